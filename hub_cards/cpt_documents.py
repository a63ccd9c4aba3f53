"""A folder of Markdown, HTML and PDF files as rows and refusals."""

import os
from pathlib import Path

from .cpt_images import ImageReference, Refusal, RefusedError, check_image, find_image, is_below
from .cpt_markup import read_html, read_markdown
from .cpt_pdf import read_pdf
from .cpt_rows import cut_rows

KINDS = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".pdf": "pdf"}


def list_documents(root):
    """Return the documents below a folder: their paths relative to it, in an order that depends on the names alone.

    Args:
        root (`str`): the folder. Hidden files and folders are passed over, and links to folders not followed.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and kind_of(name) is not None:
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def kind_of(name):
    """Return `"markdown"`, `"html"`, `"pdf"`, or None for what is no document.

    Args:
        name (`str`): a file's name.
    """
    return KINDS.get(os.path.splitext(name)[1].lower())


def read_document(source, config):
    """Yield the rows of a document, and what cannot be used of it.

    Args:
        source (`str`): path below `config.documents`.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): the settings.

    Yields:
        [`hub_cards.cpt_rows.Row`] or [`hub_cards.cpt_images.Refusal`], always the same ones in the same order.
    """
    place = source.encode("utf-8", "backslashreplace").decode()
    part = 0
    try:
        for page, parts in _read_pages(source, config, place):
            where = place if page is None else f"{place}, page {page}"
            is_empty = True
            for found in cut_rows(_checked(parts, source, config, where), config.max_characters, config.max_images):
                is_empty = False
                if not isinstance(found, Refusal):
                    found.source, found.page, found.part = source, page, part
                    part += 1
                yield found
            if is_empty and page is not None:
                yield Refusal("empty_page", f"{where} has neither text nor images.")
            elif is_empty:
                yield Refusal("empty_document", f"{where} has neither text nor images.")
    except RefusedError as error:
        yield error.refusal


def _read_pages(source, config, place):
    """Yield numbers of pages (None where there are none) and their parts."""
    path = os.path.join(config.documents, source)
    if not is_below(config.documents, path):
        raise RefusedError("unsafe_path", f"{place} is a link that leads out of the folder.")
    if place != source:
        raise RefusedError("bad_name", f"{place}: the file's name is not UTF-8.")
    if not os.path.isfile(path):
        raise RefusedError("unreadable_document", f"{place} is not a file.")
    kind = kind_of(source)
    if kind == "pdf":
        yield from read_pdf(path, config, place)
        return
    size = os.path.getsize(path)
    if size > config.max_document_bytes:
        raise RefusedError(
            "document_too_large",
            f"{place} has {size} bytes, more than max_document_bytes={config.max_document_bytes}.",
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError("not_utf8", f"{place} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise RefusedError("unreadable_document", f"{place} cannot be read ({error.strerror}).") from error
    yield None, read_markdown(text) if kind == "markdown" else read_html(text)


def _checked(parts, source, config, where):
    """Yield parts with images as bytes that can be decoded, one at a time."""
    root = os.path.realpath(config.documents)
    folder = os.path.join(root, os.path.dirname(source))
    number = 0
    for part in parts:
        if isinstance(part, (str, Refusal)):
            yield part
            continue
        place, alt = f"{where}: image {number}", ""
        number += 1
        try:
            if isinstance(part, ImageReference):
                alt = part.alt
                part = find_image(part.address, root, folder, config, place)
            check_image(part, config, place)
            yield part
        except RefusedError as error:
            yield error.refusal
        if alt and config.alt_text:
            yield alt


__all__ = ["KINDS", "kind_of", "list_documents", "read_document"]
