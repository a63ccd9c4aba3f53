"""Two real ranks give the losses and gradients of one process on the same global batches."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.trainers.contrastive_cases import SCENARIOS, run, save_checkpoint

# distributed_type MULTI_CPU, or --cpu, would silently start one process.
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model_folder = save_checkpoint(folder / "model")
    (folder / "accelerate.yaml").write_text(ACCELERATE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "accelerate.yaml"]
    result = subprocess.run(
        [*command, REPOSITORY / "tests/trainers/contrastive_cases.py", model_folder, folder],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return model_folder, folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_equal_one_process(two_ranks, tmp_path, name):
    model_folder, folder = two_ranks
    history, gradients, tasks, evaluation = run(model_folder, tmp_path, 8, 1, **SCENARIOS[name])
    records = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    losses = [entry["loss"] for entry in history]
    assert [entry["loss"] for entry in records[0]["history"]] == pytest.approx(losses, abs=2e-4)  # rounded by Trainer
    assert records[0]["evaluation"] == pytest.approx(evaluation, abs=1e-6)
    # Every global batch is of one task, both tasks occur, and the ranks agree.
    assert records[0]["tasks"] == records[1]["tasks"] == tasks
    assert len(tasks) == 4 and set(tasks) == ({None} if name == "reference" else {"texts", "mixed"})
    for rank in range(2):
        theirs = torch.load(folder / f"{name}-{rank}.pt")
        assert len(theirs) == len(gradients) == 4
        for ours, other in zip(gradients, theirs):
            largest = max(gradient.abs().max() for gradient in ours.values())
            assert largest > 1e-3
            for parameter, gradient in ours.items():
                torch.testing.assert_close(other[parameter], gradient, atol=1e-9 * largest.item(), rtol=1e-8)
    # Each step logs the loss of its task beside the mean, and of no other.
    for task, entry in zip(tasks, records[0]["history"]):
        task = task or "all_tasks"
        assert [key for key in entry if key.startswith("loss_")] == [f"loss_{task}"]
        assert entry[f"loss_{task}"] == pytest.approx(entry["loss"], abs=2e-4)
        assert entry["rows_per_second"] > 0


def test_resume_within_an_epoch_on_two_ranks(two_ranks):
    """The loader of a resumed epoch hides the sampler two wrappers deep: it must still take that epoch's order."""
    _, folder = two_ranks
    for rank in range(2):
        assert json.loads((folder / f"resume-{rank}.json").read_text()) < 1e-6
