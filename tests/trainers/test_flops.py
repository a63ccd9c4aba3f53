"""FLOPs against those that torch counts while it runs the step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_moca import MoCaForPreTraining
from tests.families import family_backbone
from tests.modeling_moca.test_packing import pack
from trainers.flops import frozen_parts, peak_flops, step_flops

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
# Taller than a window of 4 patches, and not a multiple of it.
GRIDS = [(1, 10, 12), (1, 4, 6), (1, 8, 8)]


def batch_of(config, images=True):
    """Rows of 41, 70 and 17 tokens; the second has two images if there are any."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.full((3, 70), 1)
    lengths = (41, 70, 17)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(7, 300, (length,), generator=generator)
    mask = (torch.arange(70) < torch.tensor(lengths)[:, None]).long()
    labels = input_ids.masked_fill((torch.rand(input_ids.shape, generator=generator) < 0.6) | (mask == 0), -100)
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if images:
        input_ids[0, 1:31] = input_ids[1, 2:8] = input_ids[1, 20:36] = 3
        labels[input_ids == 3] = -100
        batch["patch_mask"] = (input_ids == 3) & (torch.rand(input_ids.shape, generator=generator) < 0.5)
        num_chosen = int(batch["patch_mask"].sum())
        batch["patch_labels"] = torch.randn(num_chosen, config.num_patches_per_token, config.patch_dim)
        batch["pixel_values"] = torch.randn(sum(h * w for _, h, w in GRIDS), config.patch_dim)
        batch["image_grid_thw"] = torch.tensor(GRIDS)
    labels[:, 0] = -100
    return {**batch, "labels": labels}, lengths


def counted(model, batch):
    """FLOPs of forward and backward pass as torch counts them: of eager attention and of logits, which it knows."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, return_logits=True).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [True, False])
def test_equal_to_what_torch_counts(family, images):
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6).train()
    model.set_attn_implementation("eager")
    batch, lengths = batch_of(model.config, images)
    arguments = {"num_chosen_tokens": int((batch["labels"] != -100).sum())}
    if images:
        arguments |= {"image_grid_thw": GRIDS, "num_chosen_image_tokens": int(batch["patch_mask"].sum())}
    # Eager attention works on padding too.
    padded = step_flops(model.config, [70] * 3, **arguments)
    assert padded == pytest.approx(counted(model, batch), rel=0.02)
    assert step_flops(model.config, lengths, **arguments) < padded


@pytest.mark.parametrize("parts", ["vision", "merger", "text", "vision merger", "vision merger text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_cost_less(family, parts):
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6).train()
    model.set_attn_implementation("eager")
    batch, _ = batch_of(model.config)
    parts = parts.split()
    assert frozen_parts(model) == set()
    whole = counted(model, batch)
    for name, parameter in model.moca.backbone.visual.named_parameters():
        parameter.requires_grad_(("merger" if "merger" in name else "vision") not in parts)
    model.moca.language_model.requires_grad_("text" not in parts)
    if "text" in parts:
        # As adapters do, so that gradients pass through all layers.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert frozen_parts(model) == set(parts)
    num_chosen = int((batch["labels"] != -100).sum()), int(batch["patch_mask"].sum())
    flops = step_flops(model.config, [70] * 3, GRIDS, *num_chosen, frozen=parts)
    assert flops == pytest.approx(counted(model, batch), rel=0.02)
    assert flops < whole


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_counted(family):
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6).train()
    model.set_attn_implementation("eager")
    batch, lengths = batch_of(model.config, images=False)
    alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    expected = sum(counted(model, pack(row)) for row in alone)
    num_chosen = int((batch["labels"] != -100).sum())
    assert step_flops(model.config, lengths, num_chosen_tokens=num_chosen) == pytest.approx(expected, rel=0.02)


def test_parts_add_up():
    config = MoCaForPreTraining.from_backbone(family_backbone("qwen2_5_vl")).config
    text = config.get_text_config()
    empty = step_flops(config, [100])
    assert step_flops(config, [60, 40]) == empty - 3 * 4 * 4 * 32 * (100**2 - 60**2 - 40**2)
    assert step_flops(config, [100], num_chosen_tokens=7) - empty == 6 * 7 * 32 * text.vocab_size
    decoder = empty // text.num_hidden_layers
    assert step_flops(config, [100], num_chosen_image_tokens=5) - empty == decoder + 6 * 5 * 32 * 4 * 1176
    config.bidirectional = False
    assert step_flops(config, [100]) == empty - 3 * 4 * 4 * 32 * 100**2 // 2


def test_backbones_that_take_tiles_are_refused():
    config = MoCaForPreTraining.from_backbone(family_backbone("smolvlm")).config
    with pytest.raises(ValueError, match="rows of patches, got 'smolvlm'"):
        step_flops(config, [10])


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some other device", None),
    ],
)
def test_peaks_by_the_name_of_the_device(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0") == peak_flops(0) == peak_flops(torch.device("cuda")) == flops


def test_processors_have_no_peak():
    assert peak_flops("cpu") is None
