"""The loader of contrastive training: every worker of every rank makes whole batches of its rank's share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .batch_loader import RankBatches
from .contrastive_mixture import PairMixture
from .contrastive_rows import TALLY, Pair, open_pair
from .contrastive_sampler import TaskPlan
from .row_images import BadRowError

logger = logging.getLogger(__name__)

# What is counted of a batch's rows, by data set.
COUNTS = (*TALLY, "num_rejected_rows", "num_repeated_rows")


class PairBatches(RankBatches):
    """Encoded batches of one rank, each with the state of its reader: the data set inside the loader.

    Every item is `{"inputs": dict, "data": dict}`: what the collator returns; and `worker`, `state` (JSON, after this
    batch), `rejected` (rows that turned out bad, as lines of `rejected.jsonl`) and `counts` ([T, len(COUNTS)], by data
    set).

    Args:
        make_reader: returns, for a reader's number and the number of readers, what deals its rows: `PlannedPairs` or
            `StreamedPairs`.
        collator: encodes rows: a `ContrastiveDataCollator`.
        args: on_bad_row, rank and number of ranks: a `ContrastiveConfig`.
        num_batches: batches that were used before.
        states: state of every worker to go on from.
    """

    def __init__(
        self,
        make_reader: Callable[[int, int], Any],
        collator: Callable,
        args: Any,
        num_batches: int = 0,
        states: dict[str, str] | None = None,
    ) -> None:
        super().__init__(num_batches)
        self._make_reader, self._collator, self._args, self._states = make_reader, collator, args, states

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers, number = self.place()
        reader = self._make_reader(self._args.process_index * num_workers + worker, self._args.world_size * num_workers)
        if self._states is not None:
            reader.load_state_dict(json.loads(self._states[str(worker)]))
        while True:
            task, pairs, sides = reader.batch(number)
            for _, _, error in reader.rejected:
                if self._args.on_bad_row == "raise":
                    raise error
                logger.warning("Skipped: %s", error)
            rejected = [
                {"dataset": source, "row": row, "epoch": epoch, "reason": error.reason, "message": str(error)}
                for source, (row, epoch), error in reader.rejected
            ]
            yield {
                "inputs": self._collator.encode(pairs, sides, task),
                "data": {
                    "worker": worker,
                    "state": json.dumps(reader.state_dict()),
                    "rejected": rejected,
                    "counts": reader.counts.tolist(),
                },
            }
            reader.rejected = []
            reader.counts[:] = 0
            number += num_workers


class PlannedPairs:
    """This reader's share of the batches of a `TaskPlan`. Its state is little: every batch follows from its number.

    In the place of a row whose images turn out bad comes a row that this epoch does not deal. Only when a reader has
    used its share of those up, does a row come a second time in an epoch, and is counted.

    Args:
        mixture: rows that are there as a whole.
        plan: which rows stand in which batch.
        rank: which part of every global batch is read.
        reader: which of the readers, for its share of the rows that are not dealt.
        num_readers: all workers of all ranks.
        offsets: with batches of all data sets together: where each data set begins among the plan's rows.
        processor: see `open_pair`.
    """

    def __init__(
        self,
        mixture: PairMixture,
        plan: TaskPlan,
        rank: int,
        reader: int,
        num_readers: int,
        offsets: np.ndarray | None = None,
        processor: Any = None,
    ) -> None:
        self._mixture, self._plan, self._rank, self._processor = mixture, plan, rank, processor
        self._reader, self._num_readers, self._offsets = reader, num_readers, offsets
        # Rows of a batch have equally many sides, whichever data set they are of.
        self._num_sides = 0 if offsets is None else 2 + max(source.num_negatives for source in mixture.sources)
        self._epoch, self._num_spares = 0, {}
        self.rejected: list[tuple] = []
        self.counts = np.zeros((len(mixture.sources), len(COUNTS)), dtype=int)

    def batch(self, number: int) -> tuple[str | None, list[Pair], list[list]]:
        """Return the task's name (None in batches of all data sets), this rank's pairs and their opened sides.

        Args:
            number: the batch's number over all epochs.
        """
        task, rows = self._plan.batch(number)
        epoch = number // self._plan.num_batches
        if epoch != self._epoch:
            self._epoch, self._num_spares = epoch, {}
        size = self._plan.tasks[task].batch_size
        pairs, sides = [], []
        spares = self._spares(task, number, rows)
        for row in rows[self._rank * size : (self._rank + 1) * size]:
            opened = self._open(task, int(row), epoch)
            while opened is None:
                opened = self._open(task, next(spares), epoch)
            pairs.append(opened[0])
            sides.append(opened[1] + [None] * (self._num_sides - len(opened[1])))
        return self._plan.tasks[task].name if self._offsets is None else None, pairs, sides

    def _locate(self, task: int, row: int) -> tuple[int, int]:
        """Return the data set of one of the plan's rows, and the row's index in it."""
        if self._offsets is None:
            return task, row
        source = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return source, row - int(self._offsets[source])

    def _open(self, task: int, row: int, epoch: int) -> tuple[Pair, list] | None:
        source, index = self._locate(task, row)
        try:
            pair = self._mixture.read(source, index, epoch)
            sides = open_pair(pair, self._processor)
        except BadRowError as error:
            self.rejected.append((self._mixture.tasks[source], (f"row {index}", epoch), error))
            self.counts[source, COUNTS.index("num_rejected_rows")] += 1
            return None
        self.counts[source, : len(TALLY)] += pair.tally
        return pair, sides

    def _spares(self, task: int, number: int, rows: np.ndarray) -> Iterator[int]:
        """Yield rows to take in the place of bad ones, none with the key of another row of the global batch."""
        keys = self._plan.tasks[task].keys
        taken = set() if keys is None else set(keys[rows].tolist())
        unused = self._plan.unused(task, self._epoch)[self._reader :: self._num_readers]
        while (used := self._num_spares.get(task, 0)) < len(unused):
            self._num_spares[task] = used + 1
            row = int(unused[used])
            if keys is None or keys[row] not in taken:
                taken.update([] if keys is None else [int(keys[row])])
                yield row
        in_batch = set(rows.tolist())
        for row in np.random.default_rng([self._plan.seed, number, self._reader]).permutation(
            self._plan.tasks[task].usable
        ):
            row = int(row)
            if row not in in_batch and (keys is None or keys[row] not in taken):
                taken.update([] if keys is None else [int(keys[row])])
                self.counts[self._locate(task, row)[0], COUNTS.index("num_repeated_rows")] += 1
                yield row
        raise ValueError(
            f"Task {self._plan.tasks[task].name!r} has too few good rows to fill a batch; rejected.jsonl in the output "
            "folder names the others."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what to go on from, beside the number of the next batch."""
        return {"epoch": self._epoch, "spares": [[task, used] for task, used in self._num_spares.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._epoch, self._num_spares = state["epoch"], dict(state["spares"])


__all__ = ["COUNTS", "PairBatches", "PlannedPairs"]
