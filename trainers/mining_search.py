"""The exact search behind hard-negative mining: the best candidates of each query that nothing speaks against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# What candidates are refused for, in the order in which that is found out; each counts once.
REFUSALS = ("own_positive", "equal_to_query", "unreadable", "absolute_margin", "relative_margin")
_LOW = 2**32 - 1


@dataclass
class Found:
    """What a search found.

    Args:
        positions: positions of the negatives in the corpus, most similar first, int64 of shape [Q, K]; -1 for none.
        scores: their cosines, float32 of shape [Q, K]; minus infinity for none.
        num_refused: candidates that were refused, over all queries, by what for.
        num_skipped: candidates that `range_min` skipped.
    """

    positions: torch.Tensor
    scores: torch.Tensor
    num_refused: dict[str, int]
    num_skipped: int


def search_negatives(
    queries: torch.Tensor,
    corpus: Iterable[tuple[int, torch.Tensor]],
    readable: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    equal: tuple[torch.Tensor, torch.Tensor],
    positive_scores: torch.Tensor,
    num_negatives: int,
    range_min: int = 0,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
) -> Found:
    """Return the `num_negatives` most similar admissible documents of each query, from a corpus that comes in blocks.

    Every candidate is judged before the best are chosen, so none is missed because refused ones stood before it. Equal
    scores go to the document that comes first: the result is one, whatever the blocks and the device, as far as the
    scores are.

    Args:
        queries: unit vectors, float32 of shape [Q, d].
        corpus: blocks `(position of the first document, unit vectors)`, float32 of shape [C, d] each.
        readable: whether a document can be used, booleans of shape [N].
        own: pairs of query and document, two int64 tensors of shape [P]: documents that are positives of the query.
        equal: pairs of query and document whose content is equal.
        positive_scores: cosine of the query's least similar positive, float32 of shape [Q].
        num_negatives, range_min, absolute_margin, relative_margin: see [`trainers.mining_config.MiningConfig`].
    """
    device, num_queries, keep = queries.device, len(queries), range_min + num_negatives
    refused = dict.fromkeys(REFUSALS, 0)
    # Thresholds as sentence-transformers computes them: a share of the absolute value, so that a negative cosine works.
    positive_scores = positive_scores.to(device)[:, None]  # [Q, 1]
    best = torch.full((num_queries, keep), torch.iinfo(torch.int64).min, device=device)  # [Q, keep]
    margins = (absolute_margin, relative_margin)
    for start, block in corpus:
        scores = queries @ block.to(device).T  # [Q, C]
        admissible = torch.ones_like(scores, dtype=torch.bool)
        for reason in REFUSALS:
            bad = _refuse(reason, scores, start, readable, own, equal, positive_scores, *margins)
            if bad is None:
                continue
            refused[reason] += int((bad & admissible).sum())
            admissible &= ~bad
        keys = _keys(scores, start).masked_fill_(~admissible, torch.iinfo(torch.int64).min)
        keys = keys.topk(min(keep, keys.shape[1]), dim=1).values
        best = torch.cat([best, keys], dim=1).topk(keep, dim=1).values
    none = best == torch.iinfo(torch.int64).min
    num_skipped = int((~none[:, :range_min]).sum())
    best, none = best[:, range_min:], none[:, range_min:]
    positions = (_LOW - (best & _LOW)).masked_fill(none, -1)
    scores = _unkey(best).masked_fill(none, -torch.inf)
    return Found(positions.cpu(), scores.cpu(), refused, num_skipped)


def _refuse(reason, scores, start, readable, own, equal, positive_scores, absolute_margin, relative_margin):
    """Return where candidates of a block are refused for this reason, booleans of shape [Q, C] or [1, C]."""
    if reason == "unreadable":
        return ~readable[None, start : start + scores.shape[1]].to(scores.device)
    if reason == "absolute_margin":
        return None if absolute_margin is None else scores + absolute_margin > positive_scores
    if reason == "relative_margin":
        if relative_margin is None:
            return None
        return scores > positive_scores - positive_scores.abs() * relative_margin
    rows, columns = own if reason == "own_positive" else equal
    here = (columns >= start) & (columns < start + scores.shape[1])
    bad = torch.zeros_like(scores, dtype=torch.bool)
    bad[rows[here].to(scores.device), columns[here].to(scores.device) - start] = True
    return bad


def _keys(scores, start):
    """Return integers in the order of the scores, and of positions downwards where these are equal."""
    # Adding 0 turns -0 into 0. Bits of negative floats grow downwards.
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    positions = torch.arange(start, start + scores.shape[1], device=scores.device)
    return order * 2**32 + (_LOW - positions)  # [Q, C]


def _unkey(keys):
    order = keys >> 32
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(torch.int32).view(torch.float32)


def blocks(read: Callable[[int, int], torch.Tensor], length: int, size: int) -> Iterable[tuple[int, torch.Tensor]]:
    """Yield `(start, read(start, stop))` for blocks of `size`.

    Args:
        read: returns rows from start to stop.
        length: number of rows.
        size: rows of a block at most.
    """
    for start in range(0, length, size):
        yield start, read(start, min(start + size, length))


__all__ = ["REFUSALS", "Found", "blocks", "search_negatives"]
