"""CPTTrainer: it learns, its losses are exact means over the step, and it saves what stage 2 needs."""

import logging
import math

import pytest
import torch
from transformers import AutoModel, AutoProcessor, TrainerCallback

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import encoded_image, make_row, make_rows
from trainers.cpt_collator import CPTCollator
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_model(**kwargs):
    torch.manual_seed(0)
    return MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6, **kwargs)


def make_config(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 1,
        "max_length": 256,
        "train_sampling_strategy": "sequential",
    }
    return CPTConfig(**{**defaults, **settings})


def train(folder, rows, callbacks=(), **settings):
    processor = tiny_processor()
    trainer = CPTTrainer(
        make_model(),
        make_config(folder, **settings),
        train_dataset=rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def test_both_losses_fall_and_every_parameter_moves(tmp_path):
    before = {name: p.clone() for name, p in make_model().named_parameters()}
    # One and the same picture everywhere: hidden patches can be learned within seconds.
    picture = encoded_image(84, 56)
    rows = [{**row, "images": [picture] * len(row["images"])} for row in make_rows(8)]
    trainer = train(tmp_path, rows, learning_rate=1e-2, max_steps=30, per_device_train_batch_size=4)
    history = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    for name in ("mlm_loss", "mae_loss"):
        losses = [entry[name] for entry in history]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), (name, losses)
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    for entry in history:
        assert math.isclose(entry["loss"], entry["mlm_loss"] + 0.5 * entry["mae_loss"], rel_tol=1e-5)
        assert entry["num_masked_tokens"] > 0 and entry["num_masked_patches"] % 4 == 0
        assert entry["tokens_per_second"] > 0


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_large_batch(tmp_path, accumulation):
    # Micro-batches of very unlike numbers of tokens and patches, the last ones without any image.
    rows = [make_row(seed, 4 + 9 * (seed % 3), (2, 1, 0, 0)[seed // 2]) for seed in range(8)]
    results = []
    for steps in (1, accumulation):
        gradients = Gradients()
        settings = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = train(tmp_path, rows, [gradients], max_grad_norm=0.0, **settings)
        results.append((trainer.state.log_history[0], gradients.steps[0]))
    (whole_logs, whole), (parts_logs, parts) = results
    for name in ("loss", "mlm_loss", "mae_loss"):
        assert math.isclose(whole_logs[name], parts_logs[name], rel_tol=1e-6), name
    for name in ("num_masked_tokens", "num_masked_patches"):
        assert whole_logs[name] == parts_logs[name] > 0
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6 * max(1.0, gradient.abs().max().item()))


def test_logged_losses_are_sums_over_counts(tmp_path):
    rows = make_rows(4)
    trainer = train(tmp_path, rows, learning_rate=0.0, max_steps=2, per_device_train_batch_size=2, logging_steps=2)
    collator = CPTCollator(tiny_processor(), max_length=256, seed=trainer.args.seed)
    model, steps = make_model(), []
    model.train()
    for start in (0, 2):
        batch = collator(rows[start : start + 2])
        steps.append((batch, model(**batch)))
    entry = trainer.state.log_history[0]
    for name in ("mlm_loss", "mae_loss", "loss"):
        assert math.isclose(entry[name], sum(output[name].item() for _, output in steps) / 2, rel_tol=1e-6)
    assert entry["num_masked_tokens"] == sum((batch["labels"] != -100).sum() for batch, _ in steps)
    assert entry["num_masked_patches"] == sum(4 * batch["patch_mask"].sum() for batch, _ in steps)


def test_text_alone(tmp_path):
    trainer = train(tmp_path, [make_row(seed, 8, 0) for seed in range(4)], per_device_train_batch_size=2, max_steps=2)
    for entry in trainer.state.log_history[:2]:
        assert entry["mae_loss"] == 0.0 and entry["num_masked_patches"] == 0
        assert math.isclose(entry["loss"], entry["mlm_loss"], rel_tol=1e-6) and entry["loss"] > 0


def test_activation_checkpointing_changes_nothing(tmp_path):
    results = []
    for switch in (False, True):
        gradients = Gradients()
        train(tmp_path, make_rows(4), [gradients], per_device_train_batch_size=4, gradient_checkpointing=switch)
        results.append(gradients.steps[0])
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_evaluation_does_not_depend_on_batch_size_or_training(tmp_path):
    rows = make_rows(5)
    metrics = []
    for size in (1, 2, 5):
        trainer = CPTTrainer(
            make_model(),
            make_config(tmp_path, per_device_eval_batch_size=size),
            eval_dataset=rows,
            processing_class=tiny_processor(),
        )
        trainer.data_collator.set_epoch(3)
        metrics.append(trainer.evaluate())
    collator = CPTCollator(tiny_processor(), max_length=256, seed=trainer.args.seed)
    with torch.no_grad():
        expected = make_model()(**collator(rows))
    for entry in metrics:
        for name in ("mlm_loss", "mae_loss", "loss"):
            assert math.isclose(entry[f"eval_{name}"], expected[name].item(), rel_tol=1e-5), name
    assert "eval_mlm_loss" in trainer.state.log_history[-1]


def test_masks_differ_between_epochs_and_return_on_a_second_run(tmp_path):
    rows = make_rows(4)
    settings = {"learning_rate": 0.0, "max_steps": 3, "per_device_train_batch_size": 4}
    runs = [[entry["mlm_loss"] for entry in train(tmp_path, rows, **settings).state.log_history[:3]] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_resume_goes_on_with_the_same_masks(tmp_path):
    rows = make_rows(6)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", rows, **settings, save_strategy="steps", save_steps=2)
    resumed = CPTTrainer(
        make_model(), make_config(tmp_path / "again", **settings), train_dataset=rows, processing_class=tiny_processor()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_skipped_rows_are_logged(tmp_path):
    rows = [*make_rows(3), {"text": "", "images": []}]
    rows = [rows[0], rows[3], rows[1], rows[2]]
    trainer = train(tmp_path, rows, per_device_train_batch_size=2, max_steps=2, on_bad_row="skip")
    first, second = trainer.state.log_history[:2]
    assert first["skipped_rows"] == first["skipped_rows/empty_text"] == 1
    assert second["skipped_rows"] == 0 and "skipped_rows/empty_text" not in second
    with pytest.raises(ValueError, match="has no text"):
        train(tmp_path, rows, per_device_train_batch_size=2, on_bad_row="raise")


def test_loss_settings_reach_the_model_and_its_folder(tmp_path, caplog):
    trainer = train(tmp_path, make_rows(4), mae_loss_weight=0.1, shift_labels=False)
    trainer.save_model()
    with caplog.at_level(logging.WARNING):
        model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(model, MoCaModel)
    assert (model.config.mae_loss_weight, model.config.shift_labels) == (0.1, False)
    assert processor.tokenizer.mask_token_id == model.config.mask_token_id == 6
    trained = trainer.model.moca.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    again = MoCaForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm_ratio": 1.0}, r"mlm_ratio must lie in \[0, 1\), got 1.0"),
        ({"mae_ratio": -0.5}, r"mae_ratio must lie in \[0, 1\), got -0.5"),
        ({"mlm_ratio": 0.0, "mae_ratio": 0.0}, "both 0"),
        ({"patch_noise": "black"}, r"patch_noise must be one of \['per_patch', 'shared'\], got 'black'"),
        ({"on_bad_row": "ignore"}, r"on_bad_row must be one of \['raise', 'skip'\], got 'ignore'"),
        ({"mae_loss_weight": -1.0}, "mae_loss_weight must be at least 0, got -1.0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_cost": 255}, "max_cost must be at least max_length=256, the cost of the longest row, got 255"),
        ({"shuffle_window": 0}, "shuffle_window must be at least 1, got 0"),
        ({"max_bad_row_share": 1.5}, r"max_bad_row_share must lie in \[0, 1\], got 1.5"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False is not supported"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported, got 0.1"),
    ],
)
def test_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_config_defaults_are_the_papers(tmp_path):
    config = CPTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.max_grad_norm, config.max_length) == (2e-6, 5.0, 2048)
    assert (config.mlm_ratio, config.mae_ratio, config.mae_loss_weight) == (0.4, 0.5, 0.5)
    assert config.lr_scheduler_type == "linear" and config.get_warmup_steps(1000) == 100
    assert config.shift_labels and config.patch_noise == "per_patch"


def test_a_collator_brings_its_processor_and_the_mask_token(tmp_path):
    model = MoCaForPreTraining.from_backbone(tiny_backbone())
    trainer = CPTTrainer(model, make_config(tmp_path), data_collator=CPTCollator(tiny_processor()))
    trainer.save_model()
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.mask_token_id == 6
    assert AutoModel.from_pretrained(tmp_path).config.mask_token_id == 6


def test_trainer_refuses(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="Linear does not take num_items_in_batch"):
        CPTTrainer(torch.nn.Linear(2, 2), config, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="needs a processing_class"):
        CPTTrainer(make_model(), config)
    with pytest.raises(ValueError, match="The model's mask_token_id is 6, the tokenizer's is 0"):
        processor = tiny_processor()
        processor.tokenizer.mask_token = "<|endoftext|>"
        CPTTrainer(make_model(), config, processing_class=processor)
    with pytest.raises(ValueError, match="mask token's id 6 lies outside the model's 5 embeddings"):
        model = make_model()
        model.config.get_text_config().vocab_size = 5
        CPTTrainer(model, config, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="compute_metrics is not supported"):
        CPTTrainer(make_model(), config, processing_class=tiny_processor(), compute_metrics=lambda _: {})
