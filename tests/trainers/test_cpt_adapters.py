"""Training a part of the weights: what moves, what is saved, and how it goes on."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import set_seed

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.families import FAMILIES, family_backbone
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import make_rows
from trainers import whole_model
from trainers.adapters import add_adapters, freeze_vision_tower, language_model_layers, merge_adapters
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


def make_model():
    set_seed(0)
    return MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)


def make_trainer(output, model, **settings):
    settings = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, "warmup_steps": 0, **settings}
    settings.setdefault("per_device_train_batch_size", 2)
    config = CPTConfig(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_length=256,
        **settings,
    )
    return CPTTrainer(model, config, train_dataset=make_rows(16), processing_class=tiny_processor())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "mlm_loss" in entry]


def moved(model, start):
    """Return the names of the parameters that are not what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_is_all_but_what_leads_to_the_language_model(family):
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6)
    freeze_vision_tower(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all("visual." in name or "vision_model." in name for name in frozen)
    left = {name for name, _ in model.named_parameters()} - frozen
    assert any("merger" in name or "connector" in name for name in left)
    assert not any(("visual." in name or "vision_model." in name) and "merger" not in name for name in left)


def test_a_frozen_tower_gets_no_gradient_and_no_optimizer_state(tmp_path):
    model = make_model()
    start = snapshot(model)
    trainer = make_trainer(tmp_path, model, freeze_vision=True)
    trainer.train()
    tower = {name for name in start if ".visual." in name and ".merger." not in name}
    assert len(tower) > 10 and moved(model, start) == start.keys() - tower
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None for name in tower)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in parameters.items() if name not in tower}
    assert len(trainer.optimizer.state) == len(held)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
def test_adapters_and_the_mae_head_learn_and_are_merged_in_the_end(kind, tmp_path):
    model = add_adapters(make_model(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **kind))
    start = snapshot(model)
    trainer = make_trainer(tmp_path, model)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    learns = {name for name in start if "lora_" in name or ".modules_to_save." in name}
    assert moved(model, start) == learns
    # Seven maps in each of four layers; two matrices each, and with DoRA a magnitude.
    assert sum("lora_" in name for name in learns) == 4 * 7 * (3 if kind else 2)
    assert all(".language_model.layers." in name for name in learns if "lora_" in name)
    assert any(".mae_head." in name for name in learns)

    before = snapshot(model)
    trainer.save_model()
    assert not moved(model, before) and trainer.model is model
    assert not (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "tokenizer.json").is_file()
    whole = MoCaForPreTraining.from_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(make_model().named_parameters()).keys()
    model.eval()
    with torch.no_grad():
        embedding, expected = MoCaModel.from_pretrained(tmp_path)(**interleaved_batch()), model(**masked_batch())
        restored = whole(**masked_batch())
        adapted = model.get_base_model().moca(**interleaved_batch())
        untrained = make_model().moca(**interleaved_batch())
    torch.testing.assert_close(embedding.pooler_output, adapted.pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(embedding.pooler_output, untrained.pooler_output, atol=1e-2)
    torch.testing.assert_close(restored.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(restored.mae_loss, expected.mae_loss, atol=1e-5, rtol=1e-5)


def test_accumulation_changes_nothing_with_adapters(tmp_path):
    """The mean over the whole step reaches the model through peft's forward."""
    results = []
    for steps in (1, 2):
        model = add_adapters(make_model(), LoraConfig(r=4, lora_dropout=0.0))
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "train_sampling_strategy": "sequential"}
        batches = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 4 // steps}
        trainer = make_trainer(tmp_path, model, **batches, **settings)
        trainer.train()
        results.append((losses(trainer), snapshot(model)))
    (ours, weights), (theirs, others) = results
    assert ours == pytest.approx(theirs, rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_a_run_with_adapters_resumes_exactly(tmp_path):
    def run(output, resume=None):
        # Dropout draws numbers, which must go on as well.
        model = add_adapters(make_model(), LoraConfig(r=4, lora_dropout=0.1))
        trainer = make_trainer(output, model, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer), snapshot(model)

    expected_losses, expected = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "COMPLETE").is_file() and (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    ours, weights = run(tmp_path / "again", str(checkpoint))
    assert ours == expected_losses and len(ours) == 4
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_adapters_go_where_they_should():
    model = make_model()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any("visual" in name and name.endswith("gate_proj") for name in names)
    with pytest.raises(ValueError, match="task_type must be None, got 'CAUSAL_LM'"):
        add_adapters(model, LoraConfig(task_type="CAUSAL_LM"))
    everywhere = add_adapters(make_model(), LoraConfig(target_modules=["gate_proj"])).targeted_module_names
    assert not any(name.startswith("mae_head") for name in everywhere) and any("visual" in name for name in everywhere)
    pattern = language_model_layers(model)
    chosen = add_adapters(make_model(), LoraConfig(target_modules=pattern.replace(".*_proj", ".*[qv]_proj")))
    assert len(chosen.targeted_module_names) == 8


def test_adapters_are_refused_where_ranks_share_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_model, "is_deepspeed_zero3_enabled", lambda: True)
    make_trainer(tmp_path, make_model())
    with pytest.raises(ValueError, match="Adapters need whole weights on every rank"):
        make_trainer(tmp_path, add_adapters(make_model(), LoraConfig(r=4)))


def test_quantised_weights_are_merged_at_full_precision(tmp_path):
    """What peft merges into quantised weights is rounded; the checkpoint that they were made from is not."""
    make_model().save_pretrained(tmp_path / "start")
    adapted = add_adapters(MoCaForPreTraining.from_pretrained(tmp_path / "start"), LoraConfig(r=4))
    trainer = make_trainer(tmp_path / "run", adapted)
    trainer.train()
    expected = merge_adapters(adapted).state_dict()
    # Stands for quantisation: the base weights are rounded, the adapters are not.
    base = adapted.get_base_model()
    with torch.no_grad():
        for parameter in base.moca.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.half())
    base.is_quantized = True
    merged = merge_adapters(adapted).state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
