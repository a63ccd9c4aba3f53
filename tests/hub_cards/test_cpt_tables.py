"""Tables of captioned images: each format, and every row that is refused, with its message."""

import csv
import json
import re

import datasets
import pytest

from hub_cards.cpt_config import CPTDatasetConfig
from hub_cards.cpt_dataset import build_cpt_dataset
from hub_cards.cpt_images import Refusal, RefusedError
from hub_cards.cpt_rows import ESCAPED_PLACEHOLDER
from hub_cards.cpt_tables import read_table
from tests.hub_cards.cpt_sources import PLACEHOLDER, data_uri, picture, write

RED, BLUE = picture("red"), picture("blue")


def write_table(folder, format, rows):
    """Write rows of `file` and `title`."""
    write(folder / "img/red one.png", RED)
    path = folder / f"t.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps({"file": image, "title": title, "more": 1}) + "\n" for image, title in rows))
    elif format == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("file", "title"), *rows])
    else:
        columns = {"file": [image for image, _ in rows], "title": [title for _, title in rows]}
        datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def configure(tmp_path, path, **settings):
    settings = {"image_column": "file", "caption_column": "title", **settings}
    return CPTDatasetConfig(str(tmp_path / "out"), tables=[str(path)], **settings)


def read(tmp_path, path, **settings):
    return list(read_table(str(path), configure(tmp_path, path, **settings), 0, lambda key: True))


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_paths_and_data_uris(tmp_path, format):
    rows = [("img/red one.png", "a red one"), (data_uri(BLUE) + " " * 200_000, "blue, é"), ("img/red%20one.png", "x")]
    found = read(tmp_path, write_table(tmp_path, format, rows))
    assert [row.text for row in found] == [PLACEHOLDER + caption for caption in ("a red one", "blue, é", "x")]
    assert [row.images for row in found] == [[RED], [BLUE], [RED]]
    assert [(row.source, row.part) for row in found] == [(f"t.{format}", number) for number in range(3)]


def test_bytes_and_structs(tmp_path):
    features = datasets.Features({"file": datasets.Image(), "title": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"file": [{"bytes": RED, "path": None}], "title": ["a"]}, features=features)
    table.to_parquet(tmp_path / "struct.parquet")
    datasets.Dataset.from_dict({"file": [BLUE], "title": ["b"]}).to_parquet(tmp_path / "bytes.parquet")
    (struct,), (plain,) = (read(tmp_path, tmp_path / f"{name}.parquet") for name in ("struct", "bytes"))
    assert (struct.images, plain.images) == ([RED], [BLUE])


@pytest.mark.parametrize(
    "row, reason, message",
    [
        (("img/red one.png", " "), "empty_text", "t.jsonl, row 0: column 'title' holds no caption"),
        (("img/red one.png", None), "empty_text", "column 'title' holds no caption"),
        (("img/red one.png", "\ud800"), "bad_text", "row 0: the caption is no valid text"),
        (("img/red one.png", "x" * 101), "caption_too_long", "has 101 characters, more than max_characters=100"),
        ((7, "x"), "wrong_value", "column 'file' must hold a path, encoded bytes or a data URI, got int"),
        ((None, "x"), "wrong_value", "got NoneType"),
        (("none.png", "x"), "missing_image", "row 0: there is no file 'none.png'"),
        (("../secret.png", "x"), "unsafe_path", "leads out of the folder"),
        (("http://example.org/x.png", "x"), "remote_image", "is on the network"),
        (("t.jsonl", "x"), "undecodable_image", "row 0 cannot be decoded"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, reason, message):
    write(tmp_path / "secret.png", RED)
    (tmp_path / "in").mkdir()
    found = read(tmp_path, write_table(tmp_path / "in", "jsonl", [row]), max_characters=100)
    assert [refusal.reason for refusal in found] == [reason] and re.search(message, found[0].message), found


def test_lines_that_are_refused(tmp_path):
    write(tmp_path / "t.jsonl", '{"file": \n\n[1]\n{"title": "x"}\n')
    messages = [refusal.message for refusal in read(tmp_path, tmp_path / "t.jsonl")]
    assert re.match("t.jsonl, row 0: it is no JSON", messages[0])
    assert messages[1:] == ["t.jsonl, row 1: it has no ['file', 'title'].", "t.jsonl, row 2: it has no ['file']."]
    write(tmp_path / "t.csv", "file,title\na\nb,c,d\n")
    message = "t.csv, row {}: it has not as many values as there are columns."
    assert read(tmp_path, tmp_path / "t.csv") == [Refusal("bad_line", message.format(number)) for number in (0, 1)]


def test_a_caption_about_placeholders(tmp_path):
    (row,) = read(tmp_path, write_table(tmp_path, "csv", [("img/red one.png", f"a {PLACEHOLDER}")]))
    assert row.text == f"{PLACEHOLDER}a {ESCAPED_PLACEHOLDER}" and row.num_escaped == 1


def test_tables_that_are_refused(tmp_path):
    for name, content, message in [
        ("a.csv", "image,title\n", r"has no column 'file' \(image_column\); its columns are \['image', 'title'\]"),
        ("a.txt", "x", r"is no table: allowed are \['.csv', '.jsonl', '.parquet'\]"),
        ("a.parquet", "x", "is no Parquet file"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_cpt_dataset(configure(tmp_path, write(tmp_path / name, content)))
    with pytest.raises(ValueError, match="There is no table"):
        build_cpt_dataset(configure(tmp_path, tmp_path / "none.csv"))
    config = configure(tmp_path, write(tmp_path / "b.csv", "file,title\n"))
    config.tables = [str(tmp_path / "b.csv"), str(write(tmp_path / "c/b.csv", "file,title\n"))]
    with pytest.raises(ValueError, match=r"Tables need different names.*\['b.csv', 'b.csv'\]"):
        build_cpt_dataset(config)
    assert not (tmp_path / "out").exists()


def test_captions_of_one_picture_stay_in_one_split(tmp_path):
    for index in range(40):
        write(tmp_path / f"{index}.png", picture((index, 0, 0)))
    path = write_table(tmp_path, "csv", [(f"{index % 40}.png", f"caption {index}") for index in range(120)])
    out = build_cpt_dataset(configure(tmp_path, path, validation_share=0.3))
    rows = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache")).with_format("arrow")
    pictures = {name: {images[0]["bytes"] for images in rows[name][:]["images"].to_pylist()} for name in rows}
    assert len(rows["train"]) + len(rows["validation"]) == 120 and not pictures["train"] & pictures["validation"]
    assert 4 <= len(pictures["validation"]) <= 20
    assert "made\nfrom 1 table of captioned images" in (out / "README.md").read_text()


def test_raise_stops_at_the_first_bad_row(tmp_path):
    path = write_table(tmp_path, "csv", [("img/red one.png", "a"), ("none.png", "b")])
    with pytest.raises(RefusedError, match="t.csv, row 1: there is no file 'none.png'"):
        build_cpt_dataset(configure(tmp_path, path, on_bad_row="raise"))
