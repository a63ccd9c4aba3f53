"""Two real ranks train, log and evaluate exactly like one."""

import math

import pytest
import torch

from tests.trainers import cpt_two_ranks
from tests.two_ranks import start_two_ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    # MULTI_CPU would silently start one process; MULTI_GPU, as in the file, with use_cpu starts gloo ranks.
    start_two_ranks(cpt_two_ranks.__file__, folder, 2, config="ddp")
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("scenario", cpt_two_ranks.SCENARIOS)
def test_two_ranks_equal_one(two_ranks, tmp_path, scenario):
    one, two = cpt_two_ranks.run(tmp_path, 1, scenario), two_ranks[scenario]
    assert len(one["logs"]) == len(two["logs"])
    for expected, got in zip(one["logs"], two["logs"]):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert math.isclose(got[name], value, rel_tol=2e-6, abs_tol=1e-9), (name, got[name], value)
    assert one["logs"][-1].keys() == {"eval_mlm_loss", "eval_mae_loss"}
    if scenario == "uneven":
        assert one["logs"][0]["mae_loss"] > 0 and one["logs"][-1]["eval_mae_loss"] > 0
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=2e-6, msg=name)


def test_ranks_and_accumulation_change_neither_losses_nor_gradients(two_ranks, tmp_path):
    expected = cpt_two_ranks.first_step(tmp_path, 1, 1)
    assert all(tensor.abs().max() > 0 for tensor in expected.values()) and len(expected) > 90
    one = {accumulation: cpt_two_ranks.first_step(tmp_path, 1, accumulation) for accumulation in (2, 4)}
    for results in (one, {accumulation: two_ranks[accumulation] for accumulation in cpt_two_ranks.ACCUMULATIONS}):
        for accumulation, got in results.items():
            assert got.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6, msg=f"{accumulation}: {name}")
