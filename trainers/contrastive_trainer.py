"""Contrastive fine-tuning (MoCa stage 2) on the trainer of sentence-transformers."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer

from .adapters import freeze_vision_tower, is_adapted, load_adapters
from .batch_loader import make_loader
from .checkpoints import EpochCallback
from .contrastive_config import ContrastiveConfig
from .contrastive_data import ContrastiveDataCollator, order_columns
from .contrastive_evaluation import RETRIEVAL_METRICS, RetrievalSet, check_log_names, evaluate_retrieval, log_name
from .contrastive_loader import COUNTS, PairBatches
from .contrastive_loss import InfoNCELoss
from .contrastive_mixture import PairMixture, prompts_of
from .contrastive_model import build_sentence_transformer, save_sentence_transformer
from .contrastive_sampler import OrderedBatches
from .contrastive_schedule import MIXED, BatchSchedule
from .hub_push import HubPushMixin
from .progress import RateProgressCallback, TokenMeter
from .resumable import ResumableMixin
from .sharding import shard_by_layer
from .training_record import public_name
from .whole_model import WholeModelMixin

logger = logging.getLogger(__name__)


class ContrastiveTrainer(ResumableMixin, HubPushMixin, WholeModelMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with task-aware global batches, exact gradients over ranks, and losses by task.

    Checkpoints and the final folder are `SentenceTransformer` folders that hold the MoCa model and its processor.
    With adapters (`add_embedding_adapters`) checkpoints hold these alone, with FSDP parts, and the final folder a whole
    model. They carry no rows of the training data: the stock trainer would copy training images and texts into
    `assets/` and the model card. Source: MoCa, arXiv 2506.23115, section 3.2.

    Rows that cannot be used are counted, and listed in `rejected.jsonl`; `data_report.json` says by data set what was
    found and used. Both lie in the output folder. A run that is resumed goes on bit for bit, with the same number of
    ranks and workers: checkpoints count once they are whole, `resume_from_checkpoint=True` passes over one that was cut
    off while it was written, and `"auto"` starts anew if there is none. SIGTERM saves a checkpoint and ends training
    (`trainer.stopped`).

    Args:
        model: see `build_sentence_transformer`.
        args: settings; `ContrastiveConfig` holds the paper's.
        train_dataset: a `PairMixture`, or a `datasets.Dataset` a task, by name. Columns: `query`, `positive`, and any
            number of `negative_1`, `negative_2`, ... Values: a text, an image, a dict {"text", "image"}, or None for a
            missing negative.
        eval_dataset: dev sets by task, with these columns. For each the loss is reported, and with `eval_retrieval`
            nDCG@10 and P@1 of finding the queries' right answers among all positives and negatives of the dev set.
            Evaluation draws no random numbers that training would have drawn.
        loss: an `InfoNCELoss` with the settings of `args` when None.
        card_writer: writes the model card of a folder when the trainer pushes to the Hub, for one
            `hub_cards.write_training_card`; none is written when None.
        kwargs: passed to `SentenceTransformerTrainer`.

    Raises:
        ValueError: for missing or unknown columns, a task smaller than a global batch, too many bad rows, streamed data
            sets without max_steps, tasks that the logs could not tell apart, several devices in one process, an
            accelerate configuration that splits or dispatches batches, or, where ranks share weights, adapters or
            `load_best_model_at_end`. In training: for a checkpoint of other data, ranks or workers.

    Example:
        >>> trainer = ContrastiveTrainer(model, ContrastiveConfig("output"), {"captions": captions, "pages": pages})
        >>> trainer.train()
    """

    data_collator_class = ContrastiveDataCollator
    training_args_class = ContrastiveConfig
    stage_name = "contrastive fine-tuning"

    def __init__(
        self,
        model: SentenceTransformer,
        args: ContrastiveConfig,
        train_dataset: PairMixture | Mapping[str, Dataset] | Dataset | None = None,
        eval_dataset: Mapping[str, Dataset] | Dataset | None = None,
        loss: nn.Module | None = None,
        card_writer: Callable | None = None,
        **kwargs,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"One process drives one device, got {args.n_gpu}: start with `accelerate launch`.")
        mixture = _as_mixture(train_dataset, args)
        self._schedule, self._tasks, self._kinds = None, [], []
        if mixture is not None:
            _set_prompts(args, mixture)
            self._schedule = BatchSchedule(mixture, args, model[0].processor)
            self._tasks = self._schedule.tasks
            self._kinds = [source.kind for source in mixture.sources] if args.task_batches else [None]
            self._schedule.report()
            args.max_steps = self._schedule.max_steps
            # The readers go on where they stopped; there is nothing to skip.
            args.ignore_data_skip = True
        if args.freeze_vision:
            freeze_vision_tower(model[0].model)
        self._dev_rows = _by_task(eval_dataset, "eval") or {}
        self._dev_sets: dict[str, RetrievalSet] = {}
        check_log_names([*(mixture.tasks if mixture is not None else []), *self._dev_rows])
        names = [*(mixture.tasks if mixture is not None else []), *self._dev_rows]
        renamed = {log_name(name): log_name(public_name(name)) for name in names if public_name(name) != name}
        self._begin_record(model[0].model, card_writer, renamed)
        super().__init__(model, args, mixture, self._dev_rows or None, loss, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RateProgressCallback)
        if args.load_best_model_at_end and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "load_best_model_at_end puts whole weights into the model, which ranks here share: leave it unset "
                "under FSDP and DeepSpeed. With metric_for_best_model the best checkpoint is kept all the same "
                "(ContrastiveTrainer)."
            )
        if self.accelerator.split_batches or self.accelerator.dispatch_batches:
            raise ValueError(
                "ContrastiveTrainer needs accelerator_config with split_batches and dispatch_batches unset, or ranks "
                f"would mix tasks; got split_batches={self.accelerator.split_batches}, "
                f"dispatch_batches={self.accelerator.dispatch_batches}."
            )
        self._begin_sharding(model[0].model)
        shard_by_layer(self.accelerator, model)
        self._begin_resumable()
        if mixture is not None:
            self.add_callback(EpochCallback(self._schedule.steps_per_epoch))
        self._start_run()
        if self.is_deepspeed_enabled and (args.mini_batch_size is not None or args.mini_batch_tokens is not None):
            raise ValueError(
                f"mini_batch_size={args.mini_batch_size}, mini_batch_tokens={args.mini_batch_tokens}: mini-batches run "
                "several backward passes a step, which DeepSpeed's ZeRO refuses. Leave both unset, or train without "
                "DeepSpeed (ContrastiveTrainer)."
            )
        # A step runs one forward pass a column. Ranks must agree on what each pass uses, or sharded runs abort, and
        # distributed data parallel takes the parameters that the last pass did not use for unused ones.
        model[0].model.always_use_vision = self.args.world_size > 1

    def get_default_loss(self, model: SentenceTransformer) -> nn.Module:
        """`InfoNCELoss` with the settings of `args`."""
        return InfoNCELoss(
            model,
            temperature=self.args.temperature,
            all_negatives=self.args.all_negatives,
            symmetric=self.args.symmetric,
            false_negative_margin=self.args.false_negative_margin,
            matryoshka_dims=self.args.matryoshka_dims,
            matryoshka_weights=self.args.matryoshka_weights,
            mini_batch_size=self.args.mini_batch_size,
            mini_batch_tokens=self.args.mini_batch_tokens,
        )

    # Data.

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        """Refuse unknown columns (see `order_columns`)."""
        if isinstance(dataset, PairMixture):
            return
        if isinstance(dataset, dict):
            for name, task_dataset in dataset.items():
                self.validate_column_names(task_dataset, name)
        else:
            order_columns(dataset.column_names, dataset_name or "train")

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Always for several tasks, since losses are logged by task; a mixed batch is of none."""
        return isinstance(dataset, DatasetDict) and self.args.task_batches

    def get_batch_sampler(self, dataset: Dataset, batch_size: int, drop_last: bool, **kwargs) -> OrderedBatches:
        """Evaluation batches: in order, the last one smaller."""
        return OrderedBatches(len(dataset), batch_size, self.args.world_size)

    def get_train_dataloader(self) -> DataLoader:
        """Training batches of this rank on the host; `_prepare_inputs` moves what the step needs at once."""
        if self._schedule is None:
            raise ValueError("Training needs a train_dataset, got None (ContrastiveTrainer).")
        batches = PairBatches(
            self._schedule.reader, self.data_collator, self.args, self._num_batches, self._reader_states
        )
        return make_loader(batches, self.args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step; what they tell about the data is kept here."""
        return super().get_batch_samples(map(self._take_batch, epoch_iterator), num_batches, device)

    def _take_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._num_batches += 1
        self._take_data(batch["data"])
        counts = np.array(batch["data"]["counts"])
        self._data_counts += counts
        self._step_counts += counts.sum(0)
        self._count_rows(counts, batch["data"]["rejected"])
        num_tokens = self._meter.totals[0]
        self._meter.add(self.collect_features(batch["inputs"])[0])
        self._count("all", "tokens", self._meter.totals[0] - num_tokens)
        return batch["inputs"]

    def _count_rows(self, counts: np.ndarray, rejected: list[dict]) -> None:
        """Keep counts of data sets, [T, len(COUNTS)], and rows that turned out bad, for the record."""
        for name in ("used_rows", "repeated_rows", "missing_negatives"):
            column = COUNTS.index("num_rows" if name == "used_rows" else f"num_{name}")
            for index in np.flatnonzero(counts[:, column]).tolist():
                self._count(index, name, int(counts[index, column]))
        for row in rejected:
            self._count(self._schedule.mixture.tasks.index(row["dataset"]), f"skipped:{row['reason']}")

    def _record_sources(self) -> list[dict[str, Any]]:
        return [] if self._schedule is None else self._schedule.mixture.record()

    def _record_counts(self, seen: Counter) -> dict[str, int]:
        rows = sum(number for name, number in seen.items() if name.endswith("/used_rows"))
        return {"rows": rows, "tokens": seen["all/tokens"]}

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> None:
        """None: the loss is a mean over rows. Ranks tell each other of bad rows and signals here, once a step."""
        self._settle_counts()
        numbers = [self._step_counts[COUNTS.index(name)] for name in ("num_rows", "num_rejected_rows")]
        counts = torch.tensor([sum(numbers), numbers[1], int(self._signal.received)], device=self.args.device)
        self._keep_counts(self.accelerator.reduce(counts, "sum"))
        self._step_counts[:] = 0

    def _read_counts(self, counts: list[int]) -> list[int]:
        return counts

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Cached gradients move a mini-batch at a time, and plan on the host.
        cached = isinstance(self.loss, InfoNCELoss) and self.loss.uses_gradient_cache
        on_host = {name: value for name, value in inputs.items() if cached and name != "label"}
        to_move = {name: value for name, value in inputs.items() if name not in on_host}
        prepared = super()._prepare_inputs(to_move) if to_move else {}
        # The order of the columns decides which one is the query.
        return {name: on_host[name] if name in on_host else prepared[name] for name in inputs}

    # Loss and logs.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this rank's rows, remembered by task for the logs."""
        task = inputs.get("dataset_name", MIXED)
        num_rows = inputs["query_input_ids"].shape[0]
        if not self.args.mask_equal_positives:
            # The loss masks what it is told to be equal.
            labels = {name: value for name, value in inputs["label"].items() if not name.endswith("_hash")}
            inputs = {**inputs, "label": labels}
        outputs = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and task in self._tasks:
            loss = outputs[0] if return_outputs else outputs
            # Summed on the device: reading the value here would make every step wait for it.
            totals = self._task_totals[self._tasks.index(task)]
            totals[0] += loss.detach()
            totals[1] += 1
            totals[2] += num_rows
        return outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss by task and kind, rates and padding since the last log, and counts of the run so far."""
        if "loss" in logs and self.is_in_train:
            totals = self.accelerator.reduce(self._task_totals, "sum").cpu()  # [T, 3]
            # From the same sums: the stock one starts anew when a run is resumed between two logs.
            logs = {**logs, "loss": _mean(totals)}
            for task, row in zip(self._tasks, totals):
                if row[1]:
                    logs[f"loss_{task}"] = _mean(row[None])
            for kind in sorted({kind for kind in self._kinds if kind is not None}):
                rows = totals[[other == kind for other in self._kinds]]
                if rows[:, 1].sum():
                    logs[f"loss_of_kind/{kind}"] = _mean(rows)
            elapsed = time.perf_counter() - self._totals_since
            logs["rows_per_second"] = round(totals[:, 2].sum().item() / elapsed, 2)
            *numbers, flops = self._meter.totals
            numbers = self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()
            flops = self.accelerator.reduce(torch.tensor(flops, device=self.args.device), "sum").item()
            logs |= self._meter.logs([*numbers, flops], elapsed, self.args.world_size)
            counts = dict(zip(COUNTS, self._write_data_report().sum(0).tolist()))
            logs["skipped_rows"] = counts["num_rejected_rows"]
            logs["masked_negatives"] = counts["num_missing_negatives"] + counts["num_negatives_equal_to_positive"]
            self._reset_task_totals()
            self._write_rejected()
        super().log({log_name(name): value for name, value in logs.items()}, start_time)

    def _write_data_report(self) -> np.ndarray:
        """Write what was found and used so far, and return the counts over all ranks."""
        counts = torch.from_numpy(self._data_counts).to(self.args.device)
        counts = self.accelerator.reduce(counts, "sum").cpu().numpy()  # [T, len(COUNTS)]
        if self.is_world_process_zero():
            self._schedule.write_report(counts)
        return counts

    # The run.

    def _start_run(self) -> None:
        super()._start_run()
        self._reset_task_totals()
        num_sources = 0 if self._schedule is None else len(self._schedule.mixture.sources)
        self._data_counts = np.zeros((num_sources, len(COUNTS)), dtype=int)
        self._step_counts = np.zeros(len(COUNTS), dtype=int)
        if self._schedule is not None and self.is_world_process_zero():
            self._rejected = [{**row, "step": 0} for row in self._schedule.mixture.rejected]

    def _reset_task_totals(self) -> None:
        # [T, (loss, steps, rows)]
        self._task_totals = torch.zeros(len(self._tasks), 3, device=self.accelerator.device)
        self._totals_since = time.perf_counter()
        limits = (self.loss.max_rows, self.loss.max_tokens) if isinstance(self.loss, InfoNCELoss) else ()
        # Anew, since what is trained may have been changed.
        self._meter = TokenMeter(self.model[0].model, self.args.device, *limits)

    def _data_settings(self) -> dict[str, Any]:
        return {} if self._schedule is None else self._schedule.settings()

    def _run_totals(self) -> dict[str, Any]:
        return {
            "task_totals": self._task_totals.tolist(),
            "data_counts": self._data_counts.tolist(),
            "token_totals": self._meter.totals,
            "seconds": time.perf_counter() - self._totals_since,
        }

    def _load_run_totals(self, state: dict[str, Any]) -> None:
        self._task_totals += torch.tensor(state["task_totals"], device=self._task_totals.device)
        self._data_counts += np.array(state["data_counts"], dtype=int)
        self._meter.totals = state["token_totals"]
        self._totals_since -= state["seconds"]
        # Those that were found in the beginning are in the file.
        self._rejected = []

    def train(self, *args, **kwargs) -> Any:
        """See `transformers.Trainer.train`; `resume_from_checkpoint` may be `"auto"` too."""
        output = super().train(*args, **kwargs)
        self._write_data_report()
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See `transformers.Trainer.evaluate`; data sets by task are checked and named as those of training are.

        Returns:
            `eval_<task>_loss`, and with `eval_retrieval` `eval_<task>_ndcg_at_10` and `eval_<task>_p_at_1`, and their
            means over tasks, `eval_ndcg_at_10` and `eval_p_at_1`.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, Mapping):
            # The stock method comes back here for each of several data sets.
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        by_task = self._dev_rows
        if eval_dataset is not None:
            by_task = _by_task(eval_dataset, "eval")
            eval_dataset = DatasetDict(by_task)
        start = time.perf_counter()
        # The loaders of evaluation draw seeds.
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.args.eval_retrieval and by_task:
                metrics |= self._evaluate_retrieval(by_task, metric_key_prefix)
        # Rates are those of training.
        self._totals_since += time.perf_counter() - start
        return metrics

    def _evaluate_retrieval(self, by_task: dict[str, Dataset], prefix: str) -> dict[str, float]:
        """Log nDCG@10 and P@1 of each task and their means."""
        found = {}
        for task, rows in by_task.items():
            dev_set = self._dev_sets.get(task) if by_task is self._dev_rows else None
            dev_set = dev_set or RetrievalSet(rows, task)
            if by_task is self._dev_rows:
                self._dev_sets[task] = dev_set
            found[task] = evaluate_retrieval(self, dev_set)
        metrics = {f"{prefix}_{task}_{name}": value for task, entry in found.items() for name, value in entry.items()}
        for name in RETRIEVAL_METRICS.values():
            metrics[f"{prefix}_{name}"] = sum(entry[name] for entry in found.values()) / len(found)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        # The stock method logs what goes wrong, and hands over the last model for the best.
        logger.info("Loading the best model, of %s.", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # Checkpoints.

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No callback: it puts rows of the training data into the model card and its assets."""

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        if is_adapted(self.model[0].model):
            load_adapters(self.model[0].model, checkpoint_path)
        elif self.is_fsdp_enabled:
            # The one of sentence-transformers reads whole weights only.
            Trainer._load_from_checkpoint(self, checkpoint_path, model)
        else:
            super()._load_from_checkpoint(checkpoint_path)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # With DeepSpeed every rank comes here, and the first one writes.
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        logger.info("Saving model checkpoint to %s", output_dir)
        save_sentence_transformer(self.model, output_dir, state_dict, merge=self._saves_whole)
        # As JSON, not as the usual pickle: the folder is meant to be published.
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())


def _mean(totals: torch.Tensor) -> float:
    """Mean loss of rows of totals [T, 3]."""
    return round((totals[:, 0].sum() / totals[:, 1].sum()).item(), 6)


def _as_mixture(dataset: Any, args: ContrastiveConfig) -> PairMixture | None:
    if dataset is None or isinstance(dataset, PairMixture):
        return dataset
    by_task = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    # The first process fills the cache that the others read.
    with args.main_process_first(desc="checking the pairs"):
        return PairMixture.from_datasets(by_task, seed=args.seed)


def _set_prompts(args: ContrastiveConfig, mixture: PairMixture) -> None:
    """Add the instructions of the data sets to the prompts of the settings."""
    prompts = prompts_of(mixture.sources)
    if not prompts:
        return
    given = args.prompts or {}
    is_by_task = isinstance(given, dict) and all(isinstance(value, dict) for value in given.values())
    if not is_by_task or any(given.get(task, columns) != columns for task, columns in prompts.items()):
        raise ValueError(
            f"Data sets have instructions of their own, {prompts}, and prompts say something else, {args.prompts}: set "
            "one of them (ContrastiveTrainer)."
        )
    args.prompts = {**given, **prompts}


def _by_task(dataset: Any, name: str) -> dict[str, Dataset] | None:
    """Data sets by task, with the columns in their order."""
    if dataset is None:
        return None
    by_task = dict(dataset) if isinstance(dataset, Mapping) else {name: dataset}
    for task, rows in by_task.items():
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"Data set {task!r} must be a datasets.Dataset, whose rows can be counted and drawn by task, got "
                f"{type(rows).__name__}."
            )
        by_task[task] = rows.select_columns(order_columns(rows.column_names, task))
    return by_task


__all__ = ["ContrastiveTrainer", "build_sentence_transformer"]
