"""MMEB's protocol against answers that are known: from directions in the plane, and from equality with a tiny model."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from hub_cards.results import as_model_index, read_results
from modeling_moca import MoCaModel
from tests.tiny import IMAGE, tiny_backbone, tiny_processor
from tests.trainers.mmeb_folder import (
    MARK,
    at,
    evaluate,
    row,
    write_dataset,
    write_task,
)
from trainers.contrastive_model import build_sentence_transformer
from trainers.mmeb import MMEBEvaluator, count_right, plan_batches
from trainers.mmeb_config import MMEBConfig
from trainers.mmeb_tasks import AVERAGES, TASKS, as_csv, as_markdown, mmeb_averages, tasks_of


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "mmeb")
    return tmp_path / "mmeb"


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
