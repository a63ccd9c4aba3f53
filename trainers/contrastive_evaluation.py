"""Retrieval on dev sets while training: whether a query's right answer is found among those of all queries."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import datasets
import torch
from torch import Tensor

from .agreement import raise_together
from .contrastive_data import source_of_columns
from .contrastive_minibatches import Column, plan_mini_batches
from .contrastive_rows import content_hash, make_pair, open_side
from .evaluation import retrieval_metrics
from .row_sources import read_row, rows_of

_CUTOFF = 10
# As trackers take them: some refuse "@".
RETRIEVAL_METRICS = {f"nDCG@{_CUTOFF}": f"ndcg_at_{_CUTOFF}", "P@1": "p_at_1"}
_ROWS_AT_A_TIME = 64
# Queries whose scores of all candidates are held together.
_QUERIES_AT_A_TIME = 256
_UNSAFE = re.compile(r"[^\w./-]", re.ASCII)


class RetrievalSet:
    """Different queries and candidates of a dev set, by hash of their content; images stay encoded until they are read.

    Candidates are all positives and hard negatives, each once. What stands as the positive of a query in any row is a
    right answer of it, so that a query of several rows has several.

    Args:
        rows: columns `query`, `positive`, `negative_1`, ..., as [`ContrastiveTrainer`] takes them.
        task: what the data set is called in messages.

    Attributes:
        queries, candidates: row and number of the side where each of them is found.
        relevant: for each query, indices of the candidates that answer it.

    Raises:
        ValueError: a row is bad, since evaluation leaves none out; or there is none.

    Example:
        >>> dev_set = RetrievalSet(pages, "pages")
        >>> dev_set.read(dev_set.candidates[0])["image"].size
    """

    def __init__(self, rows: datasets.Dataset, task: str) -> None:
        if len(rows) == 0:
            raise ValueError(f"Data set {task!r} has no rows to evaluate on.")
        self.task = task
        self._source = source_of_columns(rows.column_names, task)
        self._rows = rows if rows.format["type"] == "custom" else rows.with_format("arrow")
        queries: dict[int, tuple[int, int]] = {}
        candidates: dict[int, tuple[int, int]] = {}
        answers: dict[int, set[int]] = {}
        for begin in range(0, len(rows), _ROWS_AT_A_TIME):
            for row, values in enumerate(rows_of(self._rows[begin : begin + _ROWS_AT_A_TIME]), begin):
                pair = make_pair(values, self._source, f"row {row}")
                hashes = [pair.positive_hash, *pair.negative_hashes]
                for side, key in enumerate(hashes, 1):
                    if pair.sides[side] is not None:
                        candidates.setdefault(key, (row, side))
                query = content_hash(pair.sides[0])
                queries.setdefault(query, (row, 0))
                answers.setdefault(query, set()).add(pair.positive_hash)
        self.queries, self.candidates = list(queries.values()), list(candidates.values())
        place = {key: index for index, key in enumerate(candidates)}
        self.relevant = [sorted(place[key] for key in answers[query]) for query in queries]

    def read(self, place: tuple[int, int]) -> dict[str, Any]:
        """Return a side, opened: {"text", "image"}.

        Args:
            place: row and number of the side.

        Raises:
            ValueError: an image does not open.
        """
        row, side = place
        pair = make_pair(read_row(self._rows, row), self._source, f"row {row}")
        return open_side(pair.sides[side], self._source, f"{pair.place}, side {side}")


def evaluate_retrieval(trainer: Any, dev_set: RetrievalSet) -> dict[str, float]:
    """Rank all candidates of a dev set for every query with the trainer's model, on all ranks together.

    Every rank embeds an equal share in equally many forward passes, so that ranks may share weights; mini-batches are
    those of cached gradients, cut from `per_device_eval_batch_size` inputs whose images alone are open at a time.
    Candidates take the instruction of positives.

    Args:
        trainer: a [`ContrastiveTrainer`], whose ranks all come here.
        dev_set: queries and candidates.

    Returns:
        `ndcg_at_10` and `p_at_1`, from 0 to 1, as [`trainers.evaluation.retrieval_metrics`] counts.
    """
    queries, candidates = (
        _embed(trainer, dev_set, places, column)
        for column, places in (("query", dev_set.queries), ("positive", dev_set.candidates))
    )  # [Q, d], [C, d]
    totals = dict.fromkeys(RETRIEVAL_METRICS.values(), 0.0)
    for begin in range(0, len(queries), _QUERIES_AT_A_TIME):
        relevant = dev_set.relevant[begin : begin + _QUERIES_AT_A_TIME]
        metrics = retrieval_metrics(queries[begin : begin + len(relevant)], candidates, relevant, k=_CUTOFF)
        for name, value in metrics.items():
            totals[RETRIEVAL_METRICS[name]] += value * len(relevant) / len(queries)
    return totals


def _embed(trainer, dev_set, places, column):
    """Embed inputs, equally many on every rank: [N, d] on the host."""
    args, device = trainer.args, trainer.args.device
    share = math.ceil(len(places) / args.world_size)
    # The last ranks fill up with inputs that others embed, too.
    own = [places[(args.process_index * share + number) % len(places)] for number in range(share)]
    task = dev_set.task if args.task_batches else None
    parts = []
    trainer.model.eval()
    for begin in range(0, share, args.per_device_eval_batch_size):
        error = None
        try:
            sides = [dev_set.read(place) for place in own[begin : begin + args.per_device_eval_batch_size]]
            features = Column(trainer.data_collator.encode_column(sides, column, task), f"{column} of {dev_set.task}")
        except ValueError as caught:
            error = caught
        raise_together(trainer.accelerator, error, f"Retrieval on {dev_set.task}")
        plan = plan_mini_batches([features], args.mini_batch_size, args.mini_batch_tokens, device)
        order = torch.tensor([row for _, rows in plan for row in rows])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            embeddings = [trainer.model(features.cut(rows, device))["sentence_embedding"] for _, rows in plan]
        parts.append(torch.cat(embeddings)[order.argsort().to(device)])  # [b, d]
    gathered: Tensor = trainer.accelerator.gather(torch.cat(parts))  # [W * share, d]
    return gathered[: len(places)].cpu()


def log_name(name: str) -> str:
    """Return a name as trackers take it: letters, digits and `_ - . /`; everything else becomes `_`.

    Args:
        name: name of a number in the logs.
    """
    return _UNSAFE.sub("_", name)


def check_log_names(tasks: Iterable[str]) -> None:
    """Refuse tasks that the logs could not tell apart.

    Args:
        tasks: names of data sets.

    Raises:
        ValueError: two have one name in the logs.
    """
    counts = Counter(log_name(task) for task in set(tasks))
    twice = sorted(task for task in set(tasks) if counts[log_name(task)] > 1)
    if twice:
        raise ValueError(
            f"The data sets {twice} have one name in the logs, where everything but letters, digits and '_-./' becomes "
            "'_': name them differently with `task`."
        )


__all__ = ["RETRIEVAL_METRICS", "RetrievalSet", "check_log_names", "evaluate_retrieval", "log_name"]
