"""InfoNCE over a global batch, with hard negatives, cached gradients and exact gradients across ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | Sequence[Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    *,
    temperature: float = 0.03,
    all_negatives: bool = True,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Mean over rows of `-log softmax(cosine / temperature)` at the row's own positive.

    The denominator of row i holds its own positive, every other row's positive, its own hard negatives and, with
    `all_negatives`, every other row's hard negatives. Source: MoCa (arXiv 2506.23115), section 3.2. Half-precision
    embeddings are widened first: a cosine formed in bfloat16 and divided by 0.03 is off by up to 0.1.

    Args:
        query: embeddings of shape [N, d], of any length (they are normalised here).
        positive: embeddings of shape [N, d]; row i belongs to query i.
        negatives: hard negatives of shape [N, K, d], or K tensors of shape [N, d], or None for K = 0.
        negatives_mask: booleans of shape [N, K], True where the negative exists; None when all do.
        temperature: divisor of the cosine, 0.03 in the paper.
        all_negatives: True (paper): a row's hard negatives count for every row; False (reference code): only for
            their own row.
        symmetric: average with the loss of finding the query from the positive.
        false_negative_margin: leave a candidate out when its cosine exceeds the positive's by more than this; None
            keeps all.
        rows: (begin, end) of the rows to average over, the others only being candidates; None means all rows. With
            embeddings gathered from all ranks, a rank passes its own rows.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: for a temperature that is not positive, or shapes that do not fit together.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature} (info_nce).")
    if query.ndim != 2 or query.shape != positive.shape:
        raise ValueError(
            f"query and positive must share one shape [N, d], got {tuple(query.shape)} and {tuple(positive.shape)} "
            "(info_nce)."
        )
    if isinstance(negatives, Sequence):
        negatives = torch.stack(list(negatives), dim=1) if len(negatives) else None  # [N, K, d]
    num_rows, dim = query.shape
    num_negatives = 0 if negatives is None else negatives.shape[1]
    if negatives is not None and negatives.shape != (num_rows, num_negatives, dim):
        raise ValueError(
            f"negatives must have shape [N, K, d] with N = {num_rows} and d = {dim}, got {tuple(negatives.shape)} "
            "(info_nce)."
        )
    if negatives_mask is not None and negatives_mask.shape != (num_rows, num_negatives):
        raise ValueError(
            f"negatives_mask must have shape [N, K] = {(num_rows, num_negatives)}, got {tuple(negatives_mask.shape)} "
            "(info_nce)."
        )
    begin, end = (0, num_rows) if rows is None else rows
    if not 0 <= begin < end <= num_rows:
        raise ValueError(f"rows must lie within (0, {num_rows}) and not be empty, got {rows} (info_nce).")

    # Autocast would compute the cosine in half precision again.
    with torch.autocast(device_type=query.device.type, enabled=False):
        query, positive = _unit(query), _unit(positive)
        own = torch.arange(begin, end, device=query.device)  # [R] column of each row's own positive
        cosine = query[begin:end] @ positive.T  # [R, N]
        if num_negatives:
            negatives = _unit(negatives)
            if negatives_mask is None:
                negatives_mask = torch.ones(num_rows, num_negatives, dtype=torch.bool, device=query.device)
            if all_negatives:
                negative_cosine = query[begin:end] @ negatives.flatten(0, 1).T  # [R, N * K]
                exists = negatives_mask.flatten()  # [N * K], the same for every row
            else:
                negative_cosine = torch.einsum("rd,rkd->rk", query[begin:end], negatives[begin:end])  # [R, K]
                exists = negatives_mask[begin:end]  # [R, K]
            cosine = torch.cat([cosine, negative_cosine.masked_fill(~exists, -torch.inf)], dim=1)
        loss = _cross_entropy(cosine, own, temperature, false_negative_margin)
        if symmetric:
            reverse_cosine = positive[begin:end] @ query.T  # [R, N]
            loss = (loss + _cross_entropy(reverse_cosine, own, temperature, false_negative_margin)) / 2
    return loss


def _unit(embeddings: Tensor) -> Tensor:
    """Embeddings at least float32 and of length 1."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def _cross_entropy(cosine: Tensor, own: Tensor, temperature: float, false_negative_margin: float | None) -> Tensor:
    """Mean cross-entropy of cosine [R, M] / temperature at column `own` [R]."""
    if false_negative_margin is not None:
        positive_cosine = cosine.gather(1, own[:, None])  # [R, 1]
        # The positive itself is never above its own cosine plus a margin, unless the margin is negative.
        false_negative = (cosine > positive_cosine + false_negative_margin).scatter(1, own[:, None], False)
        cosine = cosine.masked_fill(false_negative, -torch.inf)
    return F.cross_entropy(cosine / temperature, own)


class InfoNCELoss(CachedLossMixin, nn.Module):
    """`info_nce` on the columns of a batch, gathered over all ranks, for `SentenceTransformerTrainer`.

    Every rank computes the loss of its own rows against the candidates of all ranks, and the gather carries
    gradients back to the rank that made an embedding. Data parallelism averages gradients over ranks, so that the
    result is the gradient of the mean over the global batch, as one process would compute it.

    Args:
        model: the model that embeds a column's features into `sentence_embedding` [B, d].
        temperature: see `info_nce`.
        all_negatives: see `info_nce`.
        symmetric: see `info_nce`.
        false_negative_margin: see `info_nce`.
        mini_batch_size: rows a column embedded at a time with cached gradients (GradCache, arXiv 2101.06983): memory
            follows the mini-batch while the loss sees the whole batch, for one more forward pass. None embeds whole
            columns.

    Raises:
        ValueError: for a mini_batch_size below 1.

    Example:
        >>> loss = InfoNCELoss(model, temperature=0.03, mini_batch_size=8)
        >>> value = loss([query_features, positive_features, negative_features], negatives_mask)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.03,
        all_negatives: bool = True,
        symmetric: bool = False,
        false_negative_margin: float | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, or None, got {mini_batch_size} (InfoNCELoss).")
        self.model = model
        self.temperature = temperature
        self.all_negatives = all_negatives
        self.symmetric = symmetric
        self.false_negative_margin = false_negative_margin
        self.mini_batch_size = mini_batch_size
        self.uses_gradient_cache = mini_batch_size is not None
        if mini_batch_size is not None:
            model.register_forward_pre_hook(_move_pixels)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Loss of this rank's rows.

        Args:
            sentence_features: features of the query, the positive and K hard negatives, a dict a column.
            labels: the negatives mask, booleans of shape [B, K]; None when every negative exists.

        Raises:
            ValueError: for fewer than two columns.
        """
        sentence_features = list(sentence_features)
        if len(sentence_features) < 2:
            raise ValueError(
                f"InfoNCELoss needs the columns query, positive and optionally negatives, got {len(sentence_features)}."
            )
        if self.mini_batch_size is not None:
            return self.forward_cached(sentence_features, labels)
        return self.calculate_loss([[column] for column in embed_columns(self.model, sentence_features)], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss from the embeddings of each column's mini-batches, as `CachedLossMixin` asks for it."""
        columns = torch.stack([torch.cat(mini_batches) for mini_batches in reps], dim=1)  # [B, 2 + K, d]
        columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
        batch_size = columns.shape[0]
        negatives_mask = labels  # [B, K]
        rows = (0, batch_size)
        if get_world_size() > 1:
            columns = all_gather_with_grad(columns)  # [W * B, 2 + K, d]
            if negatives_mask is not None:
                # Not every backend gathers booleans.
                negatives_mask = all_gather(negatives_mask.to(torch.uint8)).bool()  # [W * B, K]
            rows = (get_rank() * batch_size, (get_rank() + 1) * batch_size)
        loss = info_nce(
            columns[:, 0],
            columns[:, 1],
            columns[:, 2:] if columns.shape[1] > 2 else None,
            negatives_mask if columns.shape[1] > 2 else None,
            temperature=self.temperature,
            all_negatives=self.all_negatives,
            symmetric=self.symmetric,
            false_negative_margin=self.false_negative_margin,
            rows=rows,
        )
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The loss's settings."""
        return {
            "temperature": self.temperature,
            "all_negatives": self.all_negatives,
            "symmetric": self.symmetric,
            "false_negative_margin": self.false_negative_margin,
            "mini_batch_size": self.mini_batch_size,
        }


def _move_pixels(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: bring one mini-batch's pixels to the model's device.

    The trainer leaves pixels on the host, since those of a whole batch would not fit beside the model (an image of
    1024 tokens takes 19 MB).
    """
    features = args[0] if args else None
    if isinstance(features, dict) and "pixel_values" in features:
        features["pixel_values"] = features["pixel_values"].to(model.device, non_blocking=True)
