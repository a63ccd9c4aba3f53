"""Global batches of one task, a new order every epoch, no row twice, equal positives apart."""

from collections import Counter

import numpy as np
import pytest

from trainers.contrastive_sampler import OrderedBatches, TaskPlan, TaskRows

SIZES = {"captions": 53, "pages": 24, "pairs": 90}


def plan(sizes=None, batch_size=4, world_size=1, seed=0, alpha=1.0, **settings):
    tasks = [TaskRows(task, size, batch_size, **settings) for task, size in (sizes or SIZES).items()]
    return TaskPlan(tasks, world_size, seed, alpha)


def epoch_of(dealt, epoch=0):
    """Return (task, rows) of every global batch of an epoch."""
    first = epoch * dealt.num_batches
    batches = [dealt.batch(number) for number in range(first, first + dealt.num_batches)]
    return [(task, rows.tolist()) for task, rows in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_global_batch_is_one_task_and_no_row_comes_twice(world_size):
    batches = epoch_of(plan(world_size=world_size, seed=5))
    seen = Counter((task, row) for task, rows in batches for row in rows)
    assert set(seen.values()) == {1} and all(len(rows) == 4 * world_size for _, rows in batches)
    # Only the last, partial batch of a task is left out.
    counts = Counter(task for task, _ in seen)
    assert counts == {task: size - size % (4 * world_size) for task, size in enumerate(SIZES.values())}
    # Tasks are mixed over the epoch, not one after the other.
    order = [task for task, _ in batches]
    assert sum(first != second for first, second in zip(order, order[1:])) > 2


def test_order_depends_on_seed_and_epoch_only():
    assert epoch_of(plan(seed=1)) == epoch_of(plan(seed=1))
    assert epoch_of(plan(seed=1)) != epoch_of(plan(seed=2))
    first, second = (epoch_of(plan(seed=1), epoch) for epoch in (0, 1))
    assert first != second
    # Rows meet other rows, too: it is not the same batches in another order.
    as_sets = [{(task, frozenset(rows)) for task, rows in batches} for batches in (first, second)]
    assert as_sets[0].isdisjoint(as_sets[1])
    # Asked in any order, as resumed workers do.
    dealt = plan(seed=1)
    assert dealt.batch(len(first) + 1)[1].tolist() == second[1][1] and dealt.batch(0)[1].tolist() == first[0][1]


def test_global_batches_are_the_same_for_every_world_size():
    assert epoch_of(plan(batch_size=8)) == epoch_of(plan(batch_size=4, world_size=2))
    assert epoch_of(plan(batch_size=8)) == epoch_of(plan(batch_size=2, world_size=4))


def test_alpha_draws_less_from_large_tasks_and_covers_them_over_epochs():
    sizes = {"small": 8, "large": 8 * 16}
    dealt = plan(sizes, batch_size=8, alpha=0.5)
    assert dealt.batches_per_epoch == [1, 4]
    assert plan(sizes, batch_size=8, alpha=0).batches_per_epoch == [1, 1]
    assert plan(sizes, batch_size=8, alpha=1).batches_per_epoch == [1, 16]
    seen = Counter()
    for epoch in range(4):
        rows = [(task, row) for task, rows in epoch_of(dealt, epoch) for row in rows]
        assert len(set(rows)) == len(rows) == 40
        seen.update(rows)
        unused = dealt.unused(1, epoch).tolist()
        assert len(unused) == 96 and not {(1, row) for row in unused} & set(rows)
    assert all(seen[1, row] == 1 for row in range(128))  # each large row once in four epochs
    assert all(seen[0, row] == 4 for row in range(8))


def test_weights_share_out_rows_whatever_the_batch_size():
    # 3 : 1 in rows; the first one is smallest for its weight, and gives all its 60.
    tasks = [TaskRows("a", 60, 4, weight=3), TaskRows("b", 100, 2, weight=1)]
    assert TaskPlan(tasks).batches_per_epoch == [15, 10]


def test_heavier_tasks_have_smaller_batches_on_all_ranks():
    tasks = [TaskRows("text", 64, 8), TaskRows("pages", 30, 2)]
    batches = epoch_of(TaskPlan(tasks, world_size=3))
    assert {(task, len(rows)) for task, rows in batches} == {(0, 24), (1, 6)}
    assert Counter(task for task, _ in batches) == {0: 2, 1: 5}


def test_equal_positives_stand_in_different_batches_and_none_is_lost(caplog):
    keys = np.array([0] * 6 + [1] * 5 + [2] * 6 + list(range(100, 131)))  # 48 rows; 6 batches of 8 hold each key once
    for epoch in range(3):
        batches = epoch_of(plan({"answers": 48}, batch_size=8, keys=keys), epoch)
        assert all(len(set(keys[rows])) == 8 for _, rows in batches)
        assert sorted(row for _, rows in batches for row in rows) == list(range(48))
    without = epoch_of(plan({"answers": 48}, batch_size=8))
    assert any(len(set(keys[rows])) < 8 for _, rows in without)


def test_more_equal_positives_than_batches_are_left_out_and_told(caplog):
    caplog.set_level("INFO")
    keys = np.array([0] * 20 + list(range(100, 121)))  # 41 rows: at most one of the 20 a batch
    dealt = plan({"answers": 41}, batch_size=8, keys=keys)
    # Three batches hold 3 of the 20 and the 21 others; for four there would have to be 28 others.
    assert dealt.capacity == [3]
    batches = epoch_of(dealt)
    assert all(len(set(keys[rows])) == 8 for _, rows in batches) and sum(len(rows) for _, rows in batches) == 24
    line = {"rows": 41, "rows_per_epoch": 24, "last_partial_batch": 1, "equal_positives": 16, "mixture": 0}
    assert line.items() <= dealt.report()[0].items()
    assert "24 of 41 rows an epoch, in 3 batches of 8" in caplog.text
    assert "left out: 1 of a last partial batch, 16 whose positive has more rows than there are batches" in caplog.text


def test_rows_that_are_not_usable_are_not_dealt():
    usable = np.array([1, 3, 5, 7, 9, 11, 13, 15, 17])
    dealt = plan({"odd": 18}, usable=usable, keys=np.arange(18))
    rows = [row for _, rows in epoch_of(dealt) for row in rows]
    assert len(rows) == 8 and set(rows) | set(dealt.unused(0, 0).tolist()) == set(usable.tolist())


def test_evaluation_keeps_order_and_the_partial_block():
    batches = list(OrderedBatches(23, batch_size=4, world_size=2))
    assert batches[0] == [0, 1, 2, 3] and [len(batch) for batch in batches] == [4, 4, 4, 4, 3, 3]
    assert sum(batches, []) == list(range(22)) and len(OrderedBatches(23, 4, 2)) == 6
    with pytest.raises(ValueError, match="at least 3 rows, one a rank, got 2"):
        OrderedBatches(2, 4, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"tiny": 7, "pairs": 90}}, r"'tiny' has 7 rows, needed are 8 to fill .* 4 rows x 2 ranks"),
        ({"sizes": {"same": 9}, "keys": np.arange(9) % 3}, "'same' has 3 different positives, needed are 8 .*distinct"),
        ({"alpha": 1.5}, "alpha must lie between 0 .* got 1.5"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"sizes": SIZES, "batch_size": 4, "world_size": 2, **changes})
    with pytest.raises(ValueError, match="at least one task"):
        TaskPlan([])
