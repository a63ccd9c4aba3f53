"""What may stand in a row, and what becomes of missing and useless negatives."""

import io

import datasets
import pytest
from PIL import Image

from trainers.contrastive_data import convert_moca_pairs, order_columns, read_side


def picture(colour="red"):
    return Image.new("RGB", (28, 28), colour)


def encoded(colour="red"):
    buffer = io.BytesIO()
    picture(colour).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


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


def test_sides():
    red = picture()
    for empty in (None, "", "  ", {"text": None, "image": None}, {"bytes": None, "path": None}):
        assert read_side(empty, "x") is None
    # A text that reads like the address of an image stays a text.
    assert read_side("https://example.org/a.png", "x") == {"text": "https://example.org/a.png"}
    assert read_side(red, "x") == {"image": red}
    assert read_side(encoded(), "x")["image"].getpixel((0, 0)) == (255, 0, 0)
    assert list(read_side({"text": "a", "image": encoded()}, "x")) == ["image", "text"]
    assert read_side({"text": "a", "image": None}, "x") == {"text": "a"}
    assert len(read_side({"text": "a", "image": [red, red]}, "x")["image"]) == 2


@pytest.mark.parametrize("value", [3, {"text": "a", "audio": 1}, {}, ["a"]])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="Column 'query' must be a text, an image, .* got "):
        read_side(value, "Column 'query'")


def published(**changes):
    row = {
        "qry": "<|image_1|>\nfind this",
        "qry_image_path": "a.png",
        "pos_text": "here",
        "pos_image_path": "",
        "neg_text": "['no', \"it's not\"]",
        "neg_image_path": "['', 'b.png']",
    }
    return datasets.Dataset.from_list([{**row, **changes}])


def test_published_pairs(tmp_path):
    picture("blue").save(tmp_path / "b.png")
    row = convert_moca_pairs(published(), str(tmp_path), num_negatives=3)[0]
    assert row["query"] == {"text": "find this", "image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    assert row["positive"] == {"text": "here", "image": None}
    assert row["negative_1"]["text"] == "no"
    second = read_side(row["negative_2"], "x")
    assert second["text"] == "it's not" and second["image"].getpixel((0, 0)) == (0, 0, 255)
    assert read_side(row["negative_3"], "x") is None


def test_published_lists_are_not_evaluated(tmp_path):
    with pytest.raises(ValueError, match="Expected a list literal"):
        convert_moca_pairs(published(neg_text=f"open('{tmp_path}/leak', 'w')"), "images")
    assert not (tmp_path / "leak").exists()
    with pytest.raises(ValueError, match=r"missing: \['qry'\]"):
        convert_moca_pairs(published().remove_columns("qry"), "images")
