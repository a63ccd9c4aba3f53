"""Whole data sets: what the Hub and stage 1 see of them, limits, and runs that are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import metadata_load

from hub_cards import cpt_dataset, cpt_shards
from hub_cards.cpt_config import CPTDatasetConfig
from hub_cards.cpt_dataset import build_cpt_dataset
from hub_cards.dataset_card import size_category
from modeling_moca import MoCaForPreTraining
from tests.forked import Forked
from tests.hub_cards.cpt_sources import PLACEHOLDER, pdf_bytes, picture, write, write_folder
from tests.tiny import tiny_backbone, tiny_processor
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixture, CPTMixtureConfig
from trainers.cpt_trainer import CPTTrainer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A data set of Markdown, HTML and PDF in two splits, with an image that is not there."""
    folder = tmp_path_factory.mktemp("built")
    write_folder(folder / "in", 40)
    write(folder / "in/one.html", "<p>A page <img src='images/3.png'> and <img src='none.png'> the end")
    write(folder / "in/two.pdf", pdf_bytes([[(50, 700, "On paper"), (50, 500, 60, 40, picture("red", format="JPEG"))]]))
    write(folder / "in/three.md", f"About {PLACEHOLDER}.")
    config = CPTDatasetConfig(
        str(folder / "out"),
        documents=str(folder / "in"),
        validation_share=0.2,
        max_shard_bytes=4000,
        license="cc-by-4.0",
        language=["en"],
        pretty_name="Pages of the sea",
    )
    build_cpt_dataset(config)
    return folder, config


def files(folder):
    """Return the bytes of all files by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_and_schema(built):
    out = built[0] / "out"
    names = sorted(files(out))
    shards = [name for name in names if name.startswith("data/train")]
    assert (
        shards == [f"data/train-{k:05d}-of-{len(shards):05d}.parquet" for k in range(len(shards))] and len(shards) > 2
    )
    validation = [name for name in names if name.startswith("data/validation")]
    assert sorted([*shards, *validation, "README.md", "build_report.json", "rejected.jsonl"]) == names
    rows = datasets.load_dataset(str(out), cache_dir=str(built[0] / "cache"))
    assert set(rows) == {"train", "validation"} and rows["train"].features == cpt_shards.FEATURES
    assert rows["train"].features["images"] == datasets.Sequence(datasets.Image())
    all_rows = [*rows["train"], *rows["validation"]]
    assert len(all_rows) == 43 == len({row["id"] for row in all_rows})
    for row in all_rows:
        assert row["text"].count(PLACEHOLDER) == len(row["images"]) <= 1
    # A document is in one split.
    assert not set(rows["train"]["source"]) & set(rows["validation"]["source"]) and len(rows["validation"]) > 3
    for name in shards:
        content = sum(row.nbytes for row in pq.read_table(out / name).to_batches())
        assert content < 2 * 4000
    (line,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    message = "one.html: image 1: there is no file 'none.png'."
    assert line["file"] == "one.html" and line["reason"] == "missing_image" and line["message"] == message


def test_card(built):
    out = built[0] / "out"
    data, card = metadata_load(out / "README.md"), (out / "README.md").read_text()
    assert data["license"] == "cc-by-4.0" and data["language"] == ["en"] and data["size_categories"] == ["n<1K"]
    (config,) = data["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "validation", "path": "data/validation-*.parquet"},
    ]
    info = datasets.DatasetInfo._from_yaml_dict(data["dataset_info"])
    assert info.features == cpt_shards.FEATURES
    for split in ("train", "validation"):
        shards = list((out / "data").glob(f"{split}-*.parquet"))
        assert info.splits[split].num_examples == sum(pq.ParquetFile(path).metadata.num_rows for path in shards)
    assert info.download_size == sum(path.stat().st_size for path in (out / "data").iterdir())
    assert "# Pages of the sea" in card and "43 rows with 42 images" in card and "40" in card
    assert "| `missing_image` | 1 |" in card and "stood in a source's own text 1 times" in card
    assert "markdown 41, html 1, pdf 1" in card or "markdown 41, pdf 1, html 1" in card
    assert "{{" not in card and "{%" not in card
    places = {1: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 10**6: "1M<n<10M", 10**13: "n>1T"}
    assert {number: size_category(number) for number in places} == places


def test_snippets_of_the_card_run_and_stage_1_trains(built, tmp_path):
    card = (built[0] / "out/README.md").read_text()
    (code,), (mixture,) = (re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL) for kind in ("python", "yaml"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "(56, 42)" in run.stdout, run.stderr
    settings = yaml.safe_load(mixture)
    for streaming in (settings["streaming"], not settings["streaming"]):
        sources = CPTMixtureConfig(datasets=settings["datasets"]).datasets
        train_dataset = CPTMixture(sources, streaming=streaming)
        row = next(train_dataset.read())
        assert re.fullmatch(r"[\w/ ]+\.(md|html|pdf)#\d", row.row) and set(row.content) == {"text", "images"}
        trainer = CPTTrainer(
            MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6),
            CPTConfig(
                output_dir=str(tmp_path / str(streaming)),
                max_steps=2,
                max_cost=512,
                max_length=256,
                logging_steps=1,
                on_bad_row="raise",
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=train_dataset,
            processing_class=tiny_processor(),
        )
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "mae_loss" in entry]
        assert len(logged) == 2 and all(entry["mae_loss"] > 0 and entry["mlm_loss"] > 0 for entry in logged)
        assert any((value != before[name]).any() for name, value in trainer.model.named_parameters())


def test_a_whole_data_set_only_gets_its_card_anew(built, caplog):
    folder, config = built
    before = files(folder / "out")
    config.pretty_name = "Other"
    with caplog.at_level("INFO"):
        build_cpt_dataset(config)
    after = files(folder / "out")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"README.md"} and after.keys() == before.keys() and "is whole already" in caplog.text
    config.pretty_name = "Pages of the sea"
    build_cpt_dataset(config)
    assert files(folder / "out") == before


def start(folder, out):
    """Start the script, with files so small that there are many to be killed between."""
    flags = ["--documents", "in", "--output_dir", out, "--max_shard_bytes", "3000", "--dedupe"]
    flags += ["--validation-share", "0.2", "--max_bad_row_share", "0.5", "--repo_id", "org/pages"]
    return Forked(REPOSITORY / "examples/build_cpt_dataset.py", *flags, folder=folder)


def finish(process):
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    return said


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(tmp_path):
    write_folder(tmp_path / "in", 150)
    for number in range(30):
        write(tmp_path / f"in/chapter {number % 5}/bad {number}.md", f"{number} ![](none.png)")
        write(tmp_path / f"in/chapter {number % 5}/twin {number}.md", "twice the same")
    process = start(tmp_path, "killed")
    shards, deadline = tmp_path / "killed/.build", time.monotonic() + 120
    while len(list(shards.glob("train-*.parquet"))) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    made = sorted(shards.glob("train-*.parquet"))
    assert len(made) >= 8 and not list((tmp_path / "killed/data").iterdir())
    # The last file may have been finished but not noted.
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in made[:-1]}
    said = finish(start(tmp_path, "killed"))
    assert re.search(r"Going on behind \d+ finished files", said)
    settings = {"documents": str(tmp_path / "in"), "max_shard_bytes": 3000, "dedupe": True, "validation_share": 0.2}
    settings |= {"max_bad_row_share": 0.5, "repo_id": "org/pages"}
    build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "whole"), **settings))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    for path in (tmp_path / "killed/data").glob("train-*.parquet"):
        name = re.sub("-of-.*", ".parquet", path.name)
        if name in kept:
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == kept[name]
    report = json.loads((tmp_path / "whole/build_report.json").read_text())
    assert report["refused"] == {"missing_image": 30} and report["left_out"] == {"duplicate": 29}
    assert sum(split["rows"] for split in report["splits"].values()) == 181


@pytest.mark.parametrize("stop", ["close", "save", "_name_shards", "finish", "write_dataset_card"])
def test_stopping_anywhere_changes_nothing(tmp_path, monkeypatch, stop):
    write_folder(tmp_path / "in", 30)
    settings = {"documents": str(tmp_path / "in"), "max_shard_bytes": 2000, "validation_share": 0.3, "dedupe": True}
    whole = build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "whole"), repo_id="a/b", **settings))
    config = CPTDatasetConfig(str(tmp_path / "stopped"), repo_id="a/b", **settings)
    owner = {
        "close": cpt_shards.ShardWriter,
        "save": cpt_dataset.Progress,
        "_name_shards": cpt_dataset._Builder,
        "finish": cpt_dataset.Progress,
        "write_dataset_card": cpt_dataset,
    }[stop]
    real, calls = getattr(owner, stop), []

    class Stopped(Exception):
        pass

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 4, 5):
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, stop, stopped)
    num_stops = 0
    while True:
        try:
            build_cpt_dataset(config)
            break
        except Stopped:
            num_stops += 1
    assert num_stops == (3 if stop in ("close", "save") else 1)
    assert files(tmp_path / "stopped") == files(whole)


def test_other_settings_or_files_are_refused(built):
    folder, config = built
    other = CPTDatasetConfig(**{**vars(config), "max_characters": 99})
    with pytest.raises(ValueError, match=r"begun with other settings or files: max_characters \(was 4000, is 99\)"):
        build_cpt_dataset(other)
    extra = write(folder / "in/extra.md", "x")
    with pytest.raises(ValueError, match=r"files \(was '43 files.*', is '44 files"):
        build_cpt_dataset(config)
    extra.unlink()
    write(folder / "other/file", "x")
    with pytest.raises(ValueError, match="is not empty, and no data set in the making"):
        build_cpt_dataset(CPTDatasetConfig(str(folder / "other"), documents=str(folder / "in")))


def test_a_larger_share_of_bad_rows_stops(tmp_path):
    for index in range(60):
        write(tmp_path / f"in/{index:02d}.md", f"{index} ![](none.png)" if index % 2 else str(index))
    settings = {"documents": str(tmp_path / "in"), "max_bad_row_share": 0.2}
    with pytest.raises(ValueError, match=r"\d+ of \d+ rows and images cannot be used.*max_bad_row_share=0.2"):
        build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "out"), **settings))
    # Nothing was finished: the settings may change.
    build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "out"), **{**settings, "max_bad_row_share": 1.0}))


def test_settings_that_are_refused(tmp_path):
    folder = str(write_folder(tmp_path / "in", 1))
    for settings, message in [
        ({"output_dir": ""}, "output_dir must be given"),
        ({"documents": None}, "Give either documents"),
        ({"tables": ["x.csv"]}, "Give either documents"),
        ({"documents": folder + "/none"}, "is not a folder"),
        ({"output_dir": folder + "/out"}, "lies inside documents="),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"max_shard_bytes": -1}, "max_shard_bytes must be at least 1, got -1"),
        ({"validation_share": 1.0}, r"validation_share must lie in \[0, 0.999\], got 1.0"),
        ({"max_bad_row_share": 2}, r"max_bad_row_share must lie in \[0, 1\], got 2"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be 'skip' or 'raise', got 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=message):
            CPTDatasetConfig(**{"output_dir": str(tmp_path / "out"), "documents": folder, **settings})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Markdown, HTML or PDF file"):
        build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "out"), documents=str(tmp_path / "empty")))
    write(tmp_path / "blank/a.md", " ")
    with pytest.raises(ValueError, match="Nothing that can be used is in 1 files"):
        build_cpt_dataset(CPTDatasetConfig(str(tmp_path / "out"), documents=str(tmp_path / "blank")))
