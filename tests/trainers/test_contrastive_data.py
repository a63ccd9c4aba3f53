"""What may stand in a row of every layout, what is refused, and what becomes of missing and useless negatives."""

import re

import datasets
import pytest
import yaml
from PIL import Image

from tests.conftest import REPOSITORY
from tests.trainers.pair_sources import encoded, published_rows, write_images, write_pages, write_texts
from trainers.contrastive_columns import read_pair
from trainers.contrastive_data import order_columns
from trainers.contrastive_mixture import PairMixture, as_columns
from trainers.contrastive_rows import make_pair, open_pair
from trainers.contrastive_sources import PairMixtureConfig, PairSource
from trainers.row_images import BadRowError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def columns(**settings):
    return PairSource("somewhere", task="pairs", **{"query": "query", "positive": "positive", **settings})


def published(folder="images", layout="moca_pairs", **settings):
    return PairSource("somewhere", task="published", layout=layout, image_folder=str(folder), **settings)


def text(value):
    return {"text": value, "images": []}


def test_columns_are_ordered_by_number():
    names = ["negative_10", "positive", "negative_2", "query"]
    assert order_columns(names, "pairs") == ["query", "positive", "negative_2", "negative_10"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["query", "positive", "id"], r"'pairs' has the columns .*unknown \['id'\], missing \[\]"),
        (["query", "negative_1"], r"missing \['positive'\]"),
        (["query", "positive", "negative"], r"unknown \['negative'\]"),
        (["query", "positive", "negative_0"], r"unknown \['negative_0'\]"),
    ],
)
def test_unknown_and_missing_columns(names, message):
    with pytest.raises(ValueError, match=message):
        order_columns(names, "pairs")


def side_of(value, **settings):
    source = columns(**settings)
    source.trusts_paths = not settings
    return read_pair({"query": value, "positive": "x"}, source, "Row 1")["query"]


def test_values_of_one_column():
    red = Image.new("RGB", (28, 28), "red")
    for empty in (None, "", "  ", {"text": None, "image": None}, {"bytes": None, "path": None}, {"text": " "}):
        assert side_of(empty) is None
    # A text that reads like the address of an image stays a text.
    assert side_of("https://example.org/a.png") == text("https://example.org/a.png")
    assert side_of(red) == {"text": None, "images": [red]}
    assert side_of(b"encoded") == {"text": None, "images": [{"bytes": b"encoded", "path": None}]}
    assert side_of({"text": "a", "image": None}) == text("a")
    both = side_of({"text": "a", "image": [{"bytes": encoded(), "path": "x"}, red]})
    assert both == {"text": "a", "images": [{"bytes": encoded(), "path": None}, red]}


@pytest.mark.parametrize("value", [3, {"text": "a", "audio": 1}, {"text": 3}, ["a"]])
def test_other_values_are_refused(value):
    with pytest.raises(BadRowError, match="Row 1, column 'query': .* must be .* got ") as error:
        side_of(value)
    assert error.value.reason == "wrong_value"


def test_published_pairs(tmp_path):
    write_images(tmp_path, 4)
    rows = published_rows(4)
    pair = make_pair(rows[3], published(tmp_path, num_negatives=4), "row 3")
    query, positive, *negatives = pair.sides
    # The mark of the image goes, since an image stands first.
    assert query == {"text": "find 3", "images": [{"bytes": None, "path": "3.png"}]}
    assert positive == text("it's 3") and negatives[0] == text("no, 3.0")
    assert negatives[2] == {"text": "no, 3.2", "images": [{"bytes": None, "path": "2.png"}]} and negatives[3] is None
    opened = open_pair(pair)
    assert opened[4]["image"].getpixel((5, 5)) == (0, 128, 0) and opened[5] is None
    assert pair.negatives_mask == [True, True, True, False] and pair.tally == [1, 1, 0, 0]
    # Lists as lists, as other files have them.
    as_lists = {**rows[3], "neg_text": ["no, 3.0"], "neg_image_path": [None]}
    assert make_pair(as_lists, published(num_negatives=1), "row 3").sides[2] == text("no, 3.0")
    # Two are used when nothing is said, and those that are not are counted.
    assert make_pair(rows[3], published(), "row 3").tally == [1, 0, 0, 1]


def test_lists_of_differing_lengths_stay_aligned():
    row = {**published_rows(1)[0], "neg_text": "['a', '', 'c']", "neg_image_path": "['', 'b.png']"}
    pair = make_pair(row, published(num_negatives=4), "row 0")
    images = [side and [image["path"] for image in side["images"]] for side in pair.sides[2:]]
    assert images == [[], ["b.png"], [], None]
    assert [side and side["text"] for side in pair.sides[2:]] == ["a", None, "c", None]


@pytest.mark.parametrize(
    "value",
    [
        "open('LEAK', 'w')",
        "{'a': 1}",
        "'a'",
        "[1, 2]",
        "['a'",
        "[" * 400,
        "[open('LEAK', 'w')]",
        "['" + "a" * 1_000_001,
    ],
)
def test_lists_are_parsed_and_nothing_else(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {**published_rows(8)[7], "neg_text": value}
    message = "'published', row 7, column 'neg_text': (expected a list of strings|a list literal of 1000003 characters)"
    with pytest.raises(BadRowError, match=message) as error:
        make_pair(row, published(), "row 7")
    assert error.value.reason == "bad_list" and not (tmp_path / "LEAK").exists()


def test_mmeb_train_has_one_negative_or_none():
    row = {**published_rows(1)[0], "neg_text": "['a list', 'to read as text']", "neg_image_path": ""}
    source = published(layout="mmeb_train", num_negatives=1)
    assert make_pair(row, source, "row").sides[2] == text("['a list', 'to read as text']")
    assert make_pair({**row, "neg_text": ""}, source, "row").negatives_mask == [False]
    without = {name: value for name, value in row.items() if not name.startswith("neg")}
    source.check_columns(without)
    assert make_pair(without, source, "row").sides[2] is None


def test_pages_and_text_pairs(tmp_path):
    pages = write_pages(tmp_path / "pages", 3)
    pair = PairMixture([pages]).read(0, 2)
    assert pair.sides == [text("page 2?"), {"text": None, "images": [{"bytes": encoded(2), "path": None}]}]
    assert open_pair(pair)[1]["image"].size == (28, 28)
    texts = PairMixture([write_texts(tmp_path / "texts", 8, num_negatives=3)])
    assert texts.read(0, 6).sides == [
        text("question 6"),
        text("answer 6"),
        text("wrong 6.0"),
        text("wrong 6.1"),
        None,
    ]


def test_a_column_map_reaches_into_structs_and_joins_columns():
    source = columns(
        query={"text": "meta.question", "image": ["left", "right.picture"]},
        positive={"image": "target"},
        negatives=["first", {"text": "second.text", "image": "second.image"}],
        num_negatives=3,
    )
    source.check_columns(["meta", "left", "right", "target", "first", "second", "other"])
    row = {
        "meta": {"question": "same?"},
        "left": b"l",
        "right": {"picture": b"r"},
        "target": {"bytes": b"t", "path": None},
        "first": None,
        "second": {"text": "s", "image": b"n"},
    }
    pair = make_pair(row, source, "row")
    assert [image["bytes"] for image in pair.sides[0]["images"]] == [b"l", b"r"]
    assert pair.sides[0]["text"] == "same?"
    # One negative a column: the first is missing, and the second does not take its place.
    assert pair.sides[2] is None and pair.sides[3]["text"] == "s" and pair.sides[4] is None
    with pytest.raises(ValueError, match="'pairs' has no column 'second.text' for its negatives; its columns are"):
        source.check_columns(["meta", "left", "right", "target", "first"])


@pytest.mark.parametrize(
    "path", ["../a.png", "/etc/passwd", "a/../../b.png", "..\\a.png", "https://x.org/a.png", "a\0"]
)
def test_paths_stay_in_their_folder(path, tmp_path):
    row = {**published_rows(1)[0], "qry_image_path": path}
    with pytest.raises(BadRowError, match="'published', row 4, column 'qry_image_path': the path .* is not one below"):
        make_pair(row, published(tmp_path), "row 4")


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    write_images(tmp_path / "secret", 1)
    write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "0.png").symlink_to(tmp_path / "secret" / "0.png")
    (tmp_path / "images" / "in.png").symlink_to(tmp_path / "images" / "1.png")
    source = published(tmp_path / "images")
    pair = make_pair(published_rows(1)[0], source, "row 0")
    with pytest.raises(BadRowError, match="row 0, query: image 0: the path '0.png' leads out of image_folder") as error:
        open_pair(pair)
    assert error.value.reason == "unsafe_path"
    inside = make_pair({**published_rows(1)[0], "qry_image_path": "in.png"}, source, "row 0")
    assert open_pair(inside)[0]["image"].size == (28, 28)


def test_paths_without_a_folder_are_refused():
    row = {"query": {"bytes": None, "path": "/etc/passwd"}, "positive": "x"}
    with pytest.raises(BadRowError, match="row 0, column 'query': '/etc/passwd' is a path, but .* no image_folder"):
        make_pair(row, columns(), "row 0")


def test_useless_negatives_are_masked_and_counted():
    picture = encoded(3)
    source = columns(negatives="negatives", num_negatives=4)
    row = {"query": "q", "positive": picture, "negatives": [encoded(4), picture, None, {"text": " ", "image": None}]}
    pair = make_pair(row, source, "row")
    assert pair.negatives_mask == [True, False, False, False] and pair.tally == [1, 2, 1, 0]
    # A masked image is not even opened.
    assert open_pair(pair)[2]["image"].size == (28, 28) and open_pair(pair)[3:] == [None] * 3
    same_text = make_pair({"query": "q", "positive": "yes", "negatives": ["yes ", "no"]}, source, "row")
    assert same_text.negatives_mask == [False, True, False, False] and same_text.tally == [1, 2, 1, 0]


def test_hashes_tell_contents_apart():
    def key(value):
        return make_pair({"query": "q", "positive": value}, columns(), "row").positive_hash

    values = [
        "a",
        "b",
        encoded(1),
        encoded(2),
        {"text": "a", "image": encoded(1)},
        {"text": "a", "image": [encoded(1)] * 2},
    ]
    keys = [key(value) for value in values]
    assert len(set(keys)) == len(values) and all(-(2**63) <= key < 2**63 for key in keys)
    assert key("a") == key(" a\n") and key(encoded(1)) == key({"bytes": encoded(1), "path": "elsewhere.png"})


@pytest.mark.parametrize("side", ["query", "positive"])
def test_rows_without_query_or_positive_are_bad(side):
    with pytest.raises(BadRowError, match=f"'pairs', row 9: its {side} holds neither text nor image") as error:
        make_pair({"query": "q", "positive": "p", side: " "}, columns(), "row 9")
    assert error.value.reason == f"empty_{side}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "beir"}, "layout must be one of .*'text_pairs'.*, got 'beir'"),
        ({"kind": "images"}, r"kind must be one of \['long_form', 'multimodal', 'text'\], got 'images'"),
        ({"query": None}, "name the column of its query"),
        ({"query": {"texts": "a"}}, "query must be a column name or a mapping of 'text' and 'image'"),
        ({"negatives": [["a"]]}, "negatives must be a column name or a mapping"),
        ({"num_negatives": -1}, "num_negatives must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"weight": 0.0}, "weight must be above 0, got 0.0"),
        ({"columns": ["a"]}, "columns is not supported"),
    ],
)
def test_entries_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        columns(**settings)


def test_entries_of_a_file_become_sources():
    config = PairMixtureConfig(datasets=[{"path": "org/pairs", "name": "nq", "layout": "text_pairs"}])
    assert config.datasets[0].task == "nq" and config.datasets[0].num_negatives == 2
    with pytest.raises(TypeError, match="instruction"):
        PairMixtureConfig(datasets=[{"path": "org/pairs", "layout": "pages", "instruction": "find"}])
    with pytest.raises(ValueError, match=r"same name: \['nq'\]"):
        PairMixture([*config.datasets, *config.datasets])


def test_the_readme_shows_entries_that_are_valid():
    _, block = re.findall(r"```yaml\n(streaming.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    config = PairMixtureConfig(**yaml.safe_load(block))
    assert [source.task for source in config.datasets] == [
        "visrag_ind",
        "WebQA",
        "vidore/colpali_train_set",
        "my_pairs",
    ]
    assert config.datasets[3].column_names["positive"] == ["answer.text", "figure"]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_told(tmp_path, streaming):
    source = write_texts(tmp_path / "texts", 4)
    source.query = {"text": "question"}
    with pytest.raises(ValueError, match="'texts' has no column 'question' for its query; its columns are"):
        PairMixture([source], streaming=streaming)


def test_rows_are_checked_once_and_the_cache_is_used(tmp_path, monkeypatch):
    rows = published_rows(12)
    rows[4]["neg_text"] = "nonsense"
    rows[5]["pos_text"] = " "
    rows[6]["qry_image_path"] = "../0.png"
    rows[7]["neg_text"] = "[\"it's 7\", '', 'x']"
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    entry = {"layout": "moca_pairs", "image_folder": str(tmp_path / "nowhere"), "task": "published", "weight": 2.0}
    mixture = PairMixture([PairSource("parquet", data_files=str(tmp_path / "rows.parquet"), **entry)])
    assert len(mixture) == 9 and mixture.checked[0].usable.tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert [(row["row"], row["reason"]) for row in mixture.rejected] == [
        ("row 4", "bad_list"),
        ("row 5", "empty_positive"),
        ("row 6", "unsafe_path"),
    ]
    assert "row 6, column 'qry_image_path'" in mixture.rejected[2]["message"]
    report = mixture.report()["published"]
    assert report["rows"] == 12 and report["rejected_rows"] == {"bad_list": 1, "empty_positive": 1, "unsafe_path": 1}
    # Rows 0 and 8 have none of two negatives, 1 and 9 one; row 7 has one that is equal, and one image without text.
    assert report["num_missing_negatives"] == 6 and report["num_negatives_equal_to_positive"] == 1
    assert report["num_cut_negatives"] == 3 and report["different_positives"] == 9
    # What would write the result of another check.
    monkeypatch.setattr("datasets.arrow_dataset.ArrowWriter", None)
    again = PairMixture([PairSource("parquet", data_files=str(tmp_path / "rows.parquet"), **entry)])
    assert again.rejected == mixture.rejected


def test_a_sample_is_the_same_every_time(tmp_path):
    source = write_texts(tmp_path / "texts", 40, max_rows=10)
    chosen = [
        [PairMixture([source], seed=seed).read(0, index).sides[0]["text"] for index in range(10)] for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 10


def test_evaluation_data(tmp_path):
    write_images(tmp_path / "images", 4)
    datasets.Dataset.from_list(published_rows(4)).to_parquet(tmp_path / "rows.parquet")
    entry = {"layout": "moca_pairs", "image_folder": str(tmp_path / "images"), "task": "published"}
    rows = as_columns([PairSource("parquet", data_files=str(tmp_path / "rows.parquet"), **entry)])["published"]
    assert rows.column_names == ["query", "positive", "negative_1", "negative_2"]
    assert rows[3]["query"]["image"][0]["path"] == str(tmp_path / "images" / "3.png")
    assert rows[1]["negative_2"] is None or rows[1]["negative_2"]["text"] is None
