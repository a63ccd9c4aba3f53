"""Rows of MMEB's evaluation set: read as a stream, checked, each different input kept once; its images opened late."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_moca.chat_moca import PLACEHOLDER

from .contrastive_columns import check_path, image_path
from .mmeb_tasks import TASKS
from .row_images import BadRowError, decode_image, open_image
from .row_sources import RowSource, load_rows

# Where an image stands in the benchmark's texts.
IMAGE_MARK = "<|image_1|>"
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass
class TaskRows:
    """A task's queries and candidates, as places in the list of its different inputs.

    Args:
        inputs: pairs of text and image path (empty for none), each once, in the order in which they come.
        places: the row and column where each of them came first, for messages.
        queries: the input of each query, int64 of shape [Q].
        targets: the inputs of each query's candidates, the right one first; int32 arrays, one a query.
    """

    inputs: list[tuple[str, str]]
    places: list[str]
    queries: np.ndarray
    targets: list[np.ndarray]


def local_tasks(folder: str | Path) -> list[str]:
    """Return the tasks that a local folder has.

    Args:
        folder: has a folder a task.
    """
    return [name for name in TASKS if (Path(folder) / name).is_dir()]


def task_source(path: str, name: str, split: str, revision: str | None) -> RowSource:
    """Return where a task's rows are: a configuration of a data set on the Hub, or a sub-folder of a local one.

    Args:
        path: Hub id or folder.
        name: the task.
        split: of which rows; files of a local folder begin with it (`test-00000-of-00001.parquet`, `test.jsonl`).
        revision: of the Hub's data set.

    Raises:
        ValueError: the folder has no such files, or files of several formats.
    """
    if not Path(path).is_dir():
        return RowSource(path, name=name, split=split, revision=revision)
    folder = Path(path) / name
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return RowSource(str(folder), split=split)
    files = sorted(file for file in folder.glob(f"{split}*") if file.suffix in _FORMATS)
    formats = {_FORMATS[file.suffix] for file in files}
    if len(formats) != 1:
        raise ValueError(
            f"Task {name!r}: {folder} must have files {split}*.parquet or {split}*.jsonl, of one format; got "
            f"{[file.name for file in files]}."
        )
    return RowSource(formats.pop(), data_files=list(map(str, files)), split="train")


def read_task(path: str, name: str, split: str = "test", revision: str | None = None) -> TaskRows:
    """Read a task's rows.

    Args:
        path, name, split, revision: see [`task_source`].

    Raises:
        ValueError: a column is missing, a row is not as the benchmark's are, or there is none; the message names the
            task, the row and the column.
    """

    def check_columns(names):
        if missing := [column for column in COLUMNS if column not in names]:
            raise ValueError(f"Task {name!r} of {path} has no columns {missing}; its columns are {list(names)}.")

    rows = load_rows(task_source(path, name, split, revision), set(COLUMNS), check_columns, streaming=True)
    task = TaskRows([], [], [], [])
    known: dict[tuple[str, str], int] = {}

    def add(text, image, place):
        if (text, image) not in known:
            _check_input(text, image, place)
            known[text, image] = len(task.inputs)
            task.inputs.append((text, image))
            task.places.append(place)
        return known[text, image]

    for number, row in enumerate(rows):
        place = f"Task {name!r}, row {number}"
        # A stream of JSON may tell its columns with its rows only.
        check_columns(row)
        query, targets = _read_row(row, place)
        task.queries.append(add(*query, f"{place}, query"))
        indices = [add(*target, f"{place}, target {index}") for index, target in enumerate(targets)]
        task.targets.append(np.array(indices, dtype=np.int32))
    if not task.targets:
        raise ValueError(f"Task {name!r} of {path} has no rows.")
    task.queries = np.array(task.queries, dtype=np.int64)
    return task


def _read_row(row, place):
    """Return the query, and the candidates, as pairs of text and image path."""
    lists = [row["tgt_text"], row["tgt_img_path"]]
    for column, value in zip(COLUMNS[2:], lists):
        if not isinstance(value, list):
            raise ValueError(f"{place}, column {column!r}: must be a list, got {type(value).__name__}.")
    if len(lists[0]) != len(lists[1]):
        raise ValueError(f"{place}: has {len(lists[0])} texts of targets, but {len(lists[1])} image paths.")
    if not lists[0]:
        raise ValueError(f"{place}: has no targets.")
    query = _as_texts([row["qry_text"], row["qry_img_path"]], f"{place}, query")
    return query, [_as_texts(pair, f"{place}, target {index}") for index, pair in enumerate(zip(*lists))]


def _as_texts(pair, place):
    pair = tuple("" if value is None else value for value in pair)
    if wrong := [value for value in pair if not isinstance(value, str)]:
        raise ValueError(f"{place}: text and image path must be strings, got {type(wrong[0]).__name__}.")
    return pair


def _check_input(text, image, place):
    num_marks = text.count(IMAGE_MARK)
    if num_marks > 1:
        raise ValueError(f"{place}: an input has one image, but its text has {num_marks} times {IMAGE_MARK}.")
    if not image and not text.replace(IMAGE_MARK, "").strip():
        raise ValueError(f"{place}: holds neither text nor image.")


def split_text(text: str, image: str, strip: bool = False) -> tuple[str, str]:
    """Return the text before and behind an input's image, as the benchmark's own code places it.

    The image stands where the mark does, and first where there is none; a mark without an image is taken out.

    Args:
        text, image: one of [`TaskRows.inputs`].
        strip: leave out white space around both, as this project's stage 2 does; the authors' code keeps it.
    """
    before, mark, behind = text.partition(IMAGE_MARK)
    if not image:
        before, behind = "", before + behind
    elif not mark:
        before, behind = "", text
    return (before.strip(), behind.strip()) if strip else (before, behind)


class ImageFiles:
    """Images below a folder or in a zip file, as the benchmark ships them.

    Args:
        root: folder or zip file that paths are below; None where no row has an image.

    Raises:
        ValueError: there is neither.
    """

    def __init__(self, root: str | None) -> None:
        self._root, self._zip = root, None
        if root is not None and zipfile.is_zipfile(root):
            self._zip = zipfile.ZipFile(root)
        elif root is not None and not Path(root).is_dir():
            raise ValueError(f"image_folder={root!r} is neither a folder nor a zip file.")

    def open(self, path: str, place: str) -> tuple[Any, tuple[int, int]]:
        """Return an image as Pillow opens it, not decoded, and its height and width.

        Args:
            path: its path below the root.
            place: which row and column, for messages.

        Raises:
            BadRowError: the path leads out of the root, or there is no such image, or it cannot be opened.
        """
        check_path(path, self._root, place)
        if self._zip is None:
            content = image_path(path, self._root, place)
        else:
            try:
                content = self._zip.read(path)
            except (KeyError, zipfile.BadZipFile) as error:
                raise BadRowError("undecodable_image", f"{place}: {self._root} has no {path!r} ({error}).") from error
        image, _, size = open_image(content, f"{place}: image {path!r}")
        return image, size

    def decode(self, path: str, place: str) -> Any:
        """Return an image as RGB Pillow image.

        Args:
            path, place: see [`ImageFiles.open`].

        Raises:
            BadRowError: see [`ImageFiles.open`]; or the image is damaged.
        """
        image, size = self.open(path, place)
        return decode_image(image, size, f"{place}: image {path!r}")


def as_model_input(before: str, behind: str, image: Any = None) -> Any:
    """Return an input as sentence-transformers takes it: a text, an image, both (image first), or a chat.

    Args:
        before, behind: text around the image.
        image: a Pillow image; None for a text.
    """
    if image is None:
        return behind
    if before:
        blocks = [("text", before), ("image", image), ("text", behind)]
        return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in blocks if value != ""]}]
    return {"image": image, "text": behind} if behind else image


def as_plain_text(before: str, behind: str, has_image: bool) -> str:
    """Return an input in MoCa's plain format, for counting its tokens.

    Args:
        before, behind: text around the image.
        has_image: whether there is one.
    """
    # What a text spells is text, here too.
    before, behind = (part.replace(PLACEHOLDER, " " * 3) for part in (before, behind))
    return before + PLACEHOLDER + behind if has_image else behind


__all__ = ["COLUMNS", "IMAGE_MARK", "ImageFiles", "TaskRows", "as_model_input", "as_plain_text", "local_tasks"]
__all__ += ["read_task", "split_text", "task_source"]
