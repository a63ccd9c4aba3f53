"""The study's data: Parquet files of real text, pictures and pages, as stage 1, stage 2 and the evaluation take them.

The folder (see `docs/study.md`) holds `cpt`, `cpt_text`, `caption`, `photo_cls` and `text_pairs`, each with `train`,
`dev` and `test` files, `visdoc/pages-*` and `visdoc/queries-*`, and `tokenizer`.
"""

import hashlib
import re
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
FILES = ("cpt/{}", "cpt_text/{}", "caption/{}", "photo_cls/{}", "text_pairs/{}", "visdoc/pages-{}", "visdoc/queries-{}")
# Of the paper's three kinds of pairs; "pages" and "sections" are long-form documents.
FAMILIES = {
    "long-form": ("pages", "sections"),
    "multimodal": ("captions", "photos"),
    "text": ("passages",),
}
TASKS = tuple(task for tasks in FAMILIES.values() for task in tasks)
# Of a task in stage 2, so that none has most of the batches.
ROWS_PER_TASK = 1300
HEADING = re.compile(r"^#+ (.+)$")
SENTENCE = re.compile(r".+?(?:[.!?]\s+|\n\n|$)", re.DOTALL)
BARE_HEADINGS = ("Introduction", "Thinking Ahead", "Summary", "Exercises", "Discussions")


def read(folder, name):
    """Return the rows of a Parquet file of the data folder, in their order."""
    return pyarrow.parquet.read_table(_file(folder, f"{name}.parquet")).to_pylist()


def fingerprint(folder):
    """Return the SHA-256 of all files that the study reads."""
    digest = hashlib.sha256()
    for split in ("train", "dev", "test"):
        for name in FILES:
            digest.update(_file(folder, f"{name.format(split)}.parquet").read_bytes())
    for path in sorted(_file(folder, "tokenizer/vocab.json").parent.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pieces(text, images, num_characters):
    """Cut a document after sentences into pieces of at least so many characters, each with its images."""
    images, result, current = iter(images), [], ""
    for sentence in SENTENCE.findall(text):
        current += sentence
        if len(current.replace(PLACEHOLDER, "")) >= num_characters:
            result.append(current)
            current = ""
    if current.replace(PLACEHOLDER, "").strip() or not result:
        result.append(current)
    else:
        result[-1] += current
    return [{"text": piece, "images": [next(images) for _ in range(piece.count(PLACEHOLDER))]} for piece in result]


def unlabelled_rows(folder, split, num_characters):
    """Return stage 1's rows as a data set (`text`, `images`, `length`): interleaved text, plain text, captions.

    Args:
        num_characters: length of the pieces that documents are cut into.
    """
    rows = [
        piece
        for name in ("cpt", "cpt_text")
        for row in read(folder, f"{name}/{split}")
        for piece in pieces(row["text"], row["images"], num_characters)
    ]
    rows += [
        {"text": f"{PLACEHOLDER}\n{row['caption']}", "images": [row["image"]]}
        for row in read(folder, f"caption/{split}")
        if row["caption"]
    ]
    for row in rows:
        row["length"] = len(row["text"])  # rows of like length share a batch
    features = {"text": Value("string"), "images": List(Value("binary")), "length": Value("int64")}
    return Dataset.from_list(rows, features=Features(features))


def sections(folder, split):
    """Yield (heading, {"text", "image"}) for the interleaved documents whose heading is theirs alone."""
    found = {}
    for row in read(folder, f"cpt/{split}"):
        first, _, body = row["text"].partition("\n")
        heading = HEADING.match(first)
        if heading and heading[1] not in BARE_HEADINGS:
            text = body.replace(PLACEHOLDER, " ").strip()
            found.setdefault(heading[1], []).append({"text": text, "image": row["images"][0]})
    return [(heading, documents[0]) for heading, documents in found.items() if len(documents) == 1]


def searches(folder, split):
    """Return by task what is searched: queries, different candidates, and for each query those that answer it.

    A side is a dict with `text`, `image` (encoded) or both.
    """
    found = {}
    for task in TASKS:
        pairs = list(_pairs(folder, split, task))
        if task == "pages":
            # Pages that nobody asks for are candidates, too.
            pairs += [(None, {"image": page["image"]}) for page in read(folder, f"visdoc/pages-{split}")]
        candidates, queries, relevant = {}, {}, {}
        for query, positive in pairs:
            place = candidates.setdefault(_key(positive), (len(candidates), positive))[0]
            if query is not None:
                queries.setdefault(_key(query), query)
                relevant.setdefault(_key(query), set()).add(place)
        found[task] = {
            "queries": list(queries.values()),
            "candidates": [candidate for _, candidate in candidates.values()],
            "relevant": [sorted(relevant[key]) for key in queries],
        }
    return found


def labelled_pairs(folder, split, rows_per_class, leave_out=()):
    """Return stage 2's data sets by task, with columns `query` and `positive`; of larger ones rows at equal distances.

    Args:
        rows_per_class: most photos of a class: no more than there are batches, which have different classes each.
        leave_out: families of `FAMILIES` that are not there.
    """
    result = {}
    for family, tasks in FAMILIES.items():
        for task in tasks if family not in leave_out else ():
            pairs = list(_pairs(folder, split, task, rows_per_class))
            pairs = pairs[:: -(-len(pairs) // ROWS_PER_TASK)]
            columns = {"query": [query for query, _ in pairs], "positive": [positive for _, positive in pairs]}
            features = {}
            for name, values in columns.items():
                columns[name], features[name] = _column(values)
            result[task] = Dataset.from_dict(columns, features=Features(features))
    return result


def _file(folder, name):
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{path} is not there: --data must name a folder with the files that docs/study.md lists.")
    return path


def _pairs(folder, split, task, rows_per_class=None):
    """Yield (query, positive) of a task."""
    if task == "pages":
        pages = {page["page_id"]: page["image"] for page in read(folder, f"visdoc/pages-{split}")}
        for row in read(folder, f"visdoc/queries-{split}"):
            for page in row["page_ids"]:
                yield {"text": row["query"]}, {"image": pages[page]}
    elif task == "sections":
        for heading, document in sections(folder, split):
            yield {"text": heading}, document
    elif task == "captions":
        for row in read(folder, f"caption/{split}"):
            if row["caption"]:
                yield {"text": row["caption"]}, {"image": row["image"]}
    elif task == "photos":
        counts = {}
        for row in read(folder, f"photo_cls/{split}"):
            counts[row["label_text"]] = counts.get(row["label_text"], 0) + 1
            if rows_per_class is None or counts[row["label_text"]] <= rows_per_class:
                yield {"image": row["image"]}, {"text": row["label_text"]}
    else:
        for row in read(folder, f"text_pairs/{split}"):
            yield {"text": row["query"]}, {"text": row["positive"]}


def _key(side):
    return side.get("text"), side.get("image")


def _column(values):
    """Return values as a data set holds them, with their feature: texts, encoded images, or both in a struct."""
    if len(values[0]) == 2:
        return values, {"text": Value("string"), "image": Image()}
    (key,) = values[0]
    return [value[key] for value in values], Value("string") if key == "text" else Image()
