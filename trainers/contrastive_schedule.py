"""From a mixture and the settings to the batches of a run: sizes, order, readers, and the report on the data."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np

from .checkpoints import check_bad_row_share
from .contrastive_loader import COUNTS, PlannedPairs
from .contrastive_mixture import PairMixture, prompts_of
from .contrastive_sampler import TaskPlan, TaskRows
from .contrastive_stream import StreamedPairs, batch_shares

# What a batch of several tasks is called.
MIXED = "all_tasks"
REPORT = "data_report.json"


class BatchSchedule:
    """Which batches a run trains on.

    Args:
        mixture: the data sets.
        args: a `ContrastiveConfig`.
        processor: tells whether images fit, see `trainers.contrastive_rows.open_pair`.

    Raises:
        ValueError: too many bad rows, or any with on_bad_row="raise"; a data set too small for one batch; streams
            without max_steps; settings of single data sets with batches of all of them.
    """

    def __init__(self, mixture: PairMixture, args: Any, processor: Any = None) -> None:
        self.mixture, self._args, self._processor = mixture, args, processor
        self.tasks = mixture.tasks if args.task_batches else [MIXED]
        self.batch_sizes = [source.batch_size or args.per_device_train_batch_size for source in mixture.sources]
        if not args.task_batches:
            self._check_mixed()
        self.plan, self._offsets = None, None
        if mixture.streaming:
            if args.max_steps <= 0:
                raise ValueError("A streamed mixture has no end: set max_steps (ContrastiveConfig).")
            return
        rejected = mixture.rejected
        if rejected and args.on_bad_row == "raise":
            raise ValueError(f"{rejected[0]['message']} {len(rejected)} rows are bad, and on_bad_row is 'raise'.")
        check_bad_row_share(len(rejected), sum(map(len, mixture.loaded)), args.max_bad_row_share)
        self.plan = TaskPlan(self._task_rows(), args.world_size, args.seed, args.task_alpha)

    def _check_mixed(self) -> None:
        if self.mixture.streaming:
            raise ValueError("Streamed data sets need task_batches=True: a batch is read from one of them.")
        for source, size in zip(self.mixture.sources, self.batch_sizes):
            if size != self._args.per_device_train_batch_size or source.weight is not None:
                raise ValueError(
                    f"Data set {source.task!r} has a batch_size or weight of its own, which needs task_batches=True: a "
                    "mixed batch holds rows of all data sets."
                )
        if prompts := prompts_of(self.mixture.sources):
            raise ValueError(
                f"Instructions of data sets need task_batches=True, got {prompts}: in a mixed batch a column has one "
                "prompt."
            )

    def _task_rows(self) -> list[TaskRows]:
        sources, checked = self.mixture.sources, self.mixture.checked
        sizes = [len(rows) for rows in self.mixture.loaded]
        if self._args.task_batches:
            return [
                TaskRows(
                    source.task,
                    size,
                    batch_size,
                    keys=rows.keys if source.distinct_positives else None,
                    usable=rows.usable,
                    weight=source.weight,
                )
                for source, size, batch_size, rows in zip(sources, sizes, self.batch_sizes, checked)
            ]
        self._offsets = np.cumsum([0, *sizes[:-1]])
        keys = np.concatenate([rows.keys for rows in checked])
        usable = np.concatenate([rows.usable + offset for rows, offset in zip(checked, self._offsets)])
        distinct = all(source.distinct_positives for source in sources)
        return [TaskRows(MIXED, sum(sizes), self.batch_sizes[0], keys if distinct else None, usable)]

    @property
    def max_steps(self) -> int:
        """Optimisation steps of the run."""
        if self._args.max_steps > 0:
            return self._args.max_steps
        num_batches = self._args.num_train_epochs * self.plan.num_batches
        return max(math.ceil(num_batches / self._args.gradient_accumulation_steps), 1)

    @property
    def steps_per_epoch(self) -> float:
        """Optimisation steps of an epoch; of streams, of the whole run."""
        if self.plan is None:
            return self.max_steps
        return self.plan.num_batches / self._args.gradient_accumulation_steps

    def reader(self, reader: int, num_readers: int) -> PlannedPairs | StreamedPairs:
        """Return what deals a reader its rows.

        Args:
            reader: which of the readers.
            num_readers: all workers of all ranks.
        """
        if self.plan is not None:
            return PlannedPairs(
                self.mixture,
                self.plan,
                self._args.process_index,
                reader,
                num_readers,
                offsets=self._offsets,
                processor=self._processor,
            )
        return StreamedPairs(
            self.mixture,
            self.batch_sizes,
            self._args.seed,
            reader,
            num_readers,
            alpha=self._args.task_alpha,
            window=self._args.shuffle_window,
            processor=self._processor,
        )

    def settings(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed, as plain values."""
        names = ("world_size", "dataloader_num_workers", "seed", "task_alpha", "task_batches", "shuffle_window")
        settings = {name: getattr(self._args, name) for name in (*names, "max_length", "on_bad_row")}
        settings["tasks"] = self.mixture.tasks
        settings["batch_sizes"] = self.batch_sizes
        settings["num_negatives"] = [source.num_negatives for source in self.mixture.sources]
        if self.plan is None:
            settings["shares"] = batch_shares(self.mixture, self.batch_sizes, self._args.task_alpha).tolist()
        else:
            settings["rows"] = [len(task.usable) for task in self.plan.tasks]
            settings["batches_per_epoch"] = self.plan.batches_per_epoch
        return settings

    def report(self, counts: np.ndarray | None = None) -> dict[str, Any]:
        """Return what there is to say about the data, by data set; log it when no counts are given.

        Args:
            counts: what the run has counted so far over all ranks, [T, len(COUNTS)].
        """
        if counts is None:
            self._found = self.mixture.report()
            self._planned = [] if self.plan is None else self.plan.report()
            counts = np.zeros((len(self.mixture.sources), len(COUNTS)), dtype=int)
        used = {task: dict(zip(COUNTS, row)) for task, row in zip(self.mixture.tasks, counts.tolist())}
        return {
            "datasets": {task: {**found, "used": used[task]} for task, found in self._found.items()},
            "plan_per_epoch": self._planned,
        }

    def write_report(self, counts: np.ndarray) -> None:
        """Write the report to `data_report.json` in the output folder.

        Args:
            counts: see `report`.
        """
        os.makedirs(self._args.output_dir, exist_ok=True)
        path = os.path.join(self._args.output_dir, REPORT)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump(self.report(counts), file, indent=1, ensure_ascii=False)
        os.replace(f"{path}.tmp", path)


__all__ = ["MIXED", "REPORT", "BatchSchedule"]
