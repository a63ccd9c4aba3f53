"""What prompts are worth, through mteb: tokens in order, scores of the plain model, resuming, intervals, own pages."""

import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError

pytest.importorskip("mteb")

import mteb
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from hub_cards import export
from hub_cards.mteb_models import MoCaModelMeta, model_meta
from hub_cards.mteb_pages import local_pages
from hub_cards.mteb_prompts import METRICS, _intervals, _resampled_means, as_table, compare_prompts
from hub_cards.results import read_results
from modeling_moca import MoCaModel
from tests.hub_cards.mteb_tasks import ANSWERS, NUM_PAGES, QUERIES, encode, images, write_tables
from tests.tiny import tiny_backbone, tiny_processor
from trainers.evaluation import retrieval_metrics

PROMPT = "Represent the given document image.\n"
VERSIONS = ("ViDoRe(v2)", "ViDoRe(v3)")
IMAGE_PAD_ID, VISION_START_ID, VISION_END_ID = 3, 2, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two exports, which bring prompts of their own, and with the same pages in both layouts."""
    folder = tmp_path_factory.mktemp("prompts")
    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "model")
    tiny_processor(max_length=128).save_pretrained(folder / "model")
    export(folder / "model", folder / "embedding", prompts={"query": "OWN", "document": "OWN"})
    export(folder / "model", folder / "multi_vector", layout="multi_vector", projection_dim=16)
    write_tables(folder / "tables")
    encoded = [encode(image) for image in images(NUM_PAGES, 3)]
    pairs = [(query, encoded[page]) for query, pages in zip(QUERIES, ANSWERS) for page in pages]
    pairs += [(None, image) for image in encoded]
    (folder / "pairs").mkdir()
    table = datasets.Dataset.from_dict({"query": [row[0] for row in pairs], "image": [row[1] for row in pairs]})
    # As `datasets` itself writes images: a structure of bytes and path.
    table.cast_column("image", datasets.Image()).to_parquet(folder / "pairs" / "test.parquet")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """Return the rows of ids that models of mteb were given, by the prompts they were loaded with."""
    rows, load = {}, MoCaModelMeta.load_model

    def load_and_watch(meta, **kwargs):
        model = load(meta, **kwargs)
        kept = rows.setdefault(meta.experiment_kwargs["model_prompts"]["document"], [])

        encoder = model.model[0].model
        forward = encoder.forward

        @functools.wraps(forward)
        def watched(**inputs):
            kept.extend(ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]))
            return forward(**inputs)

        # sentence-transformers calls `forward` by name: hooks of modules would see nothing.
        encoder.forward = watched
        return model

    monkeypatch.setattr(MoCaModelMeta, "load_model", load_and_watch)
    return rows


@pytest.mark.parametrize("layout", ["embedding", "multi_vector"])
def test_the_prompt_stands_behind_the_image_and_queries_are_plain(folder, tmp_path, seen, layout):
    compare_prompts(model_meta(folder / layout), [local_pages(folder / "tables")], tmp_path, device="cpu")
    assert list(seen) == ["", PROMPT]
    tokenizer = tiny_processor().tokenizer
    queries = sorted(tokenizer(QUERIES)["input_ids"])
    for prompt, rows in seen.items():
        pages = [ids for ids in rows if IMAGE_PAD_ID in ids]
        assert (len(pages), len(rows)) == (NUM_PAGES, NUM_PAGES + len(QUERIES))
        text = tokenizer(prompt)["input_ids"]
        for ids in pages:
            count = ids.count(IMAGE_PAD_ID)
            assert ids == [VISION_START_ID, *[IMAGE_PAD_ID] * count, VISION_END_ID, *text]
        assert sorted(ids for ids in rows if IMAGE_PAD_ID not in ids) == queries


def test_scores_are_those_of_the_plain_model_in_both_layouts_of_pages(folder, tmp_path):
    rows, _ = compare_prompts(
        model_meta(folder / "embedding"),
        [local_pages(folder / "tables"), local_pages(folder / "pairs")],
        tmp_path,
        device="cpu",
        batch_size=3,
    )
    model, processor = MoCaModel.from_pretrained(folder / "model"), tiny_processor(max_length=128)

    def embed(texts, pictures):
        with torch.no_grad():
            rows = [
                model(**processor(text=[text], images=[given])).pooler_output[0] for text, given in zip(texts, pictures)
            ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    queries, pages = embed(QUERIES, [[]] * len(QUERIES)), images(NUM_PAGES, 3)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    for side, prompt in (("without", ""), ("prompted", PROMPT)):
        documents = embed([placeholder + prompt] * NUM_PAGES, [[page] for page in pages])
        for k in (5, 10):
            expected = retrieval_metrics(queries, documents, ANSWERS, k=k)[f"nDCG@{k}"]
            for row in rows:
                assert getattr(row, side)[f"ndcg_at_{k}"] == pytest.approx(expected, abs=2e-5), (row.task, side, k)
    assert [row.task for row in rows] == ["tables-test", "pairs-test", "mean"]
    assert [row.num_queries for row in rows] == [5, 5, 10]
    assert rows[0].without != rows[0].prompted
    # What was kept of every query is what mteb averaged.
    for file in tmp_path.rglob("per_query/tables-test.test.default.json"):
        scores = json.loads(file.read_text()).values()
        result = json.loads((file.parents[1] / "tables-test.json").read_text())["scores"]["test"][0]
        for metric in METRICS:
            assert np.mean([row[metric] for row in scores]) == pytest.approx(result[metric], abs=1e-5)
    difference = rows[0].prompted["ndcg_at_5"] - rows[0].without["ndcg_at_5"]
    low, high = rows[0].intervals["ndcg_at_5"]
    assert low <= difference <= high and low < high
    table = as_table(rows)
    assert f"| tables-test | 5 | nDCG@5 | {rows[0].without['ndcg_at_5']:.4f} |" in table
    assert f"| {difference:+.4f} ({low:+.4f} to {high:+.4f}) |" in table


def test_a_run_goes_on_and_never_takes_results_of_other_data_or_prompts(folder, tmp_path, seen):
    data = write_tables(tmp_path / "data")

    def run(**options):
        seen.clear()
        rows, files = compare_prompts(
            model_meta(folder / "embedding"), [local_pages(data)], tmp_path / "out", device="cpu", **options
        )
        return rows, files, sorted(seen)

    first, files, loaded = run()
    assert loaded == ["", PROMPT]
    assert run() == (first, files, [])
    # As after a run that was killed in its second half.
    (files[0].parents[1] / "data-test.json").unlink()
    assert run() == (first, files, [PROMPT])
    (files[0].parents[1] / "per_query" / "data-test.test.default.json").unlink()
    assert run() == (first, files, [PROMPT])
    # A name for the kind of task goes before the plain one, which stays empty.
    other, other_files, _ = run(prompts={"DocumentUnderstanding-document": "A page."})
    assert other_files != files and other[0].without == first[0].without and other[0].prompted != first[0].prompted
    tokenizer = tiny_processor().tokenizer
    assert [ids[-1] for ids in seen[""] if IMAGE_PAD_ID in ids] == [tokenizer("A page.")["input_ids"][-1]] * NUM_PAGES
    assert run() == (first, files, [])
    write_tables(data, query=[*QUERIES[1:], QUERIES[0]])
    changed, _, loaded = run()
    assert loaded == ["", PROMPT] and changed != first


def test_cards_read_the_results(folder, tmp_path):
    meta = model_meta(folder / "embedding", name="org/moca-tiny")
    task = local_pages(folder / "tables")
    rows, files = compare_prompts(meta, [task], tmp_path, device="cpu")
    (result,) = read_results(files)
    assert result.metrics == pytest.approx(rows[0].prompted) and result.model == "org/moca-tiny"
    assert result.dataset["revision"] == task.metadata.dataset["revision"] and result.dataset["split"] == "test"


def test_vidore_as_mteb_defines_it(folder, tmp_path, monkeypatch, seen):
    """The benchmark's own tasks, in all their languages; only what they download is made here."""
    names = {version: [task.metadata.name for task in mteb.get_benchmark(version).tasks] for version in VERSIONS}
    assert [len(found) for found in names.values()] == [4, 10]
    for version in VERSIONS:
        for task in mteb.get_benchmark(version).tasks:
            # Pages without text: a prompt for images suits them all.
            assert task.metadata.category == "t2i" and task.metadata.type == "DocumentUnderstanding"
    task = copy.deepcopy(mteb.get_benchmark("ViDoRe(v2)").tasks[0])
    assert len(task.hf_subsets) == 4
    task.filter_languages(["eng", "fra"])

    def load_data(self, num_proc=None, **kwargs):
        pages = datasets.Dataset.from_dict(
            {"id": [f"p{page}" for page in range(NUM_PAGES)], "image": images(NUM_PAGES, 3)}
        )
        self.dataset = {}
        for language in self.hf_subsets:
            queries = datasets.Dataset.from_dict(
                {
                    "id": [f"{language}{query}" for query in range(len(QUERIES))],
                    "text": [f"{language} {q}" for q in QUERIES],
                }
            )
            relevant = {f"{language}{q}": {f"p{page}": 1 for page in pages_} for q, pages_ in enumerate(ANSWERS)}
            split = RetrievalSplitData(queries=queries, corpus=pages, relevant_docs=relevant, top_ranked=None)
            self.dataset[language] = {"test": split}
        self.data_loaded = True

    monkeypatch.setattr(type(task), "load_data", load_data)
    (row,), files = compare_prompts(model_meta(folder / "embedding"), [task], tmp_path, device="cpu")
    assert row.num_queries == 2 * len(QUERIES)
    results = read_results(files)
    assert sorted(result.dataset["config"] for result in results) == sorted(task.hf_subsets)
    assert {result.dataset["id"] for result in results} == {task.metadata.dataset["path"]}
    scores = json.loads(files[0].read_text())["scores"]["test"]
    for metric in METRICS:
        assert row.prompted[metric] == pytest.approx(np.mean([entry[metric] for entry in scores]))
    # mteb's own instruction of a task is for other models: queries are plain.
    texts = {tuple(ids) for ids in seen[PROMPT] if IMAGE_PAD_ID not in ids}
    expected = [f"{language} {query}" for language in task.hf_subsets for query in QUERIES]
    assert texts == {tuple(ids) for ids in tiny_processor().tokenizer(expected)["input_ids"]}
    # As after a run that was killed between two languages.
    kept = json.loads(files[0].read_text())
    kept["scores"]["test"] = [entry for entry in scores if entry["hf_subset"] == "english"]
    files[0].write_text(json.dumps(kept))
    seen.clear()
    assert compare_prompts(model_meta(folder / "embedding"), [task], tmp_path, device="cpu") == ([row], files)
    again = [tuple(ids) for ids in seen.pop(PROMPT) if IMAGE_PAD_ID not in ids]
    french = tiny_processor().tokenizer([f"french {query}" for query in QUERIES])["input_ids"]
    assert sorted(again) == sorted(map(tuple, french)) and not seen


def test_tasks_that_are_not_open_are_left_out_and_told(folder, tmp_path, monkeypatch, caplog):
    task = next(task for task in mteb.get_benchmark("ViDoRe(v3)").tasks if not task.metadata.is_public)

    def load_data(self, **kwargs):
        raise DatasetNotFoundError("It is private.")

    monkeypatch.setattr(type(task), "load_data", load_data)
    meta, pages = model_meta(folder / "embedding"), local_pages(folder / "tables")
    (row,), files = compare_prompts(meta, [task, pages], tmp_path, device="cpu")
    assert row.task == "tables-test" and len(files) == 1
    assert f"{task.metadata.name} is left out: It is private." in caplog.text
    with pytest.raises(ValueError, match=f"None of \\['{task.metadata.name}'\\] could be evaluated"):
        compare_prompts(meta, [task], tmp_path, device="cpu")


def test_intervals_follow_the_queries():
    same = np.full((50, len(METRICS)), 0.25)
    assert _intervals(_resampled_means(same, 0)) == dict.fromkeys(METRICS, (0.25, 0.25))
    # n values of standard deviation s: the mean spreads by s / sqrt(n), 1.96 of that on either side.
    values = np.random.default_rng(1).normal(0.1, 0.3, (400, len(METRICS)))
    drawn = _resampled_means(values, 0)
    for column, (low, high) in enumerate(_intervals(drawn).values()):
        half = 1.96 * values[:, column].std() / 20
        assert low == pytest.approx(values[:, column].mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values[:, column].mean() + half, abs=0.1 * half)
    # Two languages that score alike tell no more than one; other tasks are drawn on their own.
    assert np.array_equal(_resampled_means(values, 0), drawn)
    assert not np.allclose(_resampled_means(values, 1), drawn)


def test_the_example_prints_and_writes_the_table(folder, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "evaluate_vidore.py"
    spec = importlib.util.spec_from_file_location("evaluate_vidore", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = {"--model": folder / "embedding", "--output": tmp_path, "--local-pages": folder / "pairs"}
    options |= {"--prompts": '{"document": "A page."}', "--device": "cpu", "--name": "org/moca-tiny"}
    monkeypatch.setattr(sys, "argv", ["evaluate_vidore.py", *(str(part) for pair in options.items() for part in pair)])
    example.main()
    written = json.loads((tmp_path / "prompts.json").read_text())[str(folder / "pairs")]
    assert written["prompts"] == {"query": "", "document": "A page."} and written["model"] == "org/moca-tiny"
    (task,) = written["tasks"]
    printed = capsys.readouterr().out
    assert f"| pairs-test | 5 | nDCG@10 | {task['without']['ndcg_at_10']:.4f} |" in printed
    card = printed.split()[-1]
    assert read_results([card])[0].metrics == pytest.approx(task["prompted"])


def test_what_cannot_be_compared_is_refused(folder, tmp_path):
    meta, tasks = model_meta(folder / "embedding"), [local_pages(folder / "tables")]
    with pytest.raises(ValueError, match="no such names of prompts"):
        compare_prompts(meta, tasks, tmp_path, prompts={"documents": "A page."})
    for prompts in ({}, {"query": ""}, {"SciFact-document": "A page."}):
        with pytest.raises(ValueError, match="is one of tables-test: nothing to compare"):
            compare_prompts(meta, tasks, tmp_path, prompts=prompts)
    for prompts in (["A page."], {"document": None}):
        with pytest.raises(ValueError, match="Prompts are a mapping of names to texts, got"):
            compare_prompts(meta, tasks, tmp_path, prompts=prompts)
    with pytest.raises(ValueError, match=r"some are there twice: \['tables-test', 'tables-test'\]"):
        compare_prompts(meta, [*tasks, local_pages(folder / "tables")], tmp_path)
