"""Is the model what its flag says: bidirectional or causal, blind to padding, the same alone and in a batch?

On every attention path that runs here; `pytest -rs` prints why another one was skipped.
"""

import pytest
import torch

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.modeling_moca.attention_paths import Setup, has_backward, setups
from tests.modeling_moca.batches import PAD, interleaved_batch, masked_batch
from tests.tiny import tiny_backbone

# Half precision has rows of its own where numbers are compared; what is all or nothing is tested in both.
BOTH = (torch.float32, torch.bfloat16)
# Wide enough for the kernels of every path.
HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    "vision_overrides": {"hidden_size": 64, "out_hidden_size": 64},
}


def backbone():
    model = tiny_backbone(**HEADS)
    # As its size doubles the width, so that half precision is not drowned by its own rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.7)
    return model


def build(source, setup, tmp_path, bidirectional=True):
    """Return a MoCaModel on a path: fresh, saved and loaded, or loaded out of a pre-training checkpoint."""
    model_class = MoCaForPreTraining if source == "pre-training checkpoint" else MoCaModel
    model = model_class.from_backbone(backbone(), bidirectional=bidirectional)
    if source == "fresh":
        model.to(setup.dtype).set_attn_implementation(setup.path)
    else:
        model.save_pretrained(tmp_path)
        model = MoCaModel.from_pretrained(tmp_path, attn_implementation=setup.path, dtype=setup.dtype)
    assert model.language_model.config._attn_implementation == setup.path
    return model.to(setup.device)


def place(batch, setup):
    moved = {name: tensor.to(setup.device) for name, tensor in batch.items()}
    return {name: tensor.to(setup.dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}


def states(model, batch, setup):
    with torch.no_grad():
        return model(**place(batch, setup)).last_hidden_state.cpu()


def embeddings(model, batch, setup):
    with torch.no_grad():
        pooled = model(**place(batch, setup)).pooler_output.float().cpu()
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_causal_model_equals_the_stock_model(setup, padding_side, tmp_path):
    batch = interleaved_batch(padding_side)
    stock = backbone()
    image_tokens = (batch["input_ids"] == stock.config.image_token_id).int()
    with torch.no_grad():
        expected = stock.model(**batch, mm_token_type_ids=image_tokens).last_hidden_state
    model = build("saved", setup, tmp_path, bidirectional=False)
    real = batch["attention_mask"].bool()
    ours = states(model, batch, setup)[real].float()
    difference = torch.nn.functional.normalize(ours, dim=-1) - torch.nn.functional.normalize(expected[real], dim=-1)
    # Of single tokens, not of means over rows.
    assert difference.abs().max() < (1e-5 if setup.dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("source", ["fresh", "saved", "pre-training checkpoint"])
@pytest.mark.parametrize("rows", ["one row", "batch without padding", "right padding", "left padding"])
def test_last_token_reaches_the_first_only_if_bidirectional(setup, source, rows, tmp_path):
    short, long = list(range(10, 20)), list(range(30, 42))
    batch = {
        "one row": {"input_ids": torch.tensor([long])},
        "batch without padding": {"input_ids": torch.arange(10, 34).view(2, 12)},
        "right padding": {
            "input_ids": torch.tensor([[*short, PAD, PAD], long]),
            "attention_mask": torch.tensor([[1] * 10 + [0] * 2, [1] * 12]),
        },
        "left padding": {
            "input_ids": torch.tensor([[PAD, PAD, *short], long]),
            "attention_mask": torch.tensor([[0] * 2 + [1] * 10, [1] * 12]),
        },
    }[rows]
    masks = [batch["attention_mask"]] if "attention_mask" in batch else [None, torch.ones_like(batch["input_ids"])]
    for bidirectional in (True, False):
        model = build(source, setup, tmp_path / str(bidirectional), bidirectional)
        for mask in masks:
            before = {"input_ids": batch["input_ids"]} if mask is None else {**batch, "attention_mask": mask}
            real = torch.ones(12) if mask is None else mask[0]
            first, last = real.nonzero()[[0, -1], 0].tolist()
            changed = batch["input_ids"].clone()
            changed[0, last] = 99
            moved = states(model, {**before, "input_ids": changed}, setup) - states(model, before, setup)
            moved = moved.abs().amax(-1)
            assert (moved[0, first] > 1e-3) == bidirectional
            assert moved[0, last] > 1e-3
            if len(moved) > 1:
                assert moved[1].max() == 0, "another row moved"


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("source", ["fresh", "saved", "pre-training checkpoint"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_changes_nothing(setup, source, padding_side, tmp_path):
    model = build(source, setup, tmp_path)
    batch = interleaved_batch(padding_side)
    real = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(real, batch["input_ids"], 77)}
    ours, theirs = states(model, other, setup)[real], states(model, batch, setup)[real]
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    pooled = [embeddings(model, inputs, setup) for inputs in (batch, other)]
    torch.testing.assert_close(pooled[0], pooled[1], atol=0, rtol=0)


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_row_alone_equals_the_row_in_a_padded_batch(setup, padding_side, bidirectional, tmp_path):
    model = build("saved", setup, tmp_path, bidirectional)
    batch = interleaved_batch(padding_side)
    together = embeddings(model, batch, setup)
    patches = [(0, 24), (24, 48), None]
    images = [(0, 1), (1, 3), None]
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row][real][None]}
        if patches[row]:
            alone["pixel_values"] = batch["pixel_values"][slice(*patches[row])]
            alone["image_grid_thw"] = batch["image_grid_thw"][slice(*images[row])]
        for mask in (None, torch.ones_like(alone["input_ids"])):
            given = alone if mask is None else {**alone, "attention_mask": mask}
            difference = embeddings(model, given, setup)[0] - together[row]
            assert difference.abs().max() < setup.tolerance


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_path_gives_the_same_embeddings(setup, bidirectional, tmp_path):
    batch = interleaved_batch()
    reference = Setup("eager", "cpu", torch.float32)
    expected = embeddings(build("fresh", reference, tmp_path, bidirectional), batch, reference)
    for source in ("fresh", "saved", "pre-training checkpoint"):
        ours = embeddings(build(source, setup, tmp_path / source, bidirectional), batch, setup)
        assert (ours - expected).abs().max() < setup.tolerance


@pytest.mark.parametrize("setup", setups(BOTH))
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_path_gives_the_same_losses_and_gradients(setup, bidirectional):
    """The MAE decoder is bidirectional on every path, whatever the backbone is."""
    results = []
    for path, device, dtype in [("eager", "cpu", torch.float32), (setup.path, setup.device, setup.dtype)]:
        torch.manual_seed(0)  # of the new projection
        model = MoCaForPreTraining.from_backbone(backbone(), mask_token_id=6, bidirectional=bidirectional)
        model.to(device, dtype).set_attn_implementation(path)
        batch = {name: tensor.to(device) for name, tensor in masked_batch(dtype).items()}
        with torch.set_grad_enabled(has_backward(setup)):
            outputs = model(**batch)
        result = {"mlm_loss": outputs.mlm_loss, "mae_loss": outputs.mae_loss}
        if has_backward(setup):
            outputs.loss.backward()
            result |= {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({name: tensor.detach().float().cpu() for name, tensor in result.items()})
    tolerance = 1e-4 if setup.dtype == torch.float32 else 0.1
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < tolerance, (name, error)


def test_flex_attention_goes_to_the_language_model(tmp_path):
    MoCaForPreTraining.from_backbone(backbone(), mask_token_id=6).save_pretrained(tmp_path / "moca")
    backbone().save_pretrained(tmp_path / "stock")
    for model in (
        MoCaForPreTraining.from_pretrained(tmp_path / "moca", attn_implementation="flex_attention"),
        MoCaForPreTraining.from_backbone(tmp_path / "stock", attn_implementation="flex_attention"),
    ):
        for attention in (model.moca.language_model.layers[0].self_attn, model.mae_head.decoder.self_attn):
            assert attention.config._attn_implementation == "flex_attention"
        assert model.moca.backbone.visual.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        assert model.mae_head.decoder.self_attn.config._attn_implementation == "eager"


def test_flag_can_be_set_when_loading_and_afterwards(tmp_path):
    MoCaModel.from_backbone(backbone()).save_pretrained(tmp_path)
    model, causal = MoCaModel.from_pretrained(tmp_path), MoCaModel.from_pretrained(tmp_path, bidirectional=False)
    batch = interleaved_batch()
    with torch.no_grad():
        both, one = model(**batch).last_hidden_state, causal(**batch).last_hidden_state
        assert not torch.allclose(both[0, 0], one[0, 0], atol=1e-3)
        model.config.bidirectional = False
        torch.testing.assert_close(model(**batch).last_hidden_state, one)


def test_image_positions_are_three_dimensional():
    model = MoCaModel.from_backbone(tiny_backbone())
    batch = interleaved_batch()
    positions = model.get_position_ids(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"])
    # Row 0: vision start at 0, a 2 x 3 grid of image tokens from 1 on, then text after the grid's longer side.
    assert positions[0, 0, 1:7].tolist() == [1] * 6 or positions[0, 0, 1:7].tolist() == [0] * 6
    assert positions[1, 0, 1:7].tolist() == [1, 1, 1, 2, 2, 2]
    assert positions[2, 0, 1:7].tolist() == [1, 2, 3, 1, 2, 3]
    assert positions[:, 0, 7].tolist() == [4, 4, 4]


def test_no_cache_is_built():
    stock = tiny_backbone()
    assert stock.model(input_ids=torch.arange(10, 20)[None]).past_key_values is not None
    model = MoCaModel.from_backbone(stock)
    model.backbone.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    caches = []
    model(input_ids=torch.arange(10, 20)[None])
    assert caches == [None]
