"""The data of continual pre-training: several sources as one endless, reproducible sequence of interleaved rows."""

import hashlib
import logging
import math
from dataclasses import dataclass, field

import numpy as np
from datasets.distributed import split_dataset_by_node
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from .cpt_sources import interleaved, load_source, read_row

logger = logging.getLogger(__name__)


@dataclass
class DataSource(DatasetConfig):
    """One data set of a mixture: what [`trl.DatasetConfig`] says, and how it takes part.

    Args:
        path, name, data_dir, data_files, split: as in [`trl.DatasetConfig`]: a Hub id, a local folder (of Parquet or
            Arrow files, or written by `save_to_disk`), or a format such as `"parquet"` or `"webdataset"` with
            `data_files`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        weight (`float`, *optional*): share of the rows drawn, relative to the other sources. All sources have one, or
            none: then every row is drawn once an epoch, and streamed sources, whose sizes are not known, take turns at
            random, all alike.
        max_rows (`int`, *optional*): use only so many rows (paper: 500,000): a random sample, or of a stream the first
            ones of every reader.
        column_map (`dict`, *optional*): columns that hold `text`, `images` and, for reports, `row` (an identifier);
            by default those of the same names, and `__key__` for `row`. A dotted name reaches into a struct. A single
            image instead of a list is a captioned one: it stands before the text if the text has no placeholder.

    Raises:
        ValueError: `columns` or `fraction` is given, a number is out of range, or `column_map` has another key.
    """

    revision: str | None = None
    weight: float | None = None
    max_rows: int | None = None
    column_map: dict[str, str] | None = None

    def __post_init__(self):
        for name, instead in (("columns", "column_map"), ("fraction", "weight")):
            if getattr(self, name) is not None:
                raise ValueError(f"Source {self.path!r}: {name} is not supported, use {instead}.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"Source {self.path!r}: weight must be above 0, got {self.weight}.")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"Source {self.path!r}: max_rows must be at least 1, got {self.max_rows}.")
        unknown = set(self.column_map or {}) - {"text", "images", "row"}
        if unknown:
            raise ValueError(
                f"Source {self.path!r}: column_map names {sorted(unknown)}; allowed are ['images', 'row', 'text']."
            )

    @property
    def label(self):
        """What the source is called in logs and reports."""
        files = self.data_files if isinstance(self.data_files, str) else None
        return ":".join(part for part in (self.path, self.name, files or self.data_dir) if part)


@dataclass
class CPTMixtureConfig(DatasetMixtureConfig):
    """The mixture as a section of a YAML file: [`trl.DatasetMixtureConfig`] with entries of [`DataSource`]."""

    datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Data sets of the mixture; see trainers.cpt_mixture.DataSource."}
    )

    def __post_init__(self):
        self.datasets = [DataSource(**source) if isinstance(source, dict) else source for source in self.datasets]


@dataclass
class MixtureRow:
    """A row and where it comes from.

    Args:
        dataset (`str`): label of its source.
        row (`str`): identifier within it.
        epoch (`int`): pass over the source.
        content (`dict`): `text` and `images`.
    """

    dataset: str
    row: str
    epoch: int
    content: dict


class CPTMixture:
    """Several sources as one data set of interleaved rows, for [`CPTTrainer`] (paper section 4.1).

    Rows are drawn in an order that depends on the seed alone, without end, epoch after epoch; each reader (a loader's
    worker on a rank) takes a part of them. Images stay encoded bytes.

    Args:
        sources (`list[DataSource]`): what to mix.
        streaming (`bool`, defaults to `False`): read rows while training instead of downloading the sources first.
        seed (`int`, defaults to 0): seed of order and samples.

    Raises:
        ValueError: there is no source, some have a weight and others not, or a source has no text column.

    Example:

    ```python
    >>> mixture = CPTMixture([DataSource("parquet", data_files="captions/*.parquet", column_map={"images": "picture"})])
    >>> next(mixture.read()).content["text"]
    ```
    """

    def __init__(self, sources, streaming=False, seed=0):
        if not sources:
            raise ValueError("No data set is given: `datasets` needs at least one entry with a `path`.")
        weighted = [source.label for source in sources if source.weight is not None]
        if weighted and len(weighted) < len(sources):
            raise ValueError(f"Either all sources have a weight, or none: only {weighted} have one.")
        self.sources, self.streaming, self.seed = list(sources), streaming, seed
        self.loaded = [load_source(source, streaming) for source in self.sources]
        if not streaming:
            for index, source in enumerate(self.sources):
                if source.max_rows is not None and source.max_rows < len(self.loaded[index]):
                    rows = self.loaded[index].shuffle(seed=seed)
                    self.loaded[index] = rows.select(range(source.max_rows))

    def __len__(self):
        """Return the number of rows drawn in one epoch; streams have none."""
        if self.streaming:
            raise TypeError("A streamed mixture has no length.")
        return sum(map(len, self.loaded))

    def read(self, reader=0, num_readers=1, num_epochs=None):
        """Return one reader's rows: an iterator with `state_dict` and `load_state_dict`.

        Args:
            reader (`int`, defaults to 0): which of the readers.
            num_readers (`int`, defaults to 1): all loader's workers of all ranks.
            num_epochs (`float`, *optional*): stop after so many epochs; without end when omitted, and for streams.
        """
        if self.streaming:
            return StreamedRows(self, reader, num_readers)
        return IndexedRows(self, reader, num_readers, num_epochs)

    def split(self, test_size):
        """Take rows out of every source for evaluation.

        Args:
            test_size (`float`): share of the rows, as in `datasets.Dataset.train_test_split`.

        Returns:
            `list`: the rows taken out, as dictionaries with `text` and `images` that are read when used.

        Raises:
            ValueError: the mixture is streamed.
        """
        if self.streaming:
            raise ValueError("test_split_size needs the whole data set: it cannot go with streaming: true.")
        held_out = []
        for index, rows in enumerate(self.loaded):
            halves = rows.train_test_split(test_size=test_size, seed=self.seed)
            self.loaded[index] = halves["train"]
            held_out.append((self.sources[index], halves["test"]))
        return _HeldOut(held_out)


class _HeldOut:
    """A sequence of rows, made when they are asked for."""

    def __init__(self, parts):
        self._parts = parts
        self._places = [(part, index) for part, (_, rows) in enumerate(parts) for index in range(len(rows))]

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        part, row = self._places[index]
        source, rows = self._parts[part]
        return interleaved(read_row(rows, row), source)[0]


class IndexedRows:
    """Rows of sources that are there as a whole: every draw is a function of its number, so the state is one number.

    Without weights an epoch holds every row once. With weights it is as long, and each source has its share of it;
    whatever the share, all rows of a source come before one of them comes again.
    """

    def __init__(self, mixture, reader, num_readers, num_epochs=None):
        self._mixture, self._step, self._position = mixture, num_readers, reader
        sizes = np.array([len(rows) for rows in mixture.loaded])
        self._length = int(sizes.sum())
        self._counts = sizes
        if mixture.sources[0].weight is not None:
            weights = np.array([source.weight for source in mixture.sources])
            # Rounded at the borders between sources, so that the counts add up.
            borders = np.round(self._length * np.cumsum(weights) / weights.sum()).astype(int)
            self._counts = np.diff(borders, prepend=0)
        self._end = None if num_epochs is None else math.ceil(num_epochs * self._length)
        self._order_epoch, self._permutations = None, {}

    def __iter__(self):
        return self

    def __next__(self):
        source, epoch, index = self._draw()
        content, row = interleaved(read_row(self._mixture.loaded[source], index), self._mixture.sources[source])
        return MixtureRow(self._mixture.sources[source].label, row or f"row {index}", epoch, content)

    def draws(self):
        """Yield source, epoch of the source and index of every row, without reading it."""
        while self._end is None or self._position < self._end:
            yield self._draw()

    def _draw(self):
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        drawn = self.locate(self._position)
        self._position += self._step
        return drawn

    def locate(self, position):
        """Return source, epoch of the source and index of a draw (`int`)."""
        epoch, offset = divmod(position, self._length)
        if epoch != self._order_epoch:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            self._order = np.random.default_rng([self._mixture.seed, epoch]).permutation(order)
            # How many draws of the same source come before, in this epoch.
            self._earlier = np.empty_like(self._order)
            for source, count in enumerate(self._counts):
                self._earlier[self._order == source] = np.arange(count)
            self._order_epoch = epoch
        source = int(self._order[offset])
        drawn = epoch * int(self._counts[source]) + int(self._earlier[offset])
        size = len(self._mixture.loaded[source])
        source_epoch, place = divmod(drawn, size)
        cached = self._permutations.get(source)
        if cached is None or cached[0] != source_epoch:
            rng = np.random.default_rng([self._mixture.seed, source_epoch, source])
            cached = self._permutations[source] = (source_epoch, rng.permutation(size))
        return source, source_epoch, int(cached[1][place])

    def state_dict(self):
        """Return what to go on from."""
        return {"position": self._position}

    def load_state_dict(self, state):
        """Go on from `state`."""
        self._position = state["position"]


class StreamedRows:
    """Rows of streamed sources: a reader has shards of its own, and draws the source of each row at random."""

    def __init__(self, mixture, reader, num_readers):
        self._mixture, self._reader, self._num_readers = mixture, reader, num_readers
        weights = np.array([source.weight or 1.0 for source in mixture.sources])
        self._borders = np.cumsum(weights / weights.sum())
        self._num_drawn = 0
        self._streams = [
            _Stream(source, rows, reader, num_readers) for source, rows in zip(mixture.sources, mixture.loaded)
        ]

    def __iter__(self):
        return self

    def __next__(self):
        draw = unit_hash(self._mixture.seed, self._reader, self._num_drawn)
        self._num_drawn += 1
        chosen = min(int(np.searchsorted(self._borders, draw, side="right")), len(self._streams) - 1)
        return next(self._streams[chosen])

    def state_dict(self):
        """Return what to go on from."""
        return {"num_drawn": self._num_drawn, "streams": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state):
        """Go on from `state`."""
        self._num_drawn = state["num_drawn"]
        for stream, stream_state in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)


class _Stream:
    """One source for one reader, epoch after epoch."""

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
        number = self._num_read
        self._num_read += 1
        content, name = interleaved(row, self._source)
        name = name or f"row {number} of reader {self._reader}"
        return MixtureRow(self._source.label, name, self._epoch, content)

    def _read(self):
        if self._max_rows is not None and self._num_read >= self._max_rows:
            return None
        batch = next(self._iterator, None)
        return None if batch is None else {name: values[0] for name, values in batch.items()}

    def state_dict(self):
        return {"epoch": self._epoch, "num_read": self._num_read, "rows": self._rows.state_dict()}

    def load_state_dict(self, state):
        self._start(state["epoch"], state["num_read"], state["rows"])


def unit_hash(*numbers):
    """Return a number in [0, 1) that depends on `numbers` alone: a random draw that needs no state."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


__all__ = ["CPTMixture", "CPTMixtureConfig", "DataSource", "MixtureRow", "unit_hash"]
