"""The study: pieces of documents, equal trials, held-out rows searched once, resuming, the bootstrap, and its page."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import study  # noqa: E402
import study_backbone  # noqa: E402
import study_data  # noqa: E402
import study_jobs  # noqa: E402
import study_results  # noqa: E402
import study_runs  # noqa: E402
from study_rows import MOCA, ROWS  # noqa: E402
from study_scales import SCALES  # noqa: E402

PLACEHOLDER = study_data.PLACEHOLDER
QWEN_TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"
PAGE = ROOT / "docs" / "study.md"
RESULTS = ROOT / "docs" / "study" / "results-cpu.json"
WORDS = "tide moon sun star sea rock leaf root cell bone wave light".split()


def picture(number, size=(56, 56)):
    """Return an encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 13 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(folder):
    """Write a small data folder in the layout that the study reads."""
    generator = np.random.default_rng(0)

    def words(count):
        return " ".join(generator.choice(WORDS, count))

    def write(name, rows):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    for start, split in enumerate(("train", "dev", "test")):
        ids = range(100 * start, 100 * start + 12)
        documents = [f"# About {i}\n\n{words(30)}.\n\n{PLACEHOLDER}\n{words(30)}." for i in ids]
        write(f"cpt/{split}", [{"text": text, "images": [picture(i)]} for i, text in zip(ids, documents)])
        write(f"cpt_text/{split}", [{"text": f"{words(60)}.", "images": [b"x"][:0]} for _ in ids])
        write(f"caption/{split}", [{"caption": f"{i} {words(5)}", "image": picture(i)} for i in ids])
        write(
            f"photo_cls/{split}", [{"label_text": f"A photo of {i % 8}.", "image": picture(i, (84, 56))} for i in ids]
        )
        pairs = [{"query": f"What is {i}?", "positive": f"{i} {words(9)}"} for i in ids]
        write(f"text_pairs/{split}", pairs)
        write(f"visdoc/pages-{split}", [{"page_id": str(i), "image": picture(i, (56, 84))} for i in ids])
        queries = [
            {"query": f"page {i}", "page_ids": [str(i), str(i + 1)] if i % 100 < 2 else [str(i)]} for i in ids[:6]
        ]
        write(f"visdoc/queries-{split}", queries)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder):
    """Write a byte-level vocabulary with a few merges, in Qwen's files."""
    from tokenizers import pre_tokenizers

    folder.mkdir()
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("s", "t"), ("i", "n")]
    vocabulary = {token: index for index, token in enumerate([*tokens, *("".join(merge) for merge in merges)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")


TINY = dataclasses.replace(
    SCALES["cpu"],
    num_processes=1,
    num_merges=2,
    shape={
        **SCALES["cpu"].shape,
        "hidden_size": 32,
        "num_heads": 1,
        "num_layers": 2,
        "vision_hidden_size": 32,
    },
    num_image_tokens=4,
    backbone_steps=2,
    cpt_steps=8,
    cpt_batch_size=2,
    cl_steps=2,
    cl_batch_size=4,
    cpt_learning_rates=(1e-3,),
    cl_learning_rates=(1e-3, 2e-3),
    wide_learning_rates=(1e-3, 2e-3),
    seeds=(0, 1),
)
SOME = (
    "causal, next-token training + CL",
    "bidirectional + CL",
    MOCA,
    "without task-aware batches",
    "1/4 of CPT",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("study_data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A whole study of five rows and one curve, stopped once on its way."""
    output = tmp_path_factory.mktemp("study")
    rows = {name: ROWS[name] for name in SOME}
    calls = []

    def counted(run_job):
        def run(job, *args):
            calls.append(job)
            if len(calls) == 9:
                (Path(args[0]) / job.name).mkdir(parents=True)
                (Path(args[0]) / job.name / "result.json.partial").write_text("{")
                raise KeyboardInterrupt
            run_job(job, *args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_jobs, "run_job", counted(study_jobs.run_job))
        patch.setattr(study_runs, "begin_process", lambda scale: None)
        with pytest.raises(KeyboardInterrupt):
            study_jobs.Study(output, data, TINY, rows, {"mae_ratio": (0.25,)}).run_table()
        again = study_jobs.Study(output, data, TINY, rows, {"mae_ratio": (0.25,)})
        raw = again.run_table()
        raw["curves"] = again.run_curves(raw["chosen"])
        study.write(again, raw)
    return output, calls, raw


def test_a_document_is_cut_after_sentences_and_keeps_its_images():
    text = f"One two. Three four.\n\n{PLACEHOLDER}\nA picture. The end {PLACEHOLDER}"
    pieces = study_data.pieces(text, [b"first", b"second"], 12)
    assert "".join(piece["text"] for piece in pieces) == text
    assert [piece["images"] for piece in pieces] == [[], [b"first"], [b"second"]]
    assert all(piece["text"].count(PLACEHOLDER) == len(piece["images"]) for piece in pieces)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cpt/dev\.parquet is not there: --data must name a folder"):
        study_data.read(tmp_path, "cpt/dev")
    with pytest.raises(ValueError, match=r"cpt/train\.parquet is not there"):
        study_jobs.Study(tmp_path / "output", tmp_path, TINY)


def test_queries_with_several_pages_and_equal_candidates_once(data):
    search = study_data.searches(data, "dev")
    assert search["pages"]["relevant"][:3] == [[0, 1], [1, 2], [2]]
    assert len(search["pages"]["candidates"]) == 12 and len(search["pages"]["queries"]) == 6
    assert len(search["photos"]["candidates"]) == 8 and len(search["photos"]["queries"]) == 12


def test_stage_2_can_do_without_a_family(data):
    assert set(study_data.labelled_pairs(data, "train", 30)) == set(study_data.TASKS)
    assert set(study_data.labelled_pairs(data, "train", 30, ("long-form",))) == {"captions", "photos", "passages"}


def test_classes_are_cut_in_training_only(data):
    assert len(study_data.labelled_pairs(data, "train", 1)["photos"]) == 8
    assert len(study_data.labelled_pairs(data, "train", 30)["photos"]) == 12
    assert len(study_data.searches(data, "train")["photos"]["queries"]) == 12


@pytest.mark.skipif(not QWEN_TOKENIZER.is_dir(), reason="the real Qwen tokenizer is not there (shared/data/tokenizer)")
def test_the_first_merges_are_a_tokenizer():
    text = "The tide-tables of 1884: naïve but readable, ½ of them in 中文.\n\nA photo."
    whole = study_backbone.make_tokenizer(QWEN_TOKENIZER, None)
    every = study_backbone.make_tokenizer(QWEN_TOKENIZER, 200_000)
    assert every(text)["input_ids"] == whole(text)["input_ids"]
    cut = study_backbone.make_tokenizer(QWEN_TOKENIZER, 2000)
    ids = cut(text)["input_ids"]
    assert cut.decode(ids) == text and len(ids) > len(whole(text)["input_ids"])
    assert max(ids) < 256 + 2000 <= min(cut.convert_tokens_to_ids(list(study_backbone.SPECIAL_TOKENS)))
    for tokenizer in (whole, every, cut):
        for token in study_backbone.SPECIAL_TOKENS:
            assert len(tokenizer(token)["input_ids"]) == 1


def test_every_row_has_as_many_trials():
    for scale in SCALES.values():
        rows = study_jobs.Study.__new__(study_jobs.Study)
        rows.scale = scale
        numbers = {len(rows.trials(row)) for row in ROWS.values()}
        assert numbers == {len(scale.wide_learning_rates)}


def test_a_stopped_study_goes_on_and_runs_every_job_once(finished):
    output, calls, _ = finished
    names = [job.name for job in calls]
    stopped = names[8]
    assert names.count(stopped) == 2 and len(set(names)) == len(names) - 1
    assert {name for name in names if (output / name / "result.json").exists()} == set(names)


def test_held_out_rows_are_searched_once_and_last(finished):
    output, calls, raw = finished
    held_out = [number for number, job in enumerate(calls) if job.function == "search_held_out"]
    assert len(held_out) == len(SOME) * len(TINY.seeds)
    of_table = [number for number, job in enumerate(calls) if not re.search(r"mae_ratio", job.name)]
    assert held_out == of_table[-len(held_out) :]
    for name, of_row in raw["trials"].items():
        best = max(of_row, key=lambda trial: trial["score"])
        assert best["learning_rates"] == raw["chosen"][name]
    assert not any("test" in json.loads(path.read_text()) for path in output.glob("cl/*/result.json"))


def test_rows_differ_in_what_they_say(finished):
    output, calls, _ = finished
    by_name = {job.name: job.arguments for job in calls if job.function == "fine_tune"}
    causal = study_runs.MoCaModel.from_pretrained(output / "cpt/next_token-0.001-seed0/last")
    assert causal.config.bidirectional is False and causal.config.pooling == "last"
    assert {arguments["task_batches"] for name, arguments in by_name.items() if "task_aware" in name} == {False}
    early = [arguments["start_model"] for name, arguments in by_name.items() if name.startswith("cl/1_4")]
    assert early and all(start.endswith("2-8") for start in early)
    weights = [
        study_runs.MoCaForPreTraining.from_pretrained(output / "cpt/moca-0.001-seed0" / part).state_dict()
        for part in ("1-8", "2-8", "last")
    ]
    key = next(key for key in weights[0] if key.endswith("q_proj.weight"))
    assert not weights[0][key].equal(weights[1][key]) and not weights[1][key].equal(weights[2][key])
    # Of eight steps the first one is warm-up at a rate of 0: after an eighth the model is what it was.
    start = study_runs.MoCaModel.from_pretrained(output / "backbone/bidirectional").state_dict()
    assert weights[0][key].equal(start[key.removeprefix("moca.")])


def test_settings_reach_the_trainers(finished, data, tmp_path):
    output, _, _ = finished

    def stage(folder):
        return json.loads((folder / "training_record.json").read_text())["stages"][-1]

    assert stage(output / "cpt/moca-mae_ratio-0.25-0.001-seed0")["arguments"]["mae_ratio"] == 0.25
    assert stage(output / "cpt/moca-0.001-seed1")["arguments"]["mae_ratio"] == 0.5
    for name, of_one_task in (("without_task_aware_batches", False), ("MoCa__CPT___CL", True)):
        record = stage(output / f"cl/{name}-0.001-0.002-seed0")
        assert record["arguments"]["task_batches"] is of_one_task and record["arguments"]["learning_rate"] == 2e-3
        assert {entry["name"] for entry in record["datasets"]} == set(study_data.TASKS)
    some = study_jobs.Study(output, data, TINY)
    job = some.tuning("without text pairs", (1e-3, 1e-3), 0)
    study_runs.fine_tune(tmp_path, data, TINY, **job.arguments)
    assert {entry["name"] for entry in stage(tmp_path)["datasets"]} == set(study_data.TASKS) - {"passages"}
    for name, setting, value in (
        ("without MLM", "mlm_ratio", 0),
        ("without MAE", "mae_ratio", 0),
        ("labels not shifted", "shift_labels", False),
    ):
        assert some.pretraining(name, 1e-3, 0).arguments["settings"] == {setting: value}
        assert (
            some.tuning(name, (1e-3, 1e-3), 0)
            .arguments["start_model"]
            .endswith(f"{name.replace(' ', '_')}-0.001-seed0/last")
        )


def test_results_tables_and_figures(finished):
    output, _, raw = finished
    results = json.loads((output / "results.json").read_text())
    for row in SOME:
        for seed, found in enumerate(raw["test"][row]):
            values = found["photos"]["nDCG@5"]
            assert len(values) == 12
            assert results["test"][row][seed]["photos"]["nDCG@5"] == pytest.approx(np.mean(values))
    assert set(results["claims"]) == {"cpt", "tokens", "batches"}
    tables = (output / "tables.md").read_text()
    assert all(f"| {row} |" in tables for row in SOME)
    assert "<!-- filled-in -->" in tables and " → " in tables
    for name in (*results["claims"], "curve_mae_ratio"):
        assert (output / "figures" / f"{name}.svg").stat().st_size > 1000
    assert Image.open(output / "figures" / "reconstruction.jpg").width > 500


def test_other_settings_are_refused(finished, data):
    output, _, _ = finished
    with pytest.raises(ValueError, match="holds results of other settings or other data"):
        study_jobs.Study(output, data, dataclasses.replace(TINY, cl_steps=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_large_scale_needs_a_gpu(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study.py", "--scale", "gpu", "--data", str(data), "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        study.main()
    assert "--scale gpu needs a GPU, and torch sees none; --scale cpu does without." in capsys.readouterr().err


def rows_of(values):
    """Return one seed's results with the same values in every task."""
    return {task: {"nDCG@5": list(values)} for task in study_data.TASKS}


def test_bootstrap_of_a_constant_difference_has_no_spread():
    first, second = [rows_of([0.5, 0.75])] * 3, [rows_of([0.25, 0.5])] * 3
    found = study_results.paired_bootstrap(first, second, num_draws=200)
    assert all(np.allclose(interval, 0.25) for interval in found.values())
    assert study_results.verdict(found["mean"]) == "seen"
    assert study_results.verdict(study_results.paired_bootstrap(second, first, 200)["mean"]) == "the opposite"


def test_bootstrap_has_the_spread_of_the_mean():
    generator = np.random.default_rng(1)
    noise = generator.normal(size=400)
    found = study_results.paired_bootstrap([rows_of(noise)], [rows_of(np.zeros(400))], num_draws=4000)
    error = noise.std() / 20  # of the mean of 400 values
    middle, low, high = found["text"]
    assert middle == pytest.approx(noise.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    # Tasks are drawn one by one: of two the mean varies less.
    assert np.diff(found["long-form"][1:])[0] == pytest.approx((high - low) / 2**0.5, rel=0.12)


def test_bootstrap_counts_seeds_that_disagree():
    first, second = [rows_of([1.0] * 50), rows_of([0.0] * 50)], [rows_of([0.5] * 50)] * 2
    found = study_results.paired_bootstrap(first, second, num_draws=2000)
    assert found["mean"] == pytest.approx([0.0, -0.5, 0.5])
    assert study_results.verdict(found["mean"]) == "within noise"


def test_the_page_shows_the_results_that_lie_beside_it():
    page, results = PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, table in study_results.render(results).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->" in page, name
    for picture_path in re.findall(r"\]\((study/[^)]+)\)", page):
        assert (PAGE.parent / picture_path).is_file(), picture_path
    for key in results["claims"]:
        assert f"(study/figures/{key}.svg)" in page
