"""A contrastive run that is killed goes on as if nothing had happened: equal logs and weights, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.trainers import contrastive_run, runs
from tests.trainers.contrastive_cases import save_checkpoint
from tests.trainers.contrastive_run import make_trainer, write_mixture
from tests.trainers.runs import finish, result, wait_for
from trainers.checkpoints import MARKER, last_complete

# Streaming, workers, and adapters (settings of peft as JSON) instead of all weights.
MODES = [(False, 2, None), (True, 1, None), (False, 0, '{"r": 4, "lora_dropout": 0.1, "use_dora": true}')]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive_resume")
    save_checkpoint(folder / "start")
    write_mixture(folder)
    return folder


def start(folder, output, streaming, workers, adapters):
    settings = {
        "streaming": streaming,
        "dataloader_num_workers": workers,
        "adapters": adapters and json.loads(adapters),
    }
    return runs.start(contrastive_run.__file__, folder, output, **settings)


@pytest.fixture(scope="module")
def whole(folder):
    """Results of runs that nobody disturbed."""
    outputs = {mode: folder / f"whole-{number}" for number, mode in enumerate(MODES)}
    processes = [start(folder, output, *mode) for mode, output in outputs.items()]
    for process in processes:
        finish(process)
    return {mode: (*result(output), (output / "data_report.json").read_text()) for mode, output in outputs.items()}


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_a_random_point(folder, whole, tmp_path, mode):
    # While a checkpoint is written, after it, or steps later.
    point = random.SystemRandom().uniform(0, 0.4)
    process = start(folder, tmp_path, *mode)
    wait_for(process, tmp_path, 4)
    time.sleep(point)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"over before it was killed, {point}"
    finish(start(folder, tmp_path, *mode))
    curve, weights, rejected = result(tmp_path)
    expected_curve, expected_weights, expected_rejected, expected_report = whole[mode]
    assert curve == expected_curve, point
    assert len(curve) == 4 and weights == expected_weights, point
    assert rejected == expected_rejected and len(rejected) == 2, point
    assert (tmp_path / "data_report.json").read_text() == expected_report
    assert runs.record(tmp_path) == runs.record(folder / f"whole-{MODES.index(mode)}"), point
    checkpoint = Path(last_complete(tmp_path))
    assert (checkpoint / "adapter_model.safetensors").exists() == (mode[2] is not None)


def test_termination_saves_and_stops(folder, whole, tmp_path):
    mode = MODES[0]
    process = start(folder, tmp_path, *mode)
    wait_for(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    stopped_at = last_complete(tmp_path)
    assert stopped_at is not None and not (tmp_path / "curve.json").exists()
    assert 2 <= json.loads((Path(stopped_at) / "trainer_state.json").read_text())["global_step"] < 12
    # Another checkpoint is cut off while it is written.
    shutil.copytree(stopped_at, tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11" / MARKER).unlink()
    assert "checkpoint-11 is not whole" in finish(start(folder, tmp_path, *mode))
    assert result(tmp_path) == whole[mode][:3]


def test_a_finished_run_is_not_trained_further(folder, tmp_path):
    make_trainer(folder, tmp_path, max_steps=2).train()
    weights = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    trainer = make_trainer(folder, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(tmp_path / "again"))
    assert trainer.state.global_step == 2 and (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_other_data_is_refused(folder, tmp_path):
    make_trainer(folder, tmp_path, max_steps=2).train()
    for settings, message in (
        ({"per_device_train_batch_size": 5}, r"'batch_sizes': '\[2, 4, 4\] -> \[2, 5, 5\]'"),
        ({"streaming": True}, "'batches_per_epoch': '.* -> None'"),
        ({"dataloader_num_workers": 1}, "'dataloader_num_workers': '0 -> 1'"),
        ({"seed": 1}, "'seed': '42 -> 1'"),
    ):
        with pytest.raises(ValueError, match=f"goes on with other data than this run has: .*{message}"):
            make_trainer(folder, tmp_path, **settings).train(resume_from_checkpoint=True)
