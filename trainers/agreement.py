"""Errors that one rank alone meets, raised on all: the others would wait for it."""

import torch
from accelerate.utils import gather_object


def raise_together(accelerator, error, where):
    """Raise on every rank if one of them has met an error; all ranks come here.

    Args:
        accelerator ([`~accelerate.Accelerator`]): through which ranks tell each other.
        error (`Exception` or None): what this rank has met.
        where (`str`): what was read, for the message.

    Raises:
        ValueError: with the first rank's message; in one process the error itself.
    """
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    num_errors = accelerator.reduce(torch.tensor(int(error is not None), device=accelerator.device), "sum").item()
    if num_errors:
        messages = gather_object([None if error is None else f"{where}: {type(error).__name__}: {error}"])
        raise ValueError(next(message for message in messages if message is not None)) from error


class AgreedBatches:
    """A loader whose errors are raised on all ranks; every rank has equally many batches.

    Args:
        loader ([`~torch.utils.data.DataLoader`]): what it passes on, with all attributes.
        accelerator, where: see [`raise_together`].
    """

    def __init__(self, loader, accelerator, where):
        self._loader, self._accelerator, self._where = loader, accelerator, where

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        batches, batch = iter(self._loader), True
        while batch is not None:
            error = None
            try:
                batch = next(batches, None)
            # What is raised depends on the format of an image, and on whether a worker has met it.
            except Exception as caught:
                error = caught
            raise_together(self._accelerator, error, self._where)
            if batch is not None:
                yield batch


__all__ = ["AgreedBatches", "raise_together"]
