"""Data sets of pairs as a YAML file declares them: layouts, column maps, instructions, kinds of batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import DatasetMixtureConfig

from .row_sources import RowSource, load_rows

KINDS = ("long_form", "multimodal", "text")
_SIDES = ("query", "positive", "negatives")
_PUBLISHED = {
    "query": {"text": "qry", "image": "qry_image_path"},
    "positive": {"text": "pos_text", "image": "pos_image_path"},
    "negatives": {"text": "neg_text", "image": "neg_image_path"},
}
# Columns of the layouts; `columns` has none, so that the entry names them.
LAYOUTS = {
    "columns": {},
    # moca-embed/MoCa-CL-Pairs, intfloat/mmE5-synthetic, intfloat/mmE5-MMEB-hardneg: lists, or list literals.
    "moca_pairs": _PUBLISHED,
    # TIGER-Lab/MMEB-train: one negative a row, often an empty string.
    "mmeb_train": _PUBLISHED,
    # ColPali's and VisRAG's training sets: a question and its page.
    "pages": {"query": {"text": "query"}, "positive": {"image": "image"}},
    # E5's text pairs.
    "text_pairs": {"query": {"text": "query"}, "positive": {"text": "positive"}, "negatives": {"text": "negatives"}},
}


@dataclass
class PairSource(RowSource):
    """One data set of contrastive pairs: what [`trainers.row_sources.RowSource`] says, its columns and its batches.

    Args:
        task (`str`, *optional*): what it is called in logs, prompts and reports; its `name`, or its path, when omitted.
        layout (`str`, defaults to `"columns"`): names the columns. `"moca_pairs"`: the authors' published pairs;
            `"mmeb_train"`; `"pages"`: `query` and `image`; `"text_pairs"`: `query`, `positive` and `negatives`;
            `"columns"`: the entry names them itself. The first two write `<|image_1|>` where an image stands: it is
            taken out, since the image of a side stands first.
        query, positive (`str` or `dict`, *optional*): columns of a side: `{"text": name, "image": name or list}`, of
            which one is enough; or one name, for a column of texts, of images, or of structs `{"text", "image"}`.
            Dotted names reach into structs. In an image column a string is a path below `image_folder`.
        negatives (`str`, `dict` or `list`, *optional*): the same for the hard negatives, where a column may hold a list
            of them; or a list of such columns, one negative each. The layout's, if the data set has them, when omitted.
        image_folder (`str`, *optional*): folder below which paths of images are. Absolute paths, `..` and links that
            lead out of it are refused.
        num_negatives (`int`, *optional*): hard negatives of a row that are used, the first ones (paper: 2). Rows may
            have fewer, also none. 2 when omitted, and 0 without a column of negatives.
        query_instruction, document_instruction (`str`, *optional*): stand before the text of queries, and of positives
            and negatives.
        kind (`str`, *optional*): `"long_form"`, `"multimodal"` or `"text"` (paper section 3.2), for logs and reports.
        batch_size (`int`, *optional*): rows a rank and step, for heavier rows; `per_device_train_batch_size` when
            omitted.
        distinct_positives (`bool`, defaults to `True`): no two rows of a batch have the same positive. `False` for data
            sets with fewer different positives than a batch has rows (classes, short answers): then the loss is told
            which positives are equal.

    Raises:
        ValueError: see `RowSource`; an unknown layout, kind or form of columns; a number out of range.

    Example:
        >>> PairSource("moca-embed/MoCa-CL-Pairs", name="visrag_ind", layout="moca_pairs", image_folder="images")
        >>> PairSource("parquet", data_files="pages/*.parquet", layout="pages", kind="long_form", batch_size=32)
    """

    # Set where a program hands over a data set of its own, in which it has put the paths itself.
    trusts_paths = False

    task: str | None = None
    layout: str = "columns"
    query: Any = None
    positive: Any = None
    negatives: Any = None
    image_folder: str | None = None
    num_negatives: int | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    kind: str | None = None
    batch_size: int | None = None
    distinct_positives: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.task = self.task or self.name or self.label
        start = f"Data set {self.task!r}"
        for name, allowed in (("layout", LAYOUTS), ("kind", KINDS)):
            value = getattr(self, name)
            if value not in allowed and not (name == "kind" and value is None):
                raise ValueError(f"{start}: {name} must be one of {list(allowed)}, got {value!r}.")
        self.has_own_negatives = self.negatives is not None
        for side in _SIDES:
            if getattr(self, side) is None:
                setattr(self, side, LAYOUTS[self.layout].get(side))
        for side in ("query", "positive"):
            if getattr(self, side) is None:
                raise ValueError(f"{start}: name the column of its {side}, or choose a layout of {list(LAYOUTS)}.")
        groups = self.negatives if isinstance(self.negatives, list) else [self.negatives]
        for side, columns in [("query", self.query), ("positive", self.positive), *(("negatives", g) for g in groups)]:
            is_map = isinstance(columns, dict) and columns and set(columns) <= {"text", "image"}
            if not (is_map or isinstance(columns, str) or (columns is None and side == "negatives")):
                raise ValueError(
                    f"{start}: {side} must be a column name or a mapping of 'text' and 'image' to columns, got "
                    f"{columns!r}."
                )
        if self.num_negatives is None:
            self.num_negatives = 0 if self.negatives is None else 2
        if self.num_negatives < 0:
            raise ValueError(f"{start}: num_negatives must be at least 0, got {self.num_negatives}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"{start}: batch_size must be at least 1, got {self.batch_size}.")

    @property
    def column_names(self):
        """Names of the columns that are read, by side (`dict[str, list[str]]`)."""
        groups = self.negatives if isinstance(self.negatives, list) else [self.negatives]
        return {
            "query": _names(self.query),
            "positive": _names(self.positive),
            "negatives": sum(map(_names, groups), []),
        }

    def check_columns(self, names):
        """Refuse a data set that lacks a column; negatives that only the layout names may be missing.

        Args:
            names (`Iterable[str]`): columns that it has.

        Raises:
            ValueError: a column is missing.
        """
        for side, columns in self.column_names.items():
            missing = [column for column in columns if column.split(".")[0] not in names]
            if missing and side == "negatives" and not self.has_own_negatives:
                continue
            if missing:
                raise ValueError(
                    f"Data set {self.task!r} has no column {missing[0]!r} for its {side}; its columns are "
                    f"{list(names)}. Name the right one, or choose another layout."
                )

    def load(self, streaming):
        """Return its rows, undecoded: see [`trainers.row_sources.load_rows`].

        Args:
            streaming (`bool`): read rows when they are asked for.
        """
        needed = {column.split(".")[0] for columns in self.column_names.values() for column in columns}
        return load_rows(self, needed, self.check_columns, streaming)


@dataclass
class PairMixtureConfig(DatasetMixtureConfig):
    """The data of stage 2 as sections of a YAML file: [`trl.DatasetMixtureConfig`] with entries of [`PairSource`].

    Args:
        datasets (`list[PairSource]`): data sets to train on.
        eval_datasets (`list[PairSource]`, *optional*): dev sets: their loss, and retrieval among their rows.
    """

    datasets: list[PairSource] = field(
        default_factory=list,
        metadata={"help": "Data sets to train on; see trainers.contrastive_sources.PairSource."},
    )
    eval_datasets: list[PairSource] = field(
        default_factory=list, metadata={"help": "Dev sets, for loss and retrieval; entries as in `datasets`."}
    )

    def __post_init__(self):
        for name in ("datasets", "eval_datasets"):
            entries = [PairSource(**entry) if isinstance(entry, dict) else entry for entry in getattr(self, name)]
            setattr(self, name, entries)


def _names(columns):
    if columns is None:
        return []
    if isinstance(columns, str):
        return [columns]
    image = columns.get("image") or []
    return [name for name in [columns.get("text"), *([image] if isinstance(image, str) else image)] if name]


__all__ = ["KINDS", "LAYOUTS", "PairMixtureConfig", "PairSource"]
