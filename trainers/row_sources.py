"""What the sources of both stages have in common: where rows come from, how many are used, and how they are read."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.distributed import split_dataset_by_node
from trl.scripts.utils import DatasetConfig

logger = logging.getLogger(__name__)


@dataclass
class RowSource(DatasetConfig):
    """One data set of a mixture: what [`trl.DatasetConfig`] says, and how it takes part.

    Args:
        path, name, data_dir, data_files, split: as in [`trl.DatasetConfig`]: a Hub id, a local folder (of Parquet or
            Arrow files, or written by `save_to_disk`), or a format such as `"parquet"` or `"webdataset"` with
            `data_files`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        weight (`float`, *optional*): share of the rows drawn, relative to the other sources. All sources have one, or
            none.
        max_rows (`int`, *optional*): use only so many rows: a random sample, or of a stream the first ones of every
            reader.

    Raises:
        ValueError: `columns` or `fraction` is given, or a number is out of range.
    """

    revision: str | None = None
    weight: float | None = None
    max_rows: int | None = None

    def __post_init__(self):
        for name, instead in (("columns", "column_map"), ("fraction", "weight")):
            if getattr(self, name) is not None:
                raise ValueError(f"Source {self.path!r}: {name} is not supported, use {instead}.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"Source {self.path!r}: weight must be above 0, got {self.weight}.")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"Source {self.path!r}: max_rows must be at least 1, got {self.max_rows}.")

    @property
    def label(self):
        """What the source is called in logs and reports."""
        files = self.data_files if isinstance(self.data_files, str) else None
        return ":".join(part for part in (self.path, self.name, files or self.data_dir) if part)


def check_weights(sources):
    """Refuse sources of which some have a weight and others not.

    Args:
        sources (`list[RowSource]`): all sources of a mixture.

    Raises:
        ValueError: there is no source, or they differ in that.
    """
    if not sources:
        raise ValueError("No data set is given: `datasets` needs at least one entry with a `path`.")
    weighted = [source.label for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        raise ValueError(f"Either all sources have a weight, or none: only {weighted} have one.")


def load_rows(source, columns, check_columns, streaming):
    """Load the rows of one source; its images stay encoded.

    Args:
        source ([`RowSource`]): what to load.
        columns (`set[str]`): columns that are read; others are left aside.
        check_columns (`Callable`): refuses a list of columns. It is not called where a stream of some format tells its
            columns with its first row only.
        streaming (`bool`): read rows when they are asked for.

    Returns:
        `datasets.Dataset` (of Arrow tables) or `datasets.IterableDataset` (undecoded).
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
    if rows.column_names is not None:
        check_columns(rows.column_names)
        rows = rows.select_columns([name for name in rows.column_names if name in columns])
    # Arrow tables hold encoded images; casting a column to undecoded images would write all of them anew.
    return rows.decode(False) if streaming else rows.with_format("arrow")


def sample_rows(rows, source, seed):
    """Return at most `source.max_rows` random rows of a data set that is there as a whole.

    Args:
        rows (`datasets.Dataset`): the data set.
        source ([`RowSource`]): says how many.
        seed (`int`): seed of the sample.
    """
    if source.max_rows is None or source.max_rows >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(source.max_rows))


def read_row(rows, index):
    """Return one row of a data set of [`load_rows`] that is there as a whole, its images encoded.

    Args:
        rows (`datasets.Dataset`): the data set.
        index (`int`): which row.
    """
    return rows_of(rows[index : index + 1])[0]


def rows_of(batch):
    """Return the rows of a batch of a data set.

    Args:
        batch (`pyarrow.Table` or `dict`): as tables, or as columns where the data set has a format of its own.
    """
    if isinstance(batch, dict):
        return [dict(zip(batch, values)) for values in zip(*batch.values())]
    return batch.to_pylist()


def value_at(row, column):
    """Return a value of a row, or None; a dotted name reaches into a struct.

    Args:
        row (`dict`): the row.
        column (`str`): name.
    """
    value = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class RowStream:
    """Rows of a streamed source for one reader, epoch after epoch without end: `(row, number, epoch)` each.

    Readers have shards of their own where there are enough of them, else every so-manieth row. A reader whose rows come
    to an end begins again at once: none waits for another. The state is exact.

    Args:
        source ([`RowSource`]): says how many rows to use.
        rows (`datasets.IterableDataset`): the stream.
        reader, num_readers (`int`): which of the readers: all loader's workers of all ranks.
    """

    def __init__(self, source, rows, reader, num_readers):
        self._source, self._reader, self._num_readers = source, reader, num_readers
        # More shards than files, where the format allows it: else most readers would read all and skip most.
        self._sharded = rows.reshard()
        self._max_rows = None
        if source.max_rows is not None:
            self._max_rows = source.max_rows // num_readers + (reader < source.max_rows % num_readers)
        self._start(0)

    def _start(self, epoch, num_read=0, state=None):
        self._epoch, self._num_read = epoch, num_read
        strategy = "shards" if self._sharded.num_shards >= self._num_readers else "examples"
        if strategy == "examples" and self._reader == epoch == 0:
            logger.warning(
                "Source %r has %d shards for %d readers (workers of all ranks): each of them reads all of it, and "
                "keeps its part. More files, smaller row groups or fewer workers spare that.",
                self._source.label,
                self._sharded.num_shards,
                self._num_readers,
            )
        # Anew for every epoch: a data set that was once given a state begins there again.
        self._rows = split_dataset_by_node(self._sharded, self._reader, self._num_readers, strategy=strategy)
        # Shards change their order every epoch; of a sample the same rows must come again.
        self._rows.set_epoch(epoch if self._max_rows is None else 0)
        if state is not None:
            self._rows.load_state_dict(state)
        # Not iter(self._rows): in a loader's worker it would share the rows out among workers a second time.
        self._iterator = self._rows.iter(batch_size=1)

    def __iter__(self):
        return self

    def __next__(self):
        row = self._read()
        if row is None and self._num_read:
            self._start(self._epoch + 1)
            row = self._read()
        if row is None:
            raise ValueError(
                f"Source {self._source.label!r} has no rows for reader {self._reader} of {self._num_readers}: it has "
                "fewer rows than there are readers (workers of all ranks). Set streaming: false, or fewer "
                "dataloader_num_workers."
            )
        self._num_read += 1
        return row, self._num_read - 1, self._epoch

    def _read(self):
        if self._max_rows is not None and self._num_read >= self._max_rows:
            return None
        batch = next(self._iterator, None)
        return None if batch is None else {name: values[0] for name, values in batch.items()}

    def state_dict(self):
        """Return what to go on from."""
        return {"epoch": self._epoch, "num_read": self._num_read, "rows": self._rows.state_dict()}

    def load_state_dict(self, state):
        """Go on from `state`."""
        self._start(state["epoch"], state["num_read"], state["rows"])


def unit_hash(*numbers):
    """Return a number in [0, 1) that depends on `numbers` alone: a random draw that needs no state."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


__all__ = [
    "RowSource",
    "RowStream",
    "check_weights",
    "load_rows",
    "read_row",
    "rows_of",
    "sample_rows",
    "unit_hash",
    "value_at",
]
