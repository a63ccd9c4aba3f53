"""Rows of contrastive data: which columns they have, and how they become features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from .contrastive_rows import Pair, make_pair, open_pair
from .contrastive_sources import PairSource

_NEGATIVE = re.compile(r"negative_[1-9][0-9]*")
# Stands in for a hard negative that a row does not have; the loss masks its embedding.
_PLACEHOLDER = {"text": "-"}


def order_columns(column_names: Sequence[str], where: str) -> list[str]:
    """Return the columns in the order query, positive, negative_1, negative_2, ...

    Args:
        column_names: names of a data set's columns.
        where: what the data set is called in messages.

    Raises:
        ValueError: for a missing or unknown column.
    """
    negatives = sorted((name for name in column_names if _NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:]))
    unknown = sorted(set(column_names) - {"query", "positive", "dataset_name", *negatives})
    missing = [name for name in ("query", "positive") if name not in column_names]
    if unknown or missing:
        raise ValueError(
            f"Data set {where!r} has the columns {sorted(column_names)}: unknown {unknown}, missing {missing}. "
            "Allowed are 'query', 'positive' and 'negative_1', 'negative_2', ...; rename or remove the others."
        )
    return ["query", "positive", *negatives]


def source_of_columns(column_names: Sequence[str], task: str, **settings) -> PairSource:
    """Return the description of rows that a program hands over, in the columns query, positive, negative_1, ...

    Args:
        column_names: see `order_columns`.
        task: what the data set is called.
        settings: passed to `PairSource`.

    Raises:
        ValueError: for a missing or unknown column.
    """
    query, positive, *negatives = order_columns(column_names, task)
    source = PairSource(
        task, query=query, positive=positive, negatives=negatives, num_negatives=len(negatives), **settings
    )
    source.trusts_paths = True
    return source


@dataclass
class ContrastiveDataCollator(SentenceTransformerDataCollator):
    """Rows to features: a feature dict a column, and what the loss has to know of the rows under "label".

    "label" holds `positive_hash`, int64 of shape [B], and with hard negatives `negatives_mask`, booleans of shape
    [B, K], and `negative_hash`, int64 of shape [B, K]: see `trainers.contrastive_rows.Pair`. A hard negative that is
    missing, blank or equal to the row's positive is masked, so that rows may have fewer negatives than others.

    Raises:
        ValueError: for an unknown column, an unusable value, or a row without query or positive.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            return {}
        task = features[0].get("dataset_name", "train")
        source = source_of_columns(list(features[0]), task)
        pairs = [make_pair(row, source, f"row {index} of the batch") for index, row in enumerate(features)]
        return self.encode(pairs, [open_pair(pair) for pair in pairs], task if "dataset_name" in features[0] else None)

    def encode(self, pairs: list[Pair], sides: list[list], task: str | None) -> dict[str, Any]:
        """Return the batch of opened pairs.

        Args:
            pairs: rows of one data set, or of several.
            sides: their opened sides, see `trainers.contrastive_rows.open_pair`. All rows of a step, on all ranks, have
                equally many; rows with fewer negatives have None for them.
            task: name of the data set, for its prompts and the logs; None for a batch of several data sets.
        """
        num_negatives = len(sides[0]) - 2
        columns = ["query", "positive", *(f"negative_{number + 1}" for number in range(num_negatives))]
        rows = [
            dict(zip(columns, [_PLACEHOLDER if side is None else side for side in row_sides])) for row_sides in sides
        ]
        if task is not None:
            rows = [{"dataset_name": task, **row} for row in rows]
        batch = super().__call__(rows)
        batch["label"] = {"positive_hash": torch.tensor([pair.positive_hash for pair in pairs])}  # [B]
        if num_negatives:
            batch["label"]["negatives_mask"] = torch.tensor(
                [_padded(pair.negatives_mask, num_negatives, False) for pair in pairs]
            )  # [B, K]
            batch["label"]["negative_hash"] = torch.tensor(
                [_padded(pair.negative_hashes, num_negatives, 0) for pair in pairs]
            )  # [B, K]
        return batch

    def encode_column(self, sides: list[dict[str, Any]], column: str, task: str | None) -> dict[str, Any]:
        """Return the features of one column, as they are in a batch.

        Args:
            sides: opened sides, see `trainers.contrastive_rows.open_side`.
            column: "query" or "positive", whose prompt is used.
            task: see `encode`.
        """
        # Prompts go by name and place of a column.
        rows = [{"query": _PLACEHOLDER, "positive": _PLACEHOLDER, column: side} for side in sides]
        if task is not None:
            rows = [{"dataset_name": task, **row} for row in rows]
        features = super().__call__(rows)
        prefix = f"{column}_"
        return {name[len(prefix) :]: value for name, value in features.items() if name.startswith(prefix)}


def _padded(values: list, length: int, value: Any) -> list:
    return values + [value] * (length - len(values))
