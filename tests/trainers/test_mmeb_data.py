"""MMEB from folders, zip files and the Hub: what goes on after a kill, what is refused, and how it is named."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from hub_cards.results import read_results
from tests.forked import run
from tests.hub_cards.hub_server import Hub
from tests.trainers.mmeb_folder import (
    MARK,
    FakeEncoder,
    at,
    evaluate,
    row,
    write_dataset,
    write_image,
    write_task,
    zip_folder,
)
from trainers import mmeb_rows
from trainers.mmeb import MMEBEvaluator
from trainers.mmeb_config import MMEBConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "mmeb")
    return tmp_path / "mmeb"


def test_images_come_from_a_zip_file_as_well(dataset, tmp_path):
    expected, _ = evaluate(dataset, tmp_path / "folder")
    zip_folder(dataset / "images", dataset / "images.zip")
    (dataset / "images").rename(tmp_path / "away")
    found, _ = evaluate(dataset, tmp_path / "zip")
    assert {name: found[name]["p_at_1"] for name in found} == {name: expected[name]["p_at_1"] for name in expected}
    with pytest.raises(ValueError, match="image_folder='.*nowhere' is neither a folder nor a zip file"):
        evaluate(dataset, tmp_path / "none", image_folder=str(tmp_path / "nowhere"))


def test_a_killed_run_goes_on_behind_its_last_finished_task(dataset, tmp_path):
    output = tmp_path / "out"
    settings = {"dataset_path": str(dataset), "output_dir": str(output)}
    done = run("tests.trainers.mmeb_folder", json.dumps(settings), "12")
    assert done.returncode == -signal.SIGKILL, done.stderr
    # 21 inputs are 11 batches: the second task was under way.
    assert [path.name for path in (output / "results").iterdir()] == ["ImageNet-1K.json"]
    # What a crash may leave, and a file that is not whole, count as nothing.
    (output / "results" / "EDIS.json.unfinished").write_text('{"format"')
    (output / "results" / "OK-VQA.json").write_text('{"format": "moca-')
    (output / "counts" / "OK-VQA.json").write_text("{}")
    first = (output / "results" / "ImageNet-1K.json").stat().st_mtime_ns
    config = MMEBConfig("fake", dataset_path=str(dataset), output_dir=str(output), batch_size=2)
    encoder = FakeEncoder()
    found = MMEBEvaluator(config, encoder).evaluate()
    assert (output / "results" / "ImageNet-1K.json").stat().st_mtime_ns == first
    assert len(encoder.inputs) == found["OK-VQA"]["num_inputs"] + found["EDIS"]["num_inputs"]
    expected, _ = evaluate(dataset, tmp_path / "whole")
    assert {name: found[name]["p_at_1"] for name in found} == {name: expected[name]["p_at_1"] for name in expected}
    again = FakeEncoder()
    MMEBEvaluator(config, again).evaluate()
    assert again.inputs == []


def test_rows_are_streamed_from_the_hub_at_one_commit(dataset, tmp_path, monkeypatch):
    # The files of a repository are of one format.
    shutil.rmtree(dataset / "OK-VQA")
    expected, _ = evaluate(dataset, tmp_path / "local")
    zip_folder(dataset / "images", tmp_path / "images.zip")
    shutil.rmtree(dataset / "images")
    configs = [{"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test*"}]} for name in expected]
    (dataset / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with Hub(tmp_path / "hub") as hub:
        with monkeypatch.context() as patch:
            hub.connect(patch)
            api = HfApi(endpoint=hub.url, token=hub.token)
            api.create_repo("org/mmeb", repo_type="dataset")
            commit = api.upload_folder(repo_id="org/mmeb", folder_path=dataset, repo_type="dataset").oid
        settings = {"dataset_path": "org/mmeb", "image_folder": str(tmp_path / "images.zip"), "tasks": list(expected)}
        settings["output_dir"] = str(tmp_path / "out")
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.trainers.mmeb_folder", json.dumps(settings)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    results = read_results([tmp_path / "out" / "results" / f"{name}.json" for name in expected])
    assert [result.metrics["p_at_1"] for result in results] == [found["p_at_1"] for found in expected.values()]
    assert {(result.dataset["id"], result.dataset["revision"]) for result in results} == {("org/mmeb", commit)}
    # Streamed: no file of rows lies in the cache.
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".parquet", ".arrow", ".jsonl")]


def test_results_of_other_settings_are_not_gone_on_from(dataset, tmp_path):
    evaluate(dataset, tmp_path / "out", tasks=["EDIS"])
    with pytest.raises(ValueError, match="holds results of other settings: model was '.*' and is"):
        evaluate(dataset, tmp_path / "out", FakeEncoder("another"))
    with pytest.raises(ValueError, match="other settings: strip_text was False and is True. Give another output_dir"):
        evaluate(dataset, tmp_path / "out", strip_text=True)
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds results, but no settings\.json"):
        evaluate(dataset, tmp_path / "out")


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "some/../../secret.png", "a\\..\\b.png"])
@pytest.mark.parametrize("zipped", [False, True])
def test_paths_that_lead_out_are_refused(dataset, tmp_path, path, zipped):
    write_image(dataset / "secret.png", 0)
    if zipped:
        zip_folder(dataset / "images", dataset / "images.zip")
    write_task(dataset, "CIRR", [row(at(1), at(2), at(3)), row(at(1), at(2), MARK, images=["", path])])
    options = {"image_folder": str(dataset / "images.zip")} if zipped else {}
    with pytest.raises(ValueError, match="Task 'CIRR', row 1, target 1: the path .* is not one below image_folder"):
        evaluate(dataset, tmp_path / "out", tasks=["CIRR"], **options)


def test_links_that_lead_out_are_refused(dataset, tmp_path):
    write_image(tmp_path / "secret.png", 0)
    (dataset / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    write_task(dataset, "CIRR", [row(MARK, at(2), at(3), query_image="link.png")])
    with pytest.raises(ValueError, match="row 0, query: the path 'link.png' leads out of image_folder=.*, by a link"):
        evaluate(dataset, tmp_path / "out", tasks=["CIRR"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(at(1)), "row 1: has no targets"),
        (row(at(1), at(2), at(3), images=[""]), "row 1: has 2 texts of targets, but 1 image paths"),
        (row("", at(2)), "row 1, query: holds neither text nor image"),
        (row(MARK, at(2)), "row 1, query: holds neither text nor image"),
        (row(at(1), at(2), " "), "row 1, target 1: holds neither text nor image"),
        (row(MARK * 2 + "a", at(2), query_image="some/0.png"), r"row 1, query: .* 2 times <\|image_1\|>"),
        (row(MARK, at(2), query_image="some/1.png"), "row 1, query: image 'some/1.png' cannot be decoded"),
        ({**row(at(1), at(2)), "tgt_text": "a"}, "row 1, column 'tgt_text': must be a list, got str"),
        ({**row(at(1), at(2)), "tgt_img_path": None}, "row 1, column 'tgt_img_path': must be a list, got NoneType"),
        ({**row(at(1), at(2)), "qry_text": 7}, "row 1, query: text and image path must be strings, got int"),
    ],
)
def test_bad_rows_are_named(dataset, tmp_path, monkeypatch, bad, message):
    (dataset / "GQA").mkdir()
    (dataset / "GQA" / "test.jsonl").write_text("")
    # Most of these no file of one schema can hold beside a good row.
    monkeypatch.setattr(mmeb_rows, "load_rows", lambda *args, **kwargs: [row(at(1), at(2), at(3)), bad])
    with pytest.raises(ValueError, match=f"Task 'GQA', {message}"):
        evaluate(dataset, tmp_path / "out", tasks=["GQA"])


def test_bad_folders_and_settings_are_named(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"MMEB has no tasks \['CIFAR-100'\]"):
        evaluate(dataset, tmp_path / "out", tasks=["CIFAR-100"])
    with pytest.raises(ValueError, match="has no folder of a task; allowed are"):
        evaluate(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"Task 'CIRR': .*CIRR must have files test\*\.parquet or test\*\.jsonl"):
        evaluate(dataset, tmp_path / "out", tasks=["CIRR"])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        evaluate(dataset, tmp_path / "out", max_tokens=0)
    with pytest.raises(ValueError, match="output_dir must be given"):
        MMEBConfig("org/fake")
    (dataset / "GQA").mkdir()
    pq.write_table(pa.table({"qry_text": ["a"], "tgt_text": [["a"]]}), dataset / "GQA" / "test.parquet")
    with pytest.raises(ValueError, match=r"Task 'GQA' .* has no columns \['qry_img_path', 'tgt_img_path'\]"):
        evaluate(dataset, tmp_path / "out", tasks=["GQA"])
    (dataset / "images").rename(dataset / "elsewhere")
    with pytest.raises(ValueError, match="Task 'OK-VQA', row 2, query: .* has no image_folder"):
        evaluate(dataset, tmp_path / "out", tasks=["OK-VQA"])
