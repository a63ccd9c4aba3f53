"""Reproduce one case recorded from the authors' released code: states, losses, gradients, embeddings.

The recording lies in a folder `shared/reference` beside the repository, or where MOCA_REFERENCE points; it is no part
of this project, so without it these tests say that they were not run.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_moca import MoCaForPreTraining, MoCaModel

REFERENCE = Path(os.environ.get("MOCA_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "reference"))
pytestmark = pytest.mark.skipif(
    not (REFERENCE / "manifest.json").is_file(),
    reason="the authors' recorded case is not there (set MOCA_REFERENCE to its folder)",
)


def tensors(name):
    return load_file(REFERENCE / f"mix_{name}.safetensors")


def own_name(name):
    """Translate a parameter name of the authors' layout into ours."""
    for theirs, ours in {
        "visual.": "moca.backbone.visual.",
        "model.": "moca.backbone.language_model.",
        "lm_head.": "mlm_head.lm_head.",
        "mae_decoder.": "mae_head.decoder.",
        "mae_proj.": "mae_head.proj.",
    }.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise AssertionError(name)


@pytest.fixture
def inputs():
    return tensors("inputs")


@pytest.fixture
def masked(inputs):
    recorded = tensors("masked")
    return {
        "input_ids": recorded["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": recorded["pixel_values_masked"],
        "image_grid_thw": inputs["image_grid_thw"],
        "labels": recorded["labels"],
        "patch_mask": recorded["mae_pred_mask"],
        "patch_labels": recorded["pixel_labels"],
    }


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_pretraining_case(masked, weight, attn_implementation, tmp_path):
    manifest = json.loads((REFERENCE / "manifest.json").read_text())
    model = MoCaForPreTraining.from_backbone(
        REFERENCE / "cpt_ckpt",
        mask_token_id=manifest["special_ids"]["mask"],
        shift_labels=False,
        mae_loss_weight=weight,
    )
    model.save_pretrained(tmp_path)
    model = MoCaForPreTraining.from_pretrained(tmp_path, attn_implementation=attn_implementation)
    outputs = model(**masked)
    for name, expected in manifest["scalars"][f"mix_w{weight}"].items():
        assert outputs[name].item() == pytest.approx(expected, rel=2e-6), name

    expected = tensors("cpt_outputs")
    real = masked["attention_mask"].bool()
    positions = model.moca.get_position_ids(masked["input_ids"], masked["attention_mask"], masked["image_grid_thw"])
    assert torch.equal(positions[:, real], expected["position_ids"][:, real])
    for ours, name in [
        (outputs.last_hidden_state[real], expected["hidden_final"][real]),
        (outputs.mlm_logits, expected["logits_masked"]),
        (outputs.patch_predictions.flatten(0, 1), expected["patch_pred"]),
    ]:
        torch.testing.assert_close(ours, name, atol=1e-5, rtol=0)

    if weight == 0.1:
        outputs.loss.backward()
        parameters = dict(model.named_parameters())
        for name, norm in manifest["grad_norms_w0.1"].items():
            assert parameters[own_name(name)].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
        for name, gradient in tensors("cpt_grads_w0.1").items():
            error = (parameters[own_name(name)].grad - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, name


@pytest.mark.parametrize(
    ("bidirectional", "pooling", "name"), [(True, "mean", "mean_pooled"), (False, "last", "lasttok_causal")]
)
def test_embedding_case(inputs, bidirectional, pooling, name):
    model = MoCaModel.from_backbone(REFERENCE / "embed_ckpt", bidirectional=bidirectional, pooling=pooling)
    expected = tensors("embed_outputs")
    with torch.no_grad():
        pooled = model(**inputs).pooler_output
    torch.testing.assert_close(pooled, expected[name], atol=1e-5, rtol=0)
    normalised = torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(normalised, expected[f"{name}_l2"], atol=1e-5, rtol=0)
