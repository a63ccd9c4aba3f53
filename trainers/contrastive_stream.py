"""Streamed data sets of pairs: all ranks draw the same task for a batch, and its rows from shards of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contrastive_loader import COUNTS
from .contrastive_mixture import PairMixture
from .contrastive_rows import TALLY, Pair, make_pair, open_pair
from .row_images import BadRowError
from .row_sources import RowStream, unit_hash
from .row_window import RowWindow


class StreamedPairs:
    """One reader's rows of streamed data sets.

    - The task of a batch depends on the seed and the batch's number alone, so that ranks agree without talking.
    - Each reader (a worker of a rank) has shards of its own of every data set, holds a window of their rows, encoded,
      and takes rows from it by chance: memory is data sets x window x encoded row, a worker. A row waits for no more
      batches of its data set than the window has rows.
    - No two rows of this rank's part of a batch have the same positive; the later one waits for another batch. Between
      ranks the loss is told which positives are equal.
    - A reader whose shards come to an end begins the next pass at once, with shards dealt anew: ranks with fewer rows
      come to it sooner, and none waits or stops.

    Args:
        mixture: streamed data sets.
        batch_sizes: rows a rank and step, of each data set.
        seed: seed of tasks and orders.
        reader: which of the readers.
        num_readers: all workers of all ranks.
        alpha: where data sets have no weights: exponent of `max_rows`, which stands for their size, if all have it;
            else all are drawn alike.
        window: rows held of each data set; at least a batch.
        processor: see `open_pair`.
    """

    def __init__(
        self,
        mixture: PairMixture,
        batch_sizes: list[int],
        seed: int,
        reader: int,
        num_readers: int,
        alpha: float = 1.0,
        window: int = 256,
        processor: Any = None,
    ) -> None:
        self._mixture, self._batch_sizes, self._seed, self._processor = mixture, batch_sizes, seed, processor
        self._reader = reader
        shares = batch_shares(mixture, batch_sizes, alpha)
        self._borders = np.cumsum(shares / shares.sum())
        self._windows = []
        for number, (source, rows) in enumerate(zip(mixture.sources, mixture.loaded)):
            stream = RowStream(source, rows, reader, num_readers)
            size = max(window, batch_sizes[number])
            self._windows.append(RowWindow(stream, self._measure(source), size, f"{seed}/{reader}/{number}"))
        self.rejected: list[tuple] = []
        self.counts = np.zeros((len(mixture.sources), len(COUNTS)), dtype=int)

    def task(self, number: int) -> int:
        """Return the index of the data set that a batch is of.

        Args:
            number: the batch's number.
        """
        drawn = np.searchsorted(self._borders, unit_hash(self._seed, "task", number), side="right")
        return min(int(drawn), len(self._windows) - 1)

    def batch(self, number: int) -> tuple[str, list[Pair], list[list]]:
        """Return the task's name, this rank's pairs and their opened sides.

        Args:
            number: the batch's number.

        Raises:
            ValueError: the window holds too few different positives.
        """
        task = self.task(number)
        source, window, size = self._mixture.sources[task], self._windows[task], self._batch_sizes[task]
        pairs, sides, taken = [], [], set()
        while len(pairs) < size:
            window.fill()
            chosen = []
            for waiting in sorted(window.waiting, key=lambda waiting: waiting.turn):
                key = waiting.row.positive_hash
                if len(pairs) + len(chosen) == size:
                    break
                if source.distinct_positives and key in taken:
                    continue
                taken.add(key)
                chosen.append(waiting)
            if not chosen:
                raise ValueError(
                    f"Data set {source.task!r}: {len(window.waiting)} rows wait, but too few of them have different "
                    f"positives to fill a batch of {size}. Lower its batch_size, raise shuffle_window={window.size}, "
                    "set distinct_positives: false, or start fewer workers, so that each has more rows."
                )
            for pair in window.take(chosen):
                try:
                    opened = open_pair(pair, self._processor)
                except BadRowError as error:
                    self._reject(task, (pair.row, pair.epoch), error)
                    continue
                pairs.append(pair)
                sides.append(opened)
                self.counts[task, : len(TALLY)] += pair.tally
        for (_, row_number, epoch), error in window.rejected:
            self._reject(task, (self._row_name(row_number), epoch), error)
        window.rejected = []
        return source.task, pairs, sides

    def _row_name(self, number):
        return f"row {number} of reader {self._reader}"

    def _measure(self, source):
        return lambda item: make_pair(item[0], source, self._row_name(item[1]), item[2])

    def _reject(self, task, row, error):
        self.rejected.append((self._mixture.tasks[task], row, error))
        self.counts[task, COUNTS.index("num_rejected_rows")] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what to go on from, beside the number of the next batch."""
        return {"windows": [window.state_dict() for window in self._windows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for window, window_state in zip(self._windows, state["windows"], strict=True):
            window.load_state_dict(window_state)


def batch_shares(mixture: PairMixture, batch_sizes: list[int], alpha: float) -> np.ndarray:
    """Return how many batches of each data set are drawn, relative to each other.

    Args:
        mixture: streamed data sets.
        batch_sizes: rows of a batch, of each data set.
        alpha: see `StreamedPairs`.
    """
    weights = [source.weight for source in mixture.sources]
    caps = [source.max_rows for source in mixture.sources]
    if weights[0] is not None:
        shares = np.array(weights, dtype=float)
    elif None not in caps:
        shares = np.array(caps, dtype=float) ** alpha
    else:
        return np.ones(len(weights))
    return shares / np.array(batch_sizes)


__all__ = ["StreamedPairs", "batch_shares"]
