"""The data of contrastive fine-tuning: several data sets of pairs, checked once, and what was found."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np

from .contrastive_columns import image_path
from .contrastive_data import source_of_columns
from .contrastive_rows import TALLY, Pair, make_pair
from .contrastive_sources import PairSource
from .row_images import BadRowError
from .row_sources import check_weights, read_row, rows_of, sample_rows
from .training_record import describe_source

logger = logging.getLogger(__name__)

# Part of what `datasets` looks a result up by in its cache: to be raised when checks or hashes change.
_CHECK_VERSION = 1
_CHECKED = datasets.Features(
    {
        "key": datasets.Value("int64"),
        "reason": datasets.Value("string"),
        "message": datasets.Value("string"),
        "tally": datasets.List(datasets.Value("int64")),
    }
)


@dataclass
class CheckedRows:
    """What is known of a data set's rows before any image is opened.

    Args:
        keys: hash of each row's positive, int64 of shape [N].
        usable: indices of the rows that can be used.
        rejected: the others, as lines of `rejected.jsonl`.
        tally: sums over the usable rows, as in `trainers.contrastive_rows.TALLY`.
    """

    keys: np.ndarray
    usable: np.ndarray
    rejected: list[dict]
    tally: list[int]


class PairMixture:
    """Several data sets of pairs, for [`ContrastiveTrainer`].

    Data sets that are there as a whole are read once when this is made: every row is checked without opening its
    images, and its positive is hashed, so that a plan of all batches can keep equal positives apart. `datasets` keeps
    the result in its cache, 8 bytes and a few counts a row; two million rows are planned in seconds. Streamed ones are
    checked while they are read.

    Args:
        sources: what to mix.
        streaming: read rows while training instead of downloading the data sets first.
        seed: seed of samples (`max_rows`) and of the order of streamed rows.
        num_proc: processes that check rows; one when None.
        rows: the rows of each source, where they are loaded already.

    Raises:
        ValueError: there is no source, two have one name, some have a weight and others not, or a column is missing.

    Example:
        >>> mixture = PairMixture([PairSource("parquet", data_files="pages/*.parquet", layout="pages")])
        >>> mixture.read(0, 5).sides[0]["text"]
    """

    def __init__(
        self,
        sources: list[PairSource],
        streaming: bool = False,
        seed: int = 0,
        num_proc: int | None = None,
        rows: list[datasets.Dataset] | None = None,
    ) -> None:
        check_weights(sources)
        twice = [task for task, count in Counter(source.task for source in sources).items() if count > 1]
        if twice:
            raise ValueError(f"Two data sets have the same name: {twice}. Give them different ones with `task`.")
        self.sources, self.streaming, self.seed = list(sources), streaming, seed
        self.tasks = [source.task for source in self.sources]
        self.loaded = rows or [source.load(streaming) for source in self.sources]
        self.checked: list[CheckedRows] = []
        if not streaming:
            self.loaded = [sample_rows(rows, source, seed) for source, rows in zip(self.sources, self.loaded)]
            self.checked = [_check(rows, source, num_proc) for source, rows in zip(self.sources, self.loaded)]

    @classmethod
    def from_datasets(
        cls, by_task: Mapping[str, datasets.Dataset], seed: int = 0, distinct_positives: bool = True
    ) -> PairMixture:
        """Mix data sets with the columns `query`, `positive`, and any number of `negative_1`, `negative_2`, ...

        Args:
            by_task: a `datasets.Dataset` a task. Values: a text, an image, a dict {"text", "image"}, or None for a
                missing negative. Paths in columns of `datasets.Image` are opened wherever they lead.
            seed: see `PairMixture`.
            distinct_positives: see `PairSource`.

        Raises:
            ValueError: for missing or unknown columns, and other things than data sets that can be counted.
        """
        sources, loaded = [], []
        for task, rows in by_task.items():
            if not isinstance(rows, datasets.Dataset):
                raise ValueError(
                    f"Data set {task!r} must be a datasets.Dataset, whose rows can be counted and drawn by task, got "
                    f"{type(rows).__name__}. For streams see PairMixture."
                )
            sources.append(source_of_columns(rows.column_names, task, distinct_positives=distinct_positives))
            is_own_format = rows.format["type"] == "custom"
            loaded.append(rows if is_own_format else rows.with_format("arrow"))
        return cls(sources, seed=seed, rows=loaded)

    def __len__(self) -> int:
        """Return the number of usable rows; streams have none."""
        if self.streaming:
            raise TypeError("A streamed mixture has no length.")
        return sum(len(checked.usable) for checked in self.checked)

    @property
    def rejected(self) -> list[dict]:
        """Rows that were found bad when this was made, as lines of `rejected.jsonl`."""
        return [row for checked in self.checked for row in checked.rejected]

    def read(self, source: int, index: int, epoch: int = 0) -> Pair:
        """Return a pair of a data set that is there as a whole; no image is opened.

        Args:
            source: index of the data set.
            index: which row.
            epoch: pass over it, for reports.

        Raises:
            BadRowError: the row cannot be used.
        """
        return make_pair(read_row(self.loaded[source], index), self.sources[source], f"row {index}", epoch)

    def report(self) -> dict[str, dict]:
        """Return, by task, what was found when the rows were checked; log a line a task."""
        report = {}
        for index, source in enumerate(self.sources):
            entry = {"path": source.label, "kind": source.kind, "weight": source.weight}
            if not self.streaming:
                checked = self.checked[index]
                reasons = Counter(row["reason"] for row in checked.rejected)
                entry |= {"rows": len(self.loaded[index]), "rejected_rows": dict(sorted(reasons.items()))}
                entry |= dict(zip(TALLY[1:], checked.tally[1:]))
                entry["different_positives"] = len(np.unique(checked.keys[checked.usable]))
                logger.info("data set %s: %s", source.task, entry)
            report[source.task] = entry
        return report

    def record(self) -> list[dict]:
        """Return what the record of a run says of each data set (see `trainers.training_record.describe_source`)."""
        entries = []
        for index, source in enumerate(self.sources):
            entry = describe_source(source, None if self.streaming else len(self.loaded[index]))
            if not self.streaming:
                entry["skipped_rows"] = dict(Counter(row["reason"] for row in self.checked[index].rejected))
            entries.append(entry)
        return entries


def prompts_of(sources: list[PairSource]) -> dict[str, dict[str, str]]:
    """Return instructions by task and column, as sentence-transformers takes `prompts`.

    Args:
        sources: data sets with their instructions.
    """
    prompts = {}
    for source in sources:
        columns = {"query": source.query_instruction, "positive": source.document_instruction}
        columns |= {f"negative_{number + 1}": source.document_instruction for number in range(source.num_negatives)}
        columns = {column: text for column, text in columns.items() if text}
        if columns:
            prompts[source.task] = columns
    return prompts


def as_columns(sources: list[PairSource], seed: int = 0) -> dict[str, datasets.Dataset]:
    """Load data sets for evaluation: rows of `query`, `positive`, `negative_1`, ..., each {"text", "image"} or None.

    Args:
        sources: what to load.
        seed: seed of samples (`max_rows`).

    Raises:
        ValueError: a row is bad: evaluation leaves none out.
    """
    image = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    by_task = {}
    for source in sources:
        rows = sample_rows(source.load(streaming=False), source, seed)
        names = ["query", "positive", *(f"negative_{number + 1}" for number in range(source.num_negatives))]

        def convert(batch, indices, source=source, names=names):
            columns = {name: [] for name in names}
            for index, row in zip(indices, rows_of(batch)):
                pair = make_pair(row, source, f"row {index}")
                for name, side in zip(names, pair.sides):
                    for image in side["images"] if side else []:
                        if image["bytes"] is None:
                            image["path"] = image_path(image["path"], source.image_folder, pair.place)
                    columns[name].append(side and {"text": side["text"], "image": side["images"]})
            return columns

        features = datasets.Features({name: {"text": datasets.Value("string"), "image": image} for name in names})
        by_task[source.task] = rows.map(
            convert, batched=True, with_indices=True, batch_size=64, remove_columns=rows.column_names, features=features
        ).with_format(None)
    return by_task


def _check(rows: datasets.Dataset, source: PairSource, num_proc: int | None) -> CheckedRows:
    """Check and hash all rows of a data set."""

    def check(batch, indices):
        assert _CHECK_VERSION
        found = {name: [] for name in _CHECKED}
        for index, row in zip(indices, rows_of(batch)):
            try:
                pair = make_pair(row, source, f"row {index}")
                entry = {"key": pair.positive_hash, "reason": None, "message": None, "tally": pair.tally}
            except BadRowError as error:
                entry = {"key": 0, "reason": error.reason, "message": str(error), "tally": [0] * len(TALLY)}
            for name, value in entry.items():
                found[name].append(value)
        return found

    checked = rows.map(
        check,
        batched=True,
        with_indices=True,
        batch_size=64,
        remove_columns=rows.column_names,
        features=_CHECKED,
        num_proc=num_proc,
        desc=f"Checking {source.task}",
    ).with_format("arrow")
    table = checked[:]
    reasons = table["reason"].to_pylist()
    bad = np.array([reason is not None for reason in reasons], dtype=bool)
    messages = table["message"].take(np.flatnonzero(bad)).to_pylist()
    rejected = [
        {
            "dataset": source.task,
            "row": f"row {index}",
            "epoch": 0,
            "reason": reasons[index],
            "message": message,
        }
        for index, message in zip(np.flatnonzero(bad).tolist(), messages)
    ]
    tally = np.array(table["tally"].combine_chunks().flatten()).reshape(-1, len(TALLY)).sum(0)
    return CheckedRows(table["key"].to_numpy(), np.flatnonzero(~bad), rejected, tally.tolist())


__all__ = ["CheckedRows", "PairMixture", "as_columns", "prompts_of"]
