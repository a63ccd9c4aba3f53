"""Page retrieval on files of one's own, as a task of mteb: the same path as ViDoRe, from a folder.

A folder holds, for a split, either two Parquet files,

    pages-test.parquet      page_id (text), image
    queries-test.parquet    query_id (text), query (text), page_ids (list of texts: the pages that answer)

or one, a row a pair; a query of several pages has several rows, and a page that answers nothing a row without a query:

    test.parquet            query (text or null), image

Images are encoded bytes, as plain binary or as `datasets` writes them. Other columns are left alone.
"""

import hashlib
import io
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Image
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image as PILImage

PAGES = ("page_id", "image")
QUERIES = ("query_id", "query", "page_ids")
PAIRS = ("query", "image")


class LocalPages(AbsTaskRetrieval):
    """Task of mteb over the files of a folder; [`local_pages`] makes one.

    Args:
        files (`list[pathlib.Path]`): pages and queries, or pairs.
        kwargs: see `mteb.abstasks.AbsTask`.
    """

    def __init__(self, files, **kwargs):
        super().__init__(**kwargs)
        self.files = files

    def load_data(self, num_proc=None, **kwargs):
        """Read the files.

        Args:
            num_proc (`int`, *optional*), kwargs: of mteb, not needed here.

        Raises:
            ValueError: a column is missing, an image, query or id is missing, broken or there twice, or a query has no
                page or one that is not there; the message names file and row.
        """
        if self.data_loaded:
            return
        pages, queries, relevant = (_from_pairs if len(self.files) == 1 else _from_tables)(*self.files)
        split = RetrievalSplitData(queries=queries, corpus=pages, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {self.metadata.eval_splits[0]: split}}
        self.data_loaded = True


def local_pages(folder, split="test", *, name=None):
    """Return page retrieval on a folder of Parquet files as a task of mteb.

    Args:
        folder (`str` or `os.PathLike`): holds `pages-{split}.parquet` and `queries-{split}.parquet`, or
            `{split}.parquet`, as the head of this file describes them.
        split (`str`, defaults to `"test"`): which files.
        name (`str`, *optional*): of the task, in results; the folder's name and the split when omitted.

    Returns:
        [`LocalPages`]: for `mteb.evaluate`. Its main score is nDCG@5, as in ViDoRe v2; its revision is a hash of the
            files.

    Raises:
        ValueError: the folder has not these files, or has both kinds.

    Example:

    ```python
    >>> mteb.evaluate(model_meta("moca-3b"), local_pages("my_pages"))
    ```
    """
    folder = Path(folder).resolve()
    tables = [folder / f"{kind}-{split}.parquet" for kind in ("pages", "queries")]
    pairs = [folder / f"{split}.parquet"]
    found = [files for files in (tables, pairs) if all(file.is_file() for file in files)]
    if len(found) != 1:
        given = sorted(file.name for file in folder.glob("*.parquet"))
        raise ValueError(
            f"{folder} must hold either {tables[0].name} and {tables[1].name}, or {pairs[0].name}, for split "
            f"{split!r}; its Parquet files are {given}."
        )
    metadata = TaskMetadata(
        name=name or f"{folder.name}-{split}",
        description=f"Retrieve the pages of {folder.name} that answer a query.",
        reference=None,
        dataset={"path": folder.name, "revision": _fingerprint(found[0])},
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=[split],
        # mteb must be told a language, and nothing here depends on it.
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_5",
    )
    # mteb keeps what a task is in its class.
    return type("LocalPages", (LocalPages,), {"metadata": metadata})(found[0])


def _from_tables(pages_file, queries_file):
    pages = _read_pages(pages_file, PAGES).rename_column("page_id", "id")
    page_ids = _unique(pages_file, "page_id", pages["id"])
    _check_columns(queries_file, QUERIES)
    rows = pq.read_table(queries_file, columns=list(QUERIES)).to_pylist()
    query_ids = _unique(queries_file, "query_id", [row["query_id"] for row in rows])
    relevant = {}
    for number, row in enumerate(rows):
        _check_query(queries_file, number, row["query"])
        if not row["page_ids"]:
            raise ValueError(f"{queries_file}, row {number}: query {row['query_id']!r} has no page_ids.")
        if unknown := [page for page in row["page_ids"] if page not in page_ids]:
            raise ValueError(f"{queries_file}, row {number}: pages {unknown} are not in {pages_file.name}.")
        relevant[row["query_id"]] = dict.fromkeys(row["page_ids"], 1)
    queries = Dataset.from_dict({"id": list(query_ids), "text": [row["query"] for row in rows]})
    return pages, queries, relevant


def _from_pairs(file):
    rows = _read_pages(file, PAIRS)
    page_of_row, first_rows = [], {}
    for number, row in enumerate(rows.select_columns("image").cast_column("image", Image(decode=False))):
        page_of_row.append(hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16])
        first_rows.setdefault(page_of_row[-1], number)
    relevant = {}
    for number, (query, page) in enumerate(zip(rows["query"], page_of_row)):
        if query is not None:
            _check_query(file, number, query)
            relevant.setdefault(query, {})[page] = 1
    pages = rows.select(list(first_rows.values())).select_columns("image").add_column("id", list(first_rows))
    # A text may be long or hold anything: as an id it is its number.
    queries = Dataset.from_dict({"id": [f"q{number}" for number in range(len(relevant))], "text": list(relevant)})
    return pages, queries, {f"q{number}": pages for number, pages in enumerate(relevant.values())}


def _read_pages(file, columns):
    """Return columns of a file, every image seen to be one; pixels are not decoded here."""
    _check_columns(file, columns)
    rows = Dataset.from_parquet(str(file), columns=list(columns)).cast_column("image", Image(decode=False))
    for number, row in enumerate(rows.select_columns("image")):
        content = (row["image"] or {}).get("bytes")
        if not content:
            raise ValueError(f"{file}, row {number} has no image: allowed are encoded bytes.")
        try:
            PILImage.open(io.BytesIO(content)).close()
        except OSError as error:
            raise ValueError(f"{file}, row {number}: the image cannot be read ({error}).") from error
    return rows.cast_column("image", Image())


def _check_columns(file, columns):
    names = pq.read_schema(file).names
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{file} lacks the columns {missing}; it has {names}.")


def _check_query(file, number, query):
    if not query or not query.strip():
        raise ValueError(f"{file}, row {number}: the query must be a text that is not empty, got {query!r}.")


def _unique(file, column, values):
    rows = {}
    for number, value in enumerate(values):
        if not value or value in rows:
            what = "is missing" if not value else f"{value!r} is that of row {rows[value]} already"
            raise ValueError(f"{file}, row {number}: the {column} {what}.")
        rows[value] = number
    return rows


def _fingerprint(files):
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:40]


__all__ = ["LocalPages", "local_pages"]
