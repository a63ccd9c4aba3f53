"""What reaches flash-attn, seen on a CPU: plain attention stands in for its kernels, everything around them is real.

The kernels themselves are tested where they run (test_attention.py); this shows that the right rows, lengths and the
right `causal` are handed to them.
"""

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from modeling_moca import MoCaForPreTraining
from tests.families import FAMILIES, family_backbone, family_processor
from tests.modeling_moca.test_families import batch_of, row_alone


def plain(query, key, value, softmax_scale, causal):
    """One sequence: [T, heads, d] in and out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for flash-attn; the list of what they were asked: (function, causal)."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append(("fixed", causal))
        return torch.stack([plain(*row, softmax_scale, causal) for row in zip(q, k, v)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        calls.append(("varlen", causal))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        bounds = cu_seqlens_q.tolist()
        rows = [slice(*pair) for pair in zip(bounds, bounds[1:])]
        return torch.cat([plain(q[row], k[row], v[row], softmax_scale, causal) for row in rows])

    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash_utils, name, None)
    return calls


def build(family, path, bidirectional):
    torch.manual_seed(0)
    model = MoCaForPreTraining.from_backbone(family_backbone(family), bidirectional=bidirectional)
    model.set_attn_implementation("eager")
    # Set here, not through set_attn_implementation, which looks for the package and the device.
    model.moca.language_model.config._attn_implementation = path
    return model


def run(model, batch):
    with torch.no_grad():
        position_ids = model.moca.get_position_ids(
            batch["input_ids"], batch.get("attention_mask"), batch.get("image_grid_thw")
        )
        states = model.moca(**batch).last_hidden_state
        positions = model.moca.language_model.rotary_emb(states, position_ids)
        image_tokens = batch["input_ids"] == 3
        return states, model.mae_head(states, batch.get("attention_mask"), positions, image_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_flash_attention_gets_what_eager_computes(family, bidirectional, padding_side, kernels):
    processor = family_processor(family)
    processor.tokenizer.padding_side = padding_side
    padded, alone = dict(batch_of(processor)), dict(row_alone(None, 0, processor))
    without_mask = {name: tensor for name, tensor in alone.items() if name != "attention_mask"}
    for batch, function in [(padded, "varlen"), (alone, "fixed"), (without_mask, "fixed")]:
        kernels.clear()
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        states, patches = run(build(family, "flash_attention_2", bidirectional), batch)
        expected_states, expected_patches = run(build(family, "eager", bidirectional), batch)
        torch.testing.assert_close(states[real], expected_states[real], atol=1e-5, rtol=0)
        torch.testing.assert_close(patches, expected_patches, atol=1e-5, rtol=0)
        # Four layers as the flag says, then the MAE decoder, which attends both ways in any case.
        assert kernels == [(function, not bidirectional)] * 4 + [(function, False)]
