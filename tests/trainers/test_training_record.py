"""The record of a run: what it says is what happened, also after a kill, on two ranks, and over both stages."""

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from transformers import TrainingArguments

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers import contrastive_run, cpt_run, runs
from tests.trainers.contrastive_cases import save_checkpoint
from tests.trainers.cpt_sources import numbered_rows, write_parquet, write_tars
from tests.two_ranks import fork_two_ranks
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer
from trainers.row_sources import RowSource
from trainers.training_record import (
    RECORD,
    describe_arguments,
    describe_evaluations,
    describe_losses,
    describe_model,
    describe_source,
    public_name,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    rows = numbered_rows(40)
    rows[7]["text"] = rows[23]["text"] = " "
    write_parquet(folder / "p", rows, num_files=4)
    write_tars(folder / "w", 12, num_files=2)
    save_checkpoint(folder / "start")
    contrastive_run.write_mixture(folder)
    return folder


def record(folder):
    return json.loads((Path(folder) / RECORD).read_text())


def without_clock(stage):
    return {name: value for name, value in stage.items() if name not in ("seconds", "tokens_per_second", "resumes")}


def test_stage_1_counts_what_was_trained_on(folder, tmp_path):
    taken = Counter()

    class Watching(CPTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            mask = inputs["attention_mask"]
            taken.update(tokens=int(mask.sum()), rows=len(mask), masked_tokens=int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = cpt_run.make_trainer(folder, tmp_path, max_steps=8, hub_token="hf_secret", run_name="me")
    trainer.__class__ = Watching
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    whole = record(tmp_path)
    assert whole == record(tmp_path / "final")
    (stage,) = whole["stages"]
    assert without_clock(record(tmp_path / "checkpoint-8")["stages"][0]) == without_clock(stage)
    assert record(tmp_path / "checkpoint-4")["stages"][0]["steps"] == 4
    assert {name: stage[name] for name in taken} == taken
    assert (stage["stage"], stage["steps"], stage["kept_step"]) == ("continual pre-training", 8, 8)
    pages, captions = stage["datasets"]
    assert pages["used_rows"] + captions["used_rows"] == stage["rows"]
    assert (pages["rows"], pages["skipped_rows"]) == (40, {"empty_text": sum(1 for _ in rejected_lines(tmp_path))})
    assert (captions["rows"], captions["skipped_rows"], captions["name"]) == (12, {}, "webdataset:w/*.tar")
    assert stage["seconds"] > 0 and stage["tokens_per_second"] == pytest.approx(
        stage["tokens"] / stage["seconds"], 1e-3
    )
    logged = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    for name in ("loss", "mlm_loss", "mae_loss"):
        assert stage["losses"][name]["final"] == pytest.approx(logged[-1][name], abs=1e-6)
        assert [step for step, _ in stage["losses"][name]["curve"]] == [3, 6]
    (environment,) = stage["environments"]
    assert environment["versions"]["torch"] == torch.__version__ and environment["num_processes"] == 1
    assert sum(environment["devices"].values()) == 1 and environment["mixed_precision"] == "no"
    assert stage["model"]["num_parameters"] == sum(weight.numel() for weight in trainer.model.parameters())
    assert stage["arguments"]["max_cost"] == 256 and stage["arguments"]["shift_labels"] is True
    text = (tmp_path / RECORD).read_text()
    assert "secret" not in text and str(folder) not in text and str(tmp_path) not in text and "run_name" not in text


def rejected_lines(folder):
    return map(json.loads, (Path(folder) / "rejected.jsonl").read_text().splitlines())


def test_two_ranks_count_together(folder, tmp_path):
    arguments = runs.setting_flags(streaming=True, max_steps=2, save_steps=2)
    fork_two_ranks(cpt_run.__file__, folder, tmp_path, *arguments)
    (stage,) = record(tmp_path)["stages"]
    assert sum(entry["used_rows"] for entry in stage["datasets"]) == stage["rows"] > 20
    assert stage["environments"][0]["num_processes"] == sum(stage["environments"][0]["devices"].values()) == 2
    assert all("rows" not in entry for entry in stage["datasets"])


def test_a_resumed_run_goes_on_counting(folder, tmp_path):
    # Runs that are killed are compared with whole ones in test_*_resume.py.
    cpt_run.make_trainer(folder, tmp_path, max_steps=2).train()
    before = record(tmp_path)["stages"][0]
    cpt_run.make_trainer(folder, tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    (stage,) = record(tmp_path)["stages"]
    assert (before["steps"], before["resumes"], stage["steps"], stage["resumes"]) == (2, 0, 4, 1)
    for name in ("rows", "tokens", "masked_tokens", "seconds"):
        assert stage[name] > 1.4 * before[name] > 0, name
    assert stage["environments"] == before["environments"]


def test_stage_2_carries_stage_1_along(folder, tmp_path):
    start = shutil.copytree(folder / "start", tmp_path / "start")
    stage_1 = {"stage": "continual pre-training", "steps": 7}
    (start / RECORD).write_text(json.dumps({"format": 1, "stages": [stage_1]}))
    contrastive_run.write_mixture(tmp_path)
    trainer = contrastive_run.make_trainer(tmp_path, tmp_path / "run", max_steps=6)
    taken = Counter()
    collect = trainer.loss.forward

    def watch(features, labels):
        taken.update(rows=len(features[0]["input_ids"]), tokens=sum(int(f["attention_mask"].sum()) for f in features))
        return collect(features, labels)

    trainer.loss.forward = watch
    trainer.train()
    earlier, stage = record(tmp_path / "run")["stages"]
    assert earlier == stage_1 and stage["stage"] == "contrastive fine-tuning"
    assert {name: stage[name] for name in taken} == taken
    assert stage["model"]["start"] == "start"
    found = json.loads((tmp_path / "run" / "data_report.json").read_text())["datasets"]
    assert [entry["name"] for entry in stage["datasets"]] == list(found) == ["pages", "texts", "published"]
    for entry in stage["datasets"]:
        used = found[entry["name"]]["used"]
        assert entry["used_rows"] == used["num_rows"] and entry["rows"] == found[entry["name"]]["rows"]
        assert entry.get("missing_negatives", 0) == used["num_missing_negatives"]
    bad = Counter(line["reason"] for line in rejected_lines(tmp_path / "run"))
    assert stage["datasets"][2]["skipped_rows"] == dict(bad) and bad["empty_query"] == 1
    assert set(stage["losses"]) >= {"loss", "loss_texts", "loss_of_kind/text"}

    (start / RECORD).write_text("[]")
    with pytest.raises(ValueError, match="training_record.json is no training record of format 1"):
        contrastive_run.make_trainer(tmp_path, tmp_path / "other")


def test_evaluation_and_the_best_model(folder, tmp_path):
    rows = {"query": [f"row {i}" for i in range(8)], "positive": [f"page {i}" for i in range(8)]}
    dev = {f"parquet:{tmp_path}/d/*.parquet": datasets.Dataset.from_dict(rows)}
    trainer = ContrastiveTrainer(
        build_sentence_transformer(folder / "start", device="cpu"),
        ContrastiveConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            learning_rate=1e-2,
            load_best_model_at_end=True,
            metric_for_best_model="ndcg_at_10",
            use_cpu=True,
            report_to="none",
        ),
        {"mine": datasets.Dataset.from_dict(rows)},
        dev,
    )
    trainer.train()
    again = trainer.evaluate()
    trainer.save_model()
    (stage,) = record(tmp_path / "run")["stages"]
    assert stage["kept_step"] == trainer.state.best_global_step
    assert [(entry["step"], entry["after_training"]) for entry in stage["evaluations"]] == [
        (2, False),
        (4, False),
        (4, True),
    ]
    metrics = stage["evaluations"][-1]["metrics"]
    assert metrics["ndcg_at_10"] == pytest.approx(again["eval_ndcg_at_10"])
    assert metrics["parquet_d/_.parquet_ndcg_at_10"] == metrics["ndcg_at_10"]
    assert str(tmp_path) not in (tmp_path / "run" / RECORD).read_text()
    assert stage["datasets"] == [{"name": "mine", "rows": 8, "num_negatives": 0, "used_rows": 16, "skipped_rows": {}}]


def test_stage_1_without_a_mixture(tmp_path):
    rows = datasets.Dataset.from_list([{"text": f"row {i}" if i != 3 else " ", "images": []} for i in range(6)])
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "max_bad_row_share": 1.0, "report_to": "none"}
    config = CPTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    trainer = CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor())
    trainer.train()
    (stage,) = record(tmp_path)["stages"]
    assert stage["rows"] == 5
    expected = {"name": "train_dataset", "rows": 6, "used_rows": 5, "skipped_rows": {"empty_text": 1}}
    assert stage["datasets"] == [expected]


def test_names_without_folders_and_secrets():
    for given, expected in {
        "org/pages": "org/pages",
        "parquet:/home/me/pages/*.parquet": "parquet:pages/*.parquet",
        "/home/me/pages": "me/pages",
        "a: b": "a: b",
        "https://me:secret@host/pages.parquet?signature=1": "https://host/pages.parquet",
    }.items():
        assert public_name(given) == expected


def test_sources_on_the_hub_and_elsewhere(tmp_path):
    given = {"path": "org/pages", "name": "en", "revision": "v1", "weight": 2.0, "max_rows": 5}
    entry = {"hub_id": "org/pages", "config": "en", "revision": "v1", "weight": 2.0, "max_rows": 5, "rows": 4}
    assert describe_source(RowSource(**given), 4) == entry | {"name": "org/pages:en", "split": "train"}
    assert (
        describe_source(RowSource("parquet", data_files="hf://datasets/org/pages@v1/a.parquet"))["hub_id"]
        == "org/pages"
    )
    for path, files in ((str(tmp_path), None), ("parquet", str(tmp_path / "*.parquet"))):
        entry = describe_source(RowSource(path, data_files=files))
        assert "hub_id" not in entry and str(tmp_path) not in json.dumps(entry)


def test_only_what_differs_from_the_stock_defaults(tmp_path):
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert describe_arguments(stock) == {}
    changed = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, data_seed=0, weight_decay=0.1, hub_token="hf_x")
    assert describe_arguments(changed) == {"data_seed": 0, "weight_decay": 0.1}


def test_losses_and_evaluations_of_a_history():
    history = [{"step": step, "loss": float(step)} for step in range(1, 121)]
    history[-1]["loss"] = float("nan")
    loss = describe_losses(history + [{"step": 120, "eval_loss": 1.0}, {"step": 120, "train_loss": 2.0}])["loss"]
    assert loss["first"] == 1 and loss["final"] is None and loss["smoothed"] is None
    assert loss["curve"][0] == [3, 2.0] and loss["curve"][-1] == [120, None] and len(loss["curve"]) == 40
    assert describe_losses(history[:100])["loss"]["smoothed"] == 95.5
    repeated = [{"step": 1, "eval_a_loss": 1.0}, {"step": 1, "eval_b_loss": 2.0, "eval_b_runtime": 3.0}]
    assert describe_evaluations(repeated) == [
        {"step": 1, "after_training": False, "metrics": {"a_loss": 1.0, "b_loss": 2.0}}
    ]


def test_a_start_on_the_hub_is_named_with_its_commit(tmp_path):
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    assert "start" not in describe_model(model)
    model.config._name_or_path = str(tmp_path / "stage1")
    assert describe_model(model)["start"] == "stage1"
    model.config._name_or_path, model.config._commit_hash = "org/base", "f" * 40
    entry = describe_model(model)
    assert (entry["start"], entry["start_commit"]) == ("org/base", "f" * 40)


def test_the_card_of_a_run(folder, tmp_path):
    calls = []
    trainer = contrastive_run.make_trainer(folder, tmp_path, max_steps=2, hub_model_id="org/tiny")
    trainer.card_writer = lambda *args, **kwargs: calls.append((args, kwargs, record(tmp_path)["stages"][0]["steps"]))
    trainer.train()
    trainer.create_model_card(license="mit", finetuned_from="org/base")
    given = {"model_id": "org/tiny", "language": None, "license": "mit", "tags": None, "datasets": None}
    assert calls == [((str(tmp_path),), {**given, "base_model": "org/base"}, 2)]
    with pytest.raises(ValueError, match=r"\['tasks'\] are not supported"):
        trainer.create_model_card(tasks="retrieval")
