"""Retrieval metrics against numbers worked out by hand."""

import math

import pytest
import torch

from trainers.evaluation import chance_level, retrieval_metrics


def scored(scores, relevant, k=5):
    """Metrics of one query whose cosine with candidate i is scores[i]."""
    candidates = torch.tensor([[score, math.sqrt(1 - score**2)] for score in scores], dtype=torch.float64)
    return retrieval_metrics(torch.tensor([[1.0, 0.0]]), candidates, [relevant], k)


@pytest.mark.parametrize(
    ("scores", "relevant", "precision", "gain"),
    [
        ([0.9, 0.5, 0.1], [0], 1, 1),
        ([0.5, 0.9, 0.1], [0], 0, 1 / math.log2(3)),
        ([0.1, 0.9, 0.5], [0], 0, 1 / math.log2(4)),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0], 0, 0),
        ([0.9, 0.8, 0.1], [0, 2], 1, (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))),
        ([0.5, 0.5, 0.1], [0], 0, 1 / math.log2(3)),
        ([0.5, 0.5, 0.5], [1], 0, 1 / math.log2(4)),
        ([0.3], [0], 1, 1),
    ],
)
def test_by_hand(scores, relevant, precision, gain):
    metrics = scored(scores, relevant)
    assert metrics["P@1"] == precision
    assert metrics["nDCG@5"] == pytest.approx(gain)


@pytest.mark.parametrize("bad", [math.nan, 0.0, math.inf])
def test_nan_and_zero_vectors_are_never_right(bad):
    queries, candidates = torch.eye(3), torch.eye(3)
    broken = torch.full((3, 3), bad)
    zero = {"P@1": 0, "nDCG@5": 0}
    assert retrieval_metrics(broken, candidates, [[0], [1], [2]]) == zero
    assert retrieval_metrics(queries, broken, [[0], [1], [2]]) == zero
    candidates[1] = bad
    assert retrieval_metrics(queries, candidates, [[0], [1], [2]])["P@1"] == pytest.approx(2 / 3)


def test_length_of_vectors_does_not_matter():
    queries, candidates = torch.randn(8, 4), torch.randn(8, 4)
    relevant = [[row] for row in range(8)]
    scaled = candidates * torch.rand(8, 1) * 100
    assert retrieval_metrics(queries, candidates, relevant) == retrieval_metrics(queries, scaled, relevant)


def test_random_embeddings_score_chance():
    queries, candidates = torch.randn(4000, 16), torch.randn(20, 16)
    relevant = [[int(index)] for index in torch.randint(0, 20, (4000,))]
    metrics = retrieval_metrics(queries, candidates, relevant)
    for name, expected in chance_level(20).items():
        assert metrics[name] == pytest.approx(expected, abs=0.02)
    assert chance_level(1) == {"P@1": 1.0, "nDCG@5": 1.0}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="Got 2 query embeddings, but 1 lists"):
        retrieval_metrics(torch.eye(2), torch.eye(2), [[0]])
    with pytest.raises(ValueError, match=r"Query 1: relevant candidates must be from 0 to 1, got \[2\]"):
        retrieval_metrics(torch.eye(2), torch.eye(2), [[0], [2]])
    with pytest.raises(ValueError, match=r"Query 0: .* got \[\]"):
        retrieval_metrics(torch.eye(1), torch.eye(1), [[]])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chance_level(0)
