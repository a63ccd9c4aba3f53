"""InfoNCE against its closed form, written with Python loops, in value and gradient."""

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from trainers.contrastive_info_nce import info_nce
from trainers.contrastive_loss import InfoNCELoss


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def reference(query, positive, negatives, mask, temperature, all_negatives, margin=None, hashes=None):
    """-mean log softmax at the own positive, one candidate at a time; `hashes` are those of positives and negatives."""
    total = 0.0
    # Without hashes no two are the same.
    same, same_negative = hashes or (range(len(query)), None)
    for i in range(len(query)):
        own = cosine(query[i], positive[i])
        others = [cosine(query[i], positive[j]) for j in range(len(query)) if same[j] != same[i]]
        for j in range(len(query)):
            if all_negatives or j == i:
                others += [
                    cosine(query[i], negatives[j, k])
                    for k in range(negatives.shape[1])
                    if (mask is None or mask[j, k]) and (same_negative is None or same_negative[j][k] != same[i])
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


# Rows 0 and 2 share a positive, which is also row 1's first negative; row 3's second negative is its own positive.
POSITIVE_HASH, NEGATIVE_HASH = [7, 8, 7, 9], [[1, 2], [7, 3], [8, 4], [5, 9]]


@pytest.mark.parametrize("all_negatives", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_duplicates_of_the_positive_are_no_negatives(all_negatives, known):
    query, positive, negatives = embeddings()
    mask = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1]], dtype=torch.bool)
    negative_hash = NEGATIVE_HASH if known else None
    loss = info_nce(
        query,
        positive,
        negatives,
        mask,
        positive_hash=torch.tensor(POSITIVE_HASH),
        negative_hash=torch.tensor(negative_hash) if known else None,
        temperature=0.3,
        all_negatives=all_negatives,
    )
    hashes = (POSITIVE_HASH, negative_hash)
    expected = reference(query, positive, negatives, mask, 0.3, all_negatives, hashes=hashes)
    torch.testing.assert_close(loss, expected)
    inputs = [query, positive, negatives]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, theirs)
    assert info_nce(query, positive, negatives, mask, temperature=0.3, all_negatives=all_negatives) > loss + 1e-3


def test_duplicates_in_the_symmetric_term():
    query, positive, negatives = embeddings()
    hashes = (POSITIVE_HASH, None)
    loss = info_nce(query, positive, positive_hash=torch.tensor(POSITIVE_HASH), temperature=0.3, symmetric=True)
    directions = ((query, positive), (positive, query))
    expected = sum(reference(*pair, negatives[:, :0], None, 0.3, True, hashes=hashes) for pair in directions) / 2
    torch.testing.assert_close(loss, expected)


def test_a_batch_of_one_and_the_same_positive_has_no_loss():
    query, positive, _ = embeddings()
    loss = info_nce(query, positive, positive_hash=torch.ones(4, dtype=torch.int64), symmetric=True)
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, [query, positive]))


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
        ({"positive_hash": torch.ones(3).long()}, r"positive_hash must have shape \(4,\), got \(3,\)"),
        (
            {"positive_hash": torch.ones(4).long(), "negative_hash": torch.ones(4).long()},
            r"negative_hash must have shape \(4, 2\), got \(4,\)",
        ),
        ({"negative_hash": torch.ones(4, 2).long()}, "negative_hash is compared with positive_hash, which is None"),
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

    def get_embedding_dimension(self):
        return self.linear.out_features

    def forward(self, features):
        self.rows_seen.append(len(features["input_ids"]))
        return {"sentence_embedding": self.linear(features["input_ids"])}


def features_and_mask():
    generator = torch.Generator().manual_seed(3)
    features = [{"input_ids": torch.randn(5, 6, generator=generator, dtype=torch.float64)} for _ in range(4)]
    return features, torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)


def value_and_gradient(model, loss, features, labels):
    model.zero_grad()
    value = loss([dict(column) for column in features], labels)
    (value / 2).backward()
    return value.detach(), model.linear.weight.grad.clone()


@pytest.mark.parametrize("limit", [{"mini_batch_size": 2}, {"mini_batch_tokens": 12}])
def test_cached_gradients_equal_plain_gradients(monkeypatch, limit):
    monkeypatch.setattr("trainers.contrastive_loss._ROWS_AT_A_TIME", 2)
    model, (features, mask) = Embedder(), features_and_mask()
    plain = value_and_gradient(model, InfoNCELoss(model, symmetric=True), features, mask)
    assert model.rows_seen == [5, 15]
    model.rows_seen.clear()
    cached = value_and_gradient(model, InfoNCELoss(model, symmetric=True, **limit), features, mask)
    assert model.rows_seen == [2, 2, 1] * 8
    torch.testing.assert_close(cached, plain)
    assert plain[1].abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(InfoNCELoss(model, symmetric=True, **limit)(features, mask), plain[0])


def test_labels_are_read_by_name():
    model, (features, mask) = Embedder(), features_and_mask()
    hashes = {"positive_hash": torch.tensor([1, 2, 1, 3, 4]), "negative_hash": torch.arange(2, 12).view(5, 2)}
    columns = [model.linear(column["input_ids"]) for column in features]
    masked = {"negatives_mask": mask}
    for labels, meaning in (
        (None, {}),
        (mask, masked),
        (masked, masked),
        (hashes, hashes),
        ({**masked, **hashes},) * 2,
    ):
        expected = info_nce(columns[0], columns[1], columns[2:], **meaning)
        torch.testing.assert_close(InfoNCELoss(model)(features, labels), expected)
    # Without hard negatives what is known of them says nothing.
    expected = info_nce(*columns[:2], positive_hash=hashes["positive_hash"])
    torch.testing.assert_close(InfoNCELoss(model)(features[:2], {"negatives_mask": mask[:, :0], **hashes}), expected)
    with pytest.raises(
        ValueError, match=r"Labels hold \['positives'\], allowed are \['negatives_mask', 'positive_hash'"
    ):
        InfoNCELoss(model)(features, {"positives": mask})


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
@pytest.mark.parametrize("limit", [{}, {"mini_batch_size": 2}])
def test_matryoshka_adds_the_losses_of_renormalised_prefixes(weights, limit):
    model, (features, mask) = Embedder(), features_and_mask()
    dims = [5, 3, 2]
    loss = InfoNCELoss(model, matryoshka_dims=dims, matryoshka_weights=weights, **limit)
    ours = value_and_gradient(model, loss, features, mask)
    model.zero_grad()
    columns = [model.linear(column["input_ids"]) for column in features]
    expected = 0.0
    for dim, weight in zip(dims, weights or [1, 1, 1]):
        query, positive, *negatives = (column[:, :dim] for column in columns)
        expected = expected + weight * reference(query, positive, torch.stack(negatives, 1), mask, 0.03, True)
    (expected / 2).backward()
    torch.testing.assert_close(ours, (expected.detach(), model.linear.weight.grad))
    # The same as sentence-transformers' wrapper around the loss of whole embeddings.
    wrapped = MatryoshkaLoss(model, InfoNCELoss(model, **limit), dims, weights)
    torch.testing.assert_close(ours, value_and_gradient(model, wrapped, features, mask))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batch_size": 0}, r"mini_batch_size must be at least 1, or None, got 0 \(InfoNCELoss\)"),
        ({"mini_batch_tokens": -1}, "mini_batch_tokens must be at least 1, or None, got -1"),
        ({"matryoshka_dims": [0, 4]}, r"distinct numbers of at least 1, got \[0, 4\] \(InfoNCELoss\)"),
        ({"matryoshka_weights": [1.0]}, "one for each of matryoshka_dims None"),
        ({"matryoshka_dims": [4], "matryoshka_weights": [0.0]}, r"must be positive, .* got \[0.0\]"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(Embedder(), **settings)


def test_matryoshka_dims_must_fit_the_embedding():
    features, _ = features_and_mask()
    with pytest.raises(ValueError, match=r"must not exceed the embedding's 5 dimensions, got \[6, 2\]"):
        InfoNCELoss(Embedder(), matryoshka_dims=[6, 2])(features)


def test_loss_needs_two_columns():
    with pytest.raises(ValueError, match="columns query, positive .* got 1"):
        InfoNCELoss(Embedder())([{"input_ids": torch.ones(2, 6)}])
