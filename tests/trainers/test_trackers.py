"""What trackers write, read back: losses, rates and results on dev sets of both stages, and nothing sent anywhere."""

import importlib.util
import json

import pytest

from tests.forked import run
from tests.trainers import tracked_run

TRACKERS = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name) is not None]
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
        pytest.skip("none of tensorboard, trackio and wandb is installed (pip install moca[logging])")
    folder = tmp_path_factory.mktemp("trackers")
    environment = {"TRACKIO_DIR": str(folder / "trackio")}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
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


def of_wandb(folder, stage):
    """Read the log of a run: wandb has no reader for Python, but the messages, in a log as LevelDB keeps it."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = (folder / stage / "run.wandb").read_bytes()
    position, record, written = 7, b"", {}  # after the name of the format
    while position < len(content):
        rest_of_block = 2**15 - position % 2**15
        if rest_of_block < 7:  # too short for a header: checksum (4 bytes), length (2), kind (1)
            position += rest_of_block
            continue
        start = position + 7
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[start : start + length]
        position = start + length
        if kind in (1, 4):  # whole, or the last part
            message, record = Record.FromString(record), b""
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
            step = values.pop("train/global_step", None)
            written |= {(name, step): value for name, value in values.items() if not name.startswith("_")}
    return written


READERS = {"tensorboard": of_tensorboard, "trackio": of_trackio, "wandb": of_wandb}


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
