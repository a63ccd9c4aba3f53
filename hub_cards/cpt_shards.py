"""Parquet files of a data set for continual pre-training, as the Hub's viewer and streams like them."""

import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "images": datasets.Sequence(datasets.Image()),
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "page": datasets.Value("int32"),
        "part": datasets.Value("int32"),
    }
)
# A group is what a viewer's page or a stream reads at least, and what a reader of a stream can have for itself.
_GROUP_ROWS, _GROUP_BYTES = 100, 2**24


def row_bytes(row):
    """Return about how many bytes a row takes; images do not get smaller by compression.

    Args:
        row ([`hub_cards.cpt_rows.Row`]): the row.
    """
    return len(row.text.encode()) + sum(map(len, row.images)) + 2 * len(row.source.encode()) + 16


class ShardWriter:
    """A Parquet file with its images inside, which appears under its name when it is whole and on the disk.

    Equal rows give equal bytes.

    Args:
        path (`pathlib.Path`): the file.
    """

    def __init__(self, path):
        self.path, self.num_rows, self.num_images, self.num_bytes = path, 0, 0, 0
        self._unfinished = path.with_suffix(".unfinished")
        # Features go along as metadata; chunks cut by content let the Hub store what two versions share once.
        self._schema = FEATURES.arrow_schema
        self._writer = pq.ParquetWriter(
            self._unfinished, self._schema, write_page_index=True, use_content_defined_chunking=True
        )
        self._rows, self._group_bytes = [], 0

    def add(self, row):
        """Add a row ([`hub_cards.cpt_rows.Row`])."""
        self._rows.append(
            {
                "text": row.text,
                "images": [{"bytes": image, "path": None} for image in row.images],
                "id": f"{row.source}#{row.part}",
                "source": row.source,
                "page": row.page,
                "part": row.part,
            }
        )
        self.num_rows += 1
        self.num_images += len(row.images)
        self.num_bytes += row_bytes(row)
        self._group_bytes += row_bytes(row)
        if len(self._rows) == _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._write_group()

    def close(self):
        """Finish the file, and return what is in it."""
        self._write_group()
        self._writer.close()
        file_bytes = self._unfinished.stat().st_size
        sync(self._unfinished)
        os.replace(self._unfinished, self.path)
        sync(self.path.parent)
        return {
            "rows": self.num_rows,
            "images": self.num_images,
            "num_bytes": self.num_bytes,
            "file_bytes": file_bytes,
        }

    def abandon(self):
        """Close the file unfinished: the run stops at an error."""
        self._writer.close()
        self._unfinished.unlink()

    def _write_group(self):
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._group_bytes = [], 0


def shard_name(split, index, number):
    """Return the name of a file as the Hub shows it.

    Args:
        split (`str`): name of the split.
        index, number (`int`): which of how many.

    Example:

    ```python
    >>> shard_name("train", 0, 12)
    'train-00000-of-00012.parquet'
    ```
    """
    return f"{split}-{index:05d}-of-{number:05d}.parquet"


def sync(path):
    """Wait until a file or folder (`os.PathLike`) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["FEATURES", "ShardWriter", "row_bytes", "shard_name", "sync"]
