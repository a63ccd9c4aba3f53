"""Embeddings, both losses and their gradients against plain closed-form code with full logits and loops."""

import pytest
import torch

from modeling_moca import MoCaForPreTraining, MoCaModel
from modeling_moca.heads_moca import masked_patch_loss, masked_token_loss
from tests.modeling_moca.batches import interleaved_batch, masked_batch
from tests.tiny import tiny_backbone


def build(**kwargs):
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6, **kwargs).double()
    # The projection starts with bias 0; a bias that matters is what the test should see.
    torch.nn.init.normal_(model.mae_head.proj.bias)
    return model


def plain_attention(layer, states, positions, allowed, rotary):
    """One decoder layer, written out: loops over heads, an explicit mask, no kernel."""
    attention, config = layer.self_attn, layer.self_attn.config
    head_dim = states.shape[-1] // config.num_attention_heads
    normed = layer.input_layernorm(states)
    query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    cos, sin = rotary(states, positions)  # [B, T, head_dim] or [3, B, T, head_dim]
    if cos.ndim == 4:
        sections = config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(angle.split(sections, dim=-1))], dim=-1)
            for angle in (cos, sin)
        )

    def rotate(x):
        half = head_dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    heads = []
    group = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        shared = slice(head // group * head_dim, (head // group + 1) * head_dim)
        scores = rotate(query[..., own]) @ rotate(key[..., shared]).transpose(1, 2) / head_dim**0.5
        heads.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value[..., shared])
    states = states + attention.o_proj(torch.cat(heads, dim=-1))
    return states + layer.mlp(layer.post_attention_layernorm(states))


def plain_forward(model, batch):
    """Return final states and positions with a bidirectional mask that is written out."""
    moca = model.moca
    backbone = moca.backbone
    embeddings = backbone.get_input_embeddings()(batch["input_ids"]).clone()
    image = torch.cat(backbone.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output)
    embeddings[batch["input_ids"] == 3] = image
    positions = moca.get_position_ids(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"])
    allowed = batch["attention_mask"].bool()[:, None, :].expand(-1, embeddings.shape[1], -1)  # [B, T, T]
    states = embeddings
    for layer in moca.language_model.layers:
        states = plain_attention(layer, states, positions, allowed, moca.language_model.rotary_emb)
    return moca.language_model.norm(states), positions, allowed


def plain_losses(model, batch, shift):
    """Return both losses from full-vocabulary logits and python loops over rows, tokens and values."""
    states, positions, allowed = plain_forward(model, batch)
    logits = states @ model.mlm_head.lm_head.weight.T  # [B, T, V]
    token_losses, patch_losses = [], []
    decoded = plain_attention(model.mae_head.decoder, states, positions, allowed, model.moca.language_model.rotary_emb)
    chosen = 0
    for row in range(len(states)):
        for column in range(states.shape[1]):
            label = int(batch["labels"][row, column])
            if label != -100:
                read_from = column - 1 if shift else column
                token_losses.append(logits[row, read_from].logsumexp(-1) - logits[row, read_from, label])
            if batch["patch_mask"][row, column]:
                output = model.mae_head.proj.weight @ decoded[row, column] + model.mae_head.proj.bias  # [4704]
                for patch in range(4):
                    predicted = torch.stack([output[4 * value + patch] for value in range(1176)])
                    patch_losses.append(((predicted - batch["patch_labels"][chosen, patch]) ** 2).sum() / 1176)
                chosen += 1
    return sum(token_losses) / len(token_losses), sum(patch_losses) / len(patch_losses)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_losses_and_gradients_equal_plain_code(shift, attn_implementation):
    model, batch = build(shift_labels=shift, mae_loss_weight=0.3), masked_batch(torch.float64)
    model.set_attn_implementation(attn_implementation)
    mlm_loss, mae_loss = plain_losses(model, batch, shift)
    (mlm_loss + 0.3 * mae_loss).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    outputs = model(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.mlm_loss, mlm_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outputs.mae_loss, mae_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outputs.loss, mlm_loss + 0.3 * mae_loss, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_and_gradients_equal_plain_code(pooling):
    pretraining = build(pooling=pooling)
    model, batch = pretraining.moca, interleaved_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    states = plain_forward(pretraining, batch)[0]
    rows = []
    for row in range(3):
        real = [states[row, column] for column in range(states.shape[1]) if batch["attention_mask"][row, column]]
        pooled = sum(real) / len(real) if pooling == "mean" else real[-1]
        rows.append(pooled)
    expected = torch.stack(rows)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * direction).sum(), list(model.parameters()))
    pooled = model(**batch).pooler_output
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-6)
    again = torch.autograd.grad((pooled * direction).sum(), list(model.parameters()))
    for ours, plain in zip(again, gradients):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_patch_index_runs_fastest_in_the_projection():
    model, batch = build(), masked_batch(torch.float64)
    torch.nn.init.zeros_(model.mae_head.proj.weight)
    with torch.no_grad():
        model.mae_head.proj.bias.copy_(torch.arange(4704))
        predictions = model(**batch).patch_predictions  # [n, 4, 1176]
    assert predictions.shape == (5, 4, 1176)
    for patch in range(4):
        assert predictions[0, patch, :3].tolist() == [patch, 4 + patch, 8 + patch]
        assert predictions[4, patch, 1175] == 4 * 1175 + patch


def test_global_counts_replace_local_ones():
    model, batch = build(), masked_batch(torch.float64)
    local = model(**batch)
    scaled = model(**batch, num_items_in_batch=torch.tensor([12, 80]))
    torch.testing.assert_close(scaled.mlm_loss, local.mlm_loss * 6 / 12)
    torch.testing.assert_close(scaled.mae_loss, local.mae_loss * 20 / 80)


def test_nothing_chosen_is_zero_with_zero_gradients():
    model, batch = build(), masked_batch(torch.float64)
    batch["labels"].fill_(-100)
    batch["patch_mask"].fill_(False)
    batch["patch_labels"] = batch["patch_labels"][:0]
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_mean_pooling_counts_in_float32():
    model = MoCaModel.from_backbone(tiny_backbone()).bfloat16()
    input_ids = torch.randint(7, 300, (1, 301))
    outputs = model(input_ids=input_ids)
    exact = outputs.last_hidden_state.float().mean(1)
    torch.testing.assert_close(outputs.pooler_output, exact.bfloat16(), atol=0, rtol=0)


def test_losses_are_float32_in_a_bfloat16_model():
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).bfloat16()
    outputs = model(**masked_batch(torch.bfloat16))
    assert outputs.mlm_logits.dtype == outputs.mlm_loss.dtype == outputs.mae_loss.dtype == torch.float32


def test_position_zero_cannot_be_chosen_when_labels_are_shifted():
    batch = masked_batch(torch.float64)
    batch["labels"][2, 0] = 50
    with pytest.raises(ValueError, match=r"position 0 in rows \[2\]"):
        build()(**batch)
    assert build(shift_labels=False)(**batch).loss.isfinite()


def test_patch_labels_that_do_not_fit_are_refused():
    model, batch = build(), masked_batch(torch.float64)
    with pytest.raises(ValueError, match="patch_labels hold 18816 values"):
        model(**{**batch, "patch_labels": batch["patch_labels"][:4]})
    with pytest.raises(ValueError, match="patch_labels is None"):
        model(**{**batch, "patch_labels": None})


def test_loss_functions_on_numbers():
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    assert masked_token_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(torch.log(torch.tensor(2.0)) / 2)
    predicted = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    assert masked_patch_loss(predicted, torch.zeros(2, 2)).item() == pytest.approx((1 + 9) / 2 / 2)
    assert masked_patch_loss(predicted, torch.zeros(2, 2), torch.tensor(5)).item() == pytest.approx(5 / 5)
