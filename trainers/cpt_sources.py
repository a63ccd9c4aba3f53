"""One source of a mixture: loading it without decoding images, and bringing its rows to the interleaved layout."""

from modeling_moca.chat_moca import PLACEHOLDER

from .row_sources import load_rows, value_at

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
    needed = {_column(source, name).split(".")[0] for name in DEFAULT_COLUMNS}
    # A stream of some formats tells its columns with its first row only: see interleaved().
    return load_rows(source, needed, lambda names: check_columns(source, names), streaming)


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
    text, images, name = (value_at(row, _column(source, column)) for column in DEFAULT_COLUMNS)
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


__all__ = ["check_columns", "interleaved", "load_source"]
