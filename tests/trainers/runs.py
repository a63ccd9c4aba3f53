"""Training runs in processes of their own, which tests kill."""

import json
import time

from tests.forked import Forked


def start(program, folder, output, **settings):
    """Start `program FOLDER OUTPUT name=value ...`, with JSON values."""
    # Signals go to the whole group, workers included, as a scheduler sends them.
    return Forked(program, folder, output, *setting_flags(**settings), own_session=True)


def setting_flags(**settings):
    """Return settings as such a program takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def finish(process):
    """Wait for the end of a run, and return what it said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    return said


def wait_for(process, output, step):
    """Wait until the checkpoint of this step is begun, or the process ends."""
    for _ in range(6000):
        if (output / f"checkpoint-{step}").exists() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint-{step} after five minutes")


def record(output):
    """Return the run's record, without what depends on the clock and on how often it was resumed."""
    (stage,) = json.loads((output / "training_record.json").read_text())["stages"]
    return {name: value for name, value in stage.items() if name not in ("seconds", "tokens_per_second", "resumes")}


def result(output):
    """Return logs, weights and rejected rows of a finished run."""
    curve = json.loads((output / "curve.json").read_text())
    rejected = sorted(json.loads(line).items() for line in (output / "rejected.jsonl").read_text().splitlines())
    return curve, (output / "final" / "model.safetensors").read_bytes(), rejected
