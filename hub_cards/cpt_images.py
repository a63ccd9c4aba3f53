"""Images that documents and tables refer to: found below one folder, decoded from data URIs, checked, never fetched."""

import base64
import binascii
import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

# What Pillow decodes by itself. Not EPS, for which it would start another program. MPO is opened as JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT_RATIO = 200
# Left out because the settings say so, or because there is nothing to use: no reason to distrust the data.
LEFT_OUT = ("too_small", "duplicate", "empty_page")


@dataclass
class ImageReference:
    """An image in a document: its address as written there, and its alternative text."""

    address: str
    alt: str = ""


@dataclass
class Refusal:
    """Something that is not used: `reason` is a word that refusals are counted by, `message` says where and why."""

    reason: str
    message: str


class RefusedError(ValueError):
    """Something cannot be used; `refusal` says what."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.refusal = Refusal(reason, message)


def find_image(address, root, folder, config, place):
    """Return the bytes of an image that a document or a table names.

    Args:
        address (`str`): path relative to `folder`, as in a link (`%20`, `?query`), or a data URI.
        root (`str`): folder that no path may leave, links followed.
        folder (`str`): where relative paths begin; below `root`.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): gives `max_image_bytes`.
        place (`str`): where it stands, for messages.

    Raises:
        RefusedError: `no_source`, `remote_image`, `unsafe_path`, `missing_image`, `image_too_large`, `bad_data_uri`.
    """
    address = address.strip()
    if not address:
        raise RefusedError("no_source", f"{place} has no address.")
    if address[:5].lower() == "data:":
        return _decode_data_uri(address, config.max_image_bytes, place)
    shown = f"{address[:120]!r}"
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|//", address)
    if scheme and scheme.group().lower() in ("http:", "https:", "//", "ftp:"):
        raise RefusedError("remote_image", f"{place}: {shown} is on the network, and nothing is fetched.")
    if scheme:
        raise RefusedError("unsafe_path", f"{place}: {shown} is not a path below the folder.")
    candidates = [_join(root, folder, address, place)]
    # A name may hold % or ? itself: such a file wins over the decoded name.
    if not os.path.isfile(candidates[0]):
        path = os.fsdecode(unquote_to_bytes(urlsplit(address).path))
        candidates.append(_join(root, folder, path, place))
    for path in candidates:
        if os.path.isfile(path):
            size = os.path.getsize(path)
            if size > config.max_image_bytes:
                raise RefusedError("image_too_large", _too_large(place, size, config.max_image_bytes))
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise RefusedError("missing_image", f"{place}: {shown} cannot be read ({error.strerror}).") from error
    raise RefusedError("missing_image", f"{place}: there is no file {shown}.")


def check_image(content, config, place):
    """Refuse an image that stage 1 could not use; all of its pixels are decoded.

    Args:
        content (`bytes`): the encoded image.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): gives `min_image_side` and `max_image_bytes`.
        place (`str`): where it stands, for messages.

    Raises:
        RefusedError: `undecodable_image`, `decompression_bomb`, `aspect_ratio`, `too_small`, `image_too_large`.
    """
    if len(content) > config.max_image_bytes:
        raise RefusedError("image_too_large", _too_large(place, len(content), config.max_image_bytes))
    try:
        with warnings.catch_warnings():
            # Between one and two times MAX_IMAGE_PIXELS Pillow only warns; here both are refused.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        check_size(image.width, image.height, place)
        if min(image.size) < config.min_image_side:
            raise RefusedError(
                "too_small",
                f"{place} has {image.width} x {image.height} pixels, less than min_image_side={config.min_image_side}.",
            )
        image.load()
    except RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedError("decompression_bomb", f"{place} is too large: {error}") from error
    # What Pillow raises depends on the format and on where the bytes are damaged.
    except Exception as error:
        allowed = ", ".join(FORMATS)
        raise RefusedError(
            "undecodable_image", f"{place} cannot be decoded (allowed are {allowed}): {_without_address(error)}."
        ) from error


def check_size(width, height, place):
    """Refuse an image by its size in pixels.

    Args:
        width, height (`float`): in pixels.
        place (`str`): where it stands, for messages.

    Raises:
        RefusedError: `decompression_bomb` or `aspect_ratio`.
    """
    shown = f"{place} of {width:.0f} x {height:.0f} pixels"
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise RefusedError(
            "decompression_bomb",
            f"{shown} is too large, PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS}.",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RefusedError("aspect_ratio", f"{shown} has an aspect ratio over {MAX_ASPECT_RATIO}.")


def is_below(root, path):
    """Tell whether a path is below a folder, links followed.

    Args:
        root, path (`str`).
    """
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def _join(root, folder, path, place):
    path = path.replace("\\", "/")
    if os.path.isabs(path) or "\0" in path:
        raise RefusedError("unsafe_path", f"{place}: {path[:120]!r} is not a path relative to its file.")
    try:
        joined = os.path.normpath(os.path.join(folder, path))
        if os.path.commonpath([root, joined]) == root and is_below(root, joined):
            return joined
    except (OSError, ValueError) as error:
        raise RefusedError("unsafe_path", f"{place}: {path[:120]!r} is no path ({error}).") from error
    raise RefusedError("unsafe_path", f"{place}: {path[:120]!r} leads out of the folder.")


def _decode_data_uri(address, most, place):
    head, comma, body = address[5:].partition(",")
    if not comma or not head.lower().startswith("image/"):
        raise RefusedError("bad_data_uri", f"{place} is not a data URI of an image: {address[:60]!r}.")
    is_base64 = head.lower().replace(" ", "").endswith(";base64")
    # Before decoding: four characters are three bytes.
    size = len(body) * 3 // 4 if is_base64 else len(body)
    if size > most:
        raise RefusedError("image_too_large", _too_large(place, size, most))
    content = unquote_to_bytes(body)
    if not is_base64:
        return content
    try:
        return base64.b64decode(re.sub(rb"\s+", b"", content), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError("bad_data_uri", f"{place} is not valid base64 ({error}).") from error


def _too_large(place, size, most):
    return f"{place} has {size} bytes, more than max_image_bytes={most}."


def _without_address(error):
    """Pillow names the file object by its address in memory, which would differ between equal runs."""
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "its bytes", str(error)).rstrip(".")


__all__ = ["FORMATS", "LEFT_OUT", "ImageReference", "Refusal", "RefusedError", "check_image", "check_size"]
__all__ += ["find_image", "is_below"]
