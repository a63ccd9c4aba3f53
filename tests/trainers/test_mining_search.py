"""The search for hard negatives: closed forms, margins at their boundary, ties, and a plain version in numpy."""

import numpy as np
import pytest
import torch

from trainers.mining_search import REFUSALS, blocks, search_negatives

NONE = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def pairs(*given):
    return tuple(torch.tensor(given).T)


def search(queries, corpus, own, positive_scores, size=3, readable=None, equal=NONE, **settings):
    corpus = torch.as_tensor(corpus)
    readable = torch.ones(len(corpus), dtype=torch.bool) if readable is None else readable
    read = blocks(lambda start, stop: corpus[start:stop], len(corpus), size)
    return search_negatives(
        torch.as_tensor(queries), read, readable, own, equal, torch.tensor(positive_scores), **settings
    )


def on_a_circle(cosines):
    """Return unit vectors whose cosines with (1, 0) are exactly these."""
    cosines = torch.tensor(cosines)
    return torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)


# Document 0 is the positive. All numbers are sums of few powers of two: no rounding.
COSINES = [0.5, 0.75, 0.5, 0.375, 0.25, 0.125, -0.5]
QUERY = [[1.0, 0.0]]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("margins", "positions", "refused"),
    [
        ({}, [1, 2, 3], {}),
        # As similar as the positive is allowed, more similar is not.
        ({"absolute_margin": 0.0}, [2, 3, 4], {"absolute_margin": 1}),
        ({"absolute_margin": 0.125}, [3, 4, 5], {"absolute_margin": 2}),
        ({"absolute_margin": 0.25}, [4, 5, 6], {"absolute_margin": 3}),
        ({"relative_margin": 0.5}, [4, 5, 6], {"relative_margin": 3}),
        ({"relative_margin": 0.75}, [5, 6, -1], {"relative_margin": 4}),
        # Each candidate counts once, at the first reason.
        ({"absolute_margin": 0.125, "relative_margin": 0.5}, [4, 5, 6], {"absolute_margin": 2, "relative_margin": 1}),
    ],
)
def test_margins(size, margins, positions, refused):
    found = search(QUERY, on_a_circle(COSINES), pairs((0, 0)), [0.5], size, num_negatives=3, **margins)
    assert found.positions.tolist() == [positions]
    expected = [COSINES[position] if position >= 0 else -np.inf for position in positions]
    assert found.scores.tolist() == [expected]
    assert found.num_refused == {**dict.fromkeys(REFUSALS, 0), "own_positive": 1, **refused}


def test_a_relative_margin_of_a_negative_score_lies_below_it():
    cosines = on_a_circle([-0.5, -0.5, -0.625, -0.75])
    found = search(QUERY, cosines, pairs((0, 0)), [-0.5], num_negatives=3, relative_margin=0.25)
    assert found.positions.tolist() == [[2, 3, -1]]


def test_range_min_counts_what_the_margins_leave():
    settings = {"num_negatives": 2, "range_min": 2, "absolute_margin": 0.125}
    found = search(QUERY, on_a_circle(COSINES), pairs((0, 0)), [0.5], **settings)
    assert found.positions.tolist() == [[5, 6]] and found.num_skipped == 2
    found = search(QUERY, on_a_circle(COSINES), pairs((0, 0)), [0.5], **{**settings, "range_min": 4})
    assert found.positions.tolist() == [[-1, -1]] and found.num_skipped == 4


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_equal_scores_go_to_the_first_document(size):
    cosines = [0.25, 0.5, -0.5, 0.5, 0.0, 0.5, -0.0, 0.5, -0.5]
    found = search(QUERY, on_a_circle(cosines), pairs((0, 0)), [0.25], size, num_negatives=8)
    assert found.positions.tolist() == [[1, 3, 5, 7, 4, 6, 2, 8]]


def test_own_positives_equal_contents_and_unreadable_documents_are_refused():
    readable = torch.tensor([True, True, True, False, True, True, True])
    found = search(
        QUERY * 2,
        on_a_circle(COSINES),
        pairs((0, 0), (0, 4), (1, 1)),
        [0.25, 0.75],
        readable=readable,
        equal=pairs((1, 2)),
        num_negatives=3,
    )
    assert found.positions.tolist() == [[1, 2, 5], [0, 4, 5]]
    assert found.num_refused == {**dict.fromkeys(REFUSALS, 0), "own_positive": 3, "equal_to_query": 1, "unreadable": 2}


@pytest.mark.parametrize("size", [7, 64, 500])
def test_equals_a_plain_search(size):
    generator = np.random.default_rng(0)
    queries, corpus = (generator.normal(size=(number, 8)) for number in (20, 200))
    queries, corpus = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, corpus))
    own = np.stack([np.arange(20), generator.integers(0, 200, 20)])
    scores = queries @ corpus.T
    positive_scores = scores[own[0], own[1]]
    found = search(
        queries.astype(np.float32),
        corpus.astype(np.float32),
        tuple(torch.from_numpy(own)),
        positive_scores.astype(np.float32),
        size,
        num_negatives=5,
        range_min=3,
        relative_margin=0.1,
    )
    for row in range(20):
        threshold = positive_scores[row] - 0.1 * abs(positive_scores[row])
        allowed = [c for c in np.argsort(-scores[row]) if c != own[1, row] and scores[row, c] <= threshold][3:8]
        assert found.positions[row].tolist() == allowed + [-1] * (5 - len(allowed))
        np.testing.assert_allclose(found.scores[row, : len(allowed)], scores[row, allowed], atol=1e-6)
