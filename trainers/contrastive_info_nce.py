"""InfoNCE in closed form: hard negatives, duplicates, and rows of a batch gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | Sequence[Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    *,
    positive_hash: Tensor | None = None,
    negative_hash: Tensor | None = None,
    temperature: float = 0.03,
    all_negatives: bool = True,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Mean over rows of `-log softmax(cosine / temperature)` at the row's own positive.

    The denominator of row i holds its own positive, every other row's positive, its own hard negatives and, with
    `all_negatives`, every other row's hard negatives. Candidates whose content equals the row's positive are left out:
    they are right answers. Source: MoCa (arXiv 2506.23115), section 3.2. Half-precision embeddings are widened first: a
    cosine formed in bfloat16 and divided by 0.03 is off by up to 0.1.

    Args:
        query: embeddings of shape [N, d], of any length (they are normalised here).
        positive: embeddings of shape [N, d]; row i belongs to query i.
        negatives: hard negatives of shape [N, K, d], or K tensors of shape [N, d], or None for K = 0.
        negatives_mask: booleans of shape [N, K], True where the negative exists; None when all do.
        positive_hash: int64 of shape [N], equal where two positives have the same content; None when not known. In the
            symmetric term, queries of an equal positive are left out alike.
        negative_hash: int64 of shape [N, K], the same hash of each hard negative; None when not known.
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
        ValueError: for a temperature that is not positive, shapes that do not fit together, or a negative_hash without
            positive_hash.
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
    for name, value, shape in (
        ("negatives_mask", negatives_mask, (num_rows, num_negatives)),
        ("positive_hash", positive_hash, (num_rows,)),
        ("negative_hash", negative_hash, (num_rows, num_negatives)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)} (info_nce).")
    if negative_hash is not None and positive_hash is None:
        raise ValueError("negative_hash is compared with positive_hash, which is None (info_nce).")
    begin, end = (0, num_rows) if rows is None else rows
    if not 0 <= begin < end <= num_rows:
        raise ValueError(f"rows must lie within (0, {num_rows}) and not be empty, got {rows} (info_nce).")

    # Autocast would compute the cosine in half precision again.
    with torch.autocast(device_type=query.device.type, enabled=False):
        query, positive = _unit(query), _unit(positive)
        own = torch.arange(begin, end, device=query.device)  # [R] column of each row's own positive
        cosine = query[begin:end] @ positive.T  # [R, N]
        duplicate = None
        if positive_hash is not None:
            duplicate = positive_hash[begin:end, None] == positive_hash  # [R, N]
            duplicate = duplicate.scatter(1, own[:, None], False)
            cosine = cosine.masked_fill(duplicate, -torch.inf)
        if num_negatives:
            negatives = _unit(negatives)
            if all_negatives:
                negative_cosine = query[begin:end] @ negatives.flatten(0, 1).T  # [R, N * K]
            else:
                negative_cosine = torch.einsum("rd,rkd->rk", query[begin:end], negatives[begin:end])  # [R, K]
            # Masks of shape [1, N * K], the same for all rows, or [R, K].
            if negatives_mask is not None:
                exists = negatives_mask.reshape(1, -1) if all_negatives else negatives_mask[begin:end]
                negative_cosine = negative_cosine.masked_fill(~exists, -torch.inf)
            if negative_hash is not None:
                hashes = negative_hash.reshape(1, -1) if all_negatives else negative_hash[begin:end]
                negative_cosine = negative_cosine.masked_fill(hashes == positive_hash[begin:end, None], -torch.inf)
            cosine = torch.cat([cosine, negative_cosine], dim=1)
        loss = _cross_entropy(cosine, own, temperature, false_negative_margin)
        if symmetric:
            reverse_cosine = positive[begin:end] @ query.T  # [R, N]
            if duplicate is not None:
                reverse_cosine = reverse_cosine.masked_fill(duplicate, -torch.inf)
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
