"""Mini-batches: how rows are cut, and that cached gradients equal plain ones however they are."""

import pytest
import torch

from modeling_moca import MoCaModel
from tests.families import family_backbone, family_processor
from tests.trainers.contrastive_cases import build, picture
from trainers.contrastive_data import ContrastiveDataCollator
from trainers.contrastive_loss import InfoNCELoss
from trainers.contrastive_minibatches import Column

TEXTS = ["the sea", "a harbour at night by the sea", "the", "a page of words " * 4, "sand", "a boat on the sea"]


def column_of(lengths, images=()):
    """Return features of rows of the given lengths, and of images, a list of (height, width) in patches a row."""
    width = max(lengths)
    features = {
        "input_ids": torch.arange(len(lengths) * width).view(len(lengths), width),
        "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
        "modality": "message",
    }
    if images:
        grids = [(1, *size) for row in images for size in row]
        num_patches = sum(height * width for _, height, width in grids)
        features["pixel_values"] = torch.arange(num_patches).float()[:, None].expand(-1, 3)
        features["image_grid_thw"] = torch.tensor(grids)
        features["num_images_per_sample"] = torch.tensor([len(row) for row in images])
    return features


def test_rows_of_like_length_share_a_mini_batch_within_the_budget():
    column = Column(column_of([3, 9, 4, 30, 8, 1]), "query")
    assert column.num_tokens == [3, 9, 4, 30, 8, 1]
    # 30 alone is over the budget; 9 and 8 make 2 x 9; 4, 3 and 1 make 3 x 4.
    plan = column.plan(max_tokens=18)
    assert plan == [[3], [1, 4], [2, 0, 5]]
    assert [column.cost(rows) for rows in plan] == [30, 18, 12]
    assert column.plan(max_tokens=17) == [[3], [1], [4, 2], [0, 5]]
    assert column.plan(max_rows=2) == [[3, 1], [4, 2], [0, 5]]
    assert column.plan(max_rows=2, max_tokens=18) == [[3], [1, 4], [2, 0], [5]]
    assert column.plan() == [[3, 1, 4, 2, 0, 5]]


def test_image_patches_count_against_the_budget():
    images = [[], [(2, 2), (4, 2)], [(2, 4)], [], [(2, 2)]]
    column = Column(column_of([5, 5, 5, 5, 5], images), "query")
    assert column.num_patches == [0, 12, 8, 0, 4]
    assert column.cost([1, 2]) == 2 * 5 + 12 + 8
    assert column.plan(max_tokens=29) == [[1], [2, 4, 0], [3]]
    assert column.plan(max_tokens=30) == [[1, 2], [4, 0, 3]]


def test_a_cut_holds_the_rows_in_their_order_their_own_images_and_no_useless_padding():
    images = [[], [(2, 2), (4, 2)], [(2, 4)], [], [(2, 2)]]
    features = column_of([3, 2, 4, 9, 1], images)
    column = Column(features, "query")
    cut = column.cut([2, 1, 0], torch.device("cpu"))
    assert torch.equal(cut["input_ids"], features["input_ids"][[2, 1, 0], :4])
    assert torch.equal(cut["attention_mask"], features["attention_mask"][[2, 1, 0], :4])
    assert cut["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 4, 2]]
    assert cut["num_images_per_sample"].tolist() == [1, 2, 0]
    # Row 1 owns patches 0 to 11, row 2 the next eight, row 4 the last four.
    assert cut["pixel_values"][:, 0].tolist() == [*range(12, 20), *range(12)]
    assert cut["modality"] == "message"
    without = column.cut([3, 0], torch.device("cpu"))
    assert "pixel_values" not in without and "image_grid_thw" not in without
    alone = column.cut([4], torch.device("cpu"))
    assert alone["pixel_values"][:, 0].tolist() == [20, 21, 22, 23] and alone["input_ids"].shape == (1, 1)


def test_padding_on_the_left_stays():
    features = column_of([4, 4])
    features["attention_mask"] = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    column = Column(features, "query")
    assert column.num_tokens == [4, 3]
    assert column.cut([1], torch.device("cpu"))["attention_mask"].tolist() == [[0, 1, 1]]


def test_only_a_mini_batch_leaves_the_host():
    features = column_of([3, 2, 4], [[(2, 2)], [(2, 4)], []])
    cut = Column(features, "query").cut([0, 2], torch.device("meta"))
    assert {value.device.type for value in cut.values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert cut["pixel_values"].shape == (4, 3)
    assert {value.device.type for value in features.values() if isinstance(value, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, r"need input_ids, got \['attention_mask', .* \(column 7\)"),
        ({"pixel_values_videos": torch.ones(7, 3)}, r"'pixel_values_videos' of shape \(7, 3\) cannot be cut .*2 rows"),
        ({"image_grid_thw": torch.ones(3, 3).long()}, r"holds 3 images, but the 2 rows have 2: .* \(column 7\)"),
        ({"num_images_per_sample": torch.tensor([2])}, "holds 2 images, but the 2 rows have 2"),
    ],
)
def test_features_that_cannot_be_cut_are_refused(changes, message):
    features = {**column_of([3, 2], [[(2, 2)], [(2, 2)]]), **changes}
    with pytest.raises(ValueError, match=message):
        Column({name: value for name, value in features.items() if value is not None}, "column 7")


def rows_of(kind):
    """Return six rows of one kind of content, with one or two hard negatives, some of them missing."""
    rows = []
    for index, text in enumerate(TEXTS):
        row = {"query": text, "positive": f"{text} {index}", "negative_1": f"no {text}"}
        if kind == "image":
            row |= {"positive": {"image": picture(index)}, "negative_1": picture(index + 1)}
        if kind == "several images":
            pictures = [picture(index + number) for number in range(index % 3 + 1)]
            row["positive"] = {"image": pictures, "text": text}
            row["query"] = {"image": picture(index), "text": text} if index % 2 else text
        if kind == "missing negatives":
            row |= {"negative_1": None if index % 2 else f"no {text}", "negative_2": None if index else "not this"}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that builds the sentence-transformers model of a family, in float32."""

    def make(family):
        folder = tmp_path_factory.mktemp(family)
        MoCaModel.from_backbone(family_backbone(family)).save_pretrained(folder)
        family_processor(family).save_pretrained(folder)
        return build(folder)

    built = {}
    return lambda family: built[family] if family in built else built.setdefault(family, make(family))


def loss_and_gradients(model, rows, **settings):
    model.zero_grad()
    batch = ContrastiveDataCollator(model.preprocess)(rows)
    names = list(rows[0])
    features = [{key[len(name) + 1 :]: batch[key] for key in batch if key.startswith(f"{name}_")} for name in names]
    hashes = {"positive_hash": torch.arange(6) % 5, "negative_hash": torch.arange(6 * (len(names) - 2)).view(6, -1)}
    loss = InfoNCELoss(model, symmetric=True, **settings)(features, {**batch["label"], **hashes})
    # As accumulation over two batches scales it.
    (loss / 2).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("kind", ["text", "image", "several images", "missing negatives"])
def test_cached_equals_plain(models, monkeypatch, family, kind):
    """Loss to 1e-6 and gradients to 1e-5, in float32, with duplicates and Matryoshka prefixes."""
    monkeypatch.setattr("trainers.contrastive_loss._ROWS_AT_A_TIME", 4)
    model, rows = models(family), rows_of(kind)
    settings = {"matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5], "temperature": 0.1}
    loss, gradients = loss_and_gradients(model, rows, **settings)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 1e-3
    assert any("vision" in name or "visual" in name for name in gradients) == ("image" in kind)
    for limit in ({"mini_batch_tokens": 60}, {"mini_batch_size": 4}, {"mini_batch_tokens": 1}):
        cached_loss, cached = loss_and_gradients(model, rows, **settings, **limit)
        torch.testing.assert_close(cached_loss, loss, atol=1e-6, rtol=1e-6)
        assert cached.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(cached[name], gradient, atol=1e-5 * max(largest, 1), rtol=1e-5, msg=name)


def test_dropout_is_the_same_in_both_passes(models):
    """With dropout, the cached gradient is that of the masks which the loss was computed with."""
    model, rows = models("qwen2_5_vl").train(), rows_of("text")
    dropout = torch.nn.Dropout(0.3)
    handle = model[0].model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: dropout(output))
    try:
        torch.manual_seed(3)
        loss, gradients = loss_and_gradients(model, rows, mini_batch_size=4)
        # The same mini-batches with one graph over all of them draw the same masks from the same seed.
        torch.manual_seed(3)
        original = InfoNCELoss.forward_cached

        def with_one_graph(self, mini_batches, labels):
            embedded = [self.embed_minibatch(batch, 0, len(batch["rows"]), True, False)[0] for batch in mini_batches]
            return self.calculate_loss([[embeddings] for embeddings in embedded], labels)

        InfoNCELoss.forward_cached = with_one_graph
        try:
            expected_loss, expected = loss_and_gradients(model, rows, mini_batch_size=4)
        finally:
            InfoNCELoss.forward_cached = original
        other_loss, _ = loss_and_gradients(model, rows, mini_batch_size=4)
    finally:
        handle.remove()
        model.eval()
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    assert abs(other_loss - loss) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
