"""Checkpoints that are whole or do not count, the rows that were rejected, and stopping on a signal."""

import json
import logging
import os
import signal
import threading
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
REJECTED = "rejected.jsonl"
# Fewer rows than this say nothing about the share of bad ones.
FEWEST_ROWS = 100


def mark_complete(folder):
    """Say that a checkpoint is whole, once everything in it is on the disk.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
    """
    folder = Path(folder)
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    marker = folder / MARKER
    marker.with_suffix(".tmp").write_text("", encoding="utf-8")
    os.replace(marker.with_suffix(".tmp"), marker)
    _sync(folder)


def last_complete(output_dir):
    """Return the newest whole checkpoint, or None.

    Args:
        output_dir (`str` or `os.PathLike`): folder of the run.

    Returns:
        `str` or None. A newer checkpoint that is not whole, because the run was killed while saving, is passed over
        with a warning.
    """
    folders = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if folder.is_dir() and step.isdigit():
            folders[int(step)] = folder
    for step in sorted(folders, reverse=True):
        if (folders[step] / MARKER).is_file():
            return str(folders[step])
        logger.warning("%s is not whole (it has no %s): passed over.", folders[step], MARKER)
    return None


def find_checkpoint(resume, output_dir):
    """Return the checkpoint to go on from, or None to begin anew.

    Args:
        resume (`str`, `bool` or None): a folder; True or `"true"`: the newest whole checkpoint; `"auto"`: the same, and
            from the start if there is none.
        output_dir (`str`): folder of the run.

    Raises:
        ValueError: there is none, or the one that was named is not whole.
    """
    if resume is None or resume is False or str(resume).lower() in ("", "false", "none"):
        return None
    if resume is not True and str(resume).lower() not in ("true", "auto"):
        if not (Path(resume) / MARKER).is_file():
            raise ValueError(f"The checkpoint {resume} is not whole: it has no file {MARKER}.")
        return str(resume)
    found = last_complete(output_dir)
    if found is None and str(resume).lower() != "auto":
        raise ValueError(f"There is no whole checkpoint in {output_dir} to resume from.")
    logger.info("Going on from %s." if found else "No checkpoint to go on from in %s.", found or output_dir)
    return found


class RejectedRows:
    """The file `rejected.jsonl`: one line a bad row, with its data set, name, epoch, reason, message and step.

    Args:
        output_dir (`str`): folder of the run.
        step (`int`): step that the run goes on from; later lines are of a run that was cut off, and are removed.
    """

    def __init__(self, output_dir, step):
        self._path = Path(output_dir) / REJECTED
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self._path)

    def write(self, rows):
        """Add lines.

        Args:
            rows (`list[dict]`): what to write.
        """
        if rows:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


def check_bad_row_share(num_bad, num_rows, most):
    """Stop a run whose data is not what it seems.

    Args:
        num_bad, num_rows (`int`): bad rows and all rows, read so far on all ranks.
        most (`float`): largest share of bad rows.

    Raises:
        ValueError: the share is larger.
    """
    if num_bad > most * max(num_rows, FEWEST_ROWS):
        raise ValueError(
            f"{num_bad} of {num_rows} rows are bad, more than max_bad_row_share={most} allows; {REJECTED} in the "
            "output folder names them."
        )


class StopSignal:
    """SIGTERM as a wish that all ranks learn of, instead of the end of one: `with StopSignal() as signal: ...`."""

    def __init__(self):
        self.received = False

    def __enter__(self):
        self._previous = None
        # Elsewhere Python sets no handlers, and the program that owns the main thread decides.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number, frame):
        self.received = True


class StopCallback(TrainerCallback):
    """Save and stop once all ranks have agreed to.

    Args:
        agreed (`Callable`): tells whether they have.
    """

    def __init__(self, agreed):
        self._agreed = agreed

    def on_step_end(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback`] for `args`, `state`, `control` and `kwargs`."""
        if self._agreed():
            logger.warning("Stopping at step %d, as a signal asked for; a checkpoint is saved.", state.global_step)
            control.should_save = control.should_training_stop = True
        return control


class EpochCallback(TrainerCallback):
    """Epochs of a run whose loader has no end: how far it has come, and what is to be done after each.

    Args:
        steps_per_epoch (`float`): optimisation steps of one epoch.
    """

    def __init__(self, steps_per_epoch):
        self._steps_per_epoch = steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback`] for `args`, `state`, `control` and `kwargs`."""
        state.epoch = state.global_step / self._steps_per_epoch
        is_over = int(state.epoch) > int((state.global_step - 1) / self._steps_per_epoch)
        # The stock loop takes the last one for the end of its only epoch.
        if is_over and state.global_step < state.max_steps:
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        return control


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "MARKER",
    "REJECTED",
    "EpochCallback",
    "RejectedRows",
    "StopCallback",
    "StopSignal",
    "check_bad_row_share",
    "find_checkpoint",
    "last_complete",
    "mark_complete",
]
