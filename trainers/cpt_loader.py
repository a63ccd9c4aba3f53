"""The loader of a mixture: every worker of every rank makes whole micro-batches from rows of its own."""

import json

from accelerate.utils import broadcast_object_list

from .batch_loader import RankBatches
from .cpt_batches import CostBatches
from .cpt_rows import BadRowError, PreparedRow
from .cpt_sources import interleaved


class MixtureBatches(RankBatches):
    """Encoded micro-batches of one rank, each with the state of its reader: the data set inside the loader.

    Every item is `{"inputs": dict, "data": dict}`: what [`trainers.CPTCollator.encode`] returns; and `worker`, `state`
    (JSON, after this batch), `rejected` (list of `dict`), `num_rows` (read since the last batch, bad ones included),
    `sources` (used and bad rows, as `[index of the source, "used_rows" or "skipped:<reason>"]`), `num_cut_rows`,
    `num_cut_tokens` and `cost` of this batch.

    Args:
        mixture ([`trainers.CPTMixture`]): rows.
        collator ([`trainers.CPTCollator`]): prepares and encodes rows.
        args ([`trainers.CPTConfig`]): batch size or cost, window and seed, rank and number of ranks.
        num_epochs (`float`, *optional*): the end of an indexed mixture; without end when omitted. After it, batches
            without rows follow, since other ranks may not be done.
        num_batches (`int`, defaults to 0): micro-batches that were used before.
        states (`dict`, *optional*): state of every worker to go on from.
    """

    def __init__(self, mixture, collator, args, num_epochs=None, num_batches=0, states=None):
        super().__init__(num_batches)
        self._mixture, self._collator, self._args = mixture, collator, args
        self._num_epochs, self._states = num_epochs, states

    def __iter__(self):
        worker, num_workers, _ = self.place()
        args = self._args
        reader, num_readers = args.process_index * num_workers + worker, args.world_size * num_workers
        batches = CostBatches(
            self._mixture.read(reader, num_readers, self._num_epochs), self._prepare, **batch_limits(args, reader)
        )
        if self._states is not None:
            batches.load_state_dict(json.loads(self._states[str(worker)]))
        num_read = batches.num_read
        while True:
            rows = batches.next_batch() or []
            for _, error in batches.rejected:
                self._collator.reject(error)
            inputs, undecodable = self._collator.encode([row for _, row in rows])
            rejected = batches.rejected + [(rows[index][0], error) for index, error in undecodable]
            batches.rejected = []
            yield {
                "inputs": inputs,
                "data": {
                    "worker": worker,
                    "state": json.dumps(batches.state_dict()),
                    "rejected": [_report(*bad) for bad in rejected],
                    "num_rows": batches.num_read - num_read,
                    "sources": _by_source(rows, rejected, undecodable),
                    "num_cut_rows": sum(row.num_cut_tokens > 0 for _, row in rows),
                    "num_cut_tokens": sum(row.num_cut_tokens for _, row in rows),
                    "cost": sum(row.cost for _, row in rows),
                },
            }
            num_read = batches.num_read

    def _prepare(self, row):
        prepared = self._collator.prepare(row.content, f"{row.dataset}, {row.row}", row.epoch)
        return _Measured(row, prepared, self._args.max_cost)


class _Measured(tuple):
    """A row of the mixture and its prepared form, with what batching asks for."""

    def __new__(cls, row, prepared: PreparedRow, max_cost):
        measured = super().__new__(cls, (row, prepared))
        measured.num_tokens = prepared.num_tokens
        # Without a cost to reach, a batch is a number of rows.
        measured.cost = prepared.cost if max_cost else 1
        return measured


def batch_limits(args, reader):
    """Return the arguments of [`trainers.cpt_batches.CostBatches`] that the settings decide.

    Args:
        args ([`trainers.CPTConfig`]): settings.
        reader (`int`): number of the reader.
    """
    return {
        "max_cost": args.max_cost or args.per_device_train_batch_size,
        "window": max(args.shuffle_window, args.per_device_train_batch_size),
        "seed": f"{args.seed}/{reader}",
    }


def count_steps(mixture, collator, args):
    """Return how many optimisation steps `args.num_train_epochs` take: rows are measured, and batched without reading.

    The first process measures, the others wait; `datasets` keeps the measures in its cache.

    Args:
        mixture ([`trainers.CPTMixture`]): an indexed mixture.
        collator ([`trainers.CPTCollator`]): prepares rows.
        args ([`trainers.CPTConfig`]): settings.
    """
    steps = [None]
    if args.process_index == 0:
        measures = [_measure(rows, source, collator) for source, rows in zip(mixture.sources, mixture.loaded)]
        num_workers = max(args.dataloader_num_workers, 1)
        num_readers = args.world_size * num_workers
        most = 0
        for reader in range(num_readers):
            draws = mixture.read(reader, num_readers, args.num_train_epochs).draws()
            batches = CostBatches(_Draws(draws), _lookup(measures, args.max_cost), **batch_limits(args, reader))
            number = 0
            while batches.next_batch() is not None:
                number += 1
            most = max(most, number)
        steps[0] = max(-(-most * num_workers // args.gradient_accumulation_steps), 1)
    return broadcast_object_list(steps)[0]


def _measure(rows, source, collator):
    """Return (tokens, cost) of every row of a source; a bad row is (0, 0)."""

    def measure(table):
        sizes = []
        for row in table.to_pylist():
            try:
                prepared = collator.prepare(interleaved(row, source)[0], source.label)
                sizes.append((prepared.num_tokens, prepared.cost))
            except BadRowError:
                sizes.append((0, 0))
        return {"num_tokens": [tokens for tokens, _ in sizes], "cost": [cost for _, cost in sizes]}

    names = rows.column_names
    measured = rows.map(measure, batched=True, batch_size=64, remove_columns=names, desc=f"Measuring {source.label}")
    measured = measured.with_format("numpy")
    return measured["num_tokens"][:], measured["cost"][:]


def _lookup(measures, max_cost):
    def measure(draw):
        source, _, index = draw
        tokens, cost = measures[source][0][index], measures[source][1][index]
        if not tokens:
            raise BadRowError("measured before")
        return _Draw(int(tokens), int(cost) if max_cost else 1)

    return measure


class _Draw:
    def __init__(self, num_tokens, cost):
        self.num_tokens, self.cost = num_tokens, cost


class _Draws:
    """Draws of an indexed mixture, where nobody asks for a state."""

    def __init__(self, draws):
        self._draws = draws

    def __next__(self):
        return next(self._draws)

    def state_dict(self):
        return None


def _by_source(rows, rejected, undecodable):
    bad = {index for index, _ in undecodable}
    used = [[row.source, "used_rows"] for index, (row, _) in enumerate(rows) if index not in bad]
    return used + [[row.source, f"skipped:{error.reason}"] for row, error in rejected]


def _report(row, error):
    return {"dataset": row.dataset, "row": row.row, "epoch": row.epoch, "reason": error.reason, "message": str(error)}


__all__ = ["MixtureBatches", "batch_limits", "count_steps"]
