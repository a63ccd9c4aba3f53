"""What a person drops, as page images: pictures as they are, PDF files a page each."""

import os
import warnings
from pathlib import Path

import pypdfium2
from PIL import Image, ImageOps

MAX_PAGES = int(os.environ.get("MOCA_MAX_PAGES", 60))
MAX_FILE_MB = int(os.environ.get("MOCA_MAX_FILE_MB", 20))
# Longest side of a page in pixels: twice what 1,024 image tokens keep of a portrait page.
MAX_SIDE = 1600
# An image of more pixels than this is refused unread: a small file can hold billions.
MAX_PIXELS = 60_000_000


def open_pages(paths):
    """Open files as pages, in their order.

    Args:
        paths (`list[str]`): images and PDF files.

    Returns:
        `list[tuple[str, PIL.Image.Image]]`: a label, and an RGB image of at most `MAX_SIDE` pixels a side.

    Raises:
        ValueError: a file does not open, is too large, or there are too many pages. The message names the file and is
            meant for the person who dropped it.
    """
    pages = []
    for path in map(Path, paths):
        size = path.stat().st_size / 2**20
        if size > MAX_FILE_MB:
            raise ValueError(f"{path.name} has {size:.1f} MB; at most {MAX_FILE_MB} MB a file are taken.")
        pages += _pdf_pages(path, MAX_PAGES - len(pages)) if _is_pdf(path) else [(path.name, _open_image(path))]
        if len(pages) > MAX_PAGES:
            raise ValueError(f"These are more than {MAX_PAGES} pages; drop fewer files.")
    return pages


def _is_pdf(path):
    with path.open("rb") as file:
        return b"%PDF-" in file.read(1024)


def _open_image(path):
    try:
        with warnings.catch_warnings():
            # Pillow only warns of images that are larger than it likes; the size is checked here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))
        image.load()
    # What Pillow raises depends on the format and on where the bytes are damaged.
    except Exception as error:
        raise ValueError(f"{path.name} is neither a PDF nor an image that opens: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _pdf_pages(path, num_left):
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{path.name} does not open as a PDF, or needs a password: {error}") from error
    try:
        if len(document) > num_left:
            raise ValueError(f"{path.name} has {len(document)} pages; at most {MAX_PAGES} in all are taken.")
        pages = []
        for number, page in enumerate(document, start=1):
            scale = MAX_SIDE / max(page.get_size())
            pages.append((f"{path.name}, page {number}", page.render(scale=scale).to_pil().convert("RGB")))
        return pages
    finally:
        document.close()
