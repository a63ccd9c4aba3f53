"""examples/evaluate_mmeb.py: from flags to tables, with an export, and with a model that is none of this project's."""

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from examples import evaluate_mmeb
from hub_cards.export import export
from hub_cards.results import read_results
from modeling_moca import MoCaModel
from tests.tiny import tiny_backbone, tiny_processor, tiny_tokenizer
from tests.trainers.mmeb_folder import MARK, row, write_image, write_task


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The right answer is what is equal to the query; in every fourth row it is not the first one."""
    root = tmp_path_factory.mktemp("mmeb")
    words = ["sea", "sky", "page", "picture", "harbour", "moon", "tide", "gull"]
    rows = [row(word, *(words[i:] + words[:i])) for i, word in enumerate(words)]
    rows[2], rows[6] = row(words[2], words[3], words[2]), row(words[6], words[1], words[6])
    write_task(root, "N24News", rows)
    for degrees in (0, 60, 120, 180):
        write_image(root / "images" / f"{degrees}.png", degrees)
    images = ["0.png", "60.png", "120.png", "180.png"]
    rows = [row(MARK, *[MARK] * 4, query_image=image, images=images[i:] + images[:i]) for i, image in enumerate(images)]
    rows[3]["tgt_img_path"] = images
    write_task(root, "NIGHTS", rows)
    return root


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate_mmeb.py", *map(str, arguments)])
    evaluate_mmeb.main()
    return capsys.readouterr().out


def test_an_export_is_evaluated(dataset, tmp_path, monkeypatch, capsys):
    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "moca-tiny", prompts={"query": "Find: ", "document": "Page: "})
    settings = {"model_name_or_path": str(folder), "dataset_path": str(dataset), "device": "cpu", "dtype": "float32"}
    (tmp_path / "mmeb.yaml").write_text(yaml.safe_dump({**settings, "trust_remote_code": True, "max_tokens": 40}))
    arguments = ["--config", tmp_path / "mmeb.yaml", "--output_dir", tmp_path / "out"]
    printed = run(monkeypatch, capsys, *arguments, "--tasks", "NIGHTS")
    assert "| NIGHTS | retrieval | IND | 75.0 | 4 |" in printed and "N24News |" not in printed
    # Another task joins what is there; in bfloat16 it is another model.
    printed = run(monkeypatch, capsys, *arguments)
    assert "| N24News | classification | IND | 75.0 | 8 |\n" in printed and "| NIGHTS |" in printed
    assert "Missing tasks (34 of 36): ImageNet-1K, HatefulMemes" in printed
    with pytest.raises(ValueError, match="results of other settings: model was"):
        run(monkeypatch, capsys, *arguments, "--dtype", "bfloat16")
    printed = run(monkeypatch, capsys, *arguments[:2], "--output_dir", tmp_path / "half", "--dtype", "bfloat16")
    assert "| 75.0 | 8 |" in printed
    results = read_results((tmp_path / "out" / "results").iterdir())
    assert {result.metrics["p_at_1"] for result in results} == {0.75} and results[0].model == "moca-tiny"


def test_any_model_of_sentence_transformers_is_evaluated(dataset, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()._tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    model.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    arguments = ["--model_name_or_path", tmp_path / "static", "--dataset_path", dataset, "--tasks", "N24News"]
    printed = run(monkeypatch, capsys, *arguments, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert "| N24News | classification | IND | 75.0 | 8 |" in printed
