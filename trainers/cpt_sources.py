"""One source of a mixture: loading it without decoding images, and bringing its rows to the interleaved layout."""

import os
from pathlib import Path

import datasets

from modeling_moca.chat_moca import PLACEHOLDER

# The columns of a row, where the source does not say otherwise.
DEFAULT_COLUMNS = {"text": "text", "images": "images", "row": "__key__"}


def load_source(source, streaming):
    """Load one source; its images stay encoded.

    Args:
        source ([`~trainers.cpt_mixture.DataSource`]): what to load.
        streaming (`bool`): read rows when they are asked for.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        ValueError: a column that is needed is missing.
    """
    folder = Path(source.path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(source.path)
        rows = rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
        if streaming:
            rows = rows.to_iterable_dataset(num_shards=max(len(rows.cache_files), 1))
    else:
        path, files = source.path, source.data_files
        if folder.is_dir() and files is None and source.data_dir is None and list(folder.glob("*.arrow")):
            path, files = "arrow", os.path.join(source.path, "*.arrow")
        rows = datasets.load_dataset(
            path,
            source.name,
            data_dir=source.data_dir,
            data_files=files,
            split=source.split,
            revision=source.revision,
            streaming=streaming,
        )
    # A stream of some formats tells its columns with its first row only: see interleaved().
    if rows.column_names is not None:
        check_columns(source, rows.column_names)
        needed = {_column(source, name).split(".")[0] for name in DEFAULT_COLUMNS}
        rows = rows.select_columns([name for name in rows.column_names if name in needed])
    # Arrow tables hold encoded images; casting a column to undecoded images would write all of them anew.
    return rows.decode(False) if streaming else rows.with_format("arrow")


def read_row(rows, index):
    """Return one row of a data set of [`load_source`] that is there as a whole, its images encoded.

    Args:
        rows (`datasets.Dataset`): the data set.
        index (`int`): which row.
    """
    return rows[index : index + 1].to_pylist()[0]


def check_columns(source, names):
    """Refuse a source that lacks its text column, or any column that its column map names.

    Args:
        source ([`~trainers.cpt_mixture.DataSource`]): the source.
        names (`Iterable[str]`): columns that it has.

    Raises:
        ValueError: a column is missing.
    """
    for name in ("text", *(source.column_map or {})):
        if _column(source, name).split(".")[0] not in names:
            raise ValueError(
                f"Source {source.label!r} has no column {_column(source, name)!r} for {name!r}; its columns are "
                f"{list(names)}. Name the right one in column_map."
            )


def interleaved(row, source):
    """Return one row in the interleaved layout, `{"text": str, "images": list}`, and its identifier or None.

    Args:
        row (`dict`): the row as the source has it.
        source ([`~trainers.cpt_mixture.DataSource`]): names its columns.

    Raises:
        ValueError: a column is missing.
    """
    check_columns(source, row)
    text, images, name = (_value(row, _column(source, column)) for column in DEFAULT_COLUMNS)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if images is not None and not isinstance(images, (list, tuple)):
        images = [images]
        # One image and its caption: the image comes first, as in the chats that backbones are trained on.
        if text and PLACEHOLDER not in text:
            text = PLACEHOLDER + text
    content = {"text": text, "images": list(images or [])}
    return content, None if name is None else str(name)


def _column(source, name):
    return (source.column_map or {}).get(name, DEFAULT_COLUMNS[name])


def _value(row, column):
    value = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


__all__ = ["check_columns", "interleaved", "load_source", "read_row"]
