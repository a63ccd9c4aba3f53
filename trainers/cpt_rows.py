"""One row of continual pre-training: checked, tokenised and measured before any image is decoded."""

import hashlib
from dataclasses import dataclass

from modeling_moca.chat_moca import PLACEHOLDER

from .row_images import BadRowError, decode_image, open_image

COLUMNS = ("text", "images")
BAD_ROW_REASONS = (
    "empty_text",
    "undecodable_image",
    "placeholder_mismatch",
    "decompression_bomb",
    "aspect_ratio",
    "does_not_fit",
)


@dataclass
class PreparedRow:
    """A row that is known to fit.

    Args:
        input_ids (`list[int]`): text and image tokens, cut to the maximum length.
        images (`list[PIL.Image.Image]`): opened, but not decoded yet.
        image_sizes (`list[tuple[int, int]]`): their heights and widths.
        key (`bytes`): digest of the content; with seed and epoch it decides the row's masks.
        num_cut_tokens (`int`): text tokens that were cut from the end.
        cost (`int`): see [`row_cost`].
        place (`str`): where the row stands, for messages.
        epoch (`int`): pass over the row's data set.
    """

    input_ids: list
    images: list
    image_sizes: list
    key: bytes
    num_cut_tokens: int
    cost: int
    place: str
    epoch: int = 0

    @property
    def num_tokens(self):
        """Tokens of the row, image tokens included."""
        return len(self.input_ids)


def row_cost(num_tokens, num_image_tokens, num_images, max_length):
    """Return what a row costs to compute: `text + 4 * image tokens + 2 * images`, at most `max_length` (paper).

    Args:
        num_tokens (`int`): all tokens of the row.
        num_image_tokens (`int`): those among them that stand for patches.
        num_images (`int`): images of the row.
        max_length (`int`): most tokens that a row keeps.
    """
    return min(num_tokens - num_image_tokens + 4 * num_image_tokens + 2 * num_images, max_length)


def prepare_row(row, processor, max_length, place):
    """Check, tokenise and measure one row; image sizes come from the headers.

    Args:
        row (`dict`): `text` and, if any, `images`: see [`trainers.CPTCollator`].
        processor ([`MoCaProcessor`]): tokenizer and image processor.
        max_length (`int`): most tokens that the row keeps.
        place (`str`): where the row stands, for messages.

    Returns:
        [`PreparedRow`]

    Raises:
        BadRowError: the row cannot be used.
    """
    text, images = row["text"], list(row.get("images") or [])
    start = f"{place} ({(text or '')[:60]!r})"
    if not text or not text.strip():
        raise BadRowError("empty_text", f"{start} has no text.")
    num_placeholders = text.count(PLACEHOLDER)
    if num_placeholders != len(images):
        raise BadRowError(
            "placeholder_mismatch",
            f"{start} has {num_placeholders} image placeholders {PLACEHOLDER!r}, but {len(images)} images.",
        )
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    sizes = []
    for position, image in enumerate(images):
        images[position], content, size = open_image(image, f"{start}: image {position}")
        key.update(content)
        sizes.append(size)
    try:
        input_ids, num_cut_tokens = processor.row_ids(text, sizes, max_length)
    except ValueError as error:
        raise BadRowError("does_not_fit", f"{start}: {error}") from error
    num_image_tokens = input_ids.count(processor.image_token_id)
    cost = row_cost(len(input_ids), num_image_tokens, len(images), max_length)
    return PreparedRow(input_ids, images, sizes, key.digest(), num_cut_tokens, cost, start)


def decode_images(row, resize=None):
    """Return the images of a prepared row as RGB Pillow images, every pixel of them read.

    Args:
        row ([`PreparedRow`]): the row, which gives its images away.
        resize (`Callable`, *optional*): what becomes of each image, see [`MoCaProcessor.resize`]; left as it is when
            omitted.

    Raises:
        BadRowError: an image is truncated or damaged.
    """
    decoded = []
    for position, (image, size) in enumerate(zip(row.images, row.image_sizes)):
        image = decode_image(image, size, f"{row.place}: image {position}")
        decoded.append(image if resize is None else resize(image))
        # The pixels of the file go; those that are handed on stay.
        row.images[position] = None
    return decoded


__all__ = ["BAD_ROW_REASONS", "COLUMNS", "BadRowError", "PreparedRow", "decode_images", "prepare_row", "row_cost"]
