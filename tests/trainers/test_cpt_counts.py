"""What is counted and logged in training: padding, speed, FLOPs and utilisation, bad rows by data set."""

import time

import pytest
import torch

from modeling_moca import MoCaForPreTraining
from tests.families import family_backbone
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import make_row
from trainers.cpt_collator import CPTCollator
from trainers.cpt_config import CPTConfig
from trainers.cpt_counts import StepCounts
from trainers.cpt_trainer import CPTTrainer
from trainers.flops import FlopsMeter, step_flops


def make_trainer(folder, **settings):
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 3, "max_length": 256, **settings}
    config = CPTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings
    )
    rows = [make_row(seed, 4 + 9 * (seed % 3), seed % 3) for seed in range(6)]
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    return CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor())


@pytest.mark.parametrize("packing", [False, True])
def test_speed_padding_and_flops_are_logged(tmp_path, monkeypatch, packing):
    # A device of 10^6 FLOPs a second.
    monkeypatch.setattr("trainers.flops.peak_flops", lambda device: 1e6)
    trainer = make_trainer(tmp_path, packing=packing)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or compute_loss(model, inputs, **kwargs)
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    entries = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    assert len(entries) == 2 and len(seen) == 4
    for number, entry in enumerate(entries):
        flops = num_tokens = num_positions = 0
        for batch in seen[2 * number : 2 * number + 2]:
            lengths = batch["cu_seq_lens"].diff() if packing else batch["attention_mask"].sum(-1)
            num_tokens, num_positions = num_tokens + int(lengths.sum()), num_positions + batch["input_ids"].numel()
            chosen = int((batch["labels"] != -100).sum()), int(batch["patch_mask"].sum())
            flops += step_flops(trainer.model.config, lengths.tolist(), batch["image_grid_thw"].tolist(), *chosen)
        assert entry["padding"] == pytest.approx(1 - num_tokens / num_positions)
        assert (entry["padding"] == 0) == packing
        seconds = num_tokens / entry["tokens_per_second"]
        assert 0 < seconds < elapsed
        assert entry["tflops_per_device"] * 1e12 * seconds == pytest.approx(flops, rel=1e-5)
        assert entry["mfu"] == pytest.approx(entry["tflops_per_device"] * 1e6)


def test_no_utilisation_without_a_peak_and_no_flops_of_tiles(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    assert "mfu" not in trainer.state.log_history[0] and trainer.state.log_history[0]["tflops_per_device"] > 0
    tiles = MoCaForPreTraining.from_backbone(family_backbone("smolvlm"), mask_token_id=6)
    meter = FlopsMeter(tiles, "cpu")
    meter.add({})
    assert meter.logs(meter.total, 1.0, 1) == {}


def test_bad_rows_are_counted_by_data_set_and_reason():
    counts = StepCounts(4, ["pages", "captions", "pages"])
    rejected = [
        {"dataset": "pages", "reason": "empty_text"},
        {"dataset": "captions", "reason": "empty_text"},
        {"dataset": "captions", "reason": "aspect_ratio"},
        {"dataset": "captions", "reason": "aspect_ratio"},
    ]
    batch = CPTCollator(tiny_processor(), max_length=256)([make_row(0, 9, 1), make_row(1, 9, 0)])
    batch |= {"skipped_rows": counts.rejected(rejected), "num_rows": 6}
    num_masked, num_patches = int((batch["labels"] != -100).sum()), batch["patch_labels"].shape[:2].numel()
    total = counts.zeros("cpu") + counts.pop(batch)
    assert total[:2].tolist() == [num_masked, num_patches] and counts.num_bad_rows(total.tolist()) == 4
    assert not {"skipped_rows", "num_rows", "cut_rows"} & batch.keys()
    logs = counts.logs(total.tolist(), 2.0)
    assert logs.pop("tokens_per_second") == int(batch["attention_mask"].sum()) / 2
    assert {name: number for name, number in logs.items() if number and name.startswith("skipped_rows")} == {
        "skipped_rows": 4,
        "skipped_rows/empty_text": 2,
        "skipped_rows/aspect_ratio": 2,
        "skipped_rows/pages/empty_text": 1,
        "skipped_rows/captions/empty_text": 1,
        "skipped_rows/captions/aspect_ratio": 2,
    }
    assert logs["num_rows"] == 6 and logs["num_masked_patches"] == num_patches


def test_a_batch_that_is_not_finished_has_the_same_counts():
    collator, rows = CPTCollator(tiny_processor(), max_length=256), [make_row(0, 9, 2), make_row(1, 30, 1)]
    counts = StepCounts(4)
    encoded, _ = collator.encode([collator.prepare(row, "here") for row in rows])
    finished = collator(rows)
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    meters = [FlopsMeter(model, "cpu") for _ in range(2)]
    for meter, batch in zip(meters, (encoded, finished)):
        meter.add(batch)
    assert meters[0].total == meters[1].total > 0
    assert torch.equal(counts.pop(encoded), counts.pop(finished))
