"""Late interaction: the second layout of an export, its projection, and its training."""

import hashlib
import re
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
)

from hub_cards import export, export_model
from hub_cards.layouts import new_projection
from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.families import family_backbone, family_processor
from tests.hub_cards.test_export import check_each, run, run_snippets, save, tiny_picture
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.contrastive_cases import COLOURS, picture

CHECK = Path(__file__).with_name("check_multi_vector.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi_vector")
    prompts = {"query": "Find: ", "document": ""}
    return export(save(folder / "model"), folder / "published", layout="multi_vector", prompts=prompts)


KINDS = {"plain": (MoCaModel, None, True), "projected": (MoCaForPreTraining, 16, True), "causal": (MoCaModel, 8, False)}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Exit status and errors of a check of each kind of model, among them a backbone that takes tiles."""
    folder = tmp_path_factory.mktemp("checked")
    published = []
    for kind, (model_class, projection_dim, bidirectional) in KINDS.items():
        model = save(folder / f"{kind} model", model_class, bidirectional=bidirectional)
        output = folder / kind / "published"
        published.append(export(model, output, layout="multi_vector", projection_dim=projection_dim))
    model = MoCaModel.from_backbone(family_backbone("smolvlm"), mask_token_id=6)
    processor = family_processor("smolvlm", max_length=512)
    published.append(export_model(model, processor, folder / "tiles" / "published", layout="multi_vector"))
    return dict(zip([*KINDS, "tiles"], check_each(CHECK, published, folder)))


@pytest.mark.parametrize("kind", [*KINDS, "tiles"])
def test_both_doors_agree_where_the_package_is_unknown(kind, checked):
    status, errors = checked[kind]
    assert status == 0, errors


def test_weights_are_those_of_the_other_layout(exported, tmp_path):
    other = export(exported.parent / "model", tmp_path / "embedding")
    files = [(folder / "model.safetensors").read_bytes() for folder in (exported, other)]
    assert hashlib.sha256(files[0]).digest() == hashlib.sha256(files[1]).digest()


def test_prompts_of_queries_and_documents(exported):
    model, image = MultiVectorEncoder(str(exported), device="cpu"), tiny_picture()
    for given, written_out in [
        ("tides", "Find: tides"),
        ({"text": "tides", "image": image}, {"text": "Find: tides", "image": image}),
    ]:
        prompted = model.encode_query([given])[0]
        plain = model.encode_document([written_out])[0]
        torch.testing.assert_close(prompted, plain, atol=1e-6, rtol=0)
        assert plain.shape != model.encode_document([given])[0].shape


def test_read_as_one_vector_it_is_the_embedding(exported, tmp_path):
    """sentence-transformers converts a folder of the one kind into the other, and says so."""
    other = export(exported.parent / "model", tmp_path / "embedding")
    texts = ["a page about tides", "short"]
    converted = SentenceTransformer(str(exported), device="cpu").encode(texts, normalize_embeddings=True)
    torch.testing.assert_close(converted, SentenceTransformer(str(other), device="cpu").encode(texts))


def test_card_is_filled_and_every_snippet_runs(exported, tmp_path):
    card = ModelCard.load(exported / "README.md")
    assert "late-interaction" in card.data.tags and "{{" not in card.text and "{%" not in card.text
    assert "one vector of 32 numbers" in card.text and "projection" not in card.text and '"Find: "' in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2
    run_snippets(blocks, tmp_path)
    projected = export(exported.parent / "model", tmp_path / "out", layout="multi_vector", projection_dim=8)
    assert "one vector of 8 numbers" in (projected / "README.md").read_text()
    assert "before the projection in `1_Dense`" in " ".join((projected / "README.md").read_text().split())


def test_new_projection_has_orthonormal_rows_and_is_the_same_again():
    weight = new_projection(32, 8).linear.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)
    assert torch.equal(weight, new_projection(32, 8).linear.weight)
    assert not torch.equal(weight, new_projection(32, 8, seed=1).linear.weight)


def test_training_with_the_stock_trainer_and_publishing_again(exported, tmp_path):
    start = export(exported.parent / "model", tmp_path / "start", layout="multi_vector", projection_dim=16)
    model = MultiVectorEncoder(str(start), device="cpu")
    features = datasets.Features({"query": datasets.Value("string"), "document": datasets.Image()})
    rows = [{"query": f"find the {COLOURS[index]} page", "document": picture(index)} for index in range(8)]
    settings = MultiVectorEncoderTrainingArguments(
        str(tmp_path / "trainer"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=3e-3,
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = MultiVectorEncoderTrainer(
        model, settings, train_dataset=datasets.Dataset.from_list(rows, features=features)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])] == []
    model.save_pretrained(str(tmp_path / "trained"), create_model_card=False)
    published = export(tmp_path / "trained", tmp_path / "published", layout="multi_vector")
    again = MultiVectorEncoder(str(published), device="cpu")
    for given in ("find the red page", picture(0)):
        torch.testing.assert_close(again.encode_query([given])[0], model.encode_query([given])[0], atol=1e-6, rtol=0)
    run([str(CHECK), str(published)], tmp_path)
    with pytest.raises(ValueError, match="brings a trained projection to 16 values a token; a new one .*=8 would"):
        export(tmp_path / "trained", tmp_path / "other", layout="multi_vector", projection_dim=8)


def test_settings_are_checked(exported, tmp_path):
    folder = exported.parent / "model"
    with pytest.raises(
        ValueError, match=r"layout must be one of \['embedding', 'multi_vector', 'pretraining'\], got 'colbert'"
    ):
        export(folder, tmp_path / "out", layout="colbert")
    with pytest.raises(ValueError, match="needs layout='multi_vector', got 'embedding'"):
        export(folder, tmp_path / "out", projection_dim=8)
    with pytest.raises(ValueError, match="must lie between 1 and hidden_size=32, got 33"):
        export(folder, tmp_path / "out", layout="multi_vector", projection_dim=33)
    model = MoCaModel.from_backbone(tiny_backbone())
    with pytest.raises(ValueError, match="takes 16 values a token, the model gives 32"):
        export_model(model, tiny_processor(), tmp_path / "out", layout="multi_vector", projection=new_projection(16, 8))
