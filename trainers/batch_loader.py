"""Loaders whose workers make whole batches for one rank, from rows of its own."""

import atexit
import os
import signal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class RankBatches(IterableDataset):
    """Batches of one rank: the data set inside the loader. Every worker makes each so-manieth of them.

    Args:
        num_batches (`int`): batches that were used before.
    """

    def __init__(self, num_batches=0):
        super().__init__()
        self._num_batches = num_batches
        # In shared memory, where workers see it.
        self._closing = torch.zeros((), dtype=torch.bool).share_memory_()

    def place(self):
        """Return which worker this is, as states name it, of how many; and the number of its first batch (`int`s)."""
        info = get_worker_info()
        num_workers, number = (1, 0) if info is None else (info.num_workers, info.id)
        # The loader always begins with its first worker, and the next batch is due from another one.
        first = self._num_batches + number
        return first % num_workers, num_workers, first

    def close(self):
        """Let workers end at a termination signal, which they ignore before."""
        self._closing.fill_(True)

    def ignore_termination(self, worker):
        """Leave a signal to the whole process group to the trainer, which needs its workers to save and stop.

        Args:
            worker (`int`): number of the worker that this is called in.
        """
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if self._closing else None)


def make_loader(batches, args):
    """Return the loader of [`RankBatches`]; it is not to be prepared by accelerate, which would deal it out again.

    Args:
        batches ([`RankBatches`]): the data set.
        args ([`~transformers.TrainingArguments`]): number of workers and the like.
    """
    # Python terminates the workers of a loader that is still referred to when it exits, and waits for them.
    atexit.register(batches.close)
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        worker_init_fn=batches.ignore_termination,
        # Its own, so that starting workers takes no draw from the model's generator.
        generator=torch.Generator(),
    )


def _as_it_is(batch):
    return batch


__all__ = ["RankBatches", "make_loader"]
