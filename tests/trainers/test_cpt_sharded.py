"""Ranks that share gradients or weights train like one process, also when only one of them has images."""

import json

import pytest
import torch
from safetensors import safe_open

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers import cpt_sharded
from tests.trainers.cpt_rows import make_row
from tests.two_ranks import fork_two_ranks, needs_deepspeed, start_two_ranks
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What to start from, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_backbone().save_pretrained(folder / "stock")
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "start")
    cpt_sharded.train_all("whole", folder)
    return folder


def read(output):
    """Return what a run noted, and its final model, which must hold every weight once."""
    model = MoCaForPreTraining.from_pretrained(output)
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(dict(model.named_parameters()))
    assert model.config.architectures == ["MoCaForPreTraining"]
    assert model.config.auto_map["AutoModelForPreTraining"] == "modeling_moca.MoCaForPreTraining"
    code = {path.name for path in output.glob("*.py")}
    assert "modeling_moca.py" in code and all(name.endswith("_moca.py") for name in code)
    return json.loads((output / "result.json").read_text()), dict(model.named_parameters())


def check(folder, mode, scenario, rel=1e-5, atol=1e-5):
    """Compare a run's losses, gradient norms and weights with those of one process; return what both noted."""
    (result, weights), (expected, whole) = (read(folder / name / scenario) for name in (mode, "whole"))
    start = dict(MoCaForPreTraining.from_pretrained(folder / "start").named_parameters())
    assert len(result["losses"]) == len(expected["losses"]) >= 1
    for ours, theirs in zip(result["losses"], expected["losses"]):
        assert ours == pytest.approx(theirs, rel=rel), scenario
    assert result["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=max(10 * rel, 1e-4)), scenario
    assert start.keys() == weights.keys() == whole.keys()
    for name, tensor in whole.items():
        frozen = scenario == "frozen" and ".visual." in name and ".merger." not in name
        assert torch.equal(tensor, start[name]) == frozen, name
        torch.testing.assert_close(weights[name], tensor, atol=atol, rtol=1e-4, msg=f"{scenario}: {name}")
    return result, expected


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_zero_equals_one_process(mode, folder):
    flags = ["--zero_stage", "2", "--zero3_init_flag", "false"] if mode == "zero2" else []
    start = start_two_ranks if mode == "zero3" else fork_two_ranks
    start(cpt_sharded.__file__, mode, folder, config="zero3", flags=flags)
    for scenario in cpt_sharded.SCENARIOS_OF[mode]:
        result, _ = check(folder, mode, scenario)
        assert result["distributed_type"] == "DistributedType.DEEPSPEED"


def test_fsdp2_equals_one_process(folder):
    start_two_ranks(cpt_sharded.__file__, "fsdp2", folder, config="fsdp2")
    for scenario in ("steps", "accumulated", "converted", "frozen"):
        result, expected = check(folder, "fsdp2", scenario)
        assert result["distributed_type"] == "DistributedType.FSDP"
        assert result["types"] == ["DTensor"] and expected["types"] == ["Parameter"]
    # Layers compute in bfloat16 throughout, and not in autocast's mixture; what leaves a rank is float32.
    result, _ = check(folder, "fsdp2", "bf16", rel=1e-2, atol=2e-2)
    losses = torch.tensor(result["losses"])
    assert not torch.equal(losses, losses.bfloat16().float())

    result, _ = check(folder, "fsdp2", "resumed", atol=1e-4)
    again, weights = read(folder / "fsdp2" / "resumed_again")
    checkpoint = folder / "fsdp2" / "resumed" / "checkpoint-2"
    assert (checkpoint / "COMPLETE").is_file() and not list(checkpoint.glob("*.safetensors"))
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert again["losses"] == result["losses"] and again["gradient_norms"] == result["gradient_norms"]
    for name, tensor in read(folder / "fsdp2" / "resumed")[1].items():
        assert torch.equal(weights[name], tensor), name


def text_rows_cost(output, always_use_vision):
    """Return how often the vision tower runs in one training step on rows without images."""
    calls = []
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    model.moca.backbone.visual.register_forward_hook(lambda *args: calls.append(args))
    config = CPTConfig(
        output_dir=str(output), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1
    )
    rows = [make_row(seed, 10, 0) for seed in range(8)]
    trainer = CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor())
    assert not model.moca.always_use_vision
    model.moca.always_use_vision = always_use_vision
    trainer.train()
    return len(calls)


def test_a_step_without_images_costs_nothing_where_nothing_is_shared(tmp_path):
    assert text_rows_cost(tmp_path, always_use_vision=False) == 0
    assert text_rows_cost(tmp_path, always_use_vision=True) == 1


@pytest.mark.parametrize("model_class", [MoCaModel, MoCaForPreTraining])
def test_using_every_weight_changes_nothing(model_class):
    """States, losses and gradients of a batch without images stay as they are; weights it has no use for get zeros."""
    batch = interleaved_batch() if model_class is MoCaModel else masked_batch()
    kept = ("input_ids", "attention_mask", "labels")
    text = {name: tensor[2:] for name, tensor in batch.items() if name in kept}
    results = []
    for always in (False, True):
        torch.manual_seed(0)
        model = model_class.from_backbone(tiny_backbone(), mask_token_id=6)
        getattr(model, "moca", model).always_use_vision = always
        outputs = model(**text)
        loss = outputs.pooler_output.square().sum() if model_class is MoCaModel else outputs.loss
        loss.backward()
        results.append((outputs.last_hidden_state, loss, {name: p.grad for name, p in model.named_parameters()}))
    (states, loss, gradients), (always_states, always_loss, always_gradients) = results
    assert torch.equal(states, always_states) and torch.equal(loss, always_loss)
    unused = [name for name, gradient in gradients.items() if gradient is None]
    assert any(".visual." in f".{name}" for name in unused)
    for name, gradient in gradients.items():
        assert always_gradients[name] is not None, name
        expected = torch.zeros_like(always_gradients[name]) if gradient is None else gradient
        torch.testing.assert_close(always_gradients[name], expected, atol=1e-7, rtol=1e-5, msg=name)
