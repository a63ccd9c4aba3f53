"""Images of rows: opened without decoding, checked, decoded, and the rows that fail at it."""

import io

from PIL import Image

from modeling_moca.images_moca import EXIF_ORIENTATION, to_rgb

IMAGE_REASONS = ("undecodable_image", "decompression_bomb", "aspect_ratio")
MAX_ASPECT_RATIO = 200


class BadRowError(ValueError):
    """A row that cannot be used, and why: `reason` is a word that rows are counted by."""

    def __init__(self, reason, message=None):
        # One argument is what a loader's worker re-raises it with.
        super().__init__(reason if message is None else message)
        self.reason = reason


def open_image(image, place):
    """Open an image from its header.

    Args:
        image (`bytes`, `str`, `dict` or `PIL.Image.Image`): encoded bytes, a file's path, or both as `datasets.Image`
            gives them undecoded.
        place (`str`): which image of which row, for messages.

    Returns:
        `tuple`: the Pillow image, not decoded; the bytes that tell it from others; its height and width as seen.

    Raises:
        BadRowError: the reason is one of `IMAGE_REASONS`.
    """
    try:
        opened, content, size = _open(image)
    except Image.DecompressionBombError as error:
        raise BadRowError("decompression_bomb", f"{place} is too large: {error}") from error
    # What Pillow raises depends on the format and on where the bytes are damaged.
    except Exception as error:
        raise BadRowError("undecodable_image", f"{place} cannot be decoded ({error}).") from error
    _check_size(size, place)
    return opened, content, size


def decode_image(image, size, place):
    """Return an opened image as RGB Pillow image, every pixel of it read.

    Args:
        image (`PIL.Image.Image`): what [`open_image`] returned.
        size (`tuple[int, int]`): its height and width.
        place (`str`): which image of which row, for messages.

    Raises:
        BadRowError: the image is truncated or damaged.
    """
    try:
        # Every pixel, now: a truncated file must fail here.
        image.load()
        decoded = to_rgb(image)
        if decoded.size[::-1] != size:
            raise ValueError("EXIF data behind the pixels turns it")
    except Exception as error:
        raise BadRowError("undecodable_image", f"{place} cannot be decoded ({error}).") from error
    return decoded


def _open(image):
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str):
        with open(image, "rb") as file:
            image = file.read()
    if isinstance(image, Image.Image):
        return image, image.tobytes(), _seen_size(image)
    opened = Image.open(io.BytesIO(image))
    return opened, image, _seen_size(opened)


def _seen_size(image):
    width, height = image.size
    # Not image.getexif(): for a PNG it would decode the pixels, since the data may follow them.
    turned = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _check_size(size, place):
    height, width = size
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise BadRowError(
            "decompression_bomb",
            f"{place} is too large: {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS="
            f"{Image.MAX_IMAGE_PIXELS}.",
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadRowError(
            "aspect_ratio", f"{place} of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT_RATIO}."
        )


__all__ = ["IMAGE_REASONS", "MAX_ASPECT_RATIO", "BadRowError", "decode_image", "open_image"]
