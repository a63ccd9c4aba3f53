"""Ranks that share gradients or weights train like one process, also when only one of them has images."""

import json

import pytest
import torch

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.tiny import tiny_backbone
from tests.trainers import cpt_sharded
from tests.two_ranks import needs_deepspeed, start_two_ranks


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_one_rank_with_images_and_one_without(mode, tmp_path):
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(tmp_path / "start")
    start_two_ranks(cpt_sharded.__file__, mode, tmp_path)
    cpt_sharded.train("whole", tmp_path)
    losses, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in (mode, "whole"))
    assert len(expected) == 2
    for ours, theirs in zip(losses, expected):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start, weights, whole = (
        dict(MoCaForPreTraining.from_pretrained(tmp_path / name).named_parameters())
        for name in ("start", mode, "whole")
    )
    assert start.keys() == weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert not torch.equal(tensor, start[name]), name
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


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
