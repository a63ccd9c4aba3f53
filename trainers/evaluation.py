"""Retrieval metrics that cannot flatter: ties, NaN and zero vectors never count as right."""

import math

import torch


def retrieval_metrics(query_embeddings, candidate_embeddings, relevant, k=5):
    """Rank all candidates for every query by cosine similarity and average P@1 and nDCG@k.

    Args:
        query_embeddings (`torch.Tensor` of shape `(num_queries, hidden_size)`): need not be normalised.
        candidate_embeddings (`torch.Tensor` of shape `(num_candidates, hidden_size)`): need not be normalised.
        relevant (`list[list[int]]`): for every query the candidates that answer it, at least one.
        k (`int`, defaults to 5): cut-off of nDCG (binary gains).

    Returns:
        `dict[str, float]`: `"P@1"` and `f"nDCG@{k}"`, from 0 to 1. A candidate that ties with a right one is ranked
        before it; one whose score is NaN (a NaN or a zero vector) is ranked last, and never right.

    Raises:
        ValueError: sizes do not agree, a query has no relevant candidate, or an index lies outside the candidates.

    Example:

    ```python
    >>> import torch

    >>> retrieval_metrics(torch.eye(3), torch.eye(3), [[0], [1], [0]], k=5)["P@1"]
    0.6666666666666666
    ```
    """
    num_candidates = len(candidate_embeddings)
    if len(query_embeddings) != len(relevant):
        raise ValueError(
            f"Got {len(query_embeddings)} query embeddings, but {len(relevant)} lists of relevant candidates."
        )
    for row, indices in enumerate(relevant):
        if not indices or min(indices) < 0 or max(indices) >= num_candidates:
            raise ValueError(f"Query {row}: relevant candidates must be from 0 to {num_candidates - 1}, got {indices}.")
    queries = query_embeddings.double() / query_embeddings.double().norm(dim=-1, keepdim=True)  # [Q, d], NaN if zero
    candidates = candidate_embeddings.double() / candidate_embeddings.double().norm(dim=-1, keepdim=True)  # [C, d]
    scores = queries @ candidates.T  # [Q, C]
    hits, gains = 0, 0.0
    for row_scores, indices in zip(scores, relevant):
        right = torch.zeros(num_candidates, dtype=torch.bool)
        right[indices] = True
        valid = row_scores.isfinite()
        row_scores = row_scores.masked_fill(~valid, -math.inf)
        # Two stable sorts: wrong candidates first, then by score, so that a tie goes to the wrong one.
        order = right.int().argsort(stable=True)
        order = order[row_scores[order].argsort(descending=True, stable=True)]
        ranked = (right & valid)[order].tolist()
        hits += ranked[0]
        gain = sum(1 / math.log2(rank + 2) for rank, is_right in enumerate(ranked[:k]) if is_right)
        gains += gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(set(indices)))))
    return {"P@1": hits / len(relevant), f"nDCG@{k}": gains / len(relevant)}


def chance_level(num_candidates, k=5):
    """Return the metrics that random embeddings expect, with one right candidate a query.

    Args:
        num_candidates (`int`): size of the pool, at least 1.
        k (`int`, defaults to 5): cut-off of nDCG.

    Raises:
        ValueError: the pool is empty.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}.")
    gain = sum(1 / math.log2(rank + 2) for rank in range(min(k, num_candidates)))
    return {"P@1": 1 / num_candidates, f"nDCG@{k}": gain / num_candidates}
