"""Ranks that share the weights start from the checkpoint too: nothing is copied from an empty part of a tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_moca import MoCaForPreTraining
from tests.conftest import REPOSITORY
from tests.tiny import tiny_backbone
from tests.two_ranks import fork_two_ranks, needs_deepspeed


def write_checkpoints(folder):
    """Write a stock checkpoint, the same with a trained MAE head as the published ones have it, and a converted one."""
    tiny_backbone().save_pretrained(folder / "stock")
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "moca")
    (folder / "published").mkdir()
    shutil.copy(folder / "stock" / "config.json", folder / "published")
    layer = tiny_backbone().model.language_model.layers[2].state_dict()
    head = {f"mae_decoder.{name}": tensor + 1 for name, tensor in layer.items()}
    head |= {"mae_proj.weight": torch.randn(4704, 32), "mae_proj.bias": torch.randn(4704)}
    tensors = {**load_file(folder / "stock" / "model.safetensors"), **head}
    save_file(tensors, folder / "published" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
def test_every_weight_and_the_mae_decoder_arrive(mode, tmp_path):
    write_checkpoints(tmp_path)
    fork_two_ranks(REPOSITORY / "tests" / "modeling_moca" / "sharded_start.py", mode, tmp_path)
    first, second = (json.loads((tmp_path / f"{mode}-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["world_size"] == 2
    assert first["wrong"] == {"stock": [], "published": [], "moca": []}
    assert first["num_parameters"] > 90
    # New weights are the first rank's on every rank, and of the right size.
    assert first["projection"][0] == pytest.approx(0.02, rel=0.05)
    if mode == "fsdp":
        assert first["wrong_buffers"] == []
    else:
        assert first["wrong_prepared"] == first["wrong_saved"] == []
        assert 0 < first["loss"] < 20
        assert (tmp_path / "trained" / "training_args.json").is_file()
        assert not list((tmp_path / "trained").glob("*.bin"))
