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
from trl import TrlParser

from examples import train_contrastive, train_cpt
from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.conftest import REPOSITORY
from tests.modeling_moca.attention_paths import why_not
from tests.tiny import tiny_processor
from tests.trainers.contrastive_cases import SCENARIOS
from tests.trainers.cpt_rows import make_rows
from tests.trainers.test_cpt_trainer import make_model
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_info_nce import info_nce
from trainers.contrastive_sources import PairMixtureConfig
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixtureConfig
from trainers.cpt_trainer import CPTTrainer
from trainers.masking import mask_patches, row_generator

CONFIGS = REPOSITORY / "examples" / "configs"
REFERENCE = Path(os.environ.get("MOCA_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "reference"))
recorded_case = pytest.mark.skipif(
    not (REFERENCE / "manifest.json").is_file(),
    reason="the authors' recorded case is not there (set MOCA_REFERENCE to its folder)",
)
# Where paper and released code differ, and what each has. The setting files must say the same.
CPT_CHOICES = {
    "shift_labels": (True, False),
    "mae_loss_weight": (0.5, 0.1),
    "patch_noise": ("per_patch", "shared"),
    "max_length": (2048, 1280),
}
CONTRASTIVE_CHOICES = {
    "learning_rate": (1e-5, 2e-5),
    "all_negatives": (True, False),
    "task_batches": (True, False),
    "mask_equal_positives": (True, False),
}


def cpt_settings(name):
    """Return the settings of a shipped file, read as the script reads them."""
    parser = TrlParser((train_cpt.ScriptArguments, CPTMixtureConfig, CPTConfig))
    return parser.parse_args_and_config(["--config", str(CONFIGS / name), "--use_cpu", "true", "--bf16", "false"])[2]


def contrastive_settings(name):
    parser = TrlParser((PairMixtureConfig, train_contrastive.ScriptArguments, ContrastiveConfig))
    return parser.parse_args_and_config(["--config", str(CONFIGS / name), "--use_cpu", "true", "--bf16", "false"])[2]


def test_settings_files_hold_the_choices_of_paper_and_released_code():
    for choices, read, names in [
        (CPT_CHOICES, cpt_settings, ("cpt_qwen2_5_vl_3b.yaml", "cpt_reference_3b.yaml")),
        (CONTRASTIVE_CHOICES, contrastive_settings, ("contrastive_moca_3b.yaml", "contrastive_reference_3b.yaml")),
    ]:
        paper, reference = map(read, names)
        for key, values in choices.items():
            assert (getattr(paper, key), getattr(reference, key)) == values, key
        different = {
            key
            for key, value in paper.to_dict().items()
            if value != reference.to_dict()[key] and key not in ("output_dir", "logging_dir", "run_name")
        }
        assert different == set(choices), "a difference that the table does not name"
    # What two ranks are held to is what the file says.
    reference = contrastive_settings("contrastive_reference_3b.yaml")
    assert SCENARIOS["reference"] == {name: getattr(reference, name) for name in SCENARIOS["reference"]}
    assert SCENARIOS["reference"].keys() == CONTRASTIVE_CHOICES.keys() - {"learning_rate"}


def test_settings_of_the_released_code_reach_model_and_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the trainer makes the file's output folder
    settings, processor = cpt_settings("cpt_reference_3b.yaml"), tiny_processor(max_pixels=256 * 784)
    trainer = CPTTrainer(make_model(), settings, train_dataset=make_rows(6), processing_class=processor)
    assert (trainer.model.config.mae_loss_weight, trainer.model.config.shift_labels) == (0.1, False)
    batch = trainer.data_collator(make_rows(6))
    chosen = batch["patch_mask"][batch["input_ids"] == 3].repeat_interleave(4)
    assert chosen.sum() > 16
    assert (batch["pixel_values"][chosen] == batch["pixel_values"][chosen][0]).all(), "one vector for the whole batch"
    # With unshifted labels the first token can be chosen too; rows are cut at this code's own length.
    texts = [{"text": f"{index} " + "sea " * 2000} for index in range(6)]
    batch = trainer.data_collator(texts)
    assert batch["input_ids"].shape[1] == 1280 and (batch["labels"][:, 0] != -100).any()


@recorded_case
def test_noise_of_the_recorded_case_is_what_the_setting_makes(inputs, masked):
    noise = cpt_settings("cpt_reference_3b.yaml").patch_noise
    chosen = (masked["pixel_values"] != inputs["pixel_values"]).any(-1)  # [544]
    image_tokens = inputs["input_ids"] == 1000
    ours, patch_mask, labels = mask_patches(
        inputs["pixel_values"],
        image_tokens=image_tokens,
        num_patches_per_token=4,
        ratio=0.5,
        generators=[row_generator(0, 0, bytes([row])) for row in range(6)],
        noise=noise,
    )
    our_chosen = patch_mask[image_tokens].repeat_interleave(4)
    for pixel_values, hidden in [(masked["pixel_values"], chosen), (ours, our_chosen)]:
        assert hidden.sum() > 100
        assert (pixel_values[hidden] == pixel_values[hidden][0]).all(), "one vector in all hidden patches"
        assert torch.equal(pixel_values[~hidden], inputs["pixel_values"][~hidden])
    assert torch.equal(labels.flatten(0, 1), inputs["pixel_values"][our_chosen])
    # The targets of the recorded case, found again from its own mask.
    assert torch.equal(
        masked["patch_labels"], inputs["pixel_values"][masked["patch_mask"][image_tokens].repeat_interleave(4)]
    )


def test_contrastive_loss_of_the_released_code():
    """Own hard negatives only, every positive of the global batch, over two ranks of four rows; written out."""
    settings = contrastive_settings("contrastive_reference_3b.yaml")
    query, positive = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    negatives = torch.randn(8, 2, 6).double()
    losses = []
    for row in range(8):
        candidates = [*positive, *negatives[row]]
        scores = [torch.cosine_similarity(query[row], other, dim=0) / settings.temperature for other in candidates]
        losses.append(torch.stack(scores).logsumexp(0) - scores[row])
    ranks = [
        info_nce(
            query,
            positive,
            negatives,
            temperature=settings.temperature,
            all_negatives=settings.all_negatives,
            rows=rows,
        )
        for rows in ((0, 4), (4, 8))
    ]
    torch.testing.assert_close(ranks[0], sum(losses[:4]) / 4)
    torch.testing.assert_close(ranks[1], sum(losses[4:]) / 4)


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


@recorded_case
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_pretraining_case(masked, weight, attn_implementation, tmp_path):
    if reason := why_not(attn_implementation, "cpu", torch.float32):
        pytest.skip(reason)
    manifest = json.loads((REFERENCE / "manifest.json").read_text())
    settings = cpt_settings("cpt_reference_3b.yaml")
    assert settings.mae_loss_weight == 0.1
    model = MoCaForPreTraining.from_backbone(
        REFERENCE / "cpt_ckpt",
        mask_token_id=manifest["special_ids"]["mask"],
        shift_labels=settings.shift_labels,
        mae_loss_weight=settings.mae_loss_weight if weight == 0.1 else weight,
    )
    model.save_pretrained(tmp_path)
    model = MoCaForPreTraining.from_pretrained(tmp_path, attn_implementation=attn_implementation)
    with torch.set_grad_enabled(attn_implementation != "flex_attention"):  # it has no backward pass on CPU
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

    if weight == 0.1 and outputs.loss.requires_grad:
        outputs.loss.backward()
        parameters = dict(model.named_parameters())
        for name, norm in manifest["grad_norms_w0.1"].items():
            assert parameters[own_name(name)].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
        for name, gradient in tensors("cpt_grads_w0.1").items():
            error = (parameters[own_name(name)].grad - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, name


@recorded_case
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
