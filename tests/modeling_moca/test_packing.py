"""Packed rows are the rows of a padded batch: states, vectors, losses and gradients, on every path that runs here."""

import pytest
import torch

from modeling_moca import MoCaForPreTraining, MoCaModel, attention_moca
from modeling_moca.attention_moca import PACKED_SDPA, PackedRows
from tests.families import FAMILIES, TILED, family_backbone, family_processor
from tests.modeling_moca.attention_paths import has_backward, setups
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.modeling_moca.test_attention import backbone as wide_backbone
from tests.modeling_moca.test_attention import place
from tests.modeling_moca.test_families import batch_of
from tests.modeling_moca.test_flash_path import kernels  # noqa: F401
from tests.tiny import tiny_backbone

PER_TOKEN = ("input_ids", "labels", "patch_mask")


def pack(batch):
    """Return a padded batch without its padding, one row after another."""
    real = batch["attention_mask"].bool()
    packed = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    packed |= {name: batch[name][real][None] for name in PER_TOKEN if name in batch}
    bounds = [0, *real.sum(1).cumsum(0).tolist()]
    return {**packed, "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32)}


def family_batch(family, dtype=torch.float64):
    """A padded batch of a family with some text tokens and image tokens chosen."""
    batch = batch_of(family_processor(family))
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    text = (batch["input_ids"] > 6) & batch["attention_mask"].bool()
    text[:, 0] = False
    odd = torch.arange(text.shape[1]) % 2 == 1
    chosen, patch_mask = text & odd, (batch["input_ids"] == 3) & odd
    assert chosen.any(1).all() and patch_mask.any()
    return {**batch, "labels": batch["input_ids"].masked_fill(~chosen, -100), "patch_mask": patch_mask}


def results(model, batch, real=None):
    """Return everything that must not depend on packing; states of real tokens in their order."""
    with torch.set_grad_enabled(model.training):
        outputs = model(**batch)
    states = outputs.last_hidden_state
    found = {
        "states": states[0] if real is None else states[real],
        "pooled": outputs.pooler_output,
        "mlm_loss": outputs.mlm_loss,
        "mae_loss": outputs.mae_loss,
    }
    if model.training:
        # Both losses, and the vectors as in contrastive training.
        direction = torch.randn(outputs.pooler_output.shape, generator=torch.Generator().manual_seed(3))
        (outputs.loss + (outputs.pooler_output * direction.to(states)).sum()).backward()
        found |= {name: weight.grad for name, weight in model.named_parameters()}
        model.zero_grad()
    return {name: tensor.detach().float().cpu() for name, tensor in found.items() if tensor is not None}


def assert_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # The rest is for the biases of keys, whose gradients are 0 and noise.
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-6, name


@pytest.mark.parametrize("setup", setups((torch.float32, torch.bfloat16)))
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_rows_equal_the_padded_batch_on_every_path(setup, bidirectional):
    torch.manual_seed(0)
    model = MoCaForPreTraining.from_backbone(wide_backbone(), mask_token_id=6, bidirectional=bidirectional)
    model.to(setup.device, setup.dtype).set_attn_implementation(setup.path)
    model.train(has_backward(setup))
    batch = masked_batch(setup.dtype)
    real = batch["attention_mask"].bool()
    padded = results(model, place(batch, setup), real.to(setup.device))
    packed = results(model, place(pack(batch), setup))
    assert_equal(packed, padded, 1e-5 if setup.dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["eager", "sdpa"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_packed_rows_equal_the_padded_batch_in_every_family(family, path, bidirectional, pooling):
    model = MoCaForPreTraining.from_backbone(
        family_backbone(family), mask_token_id=6, bidirectional=bidirectional, pooling=pooling
    )
    model.double().train().set_attn_implementation(path)
    batch = family_batch(family)
    shape = (int(batch["patch_mask"].sum()), model.config.num_patches_per_token, model.config.patch_dim)
    batch["patch_labels"] = torch.randn(shape, dtype=torch.float64)
    padded = results(model, batch, batch["attention_mask"].bool())
    packed = results(model, pack(batch))
    assert packed["pooled"].shape == (3, 32)
    assert_equal(packed, padded, 1e-6)
    if family in TILED:
        # All tiles as those of one row, as a collator without padding would give them.
        tiles = batch["pixel_values"]
        kept = tiles.ne(0).flatten(2).any(-1)
        one_row = {"pixel_values": tiles[kept][None]}
        one_row["pixel_attention_mask"] = batch["pixel_attention_mask"][kept][None]
        assert_equal(results(model, {**pack(batch), **one_row}), padded, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_flash_attention_gets_the_bounds_of_the_rows(family, bidirectional, kernels):  # noqa: F811
    model = MoCaForPreTraining.from_backbone(family_backbone(family), mask_token_id=6, bidirectional=bidirectional)
    model.train().set_attn_implementation("eager")
    batch = family_batch(family, torch.float32)
    shape = (int(batch["patch_mask"].sum()), model.config.num_patches_per_token, model.config.patch_dim)
    batch["patch_labels"] = torch.randn(shape)
    padded = results(model, batch, batch["attention_mask"].bool())
    # Set here, not through set_attn_implementation, which looks for the package and the device.
    model.moca.language_model.config._attn_implementation = "flash_attention_2"
    packed = results(model, pack(batch))
    assert_equal(packed, padded, 1e-4)
    assert kernels == [("varlen", not bidirectional)] * 4 + [("varlen", False)]


@pytest.mark.parametrize("path", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_stays_within_the_rows(path, reentrant):
    """Also where padded passes come between: layers run again only in the backward pass."""
    batch = masked_batch(torch.float64)
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).double().train()

    def gradients(losses, order):
        found = {}
        for index in order:
            model.zero_grad()
            losses[index].backward()
            found[index] = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return [found[index] for index in range(len(losses))]

    def losses():
        model.set_attn_implementation(path)
        return [model(**inputs).loss for inputs in (batch, pack(batch), batch)]

    expected = gradients(losses(), (0, 1, 2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.moca.language_model.layers)
    for ours, theirs in zip(gradients(losses(), (1, 0, 2)), expected):
        assert_equal(ours, theirs, 1e-6)


@pytest.mark.parametrize("setup", setups())
@pytest.mark.parametrize("bidirectional", [True, False])
def test_rows_never_see_each_other(setup, bidirectional):
    model = MoCaForPreTraining.from_backbone(wide_backbone(), mask_token_id=6, bidirectional=bidirectional)
    model.to(setup.device, setup.dtype).set_attn_implementation(setup.path)
    packed = place(pack(masked_batch()), setup)
    rows = [slice(*pair) for pair in zip(packed["cu_seq_lens"].tolist(), packed["cu_seq_lens"].tolist()[1:])]
    with torch.no_grad():
        before = model(**packed)
        for row, own in enumerate(rows):
            changed = packed["input_ids"].clone()
            text = changed[0, own] > 6
            changed[0, own] = torch.where(text, 99, changed[0, own])
            after = model(**{**packed, "input_ids": changed})
            moved = (after.last_hidden_state - before.last_hidden_state)[0].abs().amax(-1)
            assert moved[own].max() > 1e-3
            moved[own] = 0
            assert moved.max() <= 1e-6
            pooled = (after.pooler_output - before.pooler_output).abs().amax(-1)
            assert pooled[row] > 1e-4 and pooled.sum() - pooled[row] <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_start_again_in_every_row(family):
    model = MoCaModel.from_backbone(family_backbone(family))
    batch = batch_of(family_processor(family))
    packed = pack(batch)
    grid = batch.get("image_grid_thw")
    positions = model.get_position_ids(packed["input_ids"], None, grid, packed["cu_seq_lens"])
    assert positions.shape == ((1,) if family in TILED else (3, 1)) + packed["input_ids"].shape[1:]
    images = [slice(0, 2), slice(2, 2), slice(2, 3)]
    bounds = packed["cu_seq_lens"].tolist()
    for row, (start, end) in enumerate(zip(bounds, bounds[1:])):
        alone = packed["input_ids"][:, start:end]
        own_grid = None if grid is None or images[row].start == images[row].stop else grid[images[row]]
        assert torch.equal(positions[..., start:end], model.get_position_ids(alone, None, own_grid))


def test_one_row_and_single_tokens():
    model = MoCaModel.from_backbone(tiny_backbone())
    ids = torch.arange(10, 16)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        one = model(input_ids=ids, cu_seq_lens=torch.tensor([0, 6])).last_hidden_state
        torch.testing.assert_close(one, whole, atol=1e-6, rtol=0)
        single = model(input_ids=ids, cu_seq_lens=torch.arange(7, dtype=torch.int32))
        alone = model(input_ids=ids.T)
    torch.testing.assert_close(single.pooler_output, alone.pooler_output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("always", [True, False])
def test_text_alone_with_every_weight_in_use(always):
    batch = masked_batch()
    text = {name: batch[name][2:] for name in ("input_ids", "attention_mask", "labels")}
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).train()
    model.moca.always_use_vision = always
    outputs = model(**pack(text))
    outputs.loss.backward()
    torch.testing.assert_close(outputs.mlm_loss, model(**text).mlm_loss)
    gradients = [weight.grad is not None for weight in model.parameters()]
    assert all(gradients) == always


def test_saved_configuration_and_other_paths_know_nothing_of_packing(tmp_path):
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    text_config = model.moca.language_model.config
    batch = masked_batch()
    with torch.no_grad():
        model(**batch)
        assert text_config._attn_implementation == "sdpa"
        before = model(**batch).last_hidden_state
        model(**pack(batch))
        assert text_config._attn_implementation == PACKED_SDPA
        assert torch.equal(model(**batch).last_hidden_state, before)
    model.save_pretrained(tmp_path)
    assert not any(PACKED_SDPA in path.read_text() for path in tmp_path.glob("*.json"))
    loaded = MoCaForPreTraining.from_pretrained(tmp_path)
    assert loaded.moca.language_model.config._attn_implementation == "sdpa"
    for path in ("eager", "sdpa", "flex_attention", "sdpa"):
        model.set_attn_implementation(path)
        assert text_config._attn_implementation == path
        assert model.mae_head.decoder.self_attn.config._attn_implementation == path


@pytest.mark.parametrize("bidirectional", [True, False])
def test_kernel_for_packed_rows_gets_the_bounds(bidirectional, monkeypatch):
    """On CPU a stand-in takes the place of torch's own, which runs on GPUs only."""
    calls = []

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((max_q, max_k, window_size, enable_gqa))
        assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        row = torch.searchsorted(cu_seq_q.long(), torch.arange(len(query)), right=True)
        allowed = row[:, None] == row
        if window_size == (-1, 0):
            allowed = allowed.tril()
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), value)

    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6, bidirectional=bidirectional).train()
    expected = results(model, pack(masked_batch()))
    monkeypatch.setattr(attention_moca, "varlen_attn", varlen)
    monkeypatch.setattr(attention_moca, "_runs_varlen", lambda query, value: True)
    assert_equal(results(model, pack(masked_batch())), expected, 1e-5)
    window = (-1, -1) if bidirectional else (-1, 0)
    assert calls == [(17, 17, window, True)] * 4 + [(17, 17, (-1, -1), True)]


def test_first_token_of_a_packed_row_cannot_be_chosen_when_labels_are_shifted():
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    packed = pack(masked_batch())
    packed["labels"][0, packed["cu_seq_lens"][2]] = 50
    with pytest.raises(ValueError, match=r"position 0 in rows \[2\]"):
        model(**packed)
    model.config.shift_labels = False
    assert model(**packed).loss.isfinite()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 20], "must go from 0 to the sequence length 24, got 0 to 20"),
        ([1, 5, 24], "must go from 0 to the sequence length 24, got 1 to 24"),
        ([0, 9, 9, 24], "must rise with every row, but row 1 goes from 9 to 9"),
        ([0, 12, 9, 24], "row 1 goes from 12 to 9"),
        ([0], r"shape \(num_rows \+ 1,\) with at least one row, got torch.int32 of shape \(1,\)"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds, message):
    model, ids = MoCaModel.from_backbone(tiny_backbone()), torch.arange(10, 34)[None]
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, cu_seq_lens=torch.tensor(bounds, dtype=torch.int32))


def test_what_does_not_go_with_packed_rows_is_refused():
    model, batch = MoCaModel.from_backbone(tiny_backbone()), interleaved_batch()
    packed = pack(batch)
    with pytest.raises(ValueError, match=r"exclude each other.*attention_mask of shape \(1, \d+\)"):
        model(**packed, attention_mask=torch.ones_like(packed["input_ids"]))
    with pytest.raises(ValueError, match=r"needs input_ids of shape \(1, sequence_length\), got \(3, 17\)"):
        model(input_ids=batch["input_ids"].clamp(min=7), cu_seq_lens=torch.tensor([0, 17]))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(4,\)"):
        model(**{**packed, "cu_seq_lens": packed["cu_seq_lens"].float()})
    moved = packed["cu_seq_lens"] - torch.tensor([0, 12, 0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"up to the end of row 0 input_ids hold 4 image tokens.*\[6, 2, 4\]"):
        model(**{**packed, "cu_seq_lens": moved})
    with pytest.raises(ValueError, match="own 48 rows of pixel_values; got 44"):
        model(**{**packed, "pixel_values": packed["pixel_values"][:44]})
    model.language_model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"flash_attention_3, got 'paged\|eager'"):
        model(**packed)
    model.language_model.config._attn_implementation = "sdpa"
    model.language_model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ValueError, match="layers with full attention"):
        model(**packed)


def test_cut_tiles_are_refused():
    model = MoCaModel.from_backbone(family_backbone("smolvlm"))
    packed = pack(batch_of(family_processor("smolvlm")))
    inside = int((packed["input_ids"][0] == 3).nonzero()[3])
    packed["cu_seq_lens"] = torch.tensor([0, inside, packed["input_ids"].shape[1]])
    with pytest.raises(ValueError, match="cu_seq_lens cut an image: up to the end of row 0 input_ids hold 3"):
        model(**packed)


def test_rows_know_their_bounds():
    rows = PackedRows.of(torch.tensor([0, 2, 3, 7]), torch.arange(7)[None])
    assert rows.lengths == (2, 1, 4)
    assert rows.starts.tolist() == [0, 2, 3] and rows.ends.tolist() == [1, 2, 6]
    assert rows.row_numbers.tolist() == [[0, 0, 1, 2, 2, 2, 2]]
    batch, mask = rows.unpack(torch.arange(10, 17)[None])
    assert batch.tolist() == [[10, 11, -1, -1], [12, -1, -1, -1], [13, 14, 15, 16]]
    assert torch.equal(mask, batch >= 0)
    assert PackedRows.of(None, torch.arange(7)[None]) is None
