"""Ranks that share the weights start from the checkpoint too: nothing is copied from an empty part of a tensor."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest

from modeling_moca import MoCaForPreTraining
from tests.conftest import REPOSITORY
from tests.tiny import tiny_backbone


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (pip install {package})")


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("zero3", marks=needs("deepspeed"))])
def test_every_weight_and_the_mae_decoder_arrive(mode, tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "stock")
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(tmp_path / "moca")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += [
        str(REPOSITORY / "tests" / "modeling_moca" / "sharded_start.py"),
        mode,
        str(tmp_path / "stock"),
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{mode}-{rank}.json").read_text()) for rank in range(2))
    assert first["world_size"] == 2
    assert first["wrong"] == second["wrong"] == [[], []]
    assert first["num_parameters"] > 90
    # New weights are the first rank's on every rank, and of the right size.
    assert first["projection"] == second["projection"]
    assert first["projection"][0] == pytest.approx(0.02, rel=0.05)
    if mode == "zero3":
        assert first["loss"] == second["loss"] and 0 < first["loss"] < 20
