"""Task-aware batches: every global batch, over all ranks, comes from one data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np

logger = logging.getLogger(__name__)


class TaskBatchSampler:
    """Batches of row indices into the concatenation of several tasks, in blocks of one global batch a task.

    accelerate hands batch k to rank k % world_size, so `world_size` consecutive batches are one global batch: they are
    dealt as a block, from one task. In-batch negatives of the same task are harder than those of another (MoCa,
    arXiv 2506.23115, section 3.2). A row appears at most once an epoch, the order is new every epoch and depends on
    (seed, epoch) only. With equal global batch size the blocks are the same for any world_size.

    Args:
        sizes: rows of each task by name, in the order of the concatenation.
        batch_size: rows a rank and step.
        world_size: number of ranks.
        seed: seed of all orders.
        alpha: exponent of the mixture. With n the global batches of a task, an epoch takes a number proportional to
            n^alpha from it: 1 takes every row; less takes all rows of the smallest task and a part of the others,
            which moves on from epoch to epoch; 0 takes equally many from each.
        shuffle: False keeps the order of rows and tasks.
        keep_partial: also deal the rows left over by full blocks, as a smaller block of equal batches. Fewer than
            world_size rows are still left out.

    Raises:
        ValueError: for a task that cannot fill one block, an alpha outside [0, 1], or sizes below 1.

    Example:
        >>> sampler = TaskBatchSampler({"captions": 100, "questions": 60}, batch_size=8, world_size=2)
        >>> sampler.set_epoch(1)
        >>> batches = list(sampler)  # batches 0 and 1 are of one task, 2 and 3 are, ...
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        alpha: float = 1.0,
        shuffle: bool = True,
        keep_partial: bool = False,
    ) -> None:
        if not sizes or batch_size < 1 or world_size < 1:
            raise ValueError(
                "TaskBatchSampler needs at least one task, batch_size >= 1 and world_size >= 1, got "
                f"sizes={dict(sizes)}, batch_size={batch_size}, world_size={world_size}."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (tasks alike) and 1 (rows alike), got {alpha}.")
        self.sizes = dict(sizes)
        self.rows_per_batch = batch_size
        self.world_size = world_size
        self.seed = seed
        self.alpha = alpha
        self.shuffle = shuffle
        self.keep_partial = keep_partial
        self.epoch = 0
        self.block_size = batch_size * world_size  # rows of a global batch
        smallest = world_size if keep_partial else self.block_size
        too_small = {task: size for task, size in self.sizes.items() if size < smallest}
        if too_small:
            raise ValueError(
                f"Each task needs at least {smallest} rows to fill a global batch of {batch_size} rows x {world_size} "
                f"ranks, got {too_small}. Lower the batch size, or merge or leave out these tasks."
            )
        self.blocks = {task: size // self.block_size for task, size in self.sizes.items()}
        # The task with the fewest blocks gives all of them; alpha = 1 gives every task's.
        scale = min(max(count, 1) for count in self.blocks.values()) ** (1 - alpha)
        self.blocks_per_epoch = {
            task: min(count, int(scale * count**alpha + 1e-9)) for task, count in self.blocks.items()
        }
        for task, size in self.sizes.items():
            used = sum(len(batch) for batch in self._task_batches(task, np.arange(size)))
            logger.info("task %s: %d of %d rows an epoch, %d left out", task, used, size, size - used)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, over all ranks."""
        blocks = sum(self.blocks_per_epoch.values())
        if self.keep_partial:
            blocks += sum(size % self.block_size >= self.world_size for size in self.sizes.values())
        return blocks * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        offset = 0
        blocks: list[list[list[int]]] = []  # global batches, each `world_size` lists of indices
        for task, size in self.sizes.items():
            batches = self._task_batches(task, self._task_rows(task) + offset)
            blocks += [batches[start : start + self.world_size] for start in range(0, len(batches), self.world_size)]
            offset += size
        order = np.arange(len(blocks))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(blocks))
        for index in order:
            yield from blocks[index]

    def _task_rows(self, task: str) -> np.ndarray:
        """The task's rows in this epoch's order, those of this epoch's blocks first."""
        size = self.sizes[task]
        if not self.shuffle:
            return np.arange(size)
        # A pass goes once through a permutation of the task and lasts as many epochs as it can give blocks to, so
        # that rows left out of one epoch come in a later one and none comes twice in an epoch.
        epochs_per_pass = max(1, self.blocks[task] // max(1, self.blocks_per_epoch[task]))
        task_pass, part = divmod(self.epoch, epochs_per_pass)
        task_index = list(self.sizes).index(task)
        # The third word keeps this stream apart from the order of blocks, which is seeded by two.
        rows = np.random.default_rng([self.seed, task_pass, task_index + 1]).permutation(size)
        return np.roll(rows, -part * self.blocks_per_epoch[task] * self.block_size)

    def _task_batches(self, task: str, rows: np.ndarray) -> list[list[int]]:
        """Cut this epoch's rows of one task into batches, `world_size` of them a block."""
        full = self.blocks_per_epoch[task] * self.block_size
        batches = [rows[start : start + self.rows_per_batch].tolist() for start in range(0, full, self.rows_per_batch)]
        if self.keep_partial:
            share = (self.sizes[task] % self.block_size) // self.world_size
            if share:
                batches += [
                    rows[full + rank * share : full + (rank + 1) * share].tolist() for rank in range(self.world_size)
                ]
        return batches
