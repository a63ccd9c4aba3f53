"""One pair with its hard negatives: checked, hashed without decoding, and opened when a worker needs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from modeling_moca.chat_moca import PLACEHOLDER

from .contrastive_columns import image_path, read_pair
from .contrastive_sources import PairSource
from .row_images import IMAGE_REASONS, BadRowError, decode_image, open_image

# What rows are rejected for.
BAD_PAIR_REASONS = (
    "empty_query",
    "empty_positive",
    "bad_list",
    "unsafe_path",
    "wrong_value",
    "does_not_fit",
    *IMAGE_REASONS,
)
# What is counted of the rows that are used.
TALLY = ("num_rows", "num_missing_negatives", "num_negatives_equal_to_positive", "num_cut_negatives")


@dataclass
class Pair:
    """A pair whose images are not opened yet.

    Args:
        source: the data set it is of.
        place: which row of it, for messages.
        row: the row's name in `rejected.jsonl`.
        epoch: pass over the data set.
        sides: query, positive and `source.num_negatives` hard negatives, each {"text", "images"}; None for a negative
            that the row does not have.
        negatives_mask: for each negative, whether the row has it and it is not equal to the positive.
        positive_hash: 64 bits of the positive's content, signed.
        negative_hashes: the same of the negatives, 0 for those that the row does not have.
        tally: numbers as in TALLY.
    """

    source: PairSource
    place: str
    row: str
    epoch: int
    sides: list[dict[str, Any] | None]
    negatives_mask: list[bool]
    positive_hash: int
    negative_hashes: list[int]
    tally: list[int]


def make_pair(row: dict[str, Any], source: PairSource, name: str, epoch: int = 0) -> Pair:
    """Check a row and hash its positive and negatives; no image is opened.

    Args:
        row: the row, undecoded.
        source: names its columns.
        name: which row it is, for messages and reports.
        epoch: pass over the data set.

    Raises:
        BadRowError: the row cannot be used; its reason is one of BAD_PAIR_REASONS.
    """
    place = f"Data set {source.task!r}, {name}"
    sides = read_pair(row, source, place)
    for side in ("query", "positive"):
        if sides[side] is None:
            raise BadRowError(f"empty_{side}", f"{place}: its {side} holds neither text nor image.")
    given = sides["negatives"][: source.num_negatives]
    negatives = given + [None] * (source.num_negatives - len(given))
    positive_hash = content_hash(sides["positive"])
    hashes = [0 if negative is None else content_hash(negative) for negative in negatives]
    mask = [negative is not None and key != positive_hash for negative, key in zip(negatives, hashes)]
    num_missing = negatives.count(None)
    num_equal = source.num_negatives - num_missing - sum(mask)
    num_cut = sum(negative is not None for negative in sides["negatives"][source.num_negatives :])
    return Pair(
        source,
        place,
        name,
        epoch,
        [sides["query"], sides["positive"], *negatives],
        mask,
        positive_hash,
        hashes,
        [1, num_missing, num_equal, num_cut],
    )


def content_hash(side: dict[str, Any]) -> int:
    """Return 64 bits of a side's content, signed: of its text, and of its images' encoded bytes, or paths.

    Args:
        side: {"text", "images"}.
    """
    digest = hashlib.blake2b(digest_size=8)
    for image in side["images"]:
        if isinstance(image, Image.Image):
            content = f"{image.mode}{image.size}".encode() + image.tobytes()
        else:
            content = image["bytes"] if image["bytes"] is not None else image["path"].encode("utf-8", "surrogatepass")
        digest.update(f"image {len(content)} ".encode())
        digest.update(content)
    digest.update(b"text " + (side["text"] or "").strip().encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big", signed=True)


def open_pair(pair: Pair, processor: Any = None) -> list[dict[str, Any] | None]:
    """Decode a pair's images, and return its sides as sentence-transformers takes them: {"image", "text"} or None.

    Args:
        pair: the pair. Of a negative that is masked nothing is opened.
        processor: a `MoCaProcessor`, which tells whether images fit; not asked when None.

    Raises:
        BadRowError: an image does not open, or does not fit.
    """
    names = ["query", "positive", *(f"negative {number}" for number in range(1, len(pair.sides) - 1))]
    wanted = [True, True, *pair.negatives_mask]
    return [
        open_side(side, pair.source, f"{pair.place}, {name}", processor) if is_wanted else None
        for side, name, is_wanted in zip(pair.sides, names, wanted)
    ]


def open_side(side: dict[str, Any], source: PairSource, place: str, processor: Any = None) -> dict[str, Any]:
    """Decode a side's images, and return it as sentence-transformers takes it: {"image", "text"}.

    Args:
        side: {"text", "images"}.
        source: the data set it is of.
        place: which side of which row, for messages.
        processor: see `open_pair`.

    Raises:
        BadRowError: an image does not open, or does not fit.
    """
    opened, sizes = [], []
    for number, image in enumerate(side["images"]):
        where = f"{place}: image {number}"
        if isinstance(image, dict) and image["bytes"] is None and source.image_folder is not None:
            image = image_path(image["path"], source.image_folder, where)
        image, _, size = open_image(image, where)
        opened.append(decode_image(image, size, where))
        sizes.append(size)
    if sizes and processor is not None:
        try:
            processor.row_ids(PLACEHOLDER * len(sizes), sizes)
        except ValueError as error:
            raise BadRowError("does_not_fit", f"{place}: {error}") from error
    result: dict[str, Any] = {}
    if opened:
        result["image"] = opened if len(opened) > 1 else opened[0]
    if side["text"] is not None:
        result["text"] = side["text"]
    return result


__all__ = ["BAD_PAIR_REASONS", "TALLY", "Pair", "content_hash", "make_pair", "open_pair", "open_side"]
