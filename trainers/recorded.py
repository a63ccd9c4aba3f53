"""What both trainers add to the stock one so that a run leaves a record of itself, and a card made from it."""

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

from accelerate.utils import gather_object

from .training_record import (
    FORMAT,
    RECORD,
    describe_arguments,
    describe_environment,
    describe_evaluations,
    describe_losses,
    describe_model,
    device_name,
    public_values,
)

logger = logging.getLogger(__name__)


class RecordMixin:
    """Beside [`~transformers.Trainer`]: `training_record.json` in the output folder, checkpoints and the final folder.

    It holds a list of stages, the last one this run; earlier ones are those of the folder that the run started from.
    What is counted is what was trained on: a run that is resumed goes on counting from its checkpoint, so that steps
    which were lost with a killed process are in no number.

    A trainer calls `_begin_record` when it is made and `_count` for what it takes; it has `stage_name`,
    `_record_sources` and `_record_counts`.
    """

    stage_name = None

    def _begin_record(self, model, card_writer, renamed=None):
        """Look at the model; `renamed` are parts of the names of numbers, and what the record calls them."""
        self.card_writer, self._renamed = card_writer, renamed or {}
        self._earlier_stages = _read_stages(model.config._name_or_path)
        self._model_entry = describe_model(model)

    def _start_record(self):
        self._seen, self._kept_step = Counter(), None
        self._environments, self._num_resumes = [], 0
        self._seconds, self._started = 0.0, time.perf_counter()
        self._gathered = {"seen": Counter(), "seconds": 0.0, "counts": {}}

    def _count(self, source, what, number=1):
        """Add to a count of the data set with this index; `what` is its name in the record, or "skipped:<reason>"."""
        self._seen[f"{source}/{what}"] += number

    def _gather_record(self, is_over=False):
        """Bring together what ranks counted: on all of them, and not in the middle of a step."""
        if is_over and self.args.load_best_model_at_end and not self.stopped:
            self._kept_step = self.state.best_global_step
        entries = gather_object([{"seen": dict(self._seen), "device": device_name(self.args.device)}])
        seen = Counter()
        for entry in entries:
            seen.update(entry["seen"])
        # Ranks of one tensor-parallel group hold the same rows.
        seen = Counter({name: number // self.get_tp_size() for name, number in seen.items()})
        environment = describe_environment([entry["device"] for entry in entries], self.accelerator)
        if environment not in self._environments:
            self._environments.append(environment)
        seconds = self._seconds + time.perf_counter() - self._started
        self._gathered = {"seen": seen, "seconds": seconds, "counts": self._record_counts(seen)}

    def _record_state(self):
        """Return what this rank needs to go on counting."""
        return {
            "seen": dict(self._seen),
            "seconds": self._seconds + time.perf_counter() - self._started,
            "environments": self._environments,
            "num_resumes": self._num_resumes,
            "earlier_stages": self._earlier_stages,
        }

    def _load_record_state(self, state):
        self._seen = Counter(state["seen"])
        self._seconds, self._environments = state["seconds"], state["environments"]
        self._num_resumes = state["num_resumes"] + 1
        # The folder that the run started from may have changed since.
        self._earlier_stages = state["earlier_stages"]

    def training_record(self):
        """Return the record as it stands: counts as of the last checkpoint or the end of training, logs as of now.

        Returns:
            `dict`: `format`, and `stages`, the last one this run.
        """
        seen, seconds = self._gathered["seen"], round(self._gathered["seconds"], 3)
        datasets = self._record_sources()
        for index, entry in enumerate(datasets):
            skipped = Counter(entry.pop("skipped_rows", {}))
            entry["used_rows"] = 0
            for name, number in seen.items():
                source, what = name.split("/", 1)
                if source == str(index) and what.startswith("skipped:"):
                    skipped[what.removeprefix("skipped:")] += number
                elif source == str(index):
                    entry[what] = number
            entry["skipped_rows"] = dict(sorted(skipped.items()))
        counts = self._gathered["counts"]
        stage = {
            "stage": self.stage_name,
            "model": self._model_entry,
            "arguments": describe_arguments(self.args),
            "datasets": datasets,
            "steps": self.state.global_step,
            "max_steps": self.state.max_steps,
            "epochs": round(self.state.epoch or 0, 4),
            # Of the weights in a folder that is written now.
            "kept_step": self._kept_step or self.state.global_step,
            "seconds": seconds,
            **counts,
            # Over the whole time, in which there are also evaluation and saving.
            "tokens_per_second": round(counts.get("tokens", 0) / seconds, 2) if seconds else None,
            "losses": describe_losses(self.state.log_history),
            "evaluations": describe_evaluations(self.state.log_history),
            "resumes": self._num_resumes,
            "environments": self._environments,
        }
        stage["losses"] = self._rename(stage["losses"])
        for entry in stage["evaluations"]:
            entry["metrics"] = self._rename(entry["metrics"])
        return {"format": FORMAT, "stages": [*self._earlier_stages, public_values(stage)]}

    def _rename(self, numbers):
        for name, public in self._renamed.items():
            numbers = {key.replace(name, public): value for key, value in numbers.items()}
        return numbers

    def _write_record(self, folder):
        """Write the record into a folder; on one rank."""
        path = os.path.join(folder, RECORD)
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump(self.training_record(), file, indent=1, ensure_ascii=False, allow_nan=False)
        os.replace(f"{path}.tmp", path)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, dataset=None, **kwargs
    ):
        """Write the record and, with a `card_writer`, the model card into the output folder, on the first rank.

        Args:
            language, license, tags, model_name, finetuned_from, dataset, kwargs: as in
                [`~transformers.Trainer.create_model_card`]. Results of evaluation come from files, so that `tasks`,
                `dataset_tags` and `dataset_args` are refused.

        Raises:
            ValueError: one of these is given.
        """
        if given := sorted(name for name, value in kwargs.items() if value is not None):
            raise ValueError(f"{given} are not supported: results of evaluation come from files (create_model_card).")
        if not self.is_world_process_zero():
            return
        self._write_record(self.args.output_dir)
        if self.card_writer is None:
            logger.warning("No model card is written: give the trainer a card_writer (examples/train_*.py show one).")
            return
        self.card_writer(
            self.args.output_dir,
            model_id=self.args.hub_model_id or model_name,
            language=language,
            license=license,
            tags=tags,
            base_model=finetuned_from,
            datasets=dataset,
        )


def _read_stages(folder):
    """Return the stages that the record in a folder tells of, none if it is no folder or has no record."""
    path = Path(folder or "") / RECORD
    if not folder or not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no training record of format {FORMAT}: move it away, or train from another folder."
        )
    return record["stages"]


__all__ = ["RecordMixin"]
