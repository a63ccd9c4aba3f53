"""Real data for the demo, read from installed packages: no network, no downloads.

Two kinds of input, both split once and for all so that nothing seen while training is met again at test time:

- prose of Python's language reference (`pydoc_data.topics`), as text and as page images drawn with Pillow. Pools are
  disjoint by section heading, and a paragraph that stands under several headings belongs to the first one only;
- scans of handwritten digits (scikit-learn's `load_digits`), four to an image. Pools are disjoint by scan.

Pools: `train` (shared by the `backbone` and `cpt` splits, unlabelled), `cl` (few labelled pairs), `dev` (for choosing
settings) and `test`.
"""

import io
import re
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
SPLITS = ("backbone", "cpt", "cl", "dev", "test")
POOLS = {"backbone": "train", "cpt": "train", "cl": "cl", "dev": "dev", "test": "test"}
# The share of sections and of scans that each pool gets, in percent.
POOL_SHARES = {"train": 54, "cl": 18, "dev": 8, "test": 20}
POOL_OF_PERCENT = tuple(pool for pool, share in POOL_SHARES.items() for _ in range(share))
# At most this many labelled rows a task.
PAIR_LIMITS = {"backbone": 200, "cpt": 200, "cl": 200, "dev": 80, "test": 150}

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_PER_STRIP = 4
SCAN_SIZE = 28
# One character fills 7x14 pixels, so that a 14x14 patch holds two characters exactly and an image token of 28x28
# pixels holds four characters of two lines.
CELL_WIDTH, CELL_HEIGHT = 7, 14
PAGE_COLUMNS, PAGE_LINES = 24, 8
SHORT_PAGE_LINES = 4
STOP_WORDS = frozenset(
    "about above after also any are because been before being below both but can cannot could does each either "
    "for from had has have having how into its itself may more most must not only other over same see should some "
    "such than that the their them then there these they this those through under until use used uses using was "
    "were what when where whether which while will with within without would your".split()
)


def _pool(split):
    if split not in POOLS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return POOLS[split]


def to_ascii(text):
    """Return the text in ASCII on one line: the bitmap font has no other letters."""
    text = text.translate(str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "-"}))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return " ".join(text.split())


def is_prose(text):
    """Return whether a paragraph is prose, not code, grammar or a table."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= 60 and letters / len(text) > 0.85 and not text.startswith((">>>", "+-", "|"))


@lru_cache
def sections(pool):
    """Return the documents of a pool.

    Args:
        pool (`str`): `"train"`, `"cl"`, `"dev"` or `"test"`.

    Returns:
        `dict[str, list[str]]`: the prose paragraphs under each section heading.
    """
    from pydoc_data.topics import topics

    documents, seen = {}, set()
    for topic in sorted(topics):
        heading = topic
        for block in re.split(r"\n\s*\n", topics[topic]):
            lines = block.strip("\n").split("\n")
            if len(lines) >= 2 and re.fullmatch(r"([*=\-^~\"])\1{2,}", lines[1].strip()):
                heading = to_ascii(lines[0])
                continue
            paragraph = to_ascii(block)
            if paragraph in seen or not is_prose(paragraph):
                continue
            seen.add(paragraph)
            documents.setdefault(heading, []).append(paragraph)
    # A checksum of the heading, unlike a shuffle, gives a section the same pool in every version of Python.
    return {
        heading: paragraphs
        for heading, paragraphs in documents.items()
        if POOL_OF_PERCENT[zlib.crc32(heading.encode()) % 100] == pool
    }


@lru_cache
def digit_scans(pool):
    """Return the scans of a pool as `(scans [n, 8, 8] with values 0 to 16, labels [n])`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    members = [index for rank, index in enumerate(order) if POOL_OF_PERCENT[rank * 100 // len(order)] == pool]
    return digits.images[members], digits.target[members]


@lru_cache
def _glyph(character):
    cell = Image.new("L", (CELL_WIDTH, CELL_HEIGHT), 255)
    ImageDraw.Draw(cell).text((0, 1), character, font=ImageFont.load_default_imagefont(), fill=0)
    return np.asarray(cell)


def wrap(text, columns=PAGE_COLUMNS):
    """Break a text into lines of at most `columns` characters, at spaces where there are any."""
    lines, line = [], ""
    for word in text.split():
        while word:
            room = columns - len(line) - bool(line)
            if len(word) <= room:
                line, word = f"{line} {word}" if line else word, ""
            elif line:
                lines.append(line)
                line = ""
            else:
                line, word = word[:columns], word[columns:]
    return [*lines, line] if line else lines


def pages(text, lines=PAGE_LINES, columns=PAGE_COLUMNS):
    """Split a text into the texts of consecutive pages of `lines` lines, the last one perhaps shorter."""
    wrapped = wrap(text, columns)
    return [" ".join(wrapped[start : start + lines]) for start in range(0, len(wrapped), lines)]


def render_page(text, lines=PAGE_LINES, columns=PAGE_COLUMNS):
    """Draw a text on a page, black on white; what does not fit is an error.

    Args:
        text (`str`): ASCII text.
        lines (`int`): lines of the page, an even number.
        columns (`int`): characters of a line, a multiple of 4.

    Returns:
        `PIL.Image.Image`: RGB, `7 * columns` x `14 * lines` pixels.
    """
    if lines % 2 or columns % 4:
        raise ValueError(f"lines must be a multiple of 2 and columns of 4, got {lines} lines and {columns} columns")
    wrapped = wrap(text, columns)
    if len(wrapped) > lines:
        raise ValueError(f"text must fit on a page of {lines} lines, got {len(wrapped)} lines")
    canvas = np.full((lines * CELL_HEIGHT, columns * CELL_WIDTH), 255, dtype=np.uint8)
    for row, line in enumerate(wrapped):
        for column, character in enumerate(line):
            top, left = row * CELL_HEIGHT, column * CELL_WIDTH
            canvas[top : top + CELL_HEIGHT, left : left + CELL_WIDTH] = _glyph(character)
    return Image.fromarray(canvas).convert("RGB")


def digit_strip(scans):
    """Put 8x8 scans (values 0 to 16) side by side, each enlarged to 28x28 pixels.

    Args:
        scans (`Sequence[numpy.ndarray]`): the scans, from left to right.

    Returns:
        `PIL.Image.Image`: RGB, `28 * len(scans)` x 28 pixels.
    """
    tiles = [
        Image.fromarray(np.clip(scan * 16, 0, 255).astype(np.uint8)).resize((SCAN_SIZE, SCAN_SIZE), Image.BILINEAR)
        for scan in scans
    ]
    return Image.fromarray(np.hstack([np.asarray(tile) for tile in tiles])).convert("RGB")


def to_png(image):
    """Return an image as PNG bytes, the form in which unlabelled rows carry their images."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def draw_digits(pool, generator):
    """Draw four scans of a pool at random; return their image and their words."""
    scans, labels = digit_scans(pool)
    chosen = generator.integers(len(labels), size=DIGITS_PER_STRIP)
    return digit_strip(scans[chosen]), " ".join(DIGIT_WORDS[label] for label in labels[chosen])


def pretraining_rows(split, seed):
    """Return the unlabelled, interleaved rows of a split, shuffled.

    Args:
        split (`str`): a name in `SPLITS`.
        seed (`int`): another seed starts the pages at other words and draws other strips of digits.

    Returns:
        `list[dict]`: rows of `text`, with a placeholder where each image stands, and `images`, PNG bytes. A page is
        followed by its own text or by the prose that continues it, a strip of digits by its words; some rows hold two
        images and some none.
    """
    pool, generator = _pool(split), np.random.default_rng((seed, SPLITS.index(split)))
    rows = []

    def digits():
        image, words = draw_digits(pool, generator)
        return f"{PLACEHOLDER}{words}", [image]

    for paragraphs in sections(pool).values():
        words = " ".join(paragraphs).split()
        # A new first word for each seed moves every word to another place of its page.
        chunks = pages(" ".join(words[generator.integers(min(len(words), 30)) :]))
        for position, chunk in enumerate(chunks):
            following = chunks[position + 1] if position + 1 < len(chunks) else ""
            page = f"{PLACEHOLDER}{chunk}", [render_page(chunk)]
            kind = generator.random()
            if kind < 0.5:
                rows.append(page)
            elif kind < 0.7 and following:
                rows.append((f"{PLACEHOLDER}{following}", page[1]))
            elif kind < 0.8:
                half = pages(chunk, SHORT_PAGE_LINES)[0]
                text, images = digits()
                rows.append((f"{PLACEHOLDER}{half}\n{text}", [render_page(half, SHORT_PAGE_LINES), *images]))
            else:
                rows.append((f"{chunk} {following}".strip(), []))
            rows.append(digits())
    order = generator.permutation(len(rows))
    return [{"text": rows[i][0], "images": [to_png(image) for image in rows[i][1]]} for i in order]


@lru_cache
def _document_frequencies():
    paragraphs = [paragraph for part in sections("train").values() for paragraph in part]
    return Counter(word for text in paragraphs for word in set(re.findall(r"[a-z]{4,}", text.lower())))


def key_words(text, count=4):
    """Return the words of a text that are rarest in the training prose, in the order of the text."""
    words = dict.fromkeys(re.findall(r"[A-Za-z]{4,}", text))
    candidates = [word for word in words if word.lower() not in STOP_WORDS]
    rarest = sorted(candidates, key=lambda word: _document_frequencies()[word.lower()])[:count]
    return [word for word in candidates if word in rarest]


def pair_rows(split, seed):
    """Return the labelled pairs of a split.

    Args:
        split (`str`): a name in `SPLITS`.
        seed (`int`): which pairs are drawn and in which order.

    Returns:
        `dict[str, list[dict]]`: rows of `query` and `positive`, each `{"text": str, "image": PIL.Image or None}`, by
        task. The positives of a task are all distinct.

        - `page`: a question that names the section and four words -> the image of the page that has them;
        - `digits`: four digit words -> the strip of handwritten digits;
        - `text`: a section's heading and a sentence -> the passage that follows it, as text.
    """
    pool, generator = _pool(split), np.random.default_rng((seed, 100 + SPLITS.index(split)))
    page_rows, text_rows, digit_rows = [], [], {}
    for heading, paragraphs in sections(pool).items():
        for chunk in pages(" ".join(paragraphs)):
            words = key_words(chunk)
            if len(chunk) >= 120 and len(words) == 4:
                question = f'Which page of "{heading}" mentions {", ".join(words[:3])} and {words[3]}?'
                page_rows.append((question, {"text": "", "image": render_page(chunk)}))
        for paragraph in paragraphs:
            sentences = re.split(r"(?<=[.!?:;]) ", paragraph)
            # A sentence and what follows it; the next pair starts behind the passage, so that none overlap.
            while len(sentences) > 1:
                first, passage = sentences[0], pages(" ".join(sentences[1:]))[0]
                if 25 <= len(first) <= 200 and len(passage) >= 50:
                    text_rows.append((f"{heading}: {first}", {"text": passage, "image": None}))
                    rest = " ".join(sentences[1:])[len(passage) :].strip()
                    sentences = re.split(r"(?<=[.!?:;]) ", rest)[1:]
                else:
                    sentences = sentences[1:]
    while len(digit_rows) < PAIR_LIMITS[split]:
        image, words = draw_digits(pool, generator)
        digit_rows[words] = {"text": "", "image": image}

    def draw(rows):
        # A question with two right answers, or an answer to two questions, would make the task unfair.
        by_query, seen = {}, set()
        for query, positive in rows:
            content = positive["image"].tobytes() if positive["image"] else positive["text"]
            if query not in by_query and content not in seen:
                by_query[query] = positive
            seen.add(content)
        rows = list(by_query.items())
        chosen = generator.permutation(len(rows))[: PAIR_LIMITS[split]]
        return [{"query": {"text": rows[i][0], "image": None}, "positive": rows[i][1]} for i in chosen]

    return {"page": draw(page_rows), "digits": draw(digit_rows.items()), "text": draw(text_rows)}
