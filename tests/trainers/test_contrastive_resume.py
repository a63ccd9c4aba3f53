"""A contrastive run that is killed goes on as if nothing had happened: equal logs and weights, bit for bit."""

import importlib.util
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_moca import MoCaModel
from tests.trainers import contrastive_run, runs
from tests.trainers.contrastive_cases import save_checkpoint
from tests.trainers.contrastive_run import make_trainer, write_mixture
from tests.trainers.runs import finish, result, wait_for
from trainers.checkpoints import MARKER, last_complete

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
LORA = {"r": 4, "lora_dropout": 0.1}
# Streaming, workers, and adapters (settings of peft) instead of all weights.
MODES = {
    "full": (False, 2, None),
    "lora": (True, 1, LORA),
    "dora": (False, 0, {**LORA, "use_dora": True}),
    "qlora": (False, 0, {**LORA, "load_in_4bit": True}),
}
AVAILABLE = [mode for mode in MODES if HAS_BITSANDBYTES or mode != "qlora"]
REASON = "bitsandbytes is not installed (pip install bitsandbytes)"
MARKED = [pytest.param(mode, marks=[] if mode in AVAILABLE else pytest.mark.skip(reason=REASON)) for mode in MODES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive_resume")
    save_checkpoint(folder / "start")
    write_mixture(folder)
    return folder


def start(folder, output, streaming, workers, adapters):
    settings = {"streaming": streaming, "dataloader_num_workers": workers, "adapters": adapters}
    return runs.start(contrastive_run.__file__, folder, output, **settings)


@pytest.fixture(scope="module")
def whole(folder):
    """Results of runs that nobody disturbed."""
    outputs = {mode: folder / f"whole-{mode}" for mode in AVAILABLE}
    processes = [start(folder, output, *MODES[mode]) for mode, output in outputs.items()]
    for process in processes:
        finish(process)
    return {mode: (*result(output), (output / "data_report.json").read_text()) for mode, output in outputs.items()}


@pytest.mark.parametrize("mode", MARKED)
def test_killed_at_a_random_point(folder, whole, tmp_path, mode):
    # While a checkpoint is written, after it, or steps later.
    point = random.SystemRandom().uniform(0, 0.4)
    process = start(folder, tmp_path, *MODES[mode])
    wait_for(process, tmp_path, 4)
    time.sleep(point)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"over before it was killed, {point}"
    finish(start(folder, tmp_path, *MODES[mode]))
    curve, weights, rejected = result(tmp_path)
    expected_curve, expected_weights, expected_rejected, expected_report = whole[mode]
    assert curve == expected_curve, point
    assert len(curve) == 4 and weights == expected_weights, point
    assert rejected == expected_rejected and len(rejected) == 2, point
    assert (tmp_path / "data_report.json").read_text() == expected_report
    assert runs.record(tmp_path) == runs.record(folder / f"whole-{mode}"), point
    checkpoint = Path(last_complete(tmp_path))
    assert (checkpoint / "adapter_model.safetensors").exists() == (mode != "full")
    if mode == "qlora":
        check_merged_weights(folder, tmp_path, checkpoint)


def check_merged_weights(folder, output, checkpoint):
    """What is saved in the end are the weights at full precision plus the adapters' product, and nothing else."""
    expected = MoCaModel.from_pretrained(folder / "start").state_dict()
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    names = [name for name in adapters if "lora_A" in name]
    assert len(names) == 4 * 7
    for name in names:
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        # Scaled by alpha / r, of which alpha is peft's default.
        expected[weight] += adapters[name.replace("lora_A", "lora_B")] @ adapters[name] * 8 / LORA["r"]
    merged = load_file(output / "final" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_termination_saves_and_stops(folder, whole, tmp_path):
    mode = "full"
    process = start(folder, tmp_path, *MODES[mode])
    wait_for(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    stopped_at = last_complete(tmp_path)
    assert stopped_at is not None and not (tmp_path / "curve.json").exists()
    assert 2 <= json.loads((Path(stopped_at) / "trainer_state.json").read_text())["global_step"] < 12
    # Another checkpoint is cut off while it is written.
    shutil.copytree(stopped_at, tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11" / MARKER).unlink()
    assert "checkpoint-11 is not whole" in finish(start(folder, tmp_path, *MODES[mode]))
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
