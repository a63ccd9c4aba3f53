"""What both trainers add to the stock one so that a run goes on exactly: whole checkpoints, data state, clean stops."""

import json
import os

import torch
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .agreement import AgreedBatches
from .checkpoints import (
    MARKER,
    RejectedRows,
    StopCallback,
    StopSignal,
    check_bad_row_share,
    find_checkpoint,
    mark_complete,
)
from .recorded import RecordMixin


class ResumableMixin(RecordMixin):
    """Beside [`~transformers.Trainer`]: bit-identical resuming of runs whose loader hands over its readers' states.

    Checkpoints count once they are whole; rejected rows are listed in `rejected.jsonl`; SIGTERM saves a checkpoint and
    ends training on all ranks (`trainer.stopped`). Each checkpoint holds the run's record ([`RecordMixin`]).

    A trainer calls `_begin_resumable` when it is made, `_start_run` before each run, `_take_data` for each batch, and
    `_keep_counts` once a step; and has `_read_counts`, `_data_settings`, `_run_totals`, `_load_run_totals` and
    `_push_checkpoint`.
    """

    def _begin_resumable(self):
        self.stopped = False
        self._signal = StopSignal()
        self.add_callback(StopCallback(lambda: self.stopped))

    def _start_run(self):
        self._start_record()
        self._num_batches, self._reader_states = 0, None
        self._num_rows = self._num_bad_rows = 0
        self._rejected, self._unsettled = [], None
        self.stopped = self._signal.received = False

    def _take_data(self, data):
        """Remember the state behind a batch, and its bad rows."""
        self._reader_states = {**(self._reader_states or {}), str(data["worker"]): data["state"]}
        step = self.state.global_step + 1
        self._rejected += [{**row, "step": step} for row in data["rejected"]]

    def _keep_counts(self, counts):
        """Start to copy the counts of a step, reduced over ranks, to the host: no step waits for its own."""
        self._unsettled = _copy_to_host(counts)

    def _settle_counts(self):
        """Look at the counts of the last step, which have long arrived."""
        if self._unsettled is None:
            return
        counts, arrived = self._unsettled
        if arrived is not None:
            arrived.synchronize()
        self._unsettled = None
        num_rows, num_bad_rows, num_signals = self._read_counts(counts.tolist())
        self.stopped = self.stopped or num_signals > 0
        self._num_rows += num_rows
        self._num_bad_rows += num_bad_rows
        try:
            check_bad_row_share(self._num_bad_rows, self._num_rows, self.args.max_bad_row_share)
        except ValueError:
            # On all ranks, since the counts are those of all.
            self._write_rejected()
            raise

    def _run_epoch(self, *args, **kwargs):
        # A run that was resumed when it was over: the stock loop would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and os.path.exists(os.path.join(folder, MARKER)):
            os.remove(os.path.join(folder, MARKER))
        # Older checkpoints go once this one is whole, not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._gather_record()
        if self.args.should_save:
            self._write_record(self.args.output_dir)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self._settle_counts()
        self._write_rejected()
        with open(os.path.join(folder, self._run_state_name()), "w", encoding="utf-8") as file:
            json.dump(self._run_state(), file)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._write_record(folder)
            mark_complete(folder)
        self._push_checkpoint(folder)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial=trial),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]; a batch that one rank cannot read ends it on all."""
        batches = AgreedBatches(dataloader, self.accelerator, f"The data of {metric_key_prefix}")
        return super().evaluation_loop(batches, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _determine_best_metric(self, *args, **kwargs):
        # With save_strategy "best" this alone decides whether an evaluated step is saved, a stop or not.
        return super()._determine_best_metric(*args, **kwargs) or self.stopped

    def _finalize_training(self, *args, **kwargs):
        if not self.stopped:
            return super()._finalize_training(*args, **kwargs)
        # The run goes on from its last checkpoint, which the stock loop would delete beside a better one.
        settings = self.args.load_best_model_at_end, self.args.save_total_limit
        self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = settings

    def _run_state_name(self):
        return f"run_state_{self.args.process_index}.json"

    def _run_state(self):
        """Return what this rank needs, beside the stock checkpoint, to go on as if nothing had happened."""
        return {
            "settings": self._data_settings(),
            "num_batches": self._num_batches,
            "readers": self._reader_states,
            "num_rows": self._num_rows,
            "num_bad_rows": self._num_bad_rows,
            "record": self._record_state(),
            **self._run_totals(),
        }

    def _load_run_state(self, folder):
        path = os.path.join(folder, self._run_state_name())
        now = self._data_settings()
        if not os.path.exists(path):
            if not now:
                return
            raise ValueError(
                f"The checkpoint has no {path}: it was saved with fewer ranks than {self.args.world_size}."
            )
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        changed = {
            name: f"{state['settings'].get(name)} -> {now.get(name)}"
            for name in sorted({*state["settings"], *now})
            if state["settings"].get(name) != now.get(name)
        }
        if changed:
            raise ValueError(f"The checkpoint {folder} goes on with other data than this run has: {changed}.")
        self._num_batches, self._reader_states = state["num_batches"], state["readers"]
        self._num_rows, self._num_bad_rows = state["num_rows"], state["num_bad_rows"]
        self._load_record_state(state["record"])
        self._load_run_totals(state)

    def _write_rejected(self):
        """Bring the bad rows of all ranks to the file, where there are any."""
        rows, self._rejected = self._rejected, []
        any_rows = self.accelerator.reduce(torch.tensor(len(rows), device=self.args.device), "sum").item()
        if any_rows:
            rows = gather_object(rows)
            if self.is_world_process_zero():
                self._rejected_rows.write(rows)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint; True: the newest whole one; `"auto"`:
                the same, and from the start if there is none.
            kwargs: `trial`, `ignore_keys_for_eval`.
        """
        resume = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._start_run()
        step = 0
        if resume is not None:
            self._load_run_state(resume)
            with open(os.path.join(resume, TRAINER_STATE_NAME), encoding="utf-8") as file:
                step = json.load(file)["global_step"]
        if self.is_world_process_zero():
            self._rejected_rows = RejectedRows(self.args.output_dir, step if resume is not None else -1)
        with self._signal:
            output = super().train(resume_from_checkpoint=resume, **kwargs)
        self._settle_counts()
        self._write_rejected()
        self._gather_record(is_over=True)
        if self.args.should_save:
            self._write_record(self.args.output_dir)
        return output


def _copy_to_host(tensor):
    """Start to copy a tensor to the host; return the copy, and an event to wait for where it takes its time."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


__all__ = ["ResumableMixin"]
