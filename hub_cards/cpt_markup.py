"""Markdown and HTML as text and images in reading order."""

import re
from html.parser import HTMLParser
from urllib.parse import urljoin

from .cpt_images import ImageReference

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_DEFINITION = re.compile(r"^ {0,3}\[(?P<label>[^\]\n]+)\]:[ \t]*(?:<(?P<angle>[^>\n]*)>|(?P<plain>\S+))", re.MULTILINE)
_LABEL = r"(?:[^\[\]\\]|\\.|\[[^\[\]]*\])*"
# One pass from left to right: what is code or a comment holds no image.
_MARKDOWN = re.compile(
    rf"""
    (?P<code>
        ^[ ]{{0,3}}(?P<fence>`{{3,}}|~{{3,}})[^\n]*\n .*? (?:^[ ]{{0,3}}(?P=fence)[`~]*[ \t]*$ | \Z)
      | (?<!`)(?P<ticks>`+)(?!`) (?:(?!\n[ \t]*\n).){{1,2000}}? (?<!`)(?P=ticks)(?!`)
      | \\.
    )
  | (?P<comment><!-- .*? (?:-->|\Z))
  | !\[(?P<alt>{_LABEL})\]
    (?:
        \(\s* (?:<(?P<angle>[^>\n]*)>|(?P<plain>[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*))
        (?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))? \s*\)
      | (?:\[(?P<label>[^\]]*)\])?
    )
  | (?P<tag><img\b(?:[^<>"']++|"[^"]*+"|'[^']*+'){{0,64}}+>)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
# Elements whose text nobody sees, and those that end without an end tag.
_HIDDEN = {"script", "style", "template", "noscript", "title", "svg", "iframe", "object", "video", "audio", "canvas"}
_BLOCKS = set(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr main nav ol p pre section summary table tbody tfoot thead ul".split()
)
_LINES = {"br", "li", "tr", "option"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def read_markdown(text):
    """Return a Markdown document as its source text, with the images taken out of it.

    Images are `![alt](path)`, `![alt][label]` and `<img>`. Code is left as it is; front matter and comments go.

    Args:
        text (`str`): the document.

    Returns:
        `list`: a `str` for text, an [`hub_cards.cpt_images.ImageReference`] for an image, in order.

    Example:

    ```python
    >>> read_markdown("A map: ![Old town](maps/a.png)")
    ['A map: ', ImageReference(address='maps/a.png', alt='Old town')]
    ```
    """
    text = _FRONT_MATTER.sub("", text)
    definitions = {}
    for found in _DEFINITION.finditer(text):
        definitions.setdefault(_label(found["label"]), found["angle"] or found["plain"])
    parts, end = [], 0
    for found in _MARKDOWN.finditer(text):
        image = None
        if found["tag"]:
            image = next((part for part in read_html(found["tag"]) if isinstance(part, ImageReference)), None)
        elif found["alt"] is not None:
            address = found["angle"] if found["angle"] is not None else found["plain"]
            if address is None:
                address = definitions.get(_label(found["label"] or found["alt"]))
            if address is not None:
                image = ImageReference(_unescape(address), _unescape(found["alt"]))
        if image is not None or found["comment"]:
            parts.append(text[end : found.start()])
            parts += [image] if image is not None else []
            end = found.end()
    return [part for part in [*parts, text[end:]] if part]


def read_html(text):
    """Return the visible text and the images of an HTML document.

    Args:
        text (`str`): the document. Scripts, styles, templates, drawings (`<svg>`), media players and elements with the
            attribute `hidden` are not visible; blocks become paragraphs, and cells of a table are divided by tabs.

    Returns:
        `list`: a `str` for text, an [`hub_cards.cpt_images.ImageReference`] for an image, in order.
    """
    reader = _HTMLReader()
    # No tag begins behind the last end of one. Python's parser would look for it from every "<" anew.
    end = text.rfind(">") + 1
    reader.feed(text[:end] + text[end:].replace("<", "&lt;"))
    reader.close()
    return reader.parts()


class _HTMLReader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self._parts, self._pieces = [], []
        # How the text ends so far: line breaks, or a space.
        self._num_breaks, self._ends_in_space = 2, True
        self._hidden, self._depth, self._preformatted, self._base = None, 0, 0, ""

    def parts(self):
        self._end_text()
        return self._parts

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in reversed(attrs)}
        if self._hidden is not None:
            # The end tags of these may be missing: the next block ends them.
            if self._hidden in ("p", "li", "dt", "dd", "td", "th", "tr", "option") and tag in _BLOCKS | _LINES:
                self._hidden = None
            else:
                self._depth += tag == self._hidden
                return
        is_hidden = "hidden" in attributes or "display:none" in attributes.get("style", "").replace(" ", "").lower()
        if tag in _HIDDEN or is_hidden:
            if tag not in _VOID:
                self._hidden, self._depth = tag, 1
        elif tag == "img":
            self._end_text()
            address = urljoin(self._base, attributes.get("src", "")) if self._base else attributes.get("src", "")
            self._parts.append(ImageReference(address, attributes.get("alt", "")))
            self._num_breaks, self._ends_in_space = 0, False
        elif tag == "base":
            self._base = self._base or attributes.get("href", "")
        else:
            self._break(tag)
            self._preformatted += tag == "pre"

    def handle_startendtag(self, tag, attrs):
        # <div/> opens a <div> in HTML; drawings alone may close themselves.
        self.handle_starttag(tag, attrs)
        if tag == "svg":
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self._hidden is not None:
            self._depth -= tag == self._hidden
            if self._depth == 0:
                self._hidden = None
            return
        if tag == "pre":
            self._preformatted = max(self._preformatted - 1, 0)
        if tag in _BLOCKS:
            self._break(tag)

    def handle_data(self, data):
        if self._hidden is not None:
            return
        if not self._preformatted:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            data = data.lstrip(" ") if self._ends_in_space else data
        if data:
            self._pieces.append(data)
            self._num_breaks = len(data) - len(data.rstrip("\n"))
            self._ends_in_space = data[-1] in " \n\t"

    def _break(self, tag):
        """Begin a paragraph, a line or a cell."""
        if tag in ("td", "th"):
            if not self._num_breaks:
                self._add_break("\t", 0)
        else:
            wanted = 2 if tag in _BLOCKS else int(tag in _LINES)
            missing = wanted - self._num_breaks
            if missing > 0:
                self._add_break("\n" * missing, wanted)

    def _add_break(self, text, num_breaks):
        if self._pieces and not self._preformatted:
            self._pieces[-1] = self._pieces[-1].rstrip(" ")
        self._pieces.append(text)
        self._num_breaks, self._ends_in_space = num_breaks, True

    def _end_text(self):
        text = "".join(self._pieces)
        if text:
            self._parts.append(text)
        self._pieces = []


def _label(text):
    return " ".join(text.split()).casefold()


def _unescape(text):
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


__all__ = ["read_html", "read_markdown"]
