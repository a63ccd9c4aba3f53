"""Two real ranks give the losses and gradients of one process on the same global batches."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.trainers.contrastive_cases import RESUMED, SCENARIOS, run, save_checkpoint
from tests.trainers.contrastive_run import write_mixture

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
    model_folder = save_checkpoint(folder / "start")
    write_mixture(folder)
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
    history, gradients, tasks, evaluation, weights = run(model_folder, tmp_path, 8, 1, **SCENARIOS[name])
    records = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    losses = [entry["loss"] for entry in history]
    assert [entry["loss"] for entry in records[0]["history"]] == pytest.approx(losses, abs=2e-4)  # rounded by Trainer
    assert records[0]["evaluation"] == pytest.approx(evaluation, abs=1e-6) and len(evaluation) == 5
    assert records[0]["evaluation"] == records[1]["evaluation"]
    # Tokens and padding are those of both ranks.
    for entry, ours in zip(records[0]["history"], history):
        assert entry["tokens_per_second"] > 0
        assert entry["padding"] == pytest.approx(ours["padding"], abs=0.2)
    # Every global batch is of one task, both tasks occur, and the ranks agree.
    assert records[0]["tasks"] == records[1]["tasks"] == tasks
    assert len(tasks) == 4 and set(tasks) == ({None} if name == "reference" else {"texts", "mixed"})
    for rank in range(2):
        theirs, their_weights = torch.load(folder / f"{name}-{rank}.pt")
        assert len(theirs) == len(gradients) == 4
        for ours, other in zip(gradients, theirs):
            largest = max(gradient.abs().max() for gradient in ours.values())
            assert largest > 1e-3
            for parameter, gradient in ours.items():
                torch.testing.assert_close(other[parameter], gradient, atol=1e-9 * largest.item(), rtol=1e-8)
        assert weights.keys() == their_weights.keys()
        for parameter, tensor in weights.items():
            torch.testing.assert_close(their_weights[parameter], tensor, atol=1e-9, rtol=1e-8, msg=parameter)
    if name == "adapters":
        held = {parameter for parameter, gradient in gradients[-1].items() if gradient.any()}
        assert held == {parameter for parameter in weights if "lora_" in parameter} and len(held) == 56
    # Each step logs the loss of its task beside the mean, and of no other.
    for task, entry in zip(tasks, records[0]["history"]):
        task = task or "all_tasks"
        assert [key for key in entry if key.startswith("loss_")] == [f"loss_{task}"]
        assert entry[f"loss_{task}"] == pytest.approx(entry["loss"], abs=2e-4)
        assert entry["rows_per_second"] > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_epoch_goes_on_with_the_same_batches(two_ranks, name):
    _, folder = two_ranks
    for rank in range(2):
        whole, resumed = torch.load(folder / f"resume-{name}-{rank}.pt")
        # Bit for bit: logs of both stretches, and weights.
        assert whole[0] == resumed[0] and [entry["step"] for entry in whole[0]] == [2, 4]
        assert all(torch.equal(first, second) for first, second in zip(whole[1], resumed[1]))
    # Each rank lists its own bad rows, and the file has those of both.
    rejected = [json.loads(line) for line in (folder / f"resume-{name}" / "rejected.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rejected} <= {"empty_query", "undecodable_image"}
    assert name == "True" or "empty_query" in {row["reason"] for row in rejected}
    checkpoint = folder / f"resume-{name}" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() == (name == "adapters")


def test_a_damaged_dev_row_of_one_rank_ends_evaluation_on_all(two_ranks):
    """In the loss and in retrieval; the rank without it would wait for the other."""
    _, folder = two_ranks
    messages = [json.loads((folder / f"damaged-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1]
    in_loss, in_retrieval = messages[0]
    assert in_loss == "The data of eval_dev: OSError: image file is truncated"
    assert in_retrieval.startswith("Retrieval on dev: BadRowError: Data set 'dev', row 3, side 1: image 0 cannot be")
