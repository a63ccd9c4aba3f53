"""InfoNCE against its closed form, written with Python loops, in value and gradient."""

import math

import pytest
import torch
from torch import nn

from trainers.contrastive_loss import InfoNCELoss, info_nce


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def reference(query, positive, negatives, mask, temperature, all_negatives, margin=None):
    """-mean log softmax at the own positive, one candidate at a time."""
    total = 0.0
    for i in range(len(query)):
        own = cosine(query[i], positive[i])
        others = [cosine(query[i], positive[j]) for j in range(len(query)) if j != i]
        for j in range(len(query)):
            if all_negatives or j == i:
                others += [
                    cosine(query[i], negatives[j, k]) for k in range(negatives.shape[1]) if mask is None or mask[j, k]
                ]
        if margin is not None:
            others = [value for value in others if value <= own + margin]
        denominator = (own / temperature).exp() + sum((value / temperature).exp() for value in others)
        total = total - torch.log((own / temperature).exp() / denominator)
    return total / len(query)


def embeddings(num_rows=4, num_negatives=2, dim=5):
    generator = torch.Generator().manual_seed(1)
    query, positive = (torch.randn(num_rows, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    negatives = torch.randn(num_rows, num_negatives, dim, generator=generator, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (query, positive, negatives)]


@pytest.mark.parametrize("all_negatives", [True, False])
@pytest.mark.parametrize("num_negatives", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_closed_form(all_negatives, num_negatives, masked):
    query, positive, negatives = embeddings(num_negatives=num_negatives)
    mask = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.bool)[:, :num_negatives] if masked else None
    loss = info_nce(query, positive, negatives, mask, temperature=0.3, all_negatives=all_negatives)
    expected = reference(query, positive, negatives, mask, 0.3, all_negatives)
    torch.testing.assert_close(loss, expected)
    inputs = [query, positive, negatives] if num_negatives else [query, positive]
    expected_gradients = torch.autograd.grad(expected, inputs, allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), expected_gradients):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_negative_rules_differ_and_masked_negatives_get_no_gradient():
    query, positive, negatives = embeddings()
    mask = torch.tensor([[1, 1], [0, 0], [1, 1], [1, 1]], dtype=torch.bool)
    everyone, own = (info_nce(query, positive, negatives, mask, all_negatives=rule) for rule in (True, False))
    assert everyone > own + 1e-3
    (gradient,) = torch.autograd.grad(everyone, negatives)
    assert gradient[1].abs().max() == 0 and gradient[0].abs().max() > 0


def test_negatives_as_list():
    query, positive, negatives = embeddings()
    torch.testing.assert_close(
        info_nce(query, positive, list(negatives.unbind(1))), info_nce(query, positive, negatives)
    )
    torch.testing.assert_close(info_nce(query, positive, []), info_nce(query, positive))


@pytest.mark.parametrize(
    ("num_negatives", "all_negatives", "candidates"), [(0, True, 6), (2, True, 6 + 12), (2, False, 6 + 2)]
)
def test_equal_embeddings_give_log_of_candidates(num_negatives, all_negatives, candidates):
    same = torch.ones(6, 8)
    loss = info_nce(same, same, same[:, None].expand(6, num_negatives, 8), all_negatives=all_negatives)
    assert loss.item() == pytest.approx(math.log(candidates), abs=1e-5)


def test_two_equal_candidates_cost_log_2():
    # One row whose only negative is as near as its positive.
    query = torch.tensor([[1.0, 0.0]])
    assert info_nce(query, query, query[:, None]).item() == pytest.approx(math.log(2), abs=1e-6)


def test_symmetric_is_the_mean_of_both_directions():
    query, positive, _ = embeddings()
    expected = (info_nce(query, positive) + info_nce(positive, query)) / 2
    torch.testing.assert_close(info_nce(query, positive, symmetric=True), expected)
    assert abs(info_nce(query, positive) - expected) > 1e-3


def test_false_negative_margin():
    query, positive, negatives = embeddings()
    with torch.no_grad():
        negatives[0, 0] = query[0]  # nearer to query 0 than its positive: taken for a false negative
    loss = info_nce(query, positive, negatives, temperature=0.3, false_negative_margin=0.1)
    torch.testing.assert_close(loss, reference(query, positive, negatives, None, 0.3, True, margin=0.1))
    assert loss < info_nce(query, positive, negatives, temperature=0.3) - 1e-3


def test_rows_average_to_the_whole():
    query, positive, negatives = embeddings()
    halves = [info_nce(query, positive, negatives, rows=rows, symmetric=True) for rows in ((0, 2), (2, 4))]
    torch.testing.assert_close(sum(halves) / 2, info_nce(query, positive, negatives, symmetric=True))


def test_bfloat16_under_autocast_is_computed_in_float32():
    query, positive, _ = (tensor.detach().bfloat16() for tensor in embeddings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(query, positive)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(query.float(), positive.float()), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"positive": torch.ones(3, 5)}, r"share one shape .*got \(4, 5\) and \(3, 5\)"),
        ({"negatives": torch.ones(4, 2, 6)}, r"negatives must have shape .*got \(4, 2, 6\)"),
        ({"negatives_mask": torch.ones(4, 3, dtype=torch.bool)}, r"negatives_mask must have shape .*\(4, 2\), got"),
        ({"rows": (2, 5)}, r"rows must lie within \(0, 4\)"),
    ],
)
def test_shapes_are_checked(changes, message):
    query, positive, negatives = embeddings()
    arguments = {"query": query, "positive": positive, "negatives": negatives, **changes}
    with pytest.raises(ValueError, match=message):
        info_nce(**arguments)


class Embedder(nn.Module):
    """Stands for a SentenceTransformer: one linear map of features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5, dtype=torch.float64)
        self.rows_seen = []

    def __getitem__(self, index):
        return self.linear

    def forward(self, features):
        self.rows_seen.append(len(features["input_ids"]))
        return {"sentence_embedding": self.linear(features["input_ids"])}


def test_cached_gradients_equal_plain_gradients():
    model = Embedder()
    generator = torch.Generator().manual_seed(3)
    features = [{"input_ids": torch.randn(5, 6, generator=generator, dtype=torch.float64)} for _ in range(4)]
    mask = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    results = []
    for mini_batch_size in (None, 2):
        model.zero_grad()
        model.rows_seen.clear()
        loss = InfoNCELoss(model, mini_batch_size=mini_batch_size)([dict(column) for column in features], mask)
        (loss / 2).backward()
        results.append((loss.detach(), model.linear.weight.grad.clone()))
        if mini_batch_size:
            assert max(model.rows_seen) <= 2
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1].abs().max() > 1e-3


def test_loss_needs_two_columns():
    with pytest.raises(ValueError, match="columns query, positive .* got 1"):
        InfoNCELoss(Embedder())([{"input_ids": torch.ones(2, 6)}])
