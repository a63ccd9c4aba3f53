"""One command turns a checkpoint into a MoCa folder."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from tests.conftest import REPOSITORY
from tests.families import FAMILIES, TILED, family_backbone, family_image_processor, family_tokenizer
from tests.hub_cards.test_export import CHECK, run
from tests.modeling_moca.test_checkpoints import write_hub_layout
from tests.modeling_moca.test_families import batch_of


def convert(*arguments):
    command = [sys.executable, str(REPOSITORY / "examples" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def save_processor(folder, family):
    family_backbone(family).config.save_pretrained(folder)
    family_tokenizer(family, mask_token=None).save_pretrained(folder)
    family_image_processor(family).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_becomes_a_published_folder(family, tmp_path):
    save_processor(tmp_path / "stock", family)
    family_backbone(family).save_pretrained(tmp_path / "stock")
    limits = ["--longest-edge", 32] if family in TILED else ["--min-pixels", 1024, "--max-pixels", 8192]
    done = convert(
        "--model", tmp_path / "stock", "--output", tmp_path / "out", *limits, "--license", "mit", "--max-length", 256
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run([str(CHECK), str(tmp_path / "out")], tmp_path)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def test_a_published_moca_model_with_the_processor_of_its_backbone(tmp_path):
    stock = family_backbone("qwen2_5_vl")
    write_hub_layout(tmp_path / "moca", stock, "default", num_shards=2, architecture="Qwen2_5ForEmbedding")
    done = convert("--model", tmp_path / "moca", "--output", tmp_path / "out")
    assert done.returncode != 0 and "brings no tokenizer or image processor of its own" in done.stderr
    save_processor(tmp_path / "qwen", "qwen2_5_vl")
    done = convert(
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
    assert done.returncode == 0, done.stderr[-3000:]
    processor = MoCaProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = MoCaModel.from_backbone(stock)(**batch_of(processor)).pooler_output
        ours = MoCaModel.from_pretrained(tmp_path / "out")(**batch_of(processor)).pooler_output
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a page"]).shape == (1, 32)
    done = convert("--model", tmp_path / "moca", "--output", tmp_path / "out")
    assert done.returncode != 0 and "is not empty: give a new folder" in done.stderr


def test_a_start_of_stage_1(tmp_path):
    save_processor(tmp_path / "stock", "qwen2_5_vl")
    family_backbone("qwen2_5_vl").save_pretrained(tmp_path / "stock")
    done = convert(
        "--model", tmp_path / "stock", "--output", tmp_path / "out", "--for-training", "--causal", "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = MoCaForPreTraining.from_pretrained(tmp_path / "out")
    assert (model.config.bidirectional, model.config.pooling, model.dtype) == (False, "last", torch.bfloat16)
    assert model.config.mask_token_id == MoCaProcessor.from_pretrained(tmp_path / "out").mask_token_id
