"""A mixture of sources: every format, every row once an epoch, shares, samples, and the state of a reader."""

import json
import re
from collections import Counter

import datasets
import pytest
from trl import TrlParser

from modeling_moca.chat_moca import PLACEHOLDER
from tests.conftest import REPOSITORY
from tests.trainers.cpt_rows import encoded_image
from tests.trainers.cpt_sources import FEATURES, number_of, numbered_rows, write_parquet, write_tars
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixture, CPTMixtureConfig, DataSource


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [write_parquet(folder / "p", numbered_rows(20), num_files=4), write_tars(folder / "w", 8, num_files=2)]


def take(rows, number):
    return [next(rows) for _ in range(number)]


def names(rows):
    return [
        (row.dataset.split(":")[0], row.epoch, number_of(row.content["text"].replace(PLACEHOLDER, ""))) for row in rows
    ]


@pytest.mark.parametrize("num_readers", [1, 3])
def test_indexed_every_row_comes_once_an_epoch_in_a_new_order(sources, num_readers):
    mixture = CPTMixture(sources)
    assert len(mixture) == 28
    readers = [names(mixture.read(reader, num_readers, num_epochs=2)) for reader in range(num_readers)]
    # Draw n belongs to reader n modulo their number.
    drawn = [readers[number % num_readers][number // num_readers] for number in range(56)]
    for epoch in range(2):
        part = drawn[28 * epoch : 28 * epoch + 28]
        assert Counter(part) == Counter(
            [("parquet", epoch, row) for row in range(20)] + [("webdataset", epoch, row) for row in range(8)]
        )
    assert [row[::2] for row in drawn[:28]] != [row[::2] for row in drawn[28:]]
    other = CPTMixture(sources, seed=1)
    assert names(other.read(num_epochs=1)) != drawn[:28]


def test_streamed_every_row_of_a_source_comes_once_an_epoch(sources):
    mixture = CPTMixture(sources, streaming=True)
    for num_readers in (1, 2, 3):
        seen = Counter()
        for reader in range(num_readers):
            seen.update(names(take(mixture.read(reader, num_readers), 120)))
        # Each reader is well past the first epoch of both.
        assert all(seen["parquet", 0, row] == 1 for row in range(20)), num_readers
        assert all(seen["webdataset", 0, row] == 1 for row in range(8)), num_readers
    with pytest.raises(TypeError, match="has no length"):
        len(mixture)


def test_streamed_shards_change_their_order_every_epoch(sources):
    rows = names(take(CPTMixture(sources[:1], streaming=True).read(), 80))
    orders = {tuple(row for _, e, row in rows if e == epoch) for epoch in range(4)}
    assert len(orders) > 1 and {tuple(sorted(order)) for order in orders} == {tuple(range(20))}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("at", [0, 5, 47])
def test_a_reader_goes_on_from_its_state(sources, streaming, at):
    reader = CPTMixture(sources, streaming=streaming).read(1, 2)
    take(reader, at)
    state = json.dumps(reader.state_dict())
    expected = names(take(reader, 60))
    again = CPTMixture(sources, streaming=streaming).read(1, 2)
    again.load_state_dict(json.loads(state))
    assert names(take(again, 60)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_the_rows(sources, streaming):
    for source, weight in zip(sources, (1.0, 3.0)):
        source.weight = weight
    try:
        rows = names(take(CPTMixture(sources, streaming=streaming).read(), 560))
    finally:
        for source in sources:
            source.weight = None
    counts = Counter(name for name, _, _ in rows)
    if streaming:
        assert abs(counts["webdataset"] / 560 - 0.75) < 0.08
    else:
        assert counts == {"webdataset": 420, "parquet": 140}
        # All rows of a source come before one comes again.
        times = Counter(row for name, _, row in rows if name == "webdataset")
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_stays_the_same_rows(sources, streaming):
    source = DataSource("parquet", data_files=sources[0].data_files, max_rows=7)
    seen = {}
    for reader in range(2):
        for _, epoch, row in names(take(CPTMixture([source], streaming=streaming, seed=3).read(reader, 2), 28)):
            seen.setdefault(epoch, set()).add(row)
    assert len(seen[0]) == 7 and seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_stay_the_bytes_of_the_file(tmp_path, streaming):
    image = encoded_image(56, 28, format="JPEG")
    rows = [{"text": PLACEHOLDER, "images": [image]}]
    source = write_parquet(tmp_path / "list", rows)
    row = next(CPTMixture([source], streaming=streaming).read())
    assert row.content["images"][0]["bytes"] == image


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_folders_and_saved_data_sets(tmp_path, streaming):
    rows = numbered_rows(6)
    data = datasets.Dataset.from_list(
        [{**row, "images": [{"bytes": image, "path": None} for image in row["images"]]} for row in rows],
        features=FEATURES,
    )
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "dict")
    data.to_parquet(tmp_path / "parquet" / "rows.parquet")
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow" / "rows.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    for folder in ("saved", "dict", "arrow", "parquet"):
        mixture = CPTMixture([DataSource(str(tmp_path / folder))], streaming=streaming)
        seen = {number_of(row.content["text"]): row.content for row in take(mixture.read(), 6)}
        assert sorted(seen) == list(range(6)), folder
        assert [image["bytes"] for image in seen[2]["images"]] == rows[2]["images"]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_mapped_to_the_interleaved_layout(tmp_path, streaming):
    image = encoded_image(28, 28)
    rows = [
        {"caption": "a harbour", "picture": image, "id": 17},
        {"caption": f"below {PLACEHOLDER} above", "picture": image, "id": 18},
        {"caption": "no picture", "picture": None, "id": 19},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    columns = {"text": "caption", "images": "picture", "row": "id"}
    source = DataSource("parquet", data_files=str(tmp_path / "*.parquet"), column_map=columns)
    seen = {row.row: row.content for row in take(CPTMixture([source], streaming=streaming).read(), 3)}
    assert seen == {
        "17": {"text": PLACEHOLDER + "a harbour", "images": [image]},
        "18": {"text": f"below {PLACEHOLDER} above", "images": [image]},
        "19": {"text": "no picture", "images": []},
    }


def test_a_key_names_the_row_and_text_alone_needs_no_image_column(sources, tmp_path):
    rows = take(CPTMixture(sources[1:]).read(), 8)
    assert {row.row for row in rows} == {f"k{number}" for number in range(8)}
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "rows.parquet")
    row = next(CPTMixture([DataSource(str(tmp_path))]).read())
    assert row.content == {"text": "a", "images": []} and row.row == "row 0"


def test_rows_can_be_held_out(sources):
    mixture = CPTMixture(sources)
    held_out = mixture.split(0.25)
    assert (len(held_out), len(mixture)) == (7, 21)
    kept = {(name, row) for name, _, row in names(mixture.read(num_epochs=1))}
    out = {number_of(held_out[index]["text"].replace(PLACEHOLDER, "")) for index in range(7)}
    assert len(kept) == 21 and len(out) >= 5
    with pytest.raises(ValueError, match="test_split_size needs the whole data set"):
        CPTMixture(sources, streaming=True).split(0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "Source 'here': weight must be above 0, got 0.0"),
        ({"max_rows": 0}, "Source 'here': max_rows must be at least 1, got 0"),
        ({"columns": ["text"]}, "Source 'here': columns is not supported, use column_map"),
        ({"fraction": 0.5}, "Source 'here': fraction is not supported, use weight"),
        ({"column_map": {"image": "a"}}, r"column_map names \['image'\]; allowed are \['images', 'row', 'text'\]"),
    ],
)
def test_sources_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        CPTMixtureConfig(datasets=[{"path": "here", **settings}])


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_refuse(sources, tmp_path, streaming):
    with pytest.raises(ValueError, match="No data set is given"):
        CPTMixture([], streaming=streaming)
    weighted = DataSource("parquet", data_files=sources[0].data_files, weight=1.0)
    with pytest.raises(ValueError, match=r"Either all sources have a weight, or none: only \['parquet:.*'\]"):
        CPTMixture([weighted, sources[1]], streaming=streaming)
    datasets.Dataset.from_list([{"texts": "a", "picture": 1}]).to_parquet(tmp_path / "rows.parquet")
    files = {"data_files": str(tmp_path / "rows.parquet")}
    for columns, missing in (
        (None, "'text' for 'text'"),
        ({"text": "texts", "images": "image"}, "'image' for 'images'"),
    ):
        with pytest.raises(ValueError, match=rf"has no column {missing}; its columns are \['texts', 'picture'\]"):
            next(CPTMixture([DataSource("parquet", column_map=columns, **files)], streaming=streaming).read())


def test_a_stream_with_fewer_rows_than_readers_says_so(tmp_path):
    source = write_parquet(tmp_path / "p", numbered_rows(2))
    with pytest.raises(ValueError, match="has no rows for reader 2 of 3: it has fewer rows than there are readers"):
        next(CPTMixture([source], streaming=True).read(2, 3))


def test_a_stream_that_every_reader_reads_whole_says_so(sources, caplog):
    for num_readers, said in ((2, False), (5, True)):
        caplog.clear()
        for reader in range(num_readers):
            CPTMixture(sources[1:], streaming=True).read(reader, num_readers)
        expected = f"has 2 shards for {num_readers} readers"
        assert sum(expected in record.getMessage() for record in caplog.records) == said


def test_the_readme_shows_entries_that_are_valid(tmp_path):
    block, _ = re.findall(r"```yaml\n(streaming.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "config.yaml").write_text(f"{block}output_dir: {tmp_path}\n")
    parser = TrlParser((CPTMixtureConfig, CPTConfig))
    mixture, config = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml"), "--use_cpu", "true"])
    assert [source.weight for source in mixture.datasets] == [2, 1, 1] and mixture.streaming
    assert mixture.datasets[2].column_map == {"text": "json.caption", "images": "jpg"}
    assert (config.max_cost, config.on_bad_row, config.resume_from_checkpoint) == (12800, "skip", "auto")
