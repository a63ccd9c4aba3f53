"""The two reconstruction heads of continual pre-training: masked tokens and masked image patches."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask


class MoCaMLMHead(nn.Module):
    """Predict masked tokens: the backbone's own vocabulary projection, applied to the chosen positions only.

    Args:
        hidden_size (`int`): width of the hidden states.
        vocab_size (`int`): rows of the embedding matrix.
    """

    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states, labels, shift_labels=True):
        """Return logits and labels of the chosen tokens (paper section 3.1, equation 1).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): final-normed states.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the original id where a token was
                chosen, -100 elsewhere; always at the token's own position.
            shift_labels (`bool`, defaults to `True`): read the prediction for position i from the state at i - 1.

        Returns:
            `tuple`: float32 logits `(num_chosen, vocab_size)` and labels `(num_chosen,)`.

        Raises:
            ValueError: with `shift_labels`, the first position of a row is chosen; it has no state before it.
        """
        if shift_labels:
            if bool((labels[:, 0] != -100).any()):
                rows = (labels[:, 0] != -100).nonzero().flatten().tolist()
                raise ValueError(
                    f"labels choose position 0 in rows {rows}, but with shift_labels=True position i is predicted from "
                    "the state at i - 1: position 0 must be -100."
                )
            hidden_states, labels = hidden_states[:, :-1], labels[:, 1:]  # [B, T-1, d], [B, T-1]
        chosen = labels != -100  # [B, T-1]
        logits = self.lm_head(hidden_states[chosen])  # [n, V]
        return _at_least_float32(logits), labels[chosen]


class MoCaMAEHead(nn.Module):
    """Predict masked image patches: one bidirectional layer of the backbone's own type, then a linear map.

    Args:
        config ([`MoCaConfig`]): gives the text layer's sizes and the patch layout.
        layer_class (`type`): the backbone's decoder layer class.
    """

    def __init__(self, config, layer_class):
        super().__init__()
        text_config = config.get_text_config()
        self.num_patches_per_token = config.num_patches_per_token
        self.patch_dim = config.patch_dim
        self.decoder = layer_class(text_config, text_config.num_hidden_layers // 2)
        self.proj = nn.Linear(text_config.hidden_size, self.num_patches_per_token * self.patch_dim)

    def forward(self, hidden_states, attention_mask, position_embeddings, patch_mask):
        """Return the predicted pixel rows of the chosen image tokens (paper section 3.1, equation 2).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): final-normed states.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 at padding.
            position_embeddings (`tuple`): cosine and sine of the backbone's rotary positions.
            patch_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): the chosen image tokens.

        Returns:
            `torch.Tensor` of shape `(num_chosen, num_patches_per_token, patch_dim)`.
        """
        # Bidirectional whatever the backbone is: the mask says so, and is_causal=False says so to kernels that are
        # given no mask at all because nothing is padded.
        mask = create_bidirectional_mask(
            config=self.decoder.self_attn.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        decoded = self.decoder(
            hidden_states, attention_mask=mask, position_embeddings=position_embeddings, is_causal=False
        )
        decoded = decoded[patch_mask]  # [n, d]
        # Within a token's output the patch index runs fastest, as in the published checkpoints.
        predicted = self.proj(decoded).unflatten(-1, (self.patch_dim, self.num_patches_per_token))  # [n, P, m*m]
        return predicted.transpose(1, 2)  # [n, m*m, P]


def masked_token_loss(logits, labels, num_items=None):
    """Return the cross-entropy summed over chosen tokens, divided by their number (paper equation 1).

    Args:
        logits (`torch.Tensor` of shape `(num_chosen, vocab_size)`): float32 predictions.
        labels (`torch.LongTensor` of shape `(num_chosen,)`): original ids.
        num_items (`torch.Tensor` or `int`, *optional*): chosen tokens of the whole step, over accumulation and ranks;
            this batch's own number when omitted. Nothing chosen gives 0, not NaN.

    Returns:
        `torch.Tensor`: scalar.
    """
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / _at_least_one(labels.shape[0] if num_items is None else num_items)


def masked_patch_loss(predicted, target, num_items=None):
    """Return the squared error averaged within each patch, summed over chosen patches, divided by their number.

    Args:
        predicted (`torch.Tensor` of shape `(num_chosen, num_patches_per_token, patch_dim)`): predicted pixel rows.
        target (`torch.Tensor`, same number of values): the original, processor-normalised pixel rows.
        num_items (`torch.Tensor` or `int`, *optional*): chosen patches (not tokens) of the whole step; this batch's
            own number when omitted. Nothing chosen gives 0, not NaN (paper equation 2).

    Returns:
        `torch.Tensor`: scalar.

    Raises:
        ValueError: prediction and target differ in their number of values.
    """
    if predicted.numel() != target.numel():
        raise ValueError(
            f"patch_labels hold {target.numel()} values of shape {tuple(target.shape)}, but patch_mask chooses "
            f"{predicted.shape[0]} image tokens, which own {tuple(predicted.shape)} values."
        )
    error = _at_least_float32(predicted) - _at_least_float32(target.reshape(predicted.shape))  # [n, m*m, P]
    total = error.square().mean(-1).sum()
    num_patches = predicted.shape[0] * predicted.shape[1]
    return total / _at_least_one(num_patches if num_items is None else num_items)


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _at_least_one(count):
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


__all__ = ["MoCaMAEHead", "MoCaMLMHead", "masked_patch_loss", "masked_token_loss"]
