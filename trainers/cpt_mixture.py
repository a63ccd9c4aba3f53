"""The data of continual pre-training: several sources as one endless, reproducible sequence of interleaved rows."""

import math
from dataclasses import dataclass, field

import numpy as np
from trl import DatasetMixtureConfig

from .cpt_sources import interleaved, load_source
from .row_sources import RowSource, RowStream, check_weights, read_row, sample_rows, unit_hash


@dataclass
class DataSource(RowSource):
    """One data set of a mixture: what [`trainers.row_sources.RowSource`] says, and its columns.

    Without weights every row is drawn once an epoch, and streamed sources, whose sizes are not known, take turns at
    random, all alike. The paper uses `max_rows` = 500,000.

    Args:
        column_map (`dict`, *optional*): columns that hold `text`, `images` and, for reports, `row` (an identifier);
            by default those of the same names, and `__key__` for `row`. A dotted name reaches into a struct. A single
            image instead of a list is a captioned one: it stands before the text if the text has no placeholder.

    Raises:
        ValueError: see `RowSource`, or `column_map` has another key.
    """

    column_map: dict[str, str] | None = None

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.column_map or {}) - {"text", "images", "row"}
        if unknown:
            raise ValueError(
                f"Source {self.path!r}: column_map names {sorted(unknown)}; allowed are ['images', 'row', 'text']."
            )


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
        source (`int`): index of its source, since two may have one label.
    """

    dataset: str
    row: str
    epoch: int
    content: dict
    source: int


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
        check_weights(sources)
        self.sources, self.streaming, self.seed = list(sources), streaming, seed
        self.loaded = [load_source(source, streaming) for source in self.sources]
        if not streaming:
            self.loaded = [sample_rows(rows, source, seed) for source, rows in zip(self.sources, self.loaded)]

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
        return MixtureRow(self._mixture.sources[source].label, row or f"row {index}", epoch, content, source)

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
            RowStream(source, rows, reader, num_readers) for source, rows in zip(mixture.sources, mixture.loaded)
        ]

    def __iter__(self):
        return self

    def __next__(self):
        draw = unit_hash(self._mixture.seed, self._reader, self._num_drawn)
        self._num_drawn += 1
        chosen = min(int(np.searchsorted(self._borders, draw, side="right")), len(self._streams) - 1)
        row, number, epoch = next(self._streams[chosen])
        content, name = interleaved(row, self._mixture.sources[chosen])
        name = name or f"row {number} of reader {self._reader}"
        return MixtureRow(self._mixture.sources[chosen].label, name, epoch, content, chosen)

    def state_dict(self):
        """Return what to go on from."""
        return {"num_drawn": self._num_drawn, "streams": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state):
        """Go on from `state`."""
        self._num_drawn = state["num_drawn"]
        for stream, stream_state in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)


__all__ = ["CPTMixture", "CPTMixtureConfig", "DataSource", "MixtureRow"]
