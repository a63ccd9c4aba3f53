"""MMEB's protocol against answers that are known: from directions in the plane, and from equality with a tiny model."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from hub_cards.results import as_model_index, read_results
from modeling_moca import MoCaModel
from tests.hub_cards.hub_server import Hub
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from tests.trainers.mmeb_folder import MARK, FakeEncoder, at, row, write_image, write_task, zip_folder
from trainers import mmeb_rows
from trainers.contrastive_model import build_sentence_transformer
from trainers.mmeb import MMEBEvaluator, count_right, plan_batches
from trainers.mmeb_config import MMEBConfig
from trainers.mmeb_tasks import AVERAGES, TASKS, as_csv, as_markdown, mmeb_averages, tasks_of

ROOT = Path(__file__).resolve().parents[2]


def evaluate(dataset, output, encoder=None, **options):
    encoder = encoder or FakeEncoder()
    config = MMEBConfig("org/fake", dataset_path=str(dataset), output_dir=str(output), **options)
    return MMEBEvaluator(config, encoder).evaluate(), encoder


def in_a_process(environment, settings, *arguments):
    environment = {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainers.mmeb_folder", json.dumps(settings), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def dataset(tmp_path):
    """Three tasks: texts among texts, an image among texts, a text among images; images in a folder beside them."""
    root = tmp_path / "mmeb"
    rows = [
        row(at(10), at(12, "a"), at(20), at(300)),
        row(at(10), at(20), at(12, "a"), at(300)),
        # A tie at the top is wrong, one below it is none.
        row(at(0), at(5), at(-5)),
        row(at(50), at(49), at(90, "x"), at(90, "y")),
        # Equal to the right one: no other candidate. Equal in direction only: a tie.
        row(at(10, "q"), at(12, "a"), at(300), at(12, "a")),
        row(at(10, "q"), at(12, "a"), at(300), at(12, "b")),
        # No number: as the right one, as another one, as the query.
        row(at(70), at("nan"), at(80)),
        row(at(70), at(71), at("nan", "other")),
        row(at("nan", "query"), at(71), at(80)),
        row(at(70), at(1, "zero"), at(250)),
    ]
    write_task(root, "ImageNet-1K", rows, num_files=3)
    for degrees in (0, 90, 180):
        write_image(root / "images" / "some" / f"{degrees}.png", degrees)
    rows = [
        row(MARK, at(80), at(150), query_image="some/90.png"),
        row(MARK, at(150), at(80), query_image="some/90.png"),
        # The question turns the image: 90 and 0 are 45 together.
        row(MARK + at(0), at(45), at(89), query_image="some/90.png"),
    ]
    write_task(root, "OK-VQA", rows, kind="json")
    images = ["some/0.png", "some/90.png", "some/180.png"]
    write_task(
        root, "EDIS", [row(at(20), MARK, MARK, MARK, images=images), row(at(20), *[MARK] * 2, images=images[1:])]
    )
    return root


def test_known_answers_are_scored_exactly(dataset, tmp_path):
    results, encoder = evaluate(dataset, tmp_path / "out")
    assert {name: result["p_at_1"] for name, result in results.items()} == {
        "ImageNet-1K": 3 / 10,
        "OK-VQA": 2 / 3,
        "EDIS": 1.0,
    }
    counts = results["ImageNet-1K"]
    assert (counts["num_queries"], counts["num_right"], counts["num_ties"]) == (10, 3, 2)
    assert counts["num_not_finite"] == 4
    # Each input once, whether it is a query or a candidate.
    assert counts["num_inputs"] == len(set(encoder.inputs[: counts["num_inputs"]])) == 21
    assert counts["num_candidates"] == 25
    per_task = [result["num_inputs"] for result in results.values()]
    assert len(encoder.inputs) == sum(per_task) and results["EDIS"]["num_images"] == 3


def test_images_come_from_a_zip_file_as_well(dataset, tmp_path):
    expected, _ = evaluate(dataset, tmp_path / "folder")
    zip_folder(dataset / "images", dataset / "images.zip")
    (dataset / "images").rename(tmp_path / "away")
    found, _ = evaluate(dataset, tmp_path / "zip")
    assert {name: found[name]["p_at_1"] for name in found} == {name: expected[name]["p_at_1"] for name in expected}
    with pytest.raises(ValueError, match="image_folder='.*nowhere' is neither a folder nor a zip file"):
        evaluate(dataset, tmp_path / "none", image_folder=str(tmp_path / "nowhere"))


def test_result_files_are_what_cards_read(dataset, tmp_path):
    evaluate(dataset, tmp_path / "out", tasks=["OK-VQA", "EDIS"])
    results = read_results(sorted((tmp_path / "out" / "results").glob("*.json")))
    assert [(result.task, result.metrics) for result in results] == [
        ("MMEB EDIS", {"p_at_1": 1.0}),
        ("MMEB OK-VQA", {"p_at_1": 2 / 3}),
    ]
    (entry, _) = as_model_index(results)
    assert entry.metric_value == 1.0 and entry.dataset_config == "EDIS" and results[0].model == "org/fake"


def test_all_tasks_give_the_averages(tmp_path):
    """A quarter of the tasks' queries is right where the place of the task says so."""
    rights = {name: number % 5 for number, name in enumerate(TASKS)}
    for name, num_right in rights.items():
        rows = [row(at(10), at(11), at(30)) for _ in range(num_right)]
        rows += [row(at(10), at(30), at(11)) for _ in range(4 - num_right)]
        write_task(tmp_path / "mmeb", name, rows)
    results, _ = evaluate(tmp_path / "mmeb", tmp_path / "out")
    assert list(results) == list(TASKS)
    (overall,) = read_results([tmp_path / "out" / "results" / "MMEB.json"])
    assert list(overall.metrics) == ["p_at_1", *(f"p_at_1_{name.lower()}" for name in AVERAGES[:-1])]
    assert overall.metrics["p_at_1"] == pytest.approx(sum(rights.values()) / 4 / 36)
    grounding = [rights[name] / 4 for name in ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")]
    assert overall.metrics["p_at_1_grounding"] == pytest.approx(sum(grounding) / 4)
    assert "Missing" not in (tmp_path / "out" / "summary.md").read_text()
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert len(lines) == 36 + len(AVERAGES)
    assert float(lines["overall"]["p_at_1"]) == overall.metrics["p_at_1"]


def test_groups_are_the_benchmarks():
    assert {name: len(tasks_of(name)) for name in AVERAGES} == {
        "classification": 10,
        "vqa": 10,
        "retrieval": 12,
        "grounding": 4,
        "IND": 20,
        "OOD": 16,
        "overall": 36,
    }
    # Both groupings of the published rows (paper, table 1) give the published total.
    for *rest, overall in [
        (59.8, 62.9, 70.6, 88.6, 72.3, 61.5, 67.5),
        (65.8, 64.7, 75.0, 92.4, 74.7, 67.6, 71.5),
    ]:
        for group in (AVERAGES[:4], AVERAGES[4:6]):
            scores = [score for name, score in zip(AVERAGES, rest) if name in group]
            mean = sum(score * len(tasks_of(name)) for name, score in zip(group, scores)) / 36
            assert mean == pytest.approx(overall, abs=0.1)


def test_no_average_where_a_task_is_missing():
    scores = {name: 0.5 for name in TASKS if name not in ("CIRR", "RefCOCO")}
    averages = mmeb_averages(scores)
    assert averages["vqa"] == (0.5, 0) and averages["retrieval"] == averages["grounding"] == (None, 1)
    assert averages["IND"] == averages["OOD"] == (None, 1) and averages["overall"] == (None, 2)
    table = as_markdown("moca", {name: {"p_at_1": score, "num_queries": 4} for name, score in scores.items()})
    assert "2 of 36 missing |" in table and "Missing tasks (2 of 36): CIRR, RefCOCO." in table
    assert "| 50.0 | 50.0 | 1 of 12 missing | 1 of 4 missing |" in table
    lines = as_csv({name: {"p_at_1": score, "num_queries": 4} for name, score in scores.items()}).splitlines()
    assert "overall,average,,,,,2" in lines and "vqa,average,,,0.5,,0" in lines
    with pytest.raises(ValueError, match=r"MMEB has no tasks \['CIFAR-100'\]; allowed are \['ImageNet-1K'"):
        mmeb_averages({"CIFAR-100": 1.0})


def test_a_killed_run_goes_on_behind_its_last_finished_task(dataset, tmp_path):
    output = tmp_path / "out"
    run = in_a_process(os.environ, {"dataset_path": str(dataset), "output_dir": str(output)}, "12")
    assert run.returncode == -signal.SIGKILL, run.stderr
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
        run = in_a_process(hub.environment(tmp_path / "home"), settings)
        assert run.returncode == 0, run.stderr
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


def test_equal_vectors_tie_wherever_they_stand():
    """A model that collapsed is never right, although sums of many numbers depend on where a row stands."""
    torch.manual_seed(0)
    embeddings = torch.randn(2049).expand(1001, 2049).contiguous()
    targets = [np.roll(np.arange(1000), -shift) for shift in range(0, 1000, 50)]
    assert count_right(embeddings, np.full(20, 1000), targets) == (0, 20, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_score_that_is_no_number_is_never_right(bad):
    """Not even without a rival: as query, as the right candidate, as another one."""
    embeddings = torch.eye(3)
    embeddings[2] = bad
    pools = [[2], [2], [0, 2], [2, 0], [0]]
    queries = np.array([2, 0, 0, 2, 0])
    assert count_right(embeddings, queries, [np.array(pool) for pool in pools]) == (1, 0, 4)


def test_without_ties_the_score_is_that_of_the_authors_rule():
    """Which counts a query where the first of the largest cosines is that of the first candidate."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 4)).astype(np.float32)
    queries = rng.integers(0, 60, 500)
    targets = [rng.integers(0, 60, rng.integers(1, 5)) for _ in queries]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = sum(int(np.argmax(unit[pool] @ unit[query])) == 0 for query, pool in zip(queries, targets))
    assert 100 < expected < 400
    assert count_right(torch.from_numpy(embeddings), queries, targets) == (expected, 0, 0)


def test_batches_keep_within_the_budget():
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = plan_batches(lengths, batch_size=16, max_tokens=100)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 and len(batch) <= 16 for batch in batches)
    assert max(lengths[i] for i in batches[0]) == max(lengths)
    # Every batch is full: the first input of the next one has no place in it.
    for batch, following in zip(batches, batches[1:]):
        assert len(batch) == 16 or (len(batch) + 1) * lengths[batch[0]] > 100, following
    assert [len(batch) for batch in plan_batches([500, 5], 16, 100)] == [1, 1]
    assert [len(batch) for batch in plan_batches([500] * 5, 4, None)] == [4, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "moca-tiny"
    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder)
    tiny_processor(max_length=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strip", [False, True])
def test_a_model_sees_what_the_authors_code_shows_it(tmp_path, model, strip):
    """Embeddings of the runner equal those of the plain text that the authors' code makes of a row."""
    root = tmp_path / "mmeb"
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (56, 84)), ("b.png", (112, 56))):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / "images" / name)
    texts = [
        MARK + "Represent the sea\n",
        "the sky " + MARK + "the page\n",
        "no mark\n",
        "the sea\n",
        MARK + "no image\n",
    ]
    texts += [MARK, "the page " * 60]
    paths = ["a.png", "b.png", "a.png", "", "", "b.png", ""]
    write_task(root, "WebQA", [row(texts[0], *texts, query_image="a.png", images=paths)])
    seen = {}

    class Recorded(MMEBEvaluator):
        def _encode(self, rows):
            embeddings, counts = super()._encode(rows)
            seen.update(zip(rows.inputs, embeddings), counts=counts)
            return embeddings, counts

    encoder = build_sentence_transformer(model, device="cpu")
    encoder.prompts, encoder.default_prompt_name = {"query": "Find: "}, "query"
    config = MMEBConfig(
        str(model), dataset_path=str(root), output_dir=str(tmp_path / "out"), max_tokens=140, strip_text=strip
    )
    results = Recorded(config, encoder).evaluate()
    # The query equals its right target: only a tie with another candidate could make it wrong.
    assert results["WebQA"]["p_at_1"] == 1 and config.model_id == "moca-tiny"
    plain, processor = MoCaModel.from_pretrained(model), tiny_processor(max_length=64)
    for text, path in zip(texts, paths):
        shown = text.replace("<|image_1|>", IMAGE if path else "")
        if path and IMAGE not in shown:
            shown = IMAGE + shown
        if strip:
            shown = IMAGE.join(piece.strip() for piece in shown.split(IMAGE))
        images = [[Image.open(root / "images" / path)]] if path else None
        with torch.no_grad():
            expected = plain(**processor(text=[shown], images=images)).pooler_output[0]
        expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(seen[text, path], expected, atol=1e-5, rtol=0)
    counts = seen["counts"]
    assert counts["num_inputs"] == 7 and counts["num_images"] == 4 and counts["num_batches"] > 1
    assert counts["num_cut_inputs"] == 1 and counts["num_cut_tokens"] > 0
