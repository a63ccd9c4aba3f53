"""Small tasks in mteb's own format, made of code: text, images and both, on either side.

As a script it is mteb's command line with these tasks in it: `python mteb_tasks.py run -m FOLDER -t TinyText`.
"""

import io

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image

NUM_QUERIES, NUM_DOCUMENTS = 6, 24
WORDS = ["tides", "sea", "sky", "page", "picture", "shows", "harbour", "glacier"]
FACTS = {
    "description": "Made by a test.",
    "reference": None,
    "dataset": {"path": "none", "revision": "none"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": ("2025-01-01", "2025-01-01"),
    "dialect": [],
    "domains": [],
    "task_subtypes": [],
    "license": "cc0-1.0",
    "annotations_creators": "derived",
    "sample_creation": "created",
    "bibtex_citation": "",
}


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 4), generator=generator).tolist()
    return [" ".join([str(index), *(WORDS[word] for word in row)]) for index, row in enumerate(rows)]


def images(count, seed):
    """Return noise of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(28 * (1 + index % 3), 28 * (1 + index % 2)) for index in range(count)]
    pixels = [torch.randint(256, (height, width, 3), generator=generator).byte() for height, width in sizes]
    return [Image.fromarray(values.numpy()) for values in pixels]


def side(kinds, count, seed):
    """Return the columns of one side: `kinds` is "t", "i" or "it", as in mteb's categories."""
    columns = {"id": [f"{seed}-{index}" for index in range(count)]}
    if "t" in kinds:
        columns["text"] = texts(count, seed)
    if "i" in kinds:
        columns["image"] = images(count, seed)
    return columns


class TinyRetrieval(AbsTaskRetrieval):
    """Every query has two answers, chosen without looking: what counts is that all agree on the score."""

    def load_data(self, num_proc=None, **kwargs):
        queries, documents = (
            Dataset.from_dict(side(kinds, count, seed))
            for kinds, count, seed in zip(self.metadata.category.split("2"), (NUM_QUERIES, NUM_DOCUMENTS), (1, 2))
        )
        relevant = {f"1-{query}": {f"2-{answer}": 1 for answer in answers(query)} for query in range(NUM_QUERIES)}
        split = RetrievalSplitData(queries=queries, corpus=documents, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def answers(query):
    return [3 * query, 3 * query + 1]


def retrieval(name, category, task_type="Any2AnyRetrieval"):
    kinds = {"t": "text", "i": "image"}
    modalities = [kinds[letter] for letter in "ti" if letter in category.split("2")[0] + category.split("2")[1]]
    metadata = TaskMetadata(
        name=name, type=task_type, category=category, modalities=modalities, main_score="ndcg_at_10", **FACTS
    )
    return type(name, (TinyRetrieval,), {"metadata": metadata})


TinyText = retrieval("TinyText", "t2t", "Retrieval")
TinyTextToImage = retrieval("TinyTextToImage", "t2i")
TinyImageToText = retrieval("TinyImageToText", "i2t")
TinyBothToImage = retrieval("TinyBothToImage", "it2i")
TinyTextToBoth = retrieval("TinyTextToBoth", "t2it")
TinyPages = retrieval("TinyPages", "t2i", "DocumentUnderstanding")
RETRIEVAL = (TinyText, TinyTextToImage, TinyImageToText, TinyBothToImage, TinyTextToBoth, TinyPages)


class TinySTS(AbsTaskSTS):
    """Pairs of images with made-up similarities."""

    metadata = TaskMetadata(
        name="TinySTS",
        type="VisualSTS(eng)",
        category="i2i",
        modalities=["image"],
        main_score="cosine_spearman",
        **FACTS,
    )
    column_names = ("first", "second")

    def load_data(self, num_proc=None, **kwargs):
        pairs = {"first": images(12, 3), "second": images(12, 4), "score": STS_SCORES}
        rows = Dataset.from_dict(pairs)
        for column in self.column_names:
            rows = rows.cast_column(column, datasets.Image())
        self.dataset = {"test": rows}
        self.data_loaded = True


STS_SCORES = [0.0, 4.5, 1.0, 3.0, 2.5, 5.0, 0.5, 3.5, 2.0, 4.0, 1.5, 3.2]


# Page retrieval from a folder.
NUM_PAGES, QUERIES = 20, ["the sea", "a sky page", "tides of the harbour", "what shows the picture", "7 glaciers"]
ANSWERS = [[2], [5, 6], [0], [19, 3, 4], [11]]


def encode(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_tables(folder, **columns):
    """Write pages and queries as binary columns; `columns` replaces some."""
    folder.mkdir(exist_ok=True)
    made = {
        "page_id": [f"p{page}" for page in range(NUM_PAGES)],
        "image": [encode(image) for image in images(NUM_PAGES, 3)],
        "query_id": [f"q{query}" for query in range(len(QUERIES))],
        "query": QUERIES,
        "page_ids": [[f"p{page}" for page in pages] for pages in ANSWERS],
    } | columns
    for name, keys in (("pages", ("page_id", "image")), ("queries", ("query_id", "query", "page_ids"))):
        table = {key: made[key] for key in keys if made[key] is not None}
        pq.write_table(pa.table(table), folder / f"{name}-test.parquet")
    return folder


if __name__ == "__main__":
    from mteb.get_tasks import _TASKS_REGISTRY

    from hub_cards.mteb_run import main

    _TASKS_REGISTRY.update({task.metadata.name: task for task in (*RETRIEVAL, TinySTS)})
    main()
