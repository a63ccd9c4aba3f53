"""Images as the two families of backbones take them: opening, colours, and the way from image tokens to their pixels.

This file travels to the Hub as remote code: it imports torch and transformers only.
"""

import io
import os

import torch
from transformers import image_utils

# Pillow is reached as image_utils.PIL: the remote-code loader refuses a file that imports a package which is not
# installed, even inside a function, and text alone needs no Pillow.

EXIF_ORIENTATION = 0x0112
# Pillow's numbers of the filters that torch has too.
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}


def open_image(image, place):
    """Return an image, whatever it came as, as a fully loaded RGB Pillow image.

    Args:
        image: a Pillow image, a `numpy` array (uint8), encoded bytes, a path, or `{"bytes": ..., "path": ...}` as in an
            undecoded image column.
        place (`str`): where it stands, for the message.

    Raises:
        ValueError: the image does not open; the message begins with `place`.
    """
    Image = image_utils.PIL.Image
    try:
        if isinstance(image, dict) and image.get("bytes") is not None:
            image = image["bytes"]
        elif isinstance(image, dict):
            image = image["path"]
        if isinstance(image, (bytes, bytearray)):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, (str, os.PathLike)):
            image = image_utils.load_image(os.fspath(image))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        image.load()
        return to_rgb(image)
    # What Pillow raises depends on the format and on where the bytes are damaged.
    except Exception as error:
        raise ValueError(f"{place} does not open: {error}") from error


def to_rgb(image):
    """Return a Pillow image as RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8.

    Args:
        image (`PIL.Image.Image`): any mode.
    """
    Image, ImageOps = image_utils.PIL.Image, image_utils.PIL.ImageOps
    # Without this question every image would be copied.
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        # A plain convert("RGB") clips 16-bit values at 255 instead of scaling them.
        return image.point(lambda value: value / 257, "L" if image.mode != "I" else None).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_pixels(image, height, width, resample, exact=True):
    """Return the pixels of an image in another size.

    Args:
        image (`PIL.Image.Image`): RGB.
        height, width (`int`): new size in pixels.
        resample (`int`): Pillow's number of the filter.
        exact (`bool`, defaults to `True`): Pillow's own result; False: torch's antialiased filter, where it has this
            one (bilinear and bicubic). It is several times faster, and differs from Pillow by at most a few levels of
            255, in few values: it is what the image processors of transformers use when torchvision is installed.

    Returns:
        `torch.ByteTensor` of shape `(height, width, 3)`.
    """
    if not exact and resample in TORCH_FILTERS:
        pixels = _pixels(image)[None].permute(0, 3, 1, 2)  # [1, C, H, W], channels last: the fast kernel
        resized = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode=TORCH_FILTERS[resample], antialias=True
        )
        return resized[0].permute(1, 2, 0)
    return _pixels(image.resize((width, height), resample=resample))


def _pixels(image):
    """Return a Pillow image as bytes [H, W, C]."""
    # A bytearray, since torch warns of memory that it may not write to.
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def rows_from_bytes(pixels, image_grid_thw, image_processor):
    """Cut and normalise bytes of resized images as the stock Qwen-VL image processors do.

    To do it here, where the pixels are used, instead of in a loader's worker, spares the worker half of its time.

    Args:
        pixels (`torch.ByteTensor` of shape `(num_bytes,)`): images one after another, each
            row by row, the channels of a pixel together: an eighth of the memory of `pixel_values`.
        image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`): patches in time, height, width.
        image_processor (`BaseImageProcessor`): gives the sizes of patches, mean and standard deviation.

    Returns:
        `torch.FloatTensor` of shape `(num_patches, patch_dim)`: tokens row by row, and within a token its square of
        patches.
    """
    size, merge = image_processor.patch_size, image_processor.merge_size
    rows, start = [], 0
    for _, height, width in image_grid_thw.tolist():
        end = start + height * width * size**2 * 3
        split = pixels[start:end].view(height // merge, merge, size, width // merge, merge, size, 3)
        rows.append(split.permute(0, 3, 1, 4, 6, 2, 5).reshape(height * width, 3, size**2))  # [I J m m, C, p p]
        start = end
    values = (image_processor.image_mean, image_processor.image_std)
    mean, std = (torch.tensor(value, device=pixels.device)[:, None] for value in values)  # [C, 1]
    rows = torch.cat(rows).float().div_(255).sub_(mean).div_(std)  # [N, C, p p]
    # A still image stands in every frame of a patch.
    return rows.unsqueeze(2).expand(-1, -1, image_processor.temporal_patch_size, -1).flatten(1)  # [N, C T p p]


def real_tiles(pixel_values):
    """Tell tiles from the padding that gives every row of a batch equally many (all zero, as the backbones have it).

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_tiles, channels, side, side)`).

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_tiles)`.
    """
    return pixel_values.ne(0).flatten(2).any(-1)


def to_patch_rows(pixel_values, patch_size, merge_size):
    """Return the patches of all images, one a row, in the order of the image tokens that own them.

    An image token owns `merge_size**2` consecutive rows: the square of patches that the backbone merges into it. This
    is what masked autoencoding hides and restores (paper section 3.1), the same for both layouts of pixels.

    Args:
        pixel_values (`torch.Tensor`): `(num_patches, patch_dim)`, which is in this order already and comes back as it
            is, or tiles `(batch_size, num_tiles, channels, side, side)`.
        patch_size (`int`): side of a patch in pixels.
        merge_size (`int`): side, in patches, of the square that becomes one image token.

    Returns:
        `torch.Tensor` of shape `(num_patches, patch_dim)`.

    Example:

    ```python
    >>> to_patch_rows(torch.rand(1, 2, 3, 8, 8), patch_size=2, merge_size=2).shape
    torch.Size([32, 12])
    ```
    """
    if pixel_values.ndim == 2:
        return pixel_values
    tiles = pixel_values[real_tiles(pixel_values)]  # [n, C, S, S]
    split = _split_tiles(tiles, patch_size, merge_size)  # [n, C, I, m, p, J, m, p]
    return split.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, tiles.shape[1] * patch_size**2)  # [n I J m m, C p p]


def from_patch_rows(rows, pixel_values, patch_size, merge_size):
    """Put patch rows back where `to_patch_rows` took them from.

    Args:
        rows (`torch.Tensor` of shape `(num_patches, patch_dim)`): new patches, in the order of `to_patch_rows`.
        pixel_values (`torch.Tensor`): the pixels that the rows were taken from; left as they are.
        patch_size, merge_size: see [`to_patch_rows`].

    Returns:
        `torch.Tensor` of the shape of `pixel_values`.
    """
    if pixel_values.ndim == 2:
        return rows
    real = real_tiles(pixel_values)
    tiles = pixel_values[real]
    n, channels, num_rows, _, _, num_columns, _, _ = _split_tiles(tiles, patch_size, merge_size).shape
    merged = rows.view(n, num_rows, num_columns, merge_size, merge_size, channels, patch_size, patch_size)
    pixel_values = pixel_values.clone()
    pixel_values[real] = merged.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(tiles.shape)
    return pixel_values


def _split_tiles(tiles, patch_size, merge_size):
    """View tiles [n, C, S, S] as [n, C, I, m, p, J, m, p]: image tokens, patches of a token, pixels of a patch."""
    side = tiles.shape[-1] // (patch_size * merge_size)
    shape = (*tiles.shape[:2], side, merge_size, patch_size, side, merge_size, patch_size)
    return tiles.reshape(shape)


__all__ = [
    "EXIF_ORIENTATION",
    "from_patch_rows",
    "open_image",
    "real_tiles",
    "resize_pixels",
    "rows_from_bytes",
    "to_patch_rows",
    "to_rgb",
]
