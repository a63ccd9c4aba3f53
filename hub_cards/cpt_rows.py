"""Text and images in reading order as rows of limited size."""

import re
from dataclasses import dataclass, field

from modeling_moca.chat_moca import IMAGE_PAD, PLACEHOLDER, VISION_END, VISION_START

from .cpt_images import Refusal

# What a document that writes about the placeholder has instead: no image, and still readable.
ESCAPED_PLACEHOLDER = f"{VISION_START} {IMAGE_PAD} {VISION_END}"
_BORDER = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass
class Row:
    """A row of a data set.

    Args:
        text (`str`): with a placeholder where each image stands.
        images (`list[bytes]`): encoded.
        source (`str`): its file, relative to the folder.
        page (`int` or None): of a PDF, from 1.
        part (`int`): which row of its file.
        num_escaped (`int`): placeholders in the source's own text, which are no images.
        num_cut (`int`): borders to the next row inside of a paragraph.
    """

    text: str
    images: list
    source: str = ""
    page: int | None = None
    part: int = 0
    num_escaped: int = 0
    num_cut: int = 0


@dataclass
class _Paragraph:
    """Text (`str`) and images (`bytes`) of a paragraph, or of several."""

    atoms: list = field(default_factory=list)
    num_escaped: int = 0
    num_cut: int = 0

    @property
    def num_characters(self):
        return sum(len(atom) for atom in self.atoms if isinstance(atom, str))

    @property
    def num_images(self):
        return sum(isinstance(atom, bytes) for atom in self.atoms)


def cut_rows(parts, max_characters, max_images):
    """Put paragraphs together to rows, as many as fit.

    Args:
        parts (`Iterable`): a `str` for text, `bytes` for an image, a [`hub_cards.cpt_images.Refusal`] for what is not
            used.
        max_characters (`int`): longest text of a row, placeholders not counted.
        max_images (`int`): most images of a row.

    Yields:
        [`Row`], and the refusals.

    Example:

    ```python
    >>> [row.text for row in cut_rows(["one\\n\\ntwo\\n\\nthree"], 9, 1)]
    ['one\\n\\ntwo', 'three']
    ```
    """
    row = _Paragraph()
    for paragraph in _paragraphs(parts):
        if isinstance(paragraph, Refusal):
            yield paragraph
            continue
        for piece in _pieces(paragraph, max_characters, max_images):
            fits = row.num_characters + 2 + piece.num_characters <= max_characters
            if row.atoms and not (fits and row.num_images + piece.num_images <= max_images):
                yield _finish(row)
                row = _Paragraph()
            row.atoms += (["\n\n"] if row.atoms else []) + piece.atoms
            row.num_escaped += piece.num_escaped
            if piece.num_cut:
                row.num_cut = piece.num_cut
                yield _finish(row)
                row = _Paragraph()
    if row.atoms:
        yield _finish(row)


def _paragraphs(parts):
    """Yield paragraphs and refusals."""
    atoms = []
    for part in parts:
        if isinstance(part, Refusal):
            yield part
        elif isinstance(part, bytes):
            atoms.append(part)
        else:
            first, *others = _BORDER.split(part)
            atoms.append(first)
            for piece in others:
                yield from _tidy(atoms)
                atoms = [piece]
    yield from _tidy(atoms)


def _tidy(atoms):
    """Yield one paragraph, or none if it is blank: neighbouring texts merged, literal placeholders escaped."""
    paragraph, run = _Paragraph(), ""
    for atom in [*atoms, b""]:
        if isinstance(atom, str):
            run += atom
            continue
        # Only now: a placeholder may stand around something that was taken out.
        paragraph.num_escaped += run.count(PLACEHOLDER)
        run = run.replace(PLACEHOLDER, ESCAPED_PLACEHOLDER)
        paragraph.atoms += [run] if run else []
        paragraph.atoms += [atom] if atom else []
        run = ""
    if paragraph.atoms and isinstance(paragraph.atoms[0], str):
        paragraph.atoms[0] = paragraph.atoms[0].lstrip("\n")
    if paragraph.atoms and isinstance(paragraph.atoms[-1], str):
        paragraph.atoms[-1] = paragraph.atoms[-1].rstrip()
    if any(isinstance(atom, bytes) or atom.strip() for atom in paragraph.atoms):
        yield paragraph


def _pieces(paragraph, max_characters, max_images):
    """Yield a paragraph, in pieces if it does not fit into a row."""
    if paragraph.num_characters <= max_characters and paragraph.num_images <= max_images:
        yield paragraph
        return
    piece = _Paragraph(num_escaped=paragraph.num_escaped)
    for atom in paragraph.atoms:
        for small in [atom] if isinstance(atom, bytes) else _cut_text(atom, max_characters):
            is_image = isinstance(small, bytes)
            num_characters = piece.num_characters + (0 if is_image else len(small))
            if piece.atoms and (num_characters > max_characters or piece.num_images + is_image > max_images):
                piece.num_cut = 1
                yield piece
                piece = _Paragraph()
            piece.atoms.append(small)
    yield piece


def _cut_text(text, most):
    """Yield pieces of a text: cut behind the last line break or space of each, if it has one."""
    while len(text) > most:
        end = max(text.rfind("\n", 0, most), text.rfind(" ", 0, most) if "\n" not in text[:most] else 0) + 1 or most
        if text[:end].strip():
            yield text[:end]
        text = text[end:]
    if text.strip():
        yield text


def _finish(row):
    text = "".join(PLACEHOLDER if isinstance(atom, bytes) else atom for atom in row.atoms)
    images = [atom for atom in row.atoms if isinstance(atom, bytes)]
    assert text.count(PLACEHOLDER) == len(images)
    return Row(text, images, num_escaped=row.num_escaped, num_cut=row.num_cut)


__all__ = ["ESCAPED_PLACEHOLDER", "Row", "cut_rows"]
