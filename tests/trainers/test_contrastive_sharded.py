"""Stage 2 on ranks that share gradients or weights equals one process, and saves whole weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import contrastive_sharded
from tests.trainers.contrastive_cases import save_checkpoint
from tests.two_ranks import needs_deepspeed, start_two_ranks


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_two_ranks_equal_one_process(mode, tmp_path):
    save_checkpoint(tmp_path / "start")
    start_two_ranks(contrastive_sharded.__file__, mode, tmp_path)
    contrastive_sharded.train("whole", tmp_path)
    found, whole_run = (json.loads((tmp_path / f"{name}.json").read_text()) for name in (mode, "whole"))
    (losses, evaluations), (expected, expected_evaluations) = found, whole_run
    assert len(expected) == 3 and losses == pytest.approx(expected, rel=1e-5)
    # In the middle and at the end.
    assert len(evaluations) == len(expected_evaluations) == 2
    for evaluation, ours in zip(evaluations, expected_evaluations):
        assert evaluation == pytest.approx(ours, abs=1e-6) and 0 < ours["eval_ndcg_at_10"] < 1
    weights, whole = (load_file(tmp_path / name / "model.safetensors") for name in (mode, "whole"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert not torch.equal(tensor, start[f"moca.{name}"]), name
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
