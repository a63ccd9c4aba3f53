"""Pages of PDF files: their text and embedded images in reading order, or each as one image; needs `pypdfium2`."""

import io
import re
from dataclasses import dataclass

from PIL import Image

from modeling_moca.images_moca import to_rgb

from .cpt_images import Refusal, RefusedError, check_size

# Rendered pages; text stays sharp at this quality, at a fifth of the size of a PNG.
_JPEG_QUALITY = 90


@dataclass
class _Line:
    text: str
    left: float
    bottom: float
    right: float
    top: float

    @property
    def middle(self):
        return (self.bottom + self.top) / 2


def import_pypdfium2():
    """Return the module `pypdfium2`, which reads PDF files.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("Reading PDF files needs pypdfium2: pip install moca[pdf]") from error
    return pypdfium2


def read_pdf(path, config, place):
    """Yield the pages of a PDF file.

    Args:
        path (`str`): the file.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): says whether pages are rendered, and how.
        place (`str`): the file's name, for messages.

    Yields:
        `tuple`: number of the page, from 1, and its parts: a `str` for text, `bytes` for an image, a
        [`hub_cards.cpt_images.Refusal`] for what is not used.

    Raises:
        RefusedError: `unreadable_pdf`: damaged, encrypted, or something else.
        ImportError: `pypdfium2` is not installed.
    """
    pypdfium2 = import_pypdfium2()
    try:
        pdf = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        raise RefusedError("unreadable_pdf", f"{place} cannot be read: {error}.") from error
    with pdf:
        for index in range(len(pdf)):
            number = index + 1
            where = f"{place}, page {number}"
            try:
                page = pdf[index]
            except pypdfium2.PdfiumError as error:
                yield number, [Refusal("unreadable_pdf", f"{where} cannot be read: {error}.")]
                continue
            try:
                yield number, list(_rendered(page, config, where) if config.pdf_as_pages else _embedded(page, where))
            finally:
                page.close()


def _rendered(page, config, where):
    """Yield a page's image and its text."""
    scale = config.pdf_dpi / 72
    try:
        check_size(page.get_width() * scale, page.get_height() * scale, where)
        yield _encode(page.render(scale=scale).to_pil(), "JPEG")
    except RefusedError as error:
        yield error.refusal
    except import_pypdfium2().PdfiumError as error:
        yield Refusal("unreadable_pdf", f"{where} cannot be rendered: {error}.")
    # A paragraph of its own: a page of much text goes on in a row without the image.
    text = _join(_lines(page))
    if text:
        yield "\n\n" + text


def _embedded(page, where):
    """Yield a page's text and images in reading order.

    An image comes before the first line that stands below its middle and beside none of its sides; lines are in the
    order of the file, which for columns is that of reading.
    """
    lines = _lines(page)
    images = []
    for number, image in enumerate(page.get_objects(filter=[import_pypdfium2().raw.FPDF_PAGEOBJ_IMAGE])):
        content = _image(image, f"{where}: image {number}")
        left, bottom, right, top = _bounds(image)
        below = [index for index, line in enumerate(lines) if line.middle < (bottom + top) / 2]
        in_column = (index for index in below if lines[index].left < right and lines[index].right > left)
        before = next(in_column, below[0] if below else len(lines))
        images.append((before, -top, left, content))
    images.sort(key=lambda entry: entry[:3])
    start = 0
    for before, _, _, content in images:
        if before > start:
            yield _join(lines[start:before]) + "\n\n"
            start = before
        yield content
        # An image is a paragraph of its own, or one with the text behind it, whichever fits.
        yield "\n\n"
    if start < len(lines):
        yield _join(lines[start:])


def _bounds(item):
    """Return left, bottom, right and top on the page; objects inside forms know their place in the form only."""
    bounds = item.get_bounds()
    container = item.container
    while container is not None:
        bounds = container.get_matrix().on_rect(*bounds)
        container = container.container
    return bounds


def _image(item, place):
    """Return an embedded image, encoded, or why it cannot be used."""
    pypdfium2 = import_pypdfium2()
    try:
        width, height = item.get_px_size()
        check_size(width, height, place)
        matrix = item.get_matrix()
        upright = matrix.a > 0 and matrix.d > 0 and matrix.b == matrix.c == 0
        is_plain = upright and not pypdfium2.raw.FPDFPageObj_HasTransparency(item)
        if is_plain and list(item.get_filters()) == ["DCTDecode"]:
            content = bytes(item.get_data())
            # CMYK in PDF may be inverted: such pictures are drawn.
            if Image.open(io.BytesIO(content), formats=("JPEG",)).mode in ("RGB", "L"):
                return content
        left, bottom, right, top = item.get_bounds()
        scale = max(width / (right - left), height / (top - bottom))
        check_size((right - left) * scale, (top - bottom) * scale, place)
        return _encode(item.get_bitmap(render=True).to_pil(), "PNG")
    except RefusedError as error:
        return error.refusal
    # Damage shows in pdfium, in Pillow, or as an area of zero.
    except (pypdfium2.PdfiumError, OSError, ValueError, ZeroDivisionError) as error:
        message = re.sub(r" at 0x[0-9a-f]+", "", str(error))
        return Refusal("undecodable_image", f"{place} cannot be decoded: {message}.")


def _encode(image, format):
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format, quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _lines(page):
    """Return the lines of a page's text with their places, in the order of the file."""
    raw = import_pypdfium2().raw
    textpage = page.get_textpage()
    lines, characters, places = [], [], []
    number = textpage.count_chars()
    for index in range(number + 1):
        code = raw.FPDFText_GetUnicode(textpage, index) if index < number else 10
        if code in (10, 13):
            text = _decode(characters)
            if text:
                (left, _, _, _), (_, _, right, _) = (_box(textpage, places[end]) for end in (0, -1))
                _, bottom, _, top = _box(textpage, places[0])
                lines.append(_Line(text, min(left, right), bottom, max(left, right), top))
            characters, places = [], []
            continue
        characters.append(code)
        if code > 32:
            places.append(index)
    textpage.close()
    return lines


def _box(textpage, index):
    return textpage.get_charbox(index, loose=True)


def _decode(codes):
    # 2 and 0xFFFE are pdfium's hyphens at the end of a line. UTF-16 halves come as two characters.
    codes = [45 if code in (2, 0xFFFE) else code for code in codes if code >= 32 or code in (2, 9)]
    text = "".join(map(chr, codes))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _join(lines):
    """Return lines as text; a gap, or the top of another column, begins a paragraph."""
    text = ""
    for previous, line in zip([None, *lines], lines):
        if previous is not None:
            height = max(min(previous.top - previous.bottom, line.top - line.bottom), 1)
            is_apart = previous.bottom - line.top > 0.5 * height or line.bottom > previous.top
            text += "\n\n" if is_apart else "\n"
        text += line.text
    return text


__all__ = ["import_pypdfium2", "read_pdf"]
