"""Tables of captioned images as rows and refusals."""

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_moca.chat_moca import PLACEHOLDER

from .cpt_images import Refusal, RefusedError, check_image, find_image
from .cpt_rows import ESCAPED_PLACEHOLDER, Row

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_ROWS_A_TIME = 64


def check_table(path, config):
    """Refuse a table that is none, or that lacks a column, before anything is written.

    Args:
        path (`str`): the file.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): names the columns.

    Raises:
        ValueError: there is no such file, its format is another one, or a column is missing.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no table {path!r}.")
    format = FORMATS.get(os.path.splitext(path)[1].lower())
    if format is None:
        raise ValueError(f"{path!r} is no table: allowed are {sorted(FORMATS)}.")
    if format == "csv":
        with _open(path) as file:
            columns = next(csv.reader(file), [])
    elif format == "parquet":
        columns = _parquet(path).schema_arrow.names
    else:
        # Rows of JSONL may differ in their columns.
        return
    for name in ("image_column", "caption_column"):
        if getattr(config, name) not in columns:
            raise ValueError(f"{path!r} has no column {getattr(config, name)!r} ({name}); its columns are {columns}.")


def read_table(path, config, start, chosen):
    """Yield what becomes of every row of a table: the image, and its caption behind it.

    Args:
        path (`str`): the file.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): the settings.
        start (`int`): rows that are passed over.
        chosen (`Callable`): tells by an image's path or bytes whether it is in this split.

    Yields:
        [`hub_cards.cpt_rows.Row`]; [`hub_cards.cpt_images.Refusal`]; or None for a row of another split.
    """
    name = os.path.basename(path)
    folder = os.path.realpath(config.image_folder or os.path.dirname(os.path.abspath(path)))
    for number, values in enumerate(_read_rows(path, config)):
        if number < start:
            continue
        place = f"{name}, row {number}"
        if isinstance(values, Refusal):
            yield _own(Refusal(values.reason, f"{place}: {values.message}"), place, chosen)
            continue
        image, caption = values
        if isinstance(image, dict) and set(image) <= {"bytes", "path"}:
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        key = image if isinstance(image, (str, bytes)) else place
        if not chosen(key):
            yield None
            continue
        try:
            yield _make(image, caption, folder, config, name, number, place)
        except RefusedError as error:
            yield error.refusal


def _own(refusal, place, chosen):
    return refusal if chosen(place) else None


def _make(image, caption, folder, config, name, number, place):
    if not isinstance(caption, str) or not caption.strip():
        raise RefusedError("empty_text", f"{place}: column {config.caption_column!r} holds no caption.")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError("bad_text", f"{place}: the caption is no valid text ({error.reason}).") from error
    if len(caption) > config.max_characters:
        raise RefusedError(
            "caption_too_long",
            f"{place}: the caption has {len(caption)} characters, more than max_characters={config.max_characters}.",
        )
    if isinstance(image, str):
        image = find_image(image, folder, folder, config, place)
    if not isinstance(image, bytes):
        raise RefusedError(
            "wrong_value",
            f"{place}: column {config.image_column!r} must hold a path, encoded bytes or a data URI, got "
            f"{type(image).__name__}.",
        )
    check_image(image, config, place)
    num_escaped = caption.count(PLACEHOLDER)
    text = PLACEHOLDER + caption.replace(PLACEHOLDER, ESCAPED_PLACEHOLDER)
    return Row(text, [image], source=name, part=number, num_escaped=num_escaped)


def _read_rows(path, config):
    """Yield image and caption of every row, or a refusal."""
    columns = (config.image_column, config.caption_column)
    format = FORMATS[os.path.splitext(path)[1].lower()]
    if format == "parquet":
        for batch in _parquet(path).iter_batches(_ROWS_A_TIME, columns=list(columns)):
            yield from zip(*(batch.column(name).to_pylist() for name in columns))
    elif format == "csv":
        yield from _read_csv(path, columns)
    else:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _read_json(line, columns)


def _read_csv(path, columns):
    # Data URIs are longer than the module's 128 KiB.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with _open(path) as file:
            for row in csv.DictReader(file):
                if None in row or None in row.values():
                    yield Refusal("bad_line", "it has not as many values as there are columns.")
                else:
                    yield row[columns[0]], row[columns[1]]
    finally:
        csv.field_size_limit(limit)


def _read_json(line, columns):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Refusal("bad_line", f"it is no JSON ({error}).")
    missing = [name for name in columns if not isinstance(row, dict) or name not in row]
    if missing:
        return Refusal("bad_line", f"it has no {missing}.")
    return row[columns[0]], row[columns[1]]


def _open(path):
    # Bytes that are no UTF-8 become a caption that is refused, instead of an end of the reading.
    return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parquet(path):
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path!r} is no Parquet file: {error}") from error


__all__ = ["FORMATS", "check_table", "read_table"]
