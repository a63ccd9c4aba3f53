"""Documents to rows: reading order of each format, cutting, and everything that is refused, with its message."""

import builtins
import io
import re

import pytest
from PIL import Image

from hub_cards.cpt_config import CPTDatasetConfig
from hub_cards.cpt_dataset import build_cpt_dataset
from hub_cards.cpt_documents import list_documents, read_document
from hub_cards.cpt_images import ImageReference, Refusal
from hub_cards.cpt_markup import read_html, read_markdown
from hub_cards.cpt_rows import ESCAPED_PLACEHOLDER, cut_rows
from tests.hub_cards.cpt_sources import PLACEHOLDER, data_uri, pdf_bytes, picture, write

RED, BLUE = picture("red"), picture("blue", (60, 42), "JPEG")


def read(tmp_path, name, content, **settings):
    """Return rows and refusals of one document."""
    write(tmp_path / "in" / name, content)
    config = CPTDatasetConfig(str(tmp_path / "out"), documents=str(tmp_path / "in"), **settings)
    found = list(read_document(name, config))
    return [item for item in found if not isinstance(item, Refusal)], [i for i in found if isinstance(i, Refusal)]


@pytest.fixture
def images(tmp_path):
    write(tmp_path / "in/a b.png", RED)
    write(tmp_path / "in/sub/c.jpg", BLUE)
    return tmp_path


def test_markdown_in_reading_order(images):
    text = (
        '\ufeff---\ntitle: gone\n---\n# Head\r\n\r\nRed ![a red one](<a b.png> "title"), blue ![blue][Fig]\n'
        "and <img alt=\"2 > 1\" src='sub/c.jpg'>.\n\n```md\n![code](no.png)\n```\n\n`![span](no.png)`, "
        "\\![no](no.png), ![no label]\n<!-- ![comment](no.png) -->\n\n[![linked](a%20b.png)](http://example.org)\n\n"
        "[fig]: sub/c.jpg 'x'\n"
    )
    (row,), refused = read(images, "one.md", text, max_images=9)
    assert not refused
    assert row.text == (
        f"# Head\n\nRed {PLACEHOLDER}, blue {PLACEHOLDER}\nand {PLACEHOLDER}.\n\n```md\n![code](no.png)\n```\n\n"
        "`![span](no.png)`, \\![no](no.png), ![no label]\n\n"
        f"[{PLACEHOLDER}](http://example.org)\n\n[fig]: sub/c.jpg 'x'"
    )
    assert row.images == [RED, BLUE, BLUE, RED] and (row.source, row.page, row.part) == ("one.md", None, 0)
    (row,), _ = read(images, "alt.md", "![a red one](a%20b.png) end", alt_text=True)
    assert row.text == f"{PLACEHOLDER}a red one end"


def test_html_in_reading_order(images):
    text = (
        "<!doctype html><html><head><title>gone</title><style>p {}</style>"
        "<script>if (1 < 2) '<img src=no.png>'</script>"
        "<body><h1>Head</h1><p>One  <b>bold</b>\n text &amp; <img src='../in/a b.png'> so"
        "<p hidden>secret<img src=no.png>"
        "<p>Two<br>lines<div style='display: none'><div>x</div>y</div><ul><li>a<li>b</ul><table><tr><td>1<td>2<tr><td>3"
        "</table><pre>  x\n    y</pre><svg><text>drawn</text></svg>"
        "<figure><img src=sub/c.jpg><figcaption>Blue</figcaption>"
    )
    (row,), refused = read(images, "two.htm", text, max_images=2)
    assert not refused
    assert row.text == (
        f"Head\n\nOne bold text & {PLACEHOLDER} so\n\nTwo\nlines\n\na\nb\n\n1\t2\n3\n\n  x\n    y\n\n"
        f"{PLACEHOLDER}\n\nBlue"
    )
    assert row.images == [RED, BLUE]
    assert read_html('<base href="http://example.org/"><img src="x.png">')[0].address == "http://example.org/x.png"
    assert read_html("a < b <img") == ["a < b <img"]


def test_pages_of_pdf_in_reading_order(tmp_path):
    left, right = picture("red", (60, 40), "JPEG"), picture("blue", (80, 40), "JPEG")
    columns = [(50, 700, "First line"), (50, 685, "second line"), (50, 400, "Below red")]
    columns += [(320, 700, "Right column"), (320, 400, "Below blue")]
    # In the file, the pictures come last and in the wrong order.
    pages = [[*columns, (320, 500, 80, 40, right), (50, 500, 60, 40, left)], [(50, 700, "Only text")], []]
    rows, refused = read(tmp_path, "a.pdf", pdf_bytes(pages), max_images=2)
    assert [row.text for row in rows] == [
        f"First line\nsecond line\n\n{PLACEHOLDER}\n\nBelow red\n\nRight column\n\n{PLACEHOLDER}\n\nBelow blue",
        "Only text",
    ]
    # The very bytes of the file.
    assert rows[0].images == [left, right]
    assert [(row.page, row.part) for row in rows] == [(1, 0), (2, 1)]
    assert refused == [Refusal("empty_page", "a.pdf, page 3 has neither text nor images.")]

    rows, refused = read(tmp_path, "a.pdf", pdf_bytes(pages), pdf_as_pages=True, pdf_dpi=72)
    assert [row.text[: len(PLACEHOLDER) + 12] for row in rows][:2] == [
        f"{PLACEHOLDER}\n\nFirst line",
        f"{PLACEHOLDER}\n\nOnly text",
    ]
    assert not refused and [row.page for row in rows] == [1, 2, 3]
    page = Image.open(io.BytesIO(rows[0].images[0]))
    assert page.size == (600, 800) and page.format == "JPEG"
    # The red picture, in the middle.
    assert page.getpixel((80, 800 - 520))[0] > 240 and page.getpixel((80, 800 - 520))[1] < 20


def test_images_of_pdf_that_are_no_plain_jpeg_are_drawn(tmp_path):
    buffer = io.BytesIO()
    Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(buffer, "PDF")
    (row,), refused = read(tmp_path, "cmyk.pdf", buffer.getvalue())
    image = Image.open(io.BytesIO(row.images[0]))
    assert not refused and image.format == "PNG" and image.mode == "RGB" and image.size == (60, 40)
    assert image.getpixel((30, 20))[0] > 200 and max(image.getpixel((30, 20))[1:]) < 60


@pytest.mark.parametrize(
    "address, reason, message",
    [
        (
            "http://example.org/x.png",
            "remote_image",
            r"sub/one.html: image 0: 'http://example.org/x.png' is on the net",
        ),
        ("//example.org/x.png", "remote_image", "on the network, and nothing is fetched"),
        ("../../secret.png", "unsafe_path", r"'../../secret.png' leads out of the folder"),
        ("..%2f..%2fsecret.png", "unsafe_path", r"'../../secret.png' leads out of the folder"),
        ("..\\..\\secret.png", "unsafe_path", r"leads out of the folder"),
        ("/etc/hostname", "unsafe_path", r"'/etc/hostname' is not a path relative to its file"),
        ("file:///etc/hostname", "unsafe_path", r"is not a path below the folder"),
        ("a%00b.png", "unsafe_path", "is not a path relative to its file"),
        ("link.png", "unsafe_path", r"'link.png' leads out of the folder"),
        ("folder/secret.png", "unsafe_path", r"leads out of the folder"),
        ("none.png", "missing_image", r"image 0: there is no file 'none.png'"),
        ("", "no_source", r"image 0 has no address"),
        ("text.png", "undecodable_image", r"image 0 cannot be decoded \(allowed are AVIF.*\): cannot identify"),
        ("half.png", "undecodable_image", r"image 0 cannot be decoded"),
        ("drawing.eps", "undecodable_image", r"image 0 cannot be decoded"),
        ("thin.png", "aspect_ratio", r"of 30 x 6030 pixels has an aspect ratio over 200"),
        ("dot.png", "too_small", r"image 0 has 1 x 1 pixels, less than min_image_side=28"),
        ("large.png", "image_too_large", r"image 0 has \d+ bytes, more than max_image_bytes=3000"),
        (data_uri(bytes(3003)), "image_too_large", "has 3003 bytes, more than max_image_bytes=3000"),
        ("data:image/png;base64,%%%", "bad_data_uri", "image 0 is not valid base64"),
        ("data:text/html,x", "bad_data_uri", "image 0 is not a data URI of an image: 'data:text/html,x'"),
    ],
)
def test_images_that_are_refused(tmp_path, address, reason, message):
    root = tmp_path / "in/sub"
    outside = write(tmp_path / "secret.png", RED)
    write(tmp_path / "other/secret.png", RED)
    write(root / "text.png", "no image")
    write(root / "half.png", RED[: len(RED) // 2])
    write(root / "drawing.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\nshowpage\n%%EOF\n")
    write(root / "thin.png", picture("red", (30, 6030)))
    write(root / "dot.png", picture("red", (1, 1)))
    noise = Image.effect_noise((64, 64), 99)
    noise.save(root / "large.png")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path / "other")
    (row,), (refused,) = read(
        tmp_path, "sub/one.html", f'before <img src="{address}" alt="x"> after', max_image_bytes=3000
    )
    assert refused.reason == reason and row.text.split() == ["before", "after"] and not row.images
    assert re.search(message, refused.message), refused.message


def test_a_decompression_bomb_is_refused_before_it_is_decoded(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    rows, (refused,) = read(images, "one.md", "text ![](<a b.png>)")
    assert refused.reason == "decompression_bomb" and "PIL.Image.MAX_IMAGE_PIXELS is 2000" in refused.message
    assert rows[0].text == "text"


def test_data_uris_and_links_that_stay_inside(images):
    (images / "in/inside.png").symlink_to(images / "in/a b.png")
    text = f"![]({data_uri(RED)}) ![](inside.png) ![](sub/../a%20b.png?x=1#y)"
    (row,), refused = read(images, "one.md", text, max_images=3)
    assert row.images == [RED, RED, RED] and not refused


@pytest.mark.parametrize(
    "name, content, reason, message",
    [
        ("a.md", b"\xff\xfe\x00", "not_utf8", r"a.md is not UTF-8 \(invalid start byte at byte 0\)"),
        ("a.md", "x" * 101, "document_too_large", r"a.md has 101 bytes, more than max_document_bytes=100"),
        ("a.md", " \n\n<!-- nothing -->", "empty_document", r"a.md has neither text nor images"),
        ("a.html", "<script>x</script>", "empty_document", r"a.html has neither text nor images"),
        ("a.pdf", b"no PDF", "unreadable_pdf", r"a.pdf cannot be read: .*"),
    ],
)
def test_documents_that_are_refused(tmp_path, name, content, reason, message):
    rows, (refused,) = read(tmp_path, name, content, max_document_bytes=100)
    assert not rows and refused.reason == reason
    assert re.search(message, refused.message), refused.message


def test_what_is_a_document(tmp_path):
    for name in ("b/x.md", "a.HTML", "b.pdf", "c.txt", ".git/x.md", ".hidden.md", "b/y.markdown"):
        write(tmp_path / "in" / name, "x")
    write(tmp_path / "outside.md", "secret")
    (tmp_path / "in/link.md").symlink_to(tmp_path / "outside.md")
    assert list_documents(str(tmp_path / "in")) == ["a.HTML", "b.pdf", "b/x.md", "b/y.markdown", "link.md"]
    config = CPTDatasetConfig(str(tmp_path / "out"), documents=str(tmp_path / "in"))
    (refused,) = read_document("link.md", config)
    assert refused == Refusal("unsafe_path", "link.md is a link that leads out of the folder.")


def test_rows_are_cut_between_paragraphs():
    text = "one one\n\ntwo two\n\nthree three three three\n\nfour"
    rows = list(cut_rows([text], 16, 1))
    assert [row.text for row in rows] == ["one one\n\ntwo two", "three three ", "three three", "four"]
    assert [row.num_cut for row in rows] == [0, 1, 0, 0]
    # An image takes its paragraph along.
    rows = list(cut_rows(["start ", RED, " end\n\nnext ", BLUE, "\n\nlast"], 100, 1))
    assert [row.text for row in rows] == [f"start {PLACEHOLDER} end", f"next {PLACEHOLDER}\n\nlast"]
    assert [row.images for row in rows] == [[RED], [BLUE]]
    # A paragraph of more images than a row may have.
    rows = list(cut_rows([RED, BLUE, "text ", RED], 100, 2))
    assert [(row.text, row.num_cut) for row in rows] == [(f"{PLACEHOLDER}{PLACEHOLDER}text ", 1), (PLACEHOLDER, 0)]
    # Nothing is lost, and no row is longer than allowed.
    words = " ".join(f"word{number}" for number in range(500))
    rows = list(cut_rows([words], 64, 1))
    assert "".join(row.text for row in rows) == words and max(len(row.text) for row in rows) <= 64
    assert [row.text for row in cut_rows(["x" * 10], 4, 1)] == ["xxxx", "xxxx", "xx"]


def test_literal_placeholders_stand_for_no_image(images):
    (row,), _ = read(images, "one.md", f"about `{PLACEHOLDER}` and ![](<a b.png>) <|image_pad|>")
    assert row.text == f"about `{ESCAPED_PLACEHOLDER}` and {PLACEHOLDER} <|image_pad|>"
    assert row.num_escaped == 1 and row.images == [RED]
    # Neither when something between its halves is taken out, nor written as entities.
    for name, text in {
        "two.md": "<|vision_start|><!-- x --><|image_pad|><|vision_end|>",
        "three.md": "<|vision_start|>![](none.png)<|image_pad|><|vision_end|>",
        "four.html": "&lt;|vision_start|&gt;<b>&lt;|image_pad|&gt;</b>&lt;|vision_end|&gt;",
    }.items():
        (row,), _ = read(images, name, text)
        assert row.text == ESCAPED_PLACEHOLDER and row.num_escaped == 1 and not row.images


def test_pdf_without_pypdfium2_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "in/a.pdf", pdf_bytes([[(50, 700, "x")]]))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pypdfium2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install moca\[pdf\]"):
        build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "out"), documents=str(tmp_path / "in")))
    assert not (tmp_path / "out").exists()


def test_markup_without_images_is_itself():
    assert read_markdown("a *b* [c](d)\n") == ["a *b* [c](d)\n"]
    assert read_markdown("![x](y (1).png) ![a [b] c](<d e>)") == [
        "![x](y (1).png) ",
        ImageReference("d e", "a [b] c"),
    ]
    assert read_markdown("") == []
