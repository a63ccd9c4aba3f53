"""What trackers write, read back: losses, rates and results on dev sets of both stages, and nothing sent anywhere."""

import importlib.util
import json

import pytest

from tests.forked import run
from tests.trainers import tracked_run

TRACKERS = [name for name in ("tensorboard", "trackio") if importlib.util.find_spec(name) is not None]
# Beside what every training logs; at each of three steps, unless the task of a batch decides.
TRAINING = {
    "cpt": {"loss", "mlm_loss", "mae_loss", "tokens_per_second", "num_rows", "learning_rate", "grad_norm"},
    "contrastive": {"loss", "rows_per_second", "tokens_per_second", "learning_rate", "grad_norm"},
}
EVALUATION = {
    "cpt": {"loss", "mlm_loss", "mae_loss"},
    "contrastive": {
        *(f"{task}_{name}" for task in ("texts", "mixed") for name in ("loss", "ndcg_at_10", "p_at_1")),
        "ndcg_at_10",
        "p_at_1",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not TRACKERS:
        pytest.skip("neither tensorboard nor trackio is installed (pip install moca[logging])")
    folder = tmp_path_factory.mktemp("trackers")
    environment = {"TRACKIO_DIR": str(folder / "trackio")}
    done = run(tracked_run.__file__, folder, *TRACKERS, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def logged(folder, stage):
    """Return what the trainer logged, as trackers name it: values by name and step."""
    values = {}
    for entry in json.loads((folder / stage / "history.json").read_text()):
        if "train_runtime" in entry:
            continue
        for name, value in entry.items():
            if name != "step":
                name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                values[name, entry["step"]] = value
    return values


def of_tensorboard(folder, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (runs,) = (folder / stage / "runs").iterdir()
    events = EventAccumulator(str(runs)).Reload()
    names = events.Tags()["scalars"]
    return {(name, event.step): event.value for name in names for event in events.Scalars(name)}


def of_trackio(folder, stage):
    return {
        (name, entry["train/global_step"]): value
        for entry in json.loads((folder / stage / "trackio.json").read_text())
        for name, value in entry.items()
        if name not in ("train/global_step", "timestamp", "step")
    }


READERS = {"tensorboard": of_tensorboard, "trackio": of_trackio}


@pytest.mark.parametrize("stage", ["cpt", "contrastive"])
@pytest.mark.parametrize("tracker", READERS)
def test_everything_is_written(folder, stage, tracker):
    if tracker not in TRACKERS:
        pytest.skip(f"{tracker} is not installed (pip install moca[logging])")
    written, expected = READERS[tracker](folder, stage), logged(folder, stage)
    wanted = {(f"train/{name}", step) for name in TRAINING[stage] for step in (1, 2, 3)}
    wanted |= {(f"eval/{name}", 3) for name in EVALUATION[stage]}
    assert wanted <= expected.keys(), wanted - expected.keys()
    if stage == "contrastive":
        by_task = [name for name, _ in expected if name.startswith("train/loss_")]
        assert len(by_task) == 3 and set(by_task) == {"train/loss_texts", "train/loss_mixed"}
    assert expected.keys() <= written.keys(), expected.keys() - written.keys()
    for key, value in expected.items():
        # Tensorboard keeps float32.
        assert written[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


def test_nothing_is_sent_anywhere(folder):
    hosts = json.loads((folder / "connections.json").read_text())
    assert set(hosts) <= {"local", "127.0.0.1", "::1", "localhost"}
