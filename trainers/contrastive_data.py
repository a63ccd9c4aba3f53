"""Rows of contrastive data: which columns they have, what stands in them, and how they become features."""

from __future__ import annotations

import ast
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from PIL import Image
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

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


def read_side(value: Any, where: str) -> dict[str, Any] | None:
    """Bring one side of a pair to the form {"image": image or list of images, "text": str}, either key optional.

    Args:
        value: a text, a PIL image, an undecoded `datasets.Image` ({"bytes", "path"}), a dict with the keys "text"
            and "image" (an image or a list of them), or None.
        where: the column and task, for messages.

    Returns:
        The side, or None when nothing is in it: None, blank text, and dicts of nothing else.

    Raises:
        ValueError: for any other value.
    """
    if value is None:
        return None
    if isinstance(value, str):
        # As a dict, so that a text that happens to be a URL or a path is not opened as an image.
        return {"text": value} if value.strip() else None
    if isinstance(value, Image.Image):
        return {"image": value}
    if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:
        if value.get("bytes") is None and not value.get("path"):
            return None
        source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
        with Image.open(source) as image:
            image.load()
            return {"image": image}
    if isinstance(value, dict) and value and set(value) <= {"text", "image"}:
        images = value.get("image")
        images = images if isinstance(images, (list, tuple)) else [images]
        sides = [read_side(image, where) for image in images]
        images = [side["image"] for side in sides if side is not None and "image" in side]
        side: dict[str, Any] = {}
        if images:
            side["image"] = images if len(images) > 1 else images[0]
        text = read_side(value.get("text"), where)
        return {**side, **(text or {})} or None
    given = f"a dict with the keys {sorted(map(str, value))}" if isinstance(value, dict) else type(value).__name__
    raise ValueError(
        f"{where} must be a text, an image, a dict with the keys 'text' and 'image', or None, got {given}."
    )


def convert_moca_pairs(dataset: datasets.Dataset, image_folder: str, num_negatives: int = 2) -> datasets.Dataset:
    """Bring the columns of the published pairs (`moca-embed/MoCa-CL-Pairs`, `intfloat/mmE5-synthetic`) to this form.

    Images stay files, opened batch by batch. The placeholder `<|image_1|>` goes: the image of a side stands first.

    Args:
        dataset: rows of `qry`, `qry_image_path`, `pos_text`, `pos_image_path`, `neg_text` and `neg_image_path`; the
            last two are lists, or list literals as strings. An empty path means no image.
        image_folder: folder that the paths are relative to.
        num_negatives: hard negatives to keep, the first ones of each row (paper: 2).

    Returns:
        Rows of `query`, `positive`, `negative_1`, ... `negative_<num_negatives>`, each {"text", "image"} or None.

    Raises:
        ValueError: for a missing column, or a string that is no list literal.
    """
    needed = {"qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"}
    if missing := sorted(needed - set(dataset.column_names)):
        raise ValueError(f"The published pairs need the columns {sorted(needed)}; missing: {missing}.")

    def side(text: str | None, path: str | None) -> dict[str, Any] | None:
        text = (text or "").replace("<|image_1|>", "").strip()
        if not text and not path:
            return None
        image = {"bytes": None, "path": os.path.join(image_folder, path)} if path else None
        return {"text": text, "image": image}

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        texts, paths = _read_list(row["neg_text"]), _read_list(row["neg_image_path"])
        negatives = [side(text, path) for text, path in itertools.zip_longest(texts, paths)][:num_negatives]
        negatives += [None] * (num_negatives - len(negatives))
        return {
            "query": side(row["qry"], row["qry_image_path"]),
            "positive": side(row["pos_text"], row["pos_image_path"]),
            **{f"negative_{index}": negative for index, negative in enumerate(negatives, start=1)},
        }

    columns = ["query", "positive", *(f"negative_{index}" for index in range(1, num_negatives + 1))]
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({column: {"text": datasets.Value("string"), "image": image} for column in columns})
    return dataset.map(convert, remove_columns=dataset.column_names, features=features)


def _read_list(value: str | list | None) -> list:
    """A list, or the list that a string spells; a string of anything but a list literal is an error."""
    if value is None or isinstance(value, list):
        return value or []
    try:
        items = ast.literal_eval(value) if value.strip() else []
    except (SyntaxError, ValueError):
        items = None
    if not isinstance(items, list):
        raise ValueError(f"Expected a list literal such as \"['a', 'b']\", got {value[:80]!r}.")
    return items


@dataclass
class ContrastiveDataCollator(SentenceTransformerDataCollator):
    """Rows to features: a feature dict a column, and the negatives mask [B, K] under "label".

    A hard negative that is missing, blank or equal to the row's positive is masked, so that rows may have fewer
    negatives than others. A row without query or positive is an error.

    Raises:
        ValueError: for an unknown column, an unusable value, or a row without query or positive.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            return {}
        task = features[0].get("dataset_name", "train")
        columns = order_columns(list(features[0]), task)
        rows, mask = [], []
        for feature in features:
            row = {column: read_side(feature[column], f"Column {column!r} of data set {task!r}") for column in columns}
            for column in ("query", "positive"):
                if row[column] is None:
                    raise ValueError(
                        f"Data set {task!r} has a row whose {column!r} holds neither text nor image: filter such rows "
                        f"out. The row: { {name: str(value)[:80] for name, value in feature.items()} }"
                    )
            present = [row[column] is not None and row[column] != row["positive"] for column in columns[2:]]
            for column, is_present in zip(columns[2:], present):
                if not is_present:
                    row[column] = _PLACEHOLDER
            rows.append(row if "dataset_name" not in feature else {"dataset_name": task, **row})
            mask.append(present)
        batch = super().__call__(rows)
        if len(columns) > 2:
            batch["label"] = torch.tensor(mask)  # [B, K]
        return batch
