"""Pages of one's own as a task of mteb: what is wrong is refused by file and row; scores are in test_mteb_prompts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("mteb")

from hub_cards.mteb_pages import local_pages
from tests.hub_cards.mteb_tasks import ANSWERS, NUM_PAGES, QUERIES, encode, images, write_tables


def test_a_folder_of_tables_is_a_task(tmp_path):
    task = local_pages(write_tables(tmp_path / "mine"))
    assert task.metadata.name == "mine-test" and task.metadata.dataset["path"] == "mine"
    task.load_data()
    split = task.dataset["default"]["test"]
    assert split["queries"]["text"] == QUERIES
    assert split["relevant_docs"] == {
        f"q{query}": {f"p{page}": 1 for page in pages} for query, pages in enumerate(ANSWERS)
    }
    assert [page.size for page in split["corpus"]["image"]] == [page.size for page in images(NUM_PAGES, 3)]
    changed = local_pages(write_tables(tmp_path / "mine", query=QUERIES[::-1])).metadata.dataset["revision"]
    assert changed != task.metadata.dataset["revision"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"page_ids": None}, r"queries-test.parquet lacks the columns \['page_ids'\]"),
        ({"image": [b"none"] * NUM_PAGES}, "pages-test.parquet, row 0: the image cannot be read"),
        ({"image": [b""] * NUM_PAGES}, "row 0 has no image: allowed are encoded bytes"),
        ({"page_id": ["p0"] * NUM_PAGES}, "row 1: the page_id 'p0' is that of row 0 already"),
        ({"query_id": ["q0", None, "q2", "q3", "q4"]}, "row 1: the query_id is missing"),
        ({"query": ["a", "b", " ", "c", "d"]}, "row 2: the query must be a text that is not empty, got ' '"),
        ({"page_ids": [["p0"], [], ["p1"], ["p2"], ["p3"]]}, "row 1: query 'q1' has no page_ids"),
        ({"page_ids": [["p0"], ["p99"], ["p1"], ["p2"], ["p3"]]}, r"row 1: pages \['p99'\] are not in pages-test"),
    ],
)
def test_pages_that_are_wrong_are_refused(tmp_path, columns, message):
    task = local_pages(write_tables(tmp_path, **columns))
    with pytest.raises(ValueError, match=message):
        task.load_data()


def test_folders_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold either pages-dev.parquet .* Parquet files are \['pages-test"):
        local_pages(write_tables(tmp_path / "tables"), split="dev")
    pq.write_table(pa.table({"query": [""], "image": [encode(images(1, 0)[0])]}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="row 0: the query must be a text"):
        local_pages(tmp_path).load_data()
    write_tables(tmp_path)
    with pytest.raises(
        ValueError, match="must hold either pages-test.parquet and queries-test.parquet, or test.parquet"
    ):
        local_pages(tmp_path)
