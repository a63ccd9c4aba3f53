"""Rows of continual pre-training: loading a mixture of sources, and measuring rows before they are decoded."""

import io

import datasets
from PIL import Image

from modeling_moca.chat_moca import PLACEHOLDER

from .cpt_rows import COLUMNS

FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "images": datasets.List(datasets.Value("binary"))},
)


def load_rows(sources, *, streaming=False, max_rows_per_source=None, seed=0):
    """Return one data set of interleaved rows made of all sources (paper section 4.1).

    Args:
        sources (`list`): descriptions as in [`trl.DatasetConfig`]: `path` (Hub id, folder, or a format such as
            `"parquet"` with `data_files`), `name`, `data_dir`, `data_files` and `split`. `text` and `images` are
            kept of their columns; a source without `images` is a source of text.
        streaming (`bool`, defaults to `False`): read rows while training instead of downloading the sources first.
            Sources then take turns at random, all alike, until each is used up; rows are shuffled within a window.
        max_rows_per_source (`int`, *optional*): sample this many rows of each source (paper: 500,000).
        seed (`int`, defaults to 0): seed of the sample and of the turns.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`: columns `text` and `images`.

    Raises:
        ValueError: no source is given, or a source has no column `text`.
    """
    if not sources:
        raise ValueError("No data set is given: `datasets` needs at least one entry with a `path`.")
    loaded = []
    for source in sources:
        rows = datasets.load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            split=source.split,
            streaming=streaming,
        )
        loaded.append(_interleaved(rows, source.path))
    if streaming:
        loaded = [rows.shuffle(seed=seed) for rows in loaded]
    if max_rows_per_source is not None:
        loaded = [_sample(rows, max_rows_per_source, seed) for rows in loaded]
    if len(loaded) == 1:
        return loaded[0]
    if streaming:
        # At random, not in turns: with fixed turns a rank could meet the same few sources all along.
        return datasets.interleave_datasets(
            loaded,
            probabilities=[1 / len(loaded)] * len(loaded),
            seed=seed,
            stopping_strategy="all_exhausted_without_replacement",
        )
    return datasets.concatenate_datasets(loaded)


def add_length(rows, processor, max_length):
    """Return the rows with a column `length`: how many tokens each has, image tokens included.

    Images are not decoded: their size is read from the header. For `train_sampling_strategy="group_by_length"`, which
    lets rows of like length share a batch and so spares padding.

    Args:
        rows (`datasets.Dataset`): columns `text` and `images`.
        processor ([`MoCaProcessor`]): tokenizer and image processor.
        max_length (`int`): tokens that a row keeps at most.

    Returns:
        `datasets.Dataset` with one more column. A row that cannot be read counts by its text.
    """

    def length(row):
        text = (row["text"] or "").replace(PLACEHOLDER, "")
        num_tokens = len(processor.tokenizer(text, split_special_tokens=True).input_ids)
        for image in row["images"] or []:
            try:
                width, height = Image.open(io.BytesIO(image)).size
            # The collator says what is wrong with the image, in one place.
            except Exception:
                continue
            num_tokens += processor.num_image_tokens(height, width)
        return {"length": min(num_tokens, max_length)}

    lengths = rows.map(length, remove_columns=rows.column_names, desc="Measuring rows")
    return rows.add_column("length", lengths["length"])


def _interleaved(rows, path):
    """Keep `text` and `images`, as string and list of bytes."""
    names = rows.column_names
    if names is None:  # a stream whose columns only its first row tells
        names = list(next(iter(rows)))
    if "text" not in names:
        raise ValueError(f"Source {path!r} has no column 'text'; its columns are {list(names)}.")
    rows = rows.select_columns([name for name in COLUMNS if name in names])
    if "images" not in names:
        return rows.map(lambda row: {"images": []}, features=FEATURES)
    if isinstance(rows, datasets.IterableDataset) and rows.features is None:
        return rows.map(_as_bytes, features=FEATURES)
    if rows.features == FEATURES:
        return rows
    images = rows.features["images"]
    if isinstance(getattr(images, "feature", None), datasets.Image):
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
        return rows.map(_as_bytes, features=FEATURES)
    return rows.cast(FEATURES)


def _as_bytes(row):
    return {"images": [image["bytes"] if isinstance(image, dict) else image for image in row["images"] or []]}


def _sample(rows, max_rows, seed):
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(max_rows)
    return rows.shuffle(seed=seed).select(range(min(max_rows, len(rows))))


__all__ = ["FEATURES", "add_length", "load_rows"]
