"""Task-aware batches: every global batch, over all ranks, comes from one data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger(__name__)


@dataclass
class TaskRows:
    """Rows of a task that batches are dealt from.

    Args:
        name: what the task is called.
        size: number of its rows.
        batch_size: rows a rank and step.
        keys: int64 of shape [size]: rows with equal keys never share a batch (a hash of the positive); None when any
            may.
        usable: indices of the rows that are dealt; all when None.
        weight: share of the rows drawn, relative to the other tasks; None for a mixture by size.
    """

    name: str
    size: int
    batch_size: int
    keys: np.ndarray | None = None
    usable: np.ndarray | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.usable is None:
            self.usable = np.arange(self.size)


class TaskPlan:
    """Which rows stand in which global batch, for every epoch: a function of the seed, the same on every rank.

    In-batch negatives of the same task are harder than those of another (MoCa, arXiv 2506.23115, section 3.2). A row
    comes at most once an epoch, in a new order and with new neighbours every epoch. Rows with equal keys stand in
    different batches: they are dealt out in turn, which loses none unless a key has more rows than there are batches.
    With equal global batch sizes the batches are the same for any number of ranks.

    Args:
        tasks: what to deal.
        world_size: number of ranks.
        seed: seed of all orders.
        alpha: exponent of the mixture, where tasks have no weights. With n the rows of a task, an epoch takes a number
            proportional to n^alpha from it: 1 takes every row; less takes all rows of the smallest task and a part of
            the others, which moves on from epoch to epoch; 0 takes equally many from each. With weights, the task that
            is smallest for its weight gives all its rows.

    Raises:
        ValueError: for no task, a task that cannot fill one global batch, or an alpha outside [0, 1].

    Example:
        >>> plan = TaskPlan([TaskRows("captions", 100, batch_size=8), TaskRows("questions", 60, batch_size=4)], 2)
        >>> task, rows = plan.batch(0)  # 16 rows of captions, or 8 of questions: rank r takes the r-th half
    """

    def __init__(self, tasks: list[TaskRows], world_size: int = 1, seed: int = 0, alpha: float = 1.0) -> None:
        if not tasks or world_size < 1 or min(task.batch_size for task in tasks) < 1:
            raise ValueError(
                "TaskPlan needs at least one task, batch_size >= 1 and world_size >= 1, got "
                f"{[(task.name, task.batch_size) for task in tasks]} and world_size={world_size}."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (tasks alike) and 1 (rows alike), got {alpha}.")
        self.tasks, self.world_size, self.seed, self.alpha = list(tasks), world_size, seed, alpha
        self.batch_sizes = [task.batch_size * world_size for task in self.tasks]  # rows of a global batch
        self._groups = [None if task.keys is None else _Groups(task.keys[task.usable]) for task in self.tasks]
        self.capacity = []  # global batches that all rows of a task give
        for task, groups, size in zip(self.tasks, self._groups, self.batch_sizes):
            num_batches = len(task.usable) // size
            self.capacity.append(num_batches if groups is None else groups.num_batches(size, num_batches))
        self._check_capacity()
        self.batches_per_epoch = self._share_out()
        self.num_batches = sum(self.batches_per_epoch)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._passes: dict[int, tuple[int, np.ndarray]] = {}
        for entry in self.report():
            logger.info(
                "task %(task)s: %(rows_per_epoch)d of %(rows)d rows an epoch, in %(batches_per_epoch)d batches of "
                "%(batch_size)d over all ranks; left out: %(last_partial_batch)d of a last partial batch, "
                "%(equal_positives)d whose positive has more rows than there are batches, %(mixture)d by the mixture",
                entry,
            )

    def _check_capacity(self) -> None:
        for task, groups, size, capacity in zip(self.tasks, self._groups, self.batch_sizes, self.capacity):
            if capacity:
                continue
            what = f"a global batch of {task.batch_size} rows x {self.world_size} ranks"
            if len(task.usable) < size:
                raise ValueError(
                    f"Task {task.name!r} has {len(task.usable)} rows, needed are {size} to fill {what}. Lower its "
                    "batch size, or leave it out."
                )
            raise ValueError(
                f"Task {task.name!r} has {len(groups.counts)} different positives, needed are {size} to fill {what} "
                "without two equal ones. Lower its batch_size, or set distinct_positives: false."
            )

    def _share_out(self) -> list[int]:
        sizes = np.array([capacity * size for capacity, size in zip(self.capacity, self.batch_sizes)], dtype=float)
        weights = [task.weight for task in self.tasks]
        if weights[0] is None:
            shares = sizes**self.alpha * sizes.min() ** (1 - self.alpha)
        else:
            shares = np.array(weights) * (sizes / weights).min()
        return [
            min(capacity, max(1, int(share / size + 1e-9)))
            for capacity, share, size in zip(self.capacity, shares, self.batch_sizes)
        ]

    def report(self) -> list[dict[str, int | str]]:
        """Return how many rows of each task an epoch takes, and why others are left out."""
        lines = []
        for index, (task, size) in enumerate(zip(self.tasks, self.batch_sizes)):
            num_full = len(task.usable) // size * size
            num_dealt, num_used = self.capacity[index] * size, self.batches_per_epoch[index] * size
            lines.append(
                {
                    "task": task.name,
                    "rows": len(task.usable),
                    "batch_size": size,
                    "batches_per_epoch": self.batches_per_epoch[index],
                    "rows_per_epoch": num_used,
                    "last_partial_batch": len(task.usable) - num_full,
                    "equal_positives": num_full - num_dealt,
                    "mixture": num_dealt - num_used,
                }
            )
        return lines

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """Return the task and the rows of a global batch.

        Args:
            number: batches before it, over all epochs.

        Returns:
            Index of the task, and indices of its rows: rank r takes the r-th part of `batch_size` rows.
        """
        epoch, offset = divmod(number, self.num_batches)
        if epoch not in self._epochs:
            order = np.repeat(np.arange(len(self.tasks)), self.batches_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
            # How many batches of the same task come before, in this epoch.
            earlier = np.empty_like(order)
            for task, count in enumerate(self.batches_per_epoch):
                earlier[order == task] = np.arange(count)
            self._epochs = {epoch: (order, earlier)}
        order, earlier = self._epochs[epoch]
        task = int(order[offset])
        _, part, batches, _ = self._pass(task, epoch)
        return task, batches[part * self.batches_per_epoch[task] + earlier[offset]]

    def unused(self, task: int, epoch: int) -> np.ndarray:
        """Return the indices of a task's usable rows that this epoch does not deal, in a random order.

        Args:
            task: index of the task.
            epoch: which epoch.
        """
        _, part, batches, left_out = self._pass(task, epoch)
        count = self.batches_per_epoch[task]
        others = np.concatenate([batches[: part * count].ravel(), batches[(part + 1) * count :].ravel()])
        return np.concatenate([left_out, others])

    def _pass(self, task: int, epoch: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Return the pass of a task that an epoch is in, which part of it, its batches [b, B] and the rows left out.

        A pass deals every row of the task once, and lasts as many epochs as it can give batches to.
        """
        number, part = divmod(epoch, max(1, self.capacity[task] // self.batches_per_epoch[task]))
        if self._passes.get(task, (None,))[0] != number:
            # The third word keeps this stream apart from the order of batches, which is seeded by two.
            rng = np.random.default_rng([self.seed, number, task + 1])
            self._passes[task] = (number, *self._deal(task, rng))
        return number, part, *self._passes[task][1:]

    def _deal(self, task: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        usable, groups = self.tasks[task].usable, self._groups[task]
        num_batches = self.capacity[task]
        order = rng.permutation(len(usable))
        kept = np.ones(len(order), dtype=bool)
        if groups is not None:
            # Rows with equal keys side by side, and of each key no more than there are batches.
            order = order[np.argsort(rng.permutation(len(groups.counts))[groups.of_row[order]], kind="stable")]
            kept = groups.place_within(order) < num_batches
        num_surplus = int(kept.sum()) - num_batches * self.batch_sizes[task]
        kept[rng.permutation(np.flatnonzero(kept))[:num_surplus]] = False
        # Dealt in turn, as cards are: neighbours, and so equal keys, get into different batches.
        batches = usable[order[kept]].reshape(self.batch_sizes[task], num_batches).T
        return batches[rng.permutation(num_batches)], rng.permutation(usable[order[~kept]])


class _Groups:
    """Rows by key."""

    def __init__(self, keys: np.ndarray) -> None:
        _, self.of_row, self.counts = np.unique(keys, return_inverse=True, return_counts=True)

    def num_batches(self, size: int, most: int) -> int:
        """Return how many batches of `size` different keys there can be: at most `most`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if np.minimum(self.counts, middle).sum() >= middle * size:
                low = middle
            else:
                high = middle - 1
        return low

    def place_within(self, order: np.ndarray) -> np.ndarray:
        """Return how many rows of the same key stand before each, in an order with equal keys side by side."""
        ids = self.of_row[order]
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        return np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))


class OrderedBatches:
    """Batches of indices for evaluation: in order, in blocks of one batch a rank, the last block of smaller batches.

    Fewer than `world_size` rows are left out.

    Args:
        size: number of rows.
        batch_size: rows a rank and step.
        world_size: number of ranks. accelerate hands batch k to rank k % world_size.

    Raises:
        ValueError: for fewer rows than ranks.
    """

    def __init__(self, size: int, batch_size: int, world_size: int = 1) -> None:
        if size < world_size:
            raise ValueError(f"Evaluation needs at least {world_size} rows, one a rank, got {size}.")
        self.size, self.rows_per_batch, self.world_size = size, batch_size, world_size
        num_left_out = size - sum(map(len, self))
        if num_left_out:
            logger.info("%d of %d rows are left out of the evaluation: fewer than ranks", num_left_out, size)

    def __len__(self) -> int:
        """Batches over all ranks."""
        num_full, rest = divmod(self.size, self.rows_per_batch * self.world_size)
        return (num_full + (rest >= self.world_size)) * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        while self.size - start >= self.world_size:
            share = min(self.rows_per_batch, (self.size - start) // self.world_size)
            for _ in range(self.world_size):
                yield list(range(start, start + share))
                start += share
