"""Global batches of one task, a new order every epoch, no row twice."""

from collections import Counter

import pytest

from trainers.contrastive_sampler import TaskBatchSampler

SIZES = {"captions": 53, "pages": 24, "pairs": 90}


def task_of(index):
    return "captions" if index < 53 else "pages" if index < 77 else "pairs"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_global_batch_is_one_task_and_no_row_comes_twice(world_size):
    sampler = TaskBatchSampler(SIZES, batch_size=4, world_size=world_size, seed=5)
    batches = list(sampler)
    assert len(batches) == len(sampler) and len(batches) % world_size == 0
    for start in range(0, len(batches), world_size):
        block = [index for batch in batches[start : start + world_size] for index in batch]
        assert len(block) == 4 * world_size
        assert len({task_of(index) for index in block}) == 1
    rows = [index for batch in batches for index in batch]
    assert len(set(rows)) == len(rows)
    counts = Counter(map(task_of, rows))
    # Only the last, partial block of a task is left out.
    assert counts == {task: size - size % (4 * world_size) for task, size in SIZES.items()}
    # Tasks are mixed over the epoch, not one after the other.
    order = [task_of(batch[0]) for batch in batches[::world_size]]
    assert sum(first != second for first, second in zip(order, order[1:])) > 2


def test_order_depends_on_seed_and_epoch_only():
    def batches(seed, epoch):
        sampler = TaskBatchSampler(SIZES, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 0) == batches(1, 0)
    assert batches(1, 0) != batches(1, 1)
    assert batches(1, 0) != batches(2, 0)
    # Rows meet other rows, too: it is not the same batches in another order.
    assert {frozenset(batch) for batch in batches(1, 0)}.isdisjoint(frozenset(batch) for batch in batches(1, 1))


def test_global_batches_are_the_same_for_every_world_size():
    def blocks(batch_size, world_size):
        rows = list(TaskBatchSampler(SIZES, batch_size, world_size, seed=2))
        return [sum(rows[start : start + world_size], []) for start in range(0, len(rows), world_size)]

    assert blocks(8, 1) == blocks(4, 2) == blocks(2, 4)


def test_alpha_draws_less_from_large_tasks_and_covers_them_over_epochs():
    sizes = {"small": 8, "large": 8 * 16}
    sampler = TaskBatchSampler(sizes, batch_size=8, alpha=0.5)
    assert sampler.blocks_per_epoch == {"small": 1, "large": 4}
    assert TaskBatchSampler(sizes, batch_size=8, alpha=0).blocks_per_epoch == {"small": 1, "large": 1}
    assert TaskBatchSampler(sizes, batch_size=8, alpha=1).blocks_per_epoch == {"small": 1, "large": 16}
    seen = Counter()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = [index for batch in sampler for index in batch]
        assert len(set(rows)) == len(rows) == 40
        seen.update(rows)
    assert all(seen[index] == 1 for index in range(8, 136))  # each large row once in four epochs
    assert all(seen[index] == 4 for index in range(8))


def test_evaluation_keeps_order_and_the_partial_block():
    batches = list(TaskBatchSampler({"eval": 23}, batch_size=4, world_size=2, shuffle=False, keep_partial=True))
    assert batches[0] == [0, 1, 2, 3] and [len(batch) for batch in batches] == [4, 4, 4, 4, 3, 3]
    assert sum(batches, []) == list(range(22))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"tiny": 7, "pairs": 90}}, r"at least 8 rows .* got \{'tiny': 7\}"),
        ({"sizes": {}}, "at least one task"),
        ({"alpha": 1.5}, "alpha must lie between 0 .* got 1.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TaskBatchSampler(**{"sizes": SIZES, "batch_size": 4, "world_size": 2, **changes})
