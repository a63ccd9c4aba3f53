"""A run that is killed, wherever that is, goes on as if nothing had happened: equal logs and weights, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.trainers import cpt_run, runs
from tests.trainers.cpt_sources import numbered_rows, write_parquet, write_tars
from tests.trainers.runs import finish, result, setting_flags, wait_for
from tests.two_ranks import fork_two_ranks
from trainers.checkpoints import MARKER, find_checkpoint, last_complete

MODES = [(False, 2), (True, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    rows = numbered_rows(40)
    rows[7]["text"] = rows[23]["text"] = " "
    write_parquet(folder / "p", rows, num_files=4)
    write_tars(folder / "w", 12, num_files=2)
    return folder


def start(folder, output, streaming, workers):
    return runs.start(cpt_run.__file__, folder, output, streaming=streaming, dataloader_num_workers=workers)


@pytest.fixture(scope="module")
def whole(folder):
    """Results of runs that nobody disturbed."""
    processes = {mode: start(folder, folder / f"whole-{mode}", *mode) for mode in MODES}
    for process in processes.values():
        finish(process)
    return {mode: result(folder / f"whole-{mode}") for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_points(folder, whole, tmp_path, mode):
    seed = random.SystemRandom().randrange(2**32)
    chance, points = random.Random(seed), []
    for step in (2, 6):
        process = start(folder, tmp_path, *mode)
        wait_for(process, tmp_path, step)
        points.append(chance.uniform(0, 0.25))
        time.sleep(points[-1])
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"over before it was killed, {points}"
    finish(start(folder, tmp_path, *mode))
    curve, weights, rejected = result(tmp_path)
    expected_curve, expected_weights, expected_rejected = whole[mode]
    assert curve == expected_curve, (seed, points)
    assert len(curve) == 4 and weights == expected_weights, (seed, points)
    assert rejected == expected_rejected and len(rejected) >= 2, (seed, points)
    assert runs.record(tmp_path) == runs.record(folder / f"whole-{mode}"), (seed, points)


def test_a_checkpoint_that_was_cut_off_is_passed_over(folder, whole, tmp_path):
    mode = MODES[0]
    shutil.copytree(folder / f"whole-{mode}", tmp_path / "run")
    for name in ("checkpoint-12", "checkpoint-10"):
        os.remove(tmp_path / "run" / name / MARKER)
    os.remove(tmp_path / "run" / "checkpoint-12" / "optimizer.pt")
    (tmp_path / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "curve.json").unlink()
    said = finish(start(folder, tmp_path / "run", *mode))
    assert "checkpoint-12 is not whole" in said and "checkpoint-10 is not whole" in said
    assert result(tmp_path / "run") == whole[mode]


def test_termination_saves_and_stops(folder, whole, tmp_path):
    mode = MODES[1]
    process = start(folder, tmp_path, *mode)
    wait_for(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    stopped_at = last_complete(tmp_path)
    assert stopped_at is not None and not (tmp_path / "curve.json").exists()
    state = json.loads((Path(stopped_at) / "trainer_state.json").read_text())
    assert 2 <= state["global_step"] < 12
    finish(start(folder, tmp_path, *mode))
    assert result(tmp_path) == whole[mode]


def test_two_ranks_resume(folder, tmp_path):
    arguments = setting_flags(streaming=True, dataloader_num_workers=1, max_steps=6, save_steps=3)
    fork_two_ranks(cpt_run.__file__, folder, tmp_path / "run", *arguments)
    expected, expected_record = result(tmp_path / "run"), runs.record(tmp_path / "run")
    assert expected[0][0]["num_rows"] > 20
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    fork_two_ranks(cpt_run.__file__, folder, tmp_path / "run", *arguments)
    assert result(tmp_path / "run") == expected
    assert runs.record(tmp_path / "run") == expected_record


def test_what_can_be_resumed(folder, tmp_path):
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint("auto", tmp_path) is None
    with pytest.raises(ValueError, match="There is no whole checkpoint in .* to resume from"):
        find_checkpoint(True, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="checkpoint-3 is not whole: it has no file COMPLETE"):
        find_checkpoint(str(tmp_path / "checkpoint-3"), tmp_path)
    trainer = cpt_run.make_trainer(folder, tmp_path / "run", max_steps=2)
    trainer.train()
    assert find_checkpoint("true", tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    for settings, message in (
        ({"max_cost": 300}, "'max_cost': '256 -> 300'"),
        ({"streaming": True}, "'streaming': 'False -> True'"),
        ({"dataloader_num_workers": 1}, "'dataloader_num_workers': '0 -> 1'"),
    ):
        other = cpt_run.make_trainer(folder, tmp_path / "run", **settings)
        with pytest.raises(ValueError, match=f"goes on with other data than this run has: .*{message}"):
            other.train(resume_from_checkpoint=True)


def test_old_checkpoints_go_when_a_new_one_is_whole(folder, tmp_path):
    trainer = cpt_run.make_trainer(folder, tmp_path, max_steps=6, save_total_limit=2)
    kept_while_saving = []
    save = trainer._save_optimizer_and_scheduler

    def watch(output_dir):
        kept_while_saving.append(sum((path / MARKER).exists() for path in tmp_path.glob("checkpoint-*")))
        save(output_dir)

    trainer._save_optimizer_and_scheduler = watch
    trainer.train()
    assert kept_while_saving == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    weights = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert weights["state"]
