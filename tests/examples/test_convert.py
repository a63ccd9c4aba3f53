"""One command turns a checkpoint into a MoCa folder."""

import runpy
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sentence_transformers import SentenceTransformer

from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from tests.conftest import REPOSITORY
from tests.families import FAMILIES, TILED, family_backbone, family_image_processor, family_tokenizer
from tests.hub_cards.test_export import CHECK, run
from tests.modeling_moca.test_checkpoints import write_hub_layout
from tests.modeling_moca.test_families import batch_of

SCRIPT = str(REPOSITORY / "examples" / "convert.py")


@pytest.fixture
def convert(monkeypatch):
    """Run the script in this process, which has imported everything already."""

    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        runpy.run_path(SCRIPT, run_name="__main__")

    return run_script


def save_processor(folder, family):
    family_backbone(family).config.save_pretrained(folder)
    family_tokenizer(family, mask_token=None).save_pretrained(folder)
    family_image_processor(family).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_becomes_a_published_folder(family, tmp_path, convert):
    save_processor(tmp_path / "stock", family)
    family_backbone(family).save_pretrained(tmp_path / "stock")
    limits = ["--longest-edge", 32] if family in TILED else ["--min-pixels", 1024, "--max-pixels", 8192]
    folders = ("--model", tmp_path / "stock", "--output", tmp_path / "out")
    arguments = (*folders, *limits, "--license", "mit", "--max-length", 256)
    if family == "qwen2_5_vl":
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        run([str(CHECK), str(tmp_path / "out")], tmp_path)
    else:
        convert(*arguments)
        picture = Image.new("RGB", (64, 48), "orange")
        model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
        embeddings = model.encode(["a page", picture, {"text": "its colour?", "image": picture}])
        assert embeddings.shape == (3, 32) and len({row.tobytes() for row in embeddings}) == 3
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def test_a_published_moca_model_with_the_processor_of_its_backbone(tmp_path, convert):
    stock = family_backbone("qwen2_5_vl")
    write_hub_layout(tmp_path / "moca", stock, "default", num_shards=2, architecture="Qwen2_5ForEmbedding")
    with pytest.raises(ValueError, match="brings no tokenizer or image processor of its own"):
        convert("--model", tmp_path / "moca", "--output", tmp_path / "out")
    save_processor(tmp_path / "qwen", "qwen2_5_vl")
    convert(
        "--model",
        tmp_path / "moca",
        "--processor-name",
        tmp_path / "qwen",
        "--output",
        tmp_path / "out",
        "--max-pixels",
        8192,
        "--min-pixels",
        784,
    )
    processor = MoCaProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = MoCaModel.from_backbone(stock)(**batch_of(processor)).pooler_output
        ours = MoCaModel.from_pretrained(tmp_path / "out")(**batch_of(processor)).pooler_output
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a page"]).shape == (1, 32)
    with pytest.raises(ValueError, match="is not empty: give a new folder"):
        convert("--model", tmp_path / "moca", "--output", tmp_path / "out")


def test_a_start_of_stage_1(tmp_path, convert):
    save_processor(tmp_path / "stock", "qwen2_5_vl")
    family_backbone("qwen2_5_vl").save_pretrained(tmp_path / "stock")
    folders = ("--model", tmp_path / "stock", "--output", tmp_path / "out")
    convert(*folders, "--for-training", "--causal", "--dtype", "bfloat16")
    model = MoCaForPreTraining.from_pretrained(tmp_path / "out")
    assert (model.config.bidirectional, model.config.pooling, model.dtype) == (False, "last", torch.bfloat16)
    assert model.config.mask_token_id == MoCaProcessor.from_pretrained(tmp_path / "out").mask_token_id
