"""Contrastive fine-tuning (MoCa stage 2) on the trainer of sentence-transformers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import AutoConfig

from modeling_moca import MoCaConfig

from .contrastive_config import ContrastiveConfig
from .contrastive_data import ContrastiveDataCollator, order_columns
from .contrastive_loss import InfoNCELoss
from .contrastive_sampler import TaskBatchSampler

logger = logging.getLogger(__name__)

# What a batch of several tasks is called.
_MIXED = "all_tasks"
_POOLING_MODES = {"mean": "mean", "last": "lasttoken"}


def build_sentence_transformer(
    model_name_or_path: str | os.PathLike,
    max_length: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: str | None = None,
    **kwargs,
) -> SentenceTransformer:
    """Wrap a MoCa checkpoint in a `SentenceTransformer` of stock modules: Transformer, Pooling, Normalize.

    Args:
        model_name_or_path: folder or Hub id of a checkpoint with its processor: what stage 1 wrote, what
            `MoCaModel.from_backbone(...).save_pretrained` wrote, or a finished model.
        max_length: most tokens of an input; the processor's own limit when None.
        model_kwargs: passed to `AutoModel.from_pretrained`, for example `{"dtype": "bfloat16"}`.
        device: where to put the model; chosen by sentence-transformers when None.
        kwargs: `revision`, `token` and `cache_dir`, for a model on the Hub.

    Returns:
        A `SentenceTransformer` whose pooling is the checkpoint's `config.pooling`.

    Raises:
        ValueError: when the checkpoint is not a MoCa model: a causal backbone must be converted first.

    Example:
        >>> model = build_sentence_transformer("output/stage1")
        >>> model.encode(["a harbour at night"]).shape
    """
    path = str(model_name_or_path)
    config = AutoConfig.from_pretrained(path, **kwargs)
    if config.model_type != MoCaConfig.model_type:
        raise ValueError(
            f"{path!r} holds a model of type {config.model_type!r}, allowed is {MoCaConfig.model_type!r}: convert it "
            "with MoCaModel.from_backbone(...).save_pretrained first, or it would be trained with causal attention."
        )
    transformer = Transformer(
        path,
        model_kwargs={**kwargs, **(model_kwargs or {})},
        processor_kwargs=dict(kwargs),
        config_kwargs=dict(kwargs),
        # The backbone's image positions need padded rows.
        unpad_inputs=False,
        max_seq_length=max_length,
    )
    if max_length is not None:
        # Saved with the model; the tokenizer's own limit can only lower it.
        transformer.processor.max_length = max_length
    pooling = Pooling(config.hidden_size, pooling_mode=_POOLING_MODES[config.pooling])
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)


class ContrastiveTrainer(SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with task-aware global batches, exact gradients over ranks, and losses by task.

    Checkpoints and the final folder are `SentenceTransformer` folders that hold the MoCa model and its processor.
    They carry no rows of the training data: the stock trainer would copy training images and texts into `assets/`
    and the model card. Source: MoCa, arXiv 2506.23115, section 3.2.

    Args:
        model: see `build_sentence_transformer`.
        args: settings; `ContrastiveConfig` holds the paper's.
        train_dataset: a `datasets.Dataset` a task, by name. Columns: `query`, `positive`, and any number of
            `negative_1`, `negative_2`, ... Values: a text, an image, a dict {"text", "image"}, or None for a missing
            negative.
        eval_dataset: the same; the loss is reported for each task.
        loss: an `InfoNCELoss` with the settings of `args` when None.
        kwargs: passed to `SentenceTransformerTrainer`.

    Raises:
        ValueError: for missing or unknown columns, a task smaller than a global batch, streamed data sets, several
            devices in one process, or an accelerate configuration that splits or dispatches batches.

    Example:
        >>> trainer = ContrastiveTrainer(model, ContrastiveConfig("output"), {"captions": captions, "pages": pages})
        >>> trainer.train()
    """

    data_collator_class = ContrastiveDataCollator
    training_args_class = ContrastiveConfig

    def __init__(
        self,
        model: SentenceTransformer,
        args: ContrastiveConfig,
        train_dataset: Mapping[str, Dataset] | Dataset | None = None,
        eval_dataset: Mapping[str, Dataset] | Dataset | None = None,
        loss: nn.Module | None = None,
        **kwargs,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"One process drives one device, got {args.n_gpu}: start with `accelerate launch`.")
        train_dataset = _by_task(train_dataset, "train")
        eval_dataset = _by_task(eval_dataset, "eval")
        if train_dataset is not None and not args.task_batches:
            train_dataset = _with_equal_columns(train_dataset)
        self.train_sampler: TaskBatchSampler | None = None
        super().__init__(model, args, train_dataset, eval_dataset, loss, **kwargs)
        if self.accelerator.split_batches or self.accelerator.dispatch_batches:
            raise ValueError(
                "ContrastiveTrainer needs accelerator_config with split_batches and dispatch_batches unset, or ranks "
                f"would mix tasks; got split_batches={self.accelerator.split_batches}, "
                f"dispatch_batches={self.accelerator.dispatch_batches}."
            )
        self._tasks = list(train_dataset or {}) if args.task_batches else [_MIXED]
        self._reset_task_totals()
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
        if isinstance(dataset, dict):
            for name, task_dataset in dataset.items():
                self.validate_column_names(task_dataset, name)
        else:
            order_columns(dataset.column_names, dataset_name or "train")

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Always for several tasks, since losses are logged by task; a mixed batch is of none."""
        return isinstance(dataset, DatasetDict) and self.args.task_batches

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[Any], generator: Any = None, seed: int | None = 0
    ) -> TaskBatchSampler:
        """Training batches: every global batch of one task, or of all tasks together."""
        sizes = {task: len(rows) for task, rows in zip(self.train_dataset, dataset.datasets)}
        self.train_sampler = TaskBatchSampler(
            sizes if self.args.task_batches else {_MIXED: sum(sizes.values())},
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size,
            seed=seed or 0,
            alpha=self.args.task_alpha,
        )
        return self.train_sampler

    def get_batch_sampler(self, dataset: Dataset, batch_size: int, drop_last: bool, **kwargs) -> Any:
        """Evaluation batches: in order, the last one smaller. Training batches come from all tasks together."""
        if self.train_dataset is not None and any(dataset is task for task in self.train_dataset.values()):
            return None
        return TaskBatchSampler(
            {"eval": len(dataset)}, batch_size, self.args.world_size, shuffle=False, keep_partial=True
        )

    def get_train_dataloader(self) -> DataLoader:
        """Training batches on the host; `_prepare_inputs` moves what the step needs at once."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset, got None (ContrastiveTrainer).")
        self.accelerator.even_batches = False
        dataloader = self._build_dataloader(self.train_dataset, self.args.train_batch_size, dataset_kind="train")
        self._train_dataloader = self.accelerator.prepare_data_loader(dataloader, device_placement=False)
        return self._train_dataloader

    def _run_epoch(self, *args, **kwargs) -> Any:
        # The loader of an epoch that resumes midway wraps the sampler once more, out of reach of set_epoch.
        self.train_sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

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
        task = inputs.get("dataset_name", _MIXED)
        num_rows = inputs["query_input_ids"].shape[0]
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
        """Add the mean loss of each task since the last log, and rows per second over all ranks."""
        if "loss" in logs and self._tasks:
            totals = self.accelerator.reduce(self._task_totals, "sum").cpu()  # [T, 3]
            logs = dict(logs)
            for task, (loss, steps, _) in zip(self._tasks, totals.tolist()):
                if steps:
                    logs[f"loss_{task}"] = round(loss / steps, 4)
            elapsed = time.perf_counter() - self._totals_since
            logs["rows_per_second"] = round(totals[:, 2].sum().item() / elapsed, 2)
            self._reset_task_totals()
        super().log(logs, start_time)

    def _reset_task_totals(self) -> None:
        # [T, (loss, steps, rows)]
        self._task_totals = torch.zeros(len(self._tasks), 3, device=self.accelerator.device)
        self._totals_since = time.perf_counter()

    def train(self, *args, **kwargs) -> Any:
        """See `transformers.Trainer.train`."""
        self._reset_task_totals()
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        """See `transformers.Trainer.evaluate`; data sets by task are checked and named as those of training are."""
        if isinstance(eval_dataset, Mapping):
            eval_dataset = DatasetDict(_by_task(eval_dataset, "eval"))
        return super().evaluate(eval_dataset, *args, **kwargs)

    # Checkpoints.

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No callback: it puts rows of the training data into the model card and its assets."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # With DeepSpeed every rank comes here, and the first one writes.
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        logger.info("Saving model checkpoint to %s", output_dir)
        self.model.save_pretrained(output_dir, create_model_card=False)
        # As JSON, not as the usual pickle: the folder is meant to be published.
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())


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


def _with_equal_columns(tasks: dict[str, Dataset]) -> dict[str, Dataset]:
    """Give every task the hard negatives that any of them has, as missing ones: rows of a batch share their columns."""
    columns = order_columns(sorted({name for rows in tasks.values() for name in rows.column_names}), "all tasks")
    for task, rows in tasks.items():
        for column in columns:
            if column not in rows.column_names:
                rows = rows.add_column(column, [None] * len(rows))
        tasks[task] = rows.select_columns(columns)
    return tasks
