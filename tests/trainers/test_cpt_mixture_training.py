"""Training on a mixture: every row, costs, counts, rejected rows, limits, workers and ranks."""

import json
from collections import Counter

import datasets
import pytest
import torch

from tests.tiny import tiny_processor
from tests.trainers import cpt_run
from tests.trainers.cpt_sources import number_of, numbered_rows, write_parquet, write_tars
from trainers.cpt_loader import MixtureBatches
from trainers.cpt_mixture import CPTMixture, DataSource
from trainers.cpt_rows import BadRowError
from trainers.cpt_trainer import CPTTrainer


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_parquet(folder / "p", numbered_rows(23), num_files=3)
    write_tars(folder / "w", 8, num_files=2)
    return folder


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Twenty rows, of which row 3 has no text, row 6 a truncated image and row 9 one placeholder too few."""
    folder = tmp_path_factory.mktemp("bad")
    rows = numbered_rows(20)
    rows[3]["text"] = ""
    image = rows[6]["images"][0]
    rows[6]["images"] = [image[: len(image) // 2], *rows[6]["images"][1:]]
    rows[9]["images"] = []
    rows[9]["text"] = "n9 <|vision_start|><|image_pad|><|vision_end|>"
    write_parquet(folder / "p", rows)
    write_tars(folder / "w", 4)
    return folder


class Recorder(CPTTrainer):
    """Keep the token ids that go through the model, and the largest cost."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        restored = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        for ids, mask in zip(restored, inputs["attention_mask"]):
            self.seen.append(tuple(ids[mask.bool()].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def record(monkeypatch, folder, output, **settings):
    monkeypatch.setattr(cpt_run, "CPTTrainer", Recorder)
    trainer = cpt_run.make_trainer(folder, output, save_strategy="no", **settings)
    trainer.seen = []
    trainer.train()
    decode = trainer.processing_class.tokenizer.decode
    texts = [decode([token for token in ids if token > 6]) for ids in trainer.seen]
    return trainer, [text for text in texts if text]


@pytest.mark.parametrize("settings", [{"max_cost": 256}, {"max_cost": None, "per_device_train_batch_size": 4}])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_used_once_an_epoch(monkeypatch, folder, tmp_path, settings, workers):
    settings = {**settings, "max_steps": -1, "num_train_epochs": 2, "dataloader_num_workers": workers}
    trainer, texts = record(monkeypatch, folder, tmp_path, logging_steps=1, **settings)
    names = Counter("w" if "harbour" in text else number_of(text) for text in texts)
    assert names == {"w": 16, **dict.fromkeys(range(23), 2)}
    logged = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    assert sum(entry["num_rows"] for entry in logged) == 62
    assert trainer.state.global_step == trainer.args.max_steps == len(logged)
    # The plan is tight: the last step still has rows.
    assert logged[-1]["num_masked_tokens"] > 0
    assert trainer.state.epoch == 1.0


def test_micro_batches_reach_the_cost_and_do_not_pass_it(folder, tmp_path):
    trainer = cpt_run.make_trainer(folder, tmp_path, max_cost=600, shuffle_window=64)
    batches = iter(MixtureBatches(trainer._mixture, trainer.data_collator, trainer.args))
    costs = [next(batches)["data"]["cost"] for _ in range(20)]
    assert max(costs) <= 600 and min(costs) >= 0.95 * max(costs)


@pytest.mark.parametrize("streaming", [False, True])
def test_rejected_rows_are_counted_and_listed(bad_folder, tmp_path, streaming):
    trainer = cpt_run.make_trainer(bad_folder, tmp_path, streaming, max_steps=6, logging_steps=2, max_bad_row_share=0.9)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    first = {line["row"]: line for line in lines if line["epoch"] == 0}
    reasons = {"empty_text", "undecodable_image", "placeholder_mismatch"}
    assert {line["reason"] for line in lines} == reasons and len(first) == 3
    if not streaming:
        assert {row: line["reason"] for row, line in first.items()} == {
            "row 3": "empty_text",
            "row 6": "undecodable_image",
            "row 9": "placeholder_mismatch",
        }
    for line in lines:
        assert line["dataset"].startswith("parquet:") and line["message"] and 1 <= line["step"] <= 6
    logged = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    for reason in reasons:
        assert sum(entry.get(f"skipped_rows/{reason}", 0) for entry in logged) == sum(
            line["reason"] == reason for line in lines
        )
        by_source = f"skipped_rows/{trainer._mixture.sources[0].label}/{reason}"
        assert all(entry.get(by_source, 0) == entry.get(f"skipped_rows/{reason}", 0) for entry in logged)
    assert sum(name.count("/") > 0 and "parquet:" in name for entry in logged for name in entry) >= 3
    assert not any("webdataset" in name for entry in logged for name in entry)
    # A run of its own begins a list of its own.
    cpt_run.make_trainer(bad_folder, tmp_path, max_steps=1, max_bad_row_share=0.9).train()
    again = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert len(again) < len(lines) and all(json.loads(line)["step"] == 1 for line in again)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_stop_a_run_that_wants_it_so(bad_folder, tmp_path, workers):
    trainer = cpt_run.make_trainer(bad_folder, tmp_path, on_bad_row="raise", dataloader_num_workers=workers)
    with pytest.raises(BadRowError, match=r"parquet:.*, row \d+ \(.*"):
        trainer.train()


def test_a_row_that_is_bad_before_its_images_are_opened_stops_such_a_run_too(folder, tmp_path):
    rows = numbered_rows(8)
    rows[3]["text"] = ""
    write_parquet(tmp_path / "p", rows)
    write_tars(tmp_path / "w", 4)
    trainer = cpt_run.make_trainer(tmp_path, tmp_path / "run", on_bad_row="raise")
    with pytest.raises(BadRowError, match="row 3 .*has no text"):
        trainer.train()


def test_too_large_a_share_of_bad_rows_stops_always(bad_folder, tmp_path):
    trainer = cpt_run.make_trainer(bad_folder, tmp_path, max_steps=50, max_bad_row_share=0.04)
    with pytest.raises(ValueError, match=r"\d+ of \d+ rows are bad, more than max_bad_row_share=0.04 allows; rejected"):
        trainer.train()
    assert trainer.state.global_step < 50
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) >= 4


def test_cut_rows_are_counted(folder, tmp_path):
    # Only rows without images are short enough to be cut, not refused.
    trainer = cpt_run.make_trainer(folder, tmp_path, max_steps=4, max_length=24, logging_steps=4, max_bad_row_share=1.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["num_cut_rows"] > 0 and entry["num_cut_tokens"] >= entry["num_cut_rows"]


def test_packing_gives_the_losses_of_padded_batches(folder, tmp_path):
    curves = []
    for packing in (False, True):
        trainer = cpt_run.make_trainer(folder, tmp_path, packing=packing, max_steps=4, save_strategy="no")
        trainer.train()
        curves.append(cpt_run.curve(trainer))
    for padded, packed in zip(*curves, strict=True):
        for name in ("loss", "mlm_loss", "mae_loss", "grad_norm"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-4), name
        for name in ("num_masked_tokens", "num_masked_patches", "num_rows"):
            assert packed[name] == padded[name] > 0


def test_masks_change_with_the_epoch_of_the_row(folder, tmp_path):
    mixture = CPTMixture([DataSource("parquet", data_files=str(folder / "p" / "*.parquet"))])
    trainer = cpt_run.make_trainer(folder, tmp_path, max_cost=4000, num_train_epochs=2)
    labels = {}
    for item in (next(batches) for batches in [iter(MixtureBatches(mixture, trainer.data_collator, trainer.args))] * 8):
        inputs = item["inputs"]
        restored = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        for ids, chosen, mask in zip(restored, inputs["labels"] != -100, inputs["attention_mask"].bool()):
            labels.setdefault(tuple(ids[mask].tolist()), []).append(tuple(chosen[mask].tolist()))
    repeated = [masks for masks in labels.values() if len(masks) > 1]
    assert len(repeated) >= 20
    assert sum(len(set(masks)) == len(masks) for masks in repeated) > 0.9 * len(repeated)


def test_mixtures_that_cannot_be_trained_on_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="A streamed mixture has no end: set max_steps"):
        cpt_run.make_trainer(folder, tmp_path, streaming=True, max_steps=-1)
    with pytest.raises(ValueError, match="train_sampling_strategy must be 'random', got 'group_by_length'"):
        cpt_run.make_trainer(folder, tmp_path, train_sampling_strategy="group_by_length")


def test_held_out_rows_are_evaluated(folder, tmp_path):
    trainer = cpt_run.make_trainer(folder, tmp_path)
    metrics = trainer.evaluate(eval_dataset=CPTMixture(cpt_run.sources(folder)).split(0.3))
    assert metrics["eval_mlm_loss"] > 0 and metrics["eval_mae_loss"] > 0
    assert isinstance(trainer.processing_class, type(tiny_processor()))
