"""Is the model what its flag says: bidirectional or causal, blind to padding, the same alone and in a batch?"""

import pytest
import torch

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.modeling_moca.batches import PAD, interleaved_batch
from tests.tiny import tiny_backbone

ATTENTION = ["eager", "sdpa"]


def build(source, attn_implementation, tmp_path, bidirectional=True):
    """Return a MoCaModel: fresh, saved and loaded, or loaded out of a pre-training checkpoint."""
    if source == "pre-training checkpoint":
        saved = MoCaForPreTraining.from_backbone(tiny_backbone(), bidirectional=bidirectional)
    else:
        saved = MoCaModel.from_backbone(tiny_backbone(), bidirectional=bidirectional)
    if source == "fresh":
        saved.set_attn_implementation(attn_implementation)
        return saved
    saved.save_pretrained(tmp_path)
    return MoCaModel.from_pretrained(tmp_path, attn_implementation=attn_implementation)


def states(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("attn_implementation", ATTENTION)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_causal_model_equals_the_stock_model(attn_implementation, padding_side, tmp_path):
    batch = interleaved_batch(padding_side)
    stock = tiny_backbone()
    stock.set_attn_implementation(attn_implementation)
    image_tokens = (batch["input_ids"] == stock.config.image_token_id).int()
    with torch.no_grad():
        expected = stock.model(**batch, mm_token_type_ids=image_tokens).last_hidden_state
    model = build("saved", attn_implementation, tmp_path, bidirectional=False)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states(model, batch)[real], expected[real], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attn_implementation", ATTENTION)
@pytest.mark.parametrize("source", ["fresh", "saved", "pre-training checkpoint"])
@pytest.mark.parametrize("rows", ["one row", "batch without padding", "padded batch"])
def test_last_token_reaches_the_first_only_if_bidirectional(attn_implementation, source, rows, tmp_path):
    batch = {
        "one row": {"input_ids": torch.arange(10, 22)[None]},
        "batch without padding": {"input_ids": torch.arange(10, 34).view(2, 12)},
        "padded batch": {
            "input_ids": torch.tensor([[*range(10, 20), PAD, PAD], [*range(30, 42)]]),
            "attention_mask": torch.tensor([[1] * 10 + [0] * 2, [1] * 12]),
        },
    }[rows]
    for bidirectional in (True, False):
        model = build(source, attn_implementation, tmp_path / str(bidirectional), bidirectional)
        for mask in (batch.get("attention_mask"), torch.ones_like(batch["input_ids"])):
            if rows == "padded batch":
                mask = batch["attention_mask"]
            before = {"input_ids": batch["input_ids"], "attention_mask": mask}
            changed = batch["input_ids"].clone()
            last = changed.shape[1] - 1 if mask is None else int(mask[0].sum()) - 1
            changed[0, last] = 99
            moved = (states(model, {**before, "input_ids": changed}) - states(model, before)).abs().amax(-1)
            assert (moved[0, 0] > 1e-3) == bidirectional
            assert moved[0, last] > 1e-3
            if len(moved) > 1:
                assert moved[1].max() == 0, "another row moved"


@pytest.mark.parametrize("attn_implementation", ATTENTION)
@pytest.mark.parametrize("source", ["fresh", "saved", "pre-training checkpoint"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_changes_nothing(attn_implementation, source, padding_side, tmp_path):
    model = build(source, attn_implementation, tmp_path)
    batch = interleaved_batch(padding_side)
    real = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(real, batch["input_ids"], 77)}
    torch.testing.assert_close(states(model, other)[real], states(model, batch)[real], atol=0, rtol=0)
    pooled = [model(**inputs).pooler_output for inputs in (batch, other)]
    torch.testing.assert_close(pooled[0], pooled[1], atol=0, rtol=0)


@pytest.mark.parametrize("attn_implementation", ATTENTION)
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_row_alone_equals_the_row_in_a_padded_batch(attn_implementation, padding_side, bidirectional, tmp_path):
    model = build("saved", attn_implementation, tmp_path, bidirectional)
    batch = interleaved_batch(padding_side)
    together = model(**batch).pooler_output
    patches = [(0, 24), (24, 48), None]
    images = [(0, 1), (1, 3), None]
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row][real][None]}
        if patches[row]:
            alone["pixel_values"] = batch["pixel_values"][slice(*patches[row])]
            alone["image_grid_thw"] = batch["image_grid_thw"][slice(*images[row])]
        torch.testing.assert_close(model(**alone).pooler_output[0], together[row], atol=1e-5, rtol=0)


def test_attention_paths_agree(tmp_path):
    results = [build("saved", name, tmp_path)(**interleaved_batch()).pooler_output for name in ATTENTION]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


def test_flag_can_be_set_when_loading_and_afterwards(tmp_path):
    model = build("saved", "sdpa", tmp_path)
    batch = interleaved_batch()
    causal = MoCaModel.from_pretrained(tmp_path, bidirectional=False)
    assert not torch.allclose(states(model, batch)[0, 0], states(causal, batch)[0, 0], atol=1e-3)
    model.config.bidirectional = False
    torch.testing.assert_close(states(model, batch), states(causal, batch))


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
