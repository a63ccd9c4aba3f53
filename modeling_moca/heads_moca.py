"""The two reconstruction heads of continual pre-training: masked tokens and masked image patches."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

# Rows of logits that exist at a time: enough to keep a processor busy, and with Qwen's vocabulary 78 MB on a CPU.
CHUNK_ROWS = {"cpu": 128}
DEFAULT_CHUNK_ROWS = 512


class VocabularyProjection(nn.Linear):
    """The vocabulary projection, which can also go straight to the loss without keeping its logits.

    Args:
        args, kwargs: see `nn.Linear`. It is a module of its own so that whoever shares weights between ranks (FSDP,
            ZeRO-3) gathers this one for the loss too: they do so when a module's forward is entered.
    """

    @classmethod
    def of(cls, linear):
        """Return a projection with the weight (not a copy) of another one.

        Args:
            linear (`nn.Module`): the projection; returned as it is unless it is a plain `nn.Linear` without bias,
                since adapters and dispatched modules do more than multiply.
        """
        if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
            return linear
        projection = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        projection.weight = linear.weight
        return projection.train(linear.training)

    def forward(self, hidden_states, labels=None):
        """Return logits, or with labels the summed cross-entropy.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`).
            labels (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): ids to predict.

        Returns:
            `torch.Tensor`: logits `(num_tokens, vocab_size)`, or a scalar in float32 or better.
        """
        if labels is None:
            return super().forward(hidden_states)
        return summed_token_loss(hidden_states, self.weight, labels)


class MoCaMLMHead(nn.Module):
    """Predict masked tokens: the backbone's own vocabulary projection, applied to the chosen positions only.

    Args:
        hidden_size (`int`): width of the hidden states.
        vocab_size (`int`): rows of the embedding matrix.
    """

    def __init__(self, hidden_size, vocab_size):
        super().__init__()
        self.lm_head = VocabularyProjection(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states, labels, shift_labels=True, num_items=None, rows=None, return_logits=False):
        """Return the loss of the chosen tokens (paper section 3.1, equation 1).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): final-normed states.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the original id where a token was
                chosen, -100 elsewhere; always at the token's own position.
            shift_labels (`bool`, defaults to `True`): read the prediction for position i from the state at i - 1.
            num_items (`torch.Tensor` or `int`, *optional*): see [`masked_token_loss`].
            rows ([`PackedRows`], *optional*): the rows of a packed sequence.
            return_logits (`bool`, defaults to `False`): also return the logits, which then exist all at once.

        Returns:
            `tuple`: the loss (scalar), and float32 logits `(num_chosen, vocab_size)` or None.

        Raises:
            ValueError: with `shift_labels`, the first position of a row is chosen; it has no state before it.
        """
        if shift_labels:
            first_labels = labels[:, 0] if rows is None else labels[0, rows.starts]  # [B] or [R]
            if bool((first_labels != -100).any()):
                numbers = (first_labels != -100).nonzero().flatten().tolist()
                raise ValueError(
                    f"labels choose position 0 in rows {numbers}, but with shift_labels=True position i is predicted "
                    "from the state at i - 1: position 0 must be -100."
                )
            hidden_states, labels = hidden_states[:, :-1], labels[:, 1:]  # [B, T-1, d], [B, T-1]
        chosen = labels != -100  # [B, T-1]
        hidden_states, labels = hidden_states[chosen], labels[chosen]  # [n, d], [n]
        if return_logits or not _takes_labels(self.lm_head, hidden_states):
            logits = _at_least_float32(self.lm_head(hidden_states))  # [n, V]
            return masked_token_loss(logits, labels, num_items), logits if return_logits else None
        total = self.lm_head(hidden_states, labels)
        return total / _at_least_one(labels.shape[0] if num_items is None else num_items), None


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

    def forward(self, hidden_states, attention_mask, position_embeddings, patch_mask, rows=None):
        """Return the predicted pixel rows of the chosen image tokens (paper section 3.1, equation 2).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): final-normed states.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 at padding.
            position_embeddings (`tuple`): cosine and sine of the backbone's rotary positions.
            patch_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): the chosen image tokens.
            rows ([`PackedRows`], *optional*): the rows of a packed sequence.

        Returns:
            `torch.Tensor` of shape `(num_chosen, num_patches_per_token, patch_dim)`.
        """
        # Bidirectional whatever the backbone is: the mask says so, and is_causal=False says so to kernels that are
        # given no mask at all because nothing is padded.
        config, packing = self.decoder.self_attn.config, {}
        if rows is None:
            mask = create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        else:
            mask, packing = rows.attention_inputs(config, hidden_states, bidirectional=True)
        decoded = self.decoder(
            hidden_states, attention_mask=mask, position_embeddings=position_embeddings, is_causal=False, **packing
        )
        decoded = decoded[patch_mask]  # [n, d]
        # Within a token's output the patch index runs fastest, as in the published checkpoints.
        predicted = self.proj(decoded).unflatten(-1, (self.patch_dim, self.num_patches_per_token))  # [n, P, m*m]
        return predicted.transpose(1, 2)  # [n, m*m, P]


class _SummedTokenLoss(torch.autograd.Function):
    """Cross-entropy whose gradients are made along with it, so that the logits of one chunk of rows exist at a time.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same, but returns a sum in bfloat16 for bfloat16
    states, 0.4 % off, and keeps half as much again.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, dtype, with_gradients):
        states, kernel = hidden_states.to(dtype), weight.to(dtype)  # [n, d], [V, d]
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=states.device)
        needs_states, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_states = torch.zeros_like(hidden_states) if needs_states else None  # [n, d]
        # Summed over chunks, hence not in half precision.
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None  # [V, d]
        num_rows = CHUNK_ROWS.get(states.device.type, DEFAULT_CHUNK_ROWS)
        # Types are chosen here; an outer autocast must not choose others.
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), num_rows):
                chunk = slice(start, start + num_rows)
                targets = labels[chunk, None]  # [c, 1]
                scores = (states[chunk] @ kernel.T).to(precise)  # [c, V], one buffer from here on
                scores.sub_(scores.amax(-1, keepdim=True))
                of_targets = scores.gather(1, targets)  # [c, 1]
                sums = scores.exp_().sum(-1, keepdim=True)  # [c, 1]
                total += (sums.log() - of_targets).sum()
                # Softmax minus one at the target: the gradient of the logits.
                scores.div_(sums).scatter_add_(1, targets, torch.full_like(of_targets, -1.0))
                scores = scores.to(dtype)
                if needs_states:
                    grad_states[chunk] = scores @ kernel
                if needs_weight and dtype == precise:
                    grad_weight.addmm_(scores.T, states[chunk])
                elif needs_weight:
                    grad_weight += scores.T @ states[chunk]
        ctx.gradients = grad_states, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        if ctx.gradients is None:
            raise RuntimeError("The masked-token loss goes backward once only: its gradients are scaled in place.")
        grad_states, grad_weight = ctx.gradients
        ctx.gradients = None
        if grad_states is not None:
            grad_states.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_states, grad_weight, None, None, None


def summed_token_loss(hidden_states, weight, labels):
    """Return the cross-entropy of `hidden_states @ weight.T`, summed over tokens, without keeping the logits.

    Memory is that of the two gradients and of the logits of a few hundred rows. Differentiable once. Under autocast the
    products are in autocast's type, as those of `nn.Linear`.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`).
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`).
        labels (`torch.LongTensor` of shape `(num_tokens,)`): ids below `vocab_size`. No tokens give 0.

    Returns:
        `torch.Tensor`: scalar, float32 or better.
    """
    dtype = _product_dtype(hidden_states)
    return _SummedTokenLoss.apply(hidden_states, weight, labels, dtype, torch.is_grad_enabled())


def _product_dtype(hidden_states):
    """Return the type in which `nn.Linear` would multiply these states."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype


def _takes_labels(projection, hidden_states):
    """Tell whether a projection goes straight to the loss; not in float16, where small gradients need a scaled loss."""
    return isinstance(projection, VocabularyProjection) and _product_dtype(hidden_states) != torch.float16


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


__all__ = [
    "MoCaMAEHead",
    "MoCaMLMHead",
    "VocabularyProjection",
    "masked_patch_loss",
    "masked_token_loss",
    "summed_token_loss",
]
