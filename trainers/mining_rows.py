"""Rows of hard-negative mining: what is in them, hashed by content, and the Parquet files that stage 2 takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .contrastive_columns import image_path
from .contrastive_mixture import PairMixture
from .contrastive_rows import content_hash, make_pair
from .contrastive_sources import PairSource
from .row_images import BadRowError
from .row_sources import rows_of

_HASHED = datasets.Features(
    {name: datasets.Value("int64") for name in ("query", "positive")}
    | {name: datasets.Value("string") for name in ("reason", "message")}
)
_SIDE = pa.struct(
    [("text", pa.string()), ("image", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])))]
)
# Rows that are written at a time: pages of a megabyte and a handful of negatives stay well below a gigabyte.
_GROUP = 64


@dataclass
class HashedRows:
    """Contents of the rows of one data set.

    Args:
        rows: indices of the rows that can be used, int64 of shape [R].
        query_keys, positive_keys: hashes of their sides, int64 of shape [R] each.
        rejected: the others, as lines of `rejected.jsonl`.
    """

    rows: np.ndarray
    query_keys: np.ndarray
    positive_keys: np.ndarray
    rejected: list[dict]


def hash_rows(rows: datasets.Dataset, source: PairSource, num_proc: int | None = None) -> HashedRows:
    """Hash the sides of all rows; images by their bytes, wherever they are.

    Files are read anew each time: they may have changed since the last run, and one picture may have two paths.

    Args:
        rows: the rows, undecoded.
        source: names their columns.
        num_proc: processes that do it; one when None.
    """

    def hash_batch(batch, indices):
        found = {name: [] for name in _HASHED}
        for index, row in zip(indices, rows_of(batch)):
            entry = {"query": 0, "positive": 0, "reason": None, "message": None}
            try:
                pair = make_pair(row, source, f"row {index}")
                entry["query"] = content_hash(with_bytes(pair.sides[0], source, pair.place))
                entry["positive"] = content_hash(with_bytes(pair.sides[1], source, pair.place))
            except BadRowError as error:
                entry |= {"reason": error.reason, "message": str(error)}
            for name, value in entry.items():
                found[name].append(value)
        return found

    table = rows.map(
        hash_batch,
        batched=True,
        with_indices=True,
        batch_size=64,
        remove_columns=rows.column_names,
        features=_HASHED,
        num_proc=num_proc,
        load_from_cache_file=False,
        desc=f"Hashing {source.task}",
    ).with_format("arrow")[:]
    reasons, messages = table["reason"].to_pylist(), table["message"].to_pylist()
    good = np.array([reason is None for reason in reasons], dtype=bool)
    rejected = [rejection(source, index, reasons[index], messages[index]) for index in np.flatnonzero(~good).tolist()]
    keys = (table[name].to_numpy()[good] for name in ("query", "positive"))
    return HashedRows(np.flatnonzero(good), *keys, rejected)


def rejection(source: PairSource, index: int, reason: str, message: str) -> dict[str, Any]:
    """Return a line of `rejected.jsonl`.

    Args:
        source: the data set.
        index: which row.
        reason, message: why it cannot be used.
    """
    return {"dataset": source.task, "row": f"row {index}", "epoch": 0, "reason": reason, "message": message}


def with_bytes(side: dict[str, Any], source: PairSource, place: str) -> dict[str, Any]:
    """Return a side whose images are encoded bytes.

    Args:
        side: {"text", "images"}.
        source: the data set it is of.
        place: which row, for messages.

    Raises:
        BadRowError: a file cannot be read, or a link leads out of `image_folder`.
    """
    images = []
    for image in side["images"]:
        if image["bytes"] is None:
            path = image_path(image["path"], source.image_folder, place)
            try:
                image = {"bytes": Path(path).read_bytes(), "path": None}
            except OSError as error:
                raise BadRowError(
                    "undecodable_image", f"{place}: {image['path']!r} cannot be read ({error})."
                ) from error
        images.append(image)
    return {"text": side["text"], "images": images}


def read_side(mixture: PairMixture, source: int, index: int, column: int) -> dict[str, Any]:
    """Return a side of a row, its images as encoded bytes.

    Args:
        mixture: the data sets.
        source: which of them.
        index: which row.
        column: 0 for the query, 1 for the positive.

    Raises:
        BadRowError: it cannot be read.
    """
    pair = mixture.read(source, index)
    return with_bytes(pair.sides[column], mixture.sources[source], pair.place)


def write_rows(path: Path, rows: Iterable[list[dict[str, Any] | None]], num_negatives: int) -> None:
    """Write rows of query, positive, negative_1, ... to a Parquet file, which appears when it is whole.

    Args:
        path: the file.
        rows: the sides of each row, {"text", "images"} with encoded images, or None.
        num_negatives: negatives of each row, None included.
    """
    names = ["query", "positive", *(f"negative_{number + 1}" for number in range(num_negatives))]
    schema = pa.schema([(name, _SIDE) for name in names])
    unfinished = path.with_suffix(".unfinished")
    with pq.ParquetWriter(unfinished, schema) as writer:
        group = []
        for sides in rows:
            group.append([side and {"text": side["text"], "image": side["images"]} for side in sides])
            if len(group) == _GROUP:
                writer.write_table(_table(group, schema))
                group = []
        if group:
            writer.write_table(_table(group, schema))
    os.replace(unfinished, path)


def _table(group, schema):
    return pa.table([pa.array(column, _SIDE) for column in zip(*group)], schema=schema)


__all__ = ["HashedRows", "hash_rows", "read_side", "rejection", "with_bytes", "write_rows"]
