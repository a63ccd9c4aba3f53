"""From the columns of a data set to the sides of a pair: lists parsed, paths checked, nothing opened or run."""

from __future__ import annotations

import ast
import os
from typing import Any

from PIL import Image

from .contrastive_sources import PairSource
from .row_images import BadRowError
from .row_sources import value_at

# Longer list literals are refused before they are parsed: 2 negatives of 8,000 tokens take less.
MAX_LIST_CHARACTERS = 1_000_000
# Layouts whose texts hold a mark where the image stands.
_MARKED = ("moca_pairs", "mmeb_train")


def read_pair(row: dict[str, Any], source: PairSource, place: str) -> dict[str, Any]:
    """Return a row as `{"query": side, "positive": side, "negatives": [side, ...]}`.

    A side is `{"text": str, "images": list}` or None when nothing is in it. Images stay as they are, and paths are
    checked, but not followed.

    Args:
        row: the row, undecoded.
        source: names the columns.
        place: which row of which data set, for messages.

    Raises:
        BadRowError: a list of negatives is no list, or a path leads out of `image_folder`.
    """
    if isinstance(source.negatives, list):
        negatives = [_side(source, row, columns, place) for columns in source.negatives]
    else:
        negatives = [] if source.negatives is None else _sides(source, row, source.negatives, place)
    return {
        "query": _side(source, row, source.query, place),
        "positive": _side(source, row, source.positive, place),
        "negatives": negatives,
    }


def _side(source, row, columns, place):
    if isinstance(columns, str):
        return _value(source, value_at(row, columns), columns, place)
    text = value_at(row, columns["text"]) if columns.get("text") else None
    names = columns.get("image") or []
    names = [names] if isinstance(names, str) else names
    images = [(value_at(row, name), name) for name in names]
    return _make(source, text, images, columns.get("text"), place)


def _sides(source, row, columns, place):
    """Return the negatives of columns that hold a value or a list each."""
    if isinstance(columns, str):
        values = _list(source, value_at(row, columns), columns, place)
        return [_value(source, value, columns, place) for value in values]
    text, image = columns.get("text"), columns.get("image")
    images = [image] if isinstance(image, str) else image or []
    names = [text, *images] if text else images
    lists = [_list(source, value_at(row, name), name, place) for name in names]
    sides = []
    for index in range(max(map(len, lists))):
        values = [values[index] if index < len(values) else None for values in lists]
        texts = values[:1] if text else [None]
        sides.append(_make(source, texts[0], list(zip(values[len(values) - len(images) :], images)), text, place))
    return sides


def _list(source, value, column, place):
    if value is None:
        return []
    if isinstance(value, str) and source.layout == "moca_pairs":
        return _read_literal(value, f"{place}, column {column!r}")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _value(source, value, column, place):
    """Return the side that one value holds: a text, an image, or a struct of both."""
    if isinstance(value, dict) and set(value) <= {"text", "image"} and value:
        images = value.get("image")
        images = images if isinstance(images, (list, tuple)) else [images]
        return _make(source, value.get("text"), [(image, column) for image in images], column, place)
    if isinstance(value, str):
        return _make(source, value, [], column, place)
    return _make(source, None, [(value, column)], column, place)


def _make(source, text, images, column, place):
    if text is not None and not isinstance(text, str):
        raise BadRowError(
            "wrong_value", f"{place}, column {column!r}: a text must be a string, got {type(text).__name__}."
        )
    if text and source.layout in _MARKED:
        text = text.replace("<|image_1|>", "")
    text = text if text and text.strip() else None
    if text is not None and source.layout in _MARKED:
        text = text.strip()
    found = [_image(source, value, f"{place}, column {name!r}") for value, name in images]
    found = [image for image in found if image is not None]
    return {"text": text, "images": found} if text is not None or found else None


def _image(source, value, place):
    """Return an image as it is, with its path checked; None when there is none."""
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        if value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": None}
        value = value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        path = value if source.trusts_paths else check_path(value, source.image_folder, place)
        return {"bytes": None, "path": path}
    if isinstance(value, Image.Image):
        return value
    given = f"a dict with the keys {sorted(map(str, value))}" if isinstance(value, dict) else type(value).__name__
    raise BadRowError("wrong_value", f"{place}: an image must be encoded bytes, a path or an image, got {given}.")


def check_path(path: str, folder: str | None, place: str) -> str:
    """Return a path of a row as it is, if it spells one below a folder; nothing is looked up.

    Args:
        path: the path.
        folder: the folder, called `image_folder` in messages.
        place: which row of which data set, for messages.

    Raises:
        BadRowError: there is no folder, or the path is absolute, has `..` in it, or is none.
    """
    if folder is None:
        raise BadRowError(
            "unsafe_path", f"{place}: {path!r} is a path, but the data set has no image_folder that it is below."
        )
    if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/") or "\0" in path or "://" in path:
        raise BadRowError("unsafe_path", f"{place}: the path {path!r} is not one below image_folder={folder!r}.")
    return path


def image_path(path: str, folder: str, place: str) -> str:
    """Return where an image's file is, links followed.

    Args:
        path: its path below `folder`.
        folder: the folder, called `image_folder` in messages.
        place: which row of which data set, for messages.

    Raises:
        BadRowError: a link leads out of the folder.
    """
    root = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        raise BadRowError("unsafe_path", f"{place}: the path {path!r} leads out of image_folder={folder!r}, by a link.")
    return real


def _read_literal(value, place):
    """Return the list that a string spells; nothing in it is run."""
    if not value.strip():
        return []
    if len(value) > MAX_LIST_CHARACTERS:
        raise BadRowError(
            "bad_list", f"{place}: a list literal of {len(value)} characters, allowed are {MAX_LIST_CHARACTERS}."
        )
    try:
        items = ast.literal_eval(value)
    # Deep nesting ends in one of the last two.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        items = None
    if not isinstance(items, list) or not all(item is None or isinstance(item, str) for item in items):
        raise BadRowError(
            "bad_list", f"{place}: expected a list of strings such as \"['a', 'b']\", got {value[:80]!r}."
        )
    return items


__all__ = ["MAX_LIST_CHARACTERS", "check_path", "image_path", "read_pair"]
