"""Trainer of continual pre-training: the stock loop, with a loss that is an exact mean over the global step."""

import os
import time

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length

from .adapters import freeze_vision_tower, is_adapted, merge_adapters
from .batch_loader import make_loader
from .checkpoints import EpochCallback
from .cpt_collator import CPTCollator
from .cpt_config import CPTConfig
from .cpt_counts import NAMES, StepCounts
from .cpt_loader import MixtureBatches, count_steps
from .cpt_mixture import CPTMixture
from .cpt_rows import BAD_ROW_REASONS
from .flops import FlopsMeter
from .hub_push import HubPushMixin
from .masking import IGNORE_INDEX
from .resumable import ResumableMixin
from .sentence_modules import write_sentence_modules
from .sharding import own_class, without_copies
from .training_record import describe_source
from .whole_model import WholeModelMixin


class CPTTrainer(ResumableMixin, HubPushMixin, WholeModelMixin, Trainer):
    """Train [`MoCaForPreTraining`] to reconstruct masked tokens and patches (paper section 3.1).

    Both losses are means over all tokens and all patches hidden in one optimisation step, over gradient accumulation
    and ranks. They are logged as `mlm_loss` and `mae_loss`, in evaluation with the prefix `eval_`; in training beside
    `num_masked_tokens`, `num_masked_patches` (rows of pixels), `num_rows`, `num_cut_rows` and `num_cut_tokens` (text
    beyond `max_length`), `padding` (share of positions), `tokens_per_second` (without padding, over all ranks),
    `tflops_per_device` and, on a GPU whose peak is known, `mfu` (model FLOPs utilisation), and bad rows as
    `skipped_rows`, `skipped_rows/<reason>` and of a mixture `skipped_rows/<data set>/<reason>`. Evaluation draws the
    same masks every time.

    With a [`CPTMixture`] as `train_dataset` micro-batches are filled by cost, rejected rows are listed in
    `rejected.jsonl`, and a run that is resumed goes on bit for bit, with the same number of ranks and workers.
    Checkpoints count once they are whole: `resume_from_checkpoint=True` passes over one that was cut off while it was
    written, and `"auto"` starts anew if there is none. SIGTERM saves a checkpoint and ends training
    (`trainer.stopped`).

    Args:
        model ([`MoCaForPreTraining`]): the model, or one with adapters ([`trainers.add_adapters`]); `mae_loss_weight`
            and `shift_labels` of `args` are written to its configuration.
        args ([`CPTConfig`], *optional*): settings; all defaults when omitted.
        processing_class ([`MoCaProcessor`]): makes the batches, and is saved with every checkpoint.
        data_collator (`Callable`, *optional*): a [`CPTCollator`] made from `args` when omitted; one that is given
            serves evaluation too, as it is.
        card_writer (`Callable`, *optional*): writes the model card of a folder when the trainer pushes to the Hub,
            `hub_cards.write_training_card` for one; none is written when omitted.
        kwargs: passed on to [`~transformers.Trainer`].

    Raises:
        ValueError: neither `processing_class` nor `data_collator` is given, more than one device a process, a model
            that cannot be told the number of items, a mask token that model and tokenizer do not share,
            `compute_metrics`, a streamed mixture without `max_steps`, or adapters where ranks share weights. In
            training: too many bad rows, or a checkpoint of other data, ranks or workers.

    Example:

    ```python
    >>> trainer = CPTTrainer(model, CPTConfig(output_dir="moca-cpt"), train_dataset=rows, processing_class=processor)
    >>> trainer.train()
    ```
    """

    # The model divides by the counts of the whole step.
    loss_is_scaled_for_ga = True
    stage_name = "continual pre-training"

    def __init__(self, model, args=None, *, processing_class=None, data_collator=None, card_writer=None, **kwargs):
        args = CPTConfig(output_dir="moca-cpt") if args is None else args
        if args.n_gpu > 1:
            raise ValueError(f"One process drives one device, got {args.n_gpu}; start with `accelerate launch`.")
        if not getattr(model, "accepts_loss_kwargs", False):
            raise ValueError(
                f"{type(model).__name__} does not take num_items_in_batch (accepts_loss_kwargs is not set); use "
                "MoCaForPreTraining.from_backbone(...) or from_pretrained(...)."
            )
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is not supported: evaluation reports losses, and keeps no predictions.")
        if data_collator is None:
            if processing_class is None:
                raise ValueError("CPTTrainer needs a processing_class (MoCaProcessor), or a data_collator.")
            data_collator = _collator(processing_class, args)
            self._eval_collator = _collator(processing_class, args)
            # Rows that were repeated to fill a last batch are told from others by their place in it.
            self._eval_collator.packing = False
        else:
            self._eval_collator = data_collator
            processing_class = processing_class or getattr(data_collator, "processor", None)
        if processing_class is not None:
            _check_mask_token(model.config, processing_class.tokenizer)
        # The one place where the loss settings reach the model.
        model.config.mae_loss_weight = args.mae_loss_weight
        model.config.shift_labels = args.shift_labels
        self._mixture = kwargs["train_dataset"] if isinstance(kwargs.get("train_dataset"), CPTMixture) else None
        self._num_epochs = None
        if self._mixture is not None:
            # The readers go on where they stopped; there is nothing to skip.
            args.ignore_data_skip = True
            if args.train_sampling_strategy != "random":
                raise ValueError(
                    f"A mixture puts rows of like length together by itself: train_sampling_strategy must be 'random', "
                    f"got {args.train_sampling_strategy!r}."
                )
            if args.max_steps <= 0:
                if self._mixture.streaming:
                    raise ValueError("A streamed mixture has no end: set max_steps.")
                self._num_epochs = args.num_train_epochs
                args.max_steps = count_steps(self._mixture, data_collator, args)
        if args.freeze_vision:
            freeze_vision_tower(model)
        self._begin_record(model, card_writer)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        self._begin_sharding(model)
        sources = None if self._mixture is None else [source.label for source in self._mixture.sources]
        self._counts = StepCounts(model.config.num_patches_per_token, sources)
        self._begin_resumable()
        if self._mixture is not None:
            self.add_callback(EpochCallback(args.max_steps))
        self._start_run()
        # Plain data parallelism finds unused parameters by itself, and is spared the blank images.
        model.moca.always_use_vision = self.is_deepspeed_enabled or self.is_fsdp_enabled

    def get_train_dataloader(self):
        """Return the training loader; of a mixture, one whose workers make whole micro-batches for this rank."""
        if self._mixture is None:
            return super().get_train_dataloader()
        batches = MixtureBatches(
            self._mixture, self.data_collator, self.args, self._num_epochs, self._num_batches, self._reader_states
        )
        return make_loader(batches, self.args)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the evaluation loader; its collator stays at epoch 0, so that evaluations can be compared."""
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def _run_epoch(self, *args, **kwargs):
        # Before the loader's workers are started or woken.
        if hasattr(self.data_collator, "set_epoch"):
            self.data_collator.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step and their counts; what a mixture's batches tell about the data is kept here."""
        return super().get_batch_samples(map(self._take_batch, epoch_iterator), num_batches, device)

    def _take_batch(self, batch):
        self._num_batches += 1
        if self._mixture is None:
            return batch
        data, inputs = batch["data"], batch["inputs"]
        self._take_data(data)
        for source, what in data["sources"]:
            self._count(source, what)
        inputs["skipped_rows"] = self._counts.rejected(data["rejected"])
        inputs["cut_rows"] = torch.tensor([data["num_cut_rows"], data["num_cut_tokens"]])
        inputs["num_rows"] = data["num_rows"]
        return inputs

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the tokens and the patches hidden in this step, over accumulation and ranks: int64 of shape `(2,)`."""
        self._settle_counts()
        for batch in batch_samples:
            self._flops.add(batch)
        counts = sum((self._counts.pop(batch).to(device) for batch in batch_samples), self._counts.zeros(device))
        counts[-1] = self._signal.received
        # Ranks of one tensor-parallel group hold the same batch.
        counts = self.accelerator.reduce(counts, "sum") // self.get_tp_size()
        self._train_counts += counts
        self._run_counts += counts
        self._train_steps += 1
        self._keep_counts(counts)
        return counts[:2]

    def _read_counts(self, counts):
        return counts[NAMES.index("num_rows")], self._counts.num_bad_rows(counts), counts[-1]

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        # Pixels come as bytes, and noise is drawn where they are.
        return self.data_collator.finish(inputs) if "noise_seeds" in inputs else inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return `mlm_loss + w * mae_loss`: this rank's share of the global mean, times the number of ranks."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._train_losses += _losses(outputs)
        # Gradients are averaged over ranks later, while the counts are already global.
        loss = outputs["loss"] * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add this batch's summed losses and counts to the running sums; nothing is gathered."""
        self._counts.pop(inputs)
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            # Divided by 1, the losses are sums.
            outputs = model(**inputs, num_items_in_batch=inputs["labels"].new_ones(2))
        self._eval_sums += torch.cat([_losses(outputs).cpu(), self._counts.pop(inputs)[:2].cpu()])
        return None, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Return metrics `loss`, `mlm_loss` and `mae_loss`: sums over sums, whatever the batch size and the ranks."""
        start = time.perf_counter()
        self._eval_sums = torch.zeros(4, dtype=torch.float64)  # MLM and MAE sums, tokens, patches
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(self._eval_sums.to(self.args.device), "sum").tolist()
        mlm_loss, mae_loss = sums[0] / max(sums[2], 1), sums[1] / max(sums[3], 1)
        output.metrics[f"{metric_key_prefix}_loss"] = mlm_loss + self.args.mae_loss_weight * mae_loss
        output.metrics[f"{metric_key_prefix}_mlm_loss"] = mlm_loss
        output.metrics[f"{metric_key_prefix}_mae_loss"] = mae_loss
        # Evaluation is no training time.
        self._train_start += time.perf_counter() - start
        return output

    def _without_repeated_rows(self, inputs):
        """Take the targets from the rows that were repeated to give every rank a last batch."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        num_own = state.remainder - self.accelerator.process_index * self.args.eval_batch_size
        num_own = max(num_own, 0)
        inputs["labels"][num_own:] = IGNORE_INDEX
        if "patch_mask" in inputs:
            inputs["patch_mask"][num_own:] = False
            inputs["patch_labels"] = inputs["patch_labels"][: int(inputs["patch_mask"].sum())]
        return inputs

    def _save(self, output_dir=None, state_dict=None):
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model = self.model
        if self._saves_whole and is_adapted(model) and self.args.should_save:
            self.model, state_dict = merge_adapters(model), None
        if state_dict:
            state_dict = without_copies(model, state_dict)
        try:
            with own_class(self.model):
                super()._save(output_dir, state_dict)
        finally:
            self.model = model
        # Where weights are sharded every rank comes here, and the first one writes.
        if not self.args.should_save:
            return
        config = model.get_base_model().config if is_adapted(model) else model.config
        if self.processing_class is not None:
            write_sentence_modules(config, output_dir)
        if is_adapted(model) and not self._saves_whole:
            # Under another name: transformers takes a folder with a config.json for a whole model.
            config.to_json_file(os.path.join(output_dir, "moca_config.json"), use_diff=False)
        # As JSON, not as the usual pickle: the folder is meant to be given away.
        os.remove(os.path.join(output_dir, TRAINING_ARGS_NAME))
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    def _run_totals(self):
        return {
            "losses": self._train_losses.tolist(),
            "counts": self._train_counts.tolist(),
            "run_counts": self._run_counts.tolist(),
            "steps": self._train_steps,
            "flops": self._flops.total,
            "seconds": time.perf_counter() - self._train_start,
        }

    def _load_run_totals(self, state):
        self._train_losses += torch.tensor(state["losses"], device=self.args.device)
        self._train_counts += torch.tensor(state["counts"], device=self.args.device)
        self._run_counts += torch.tensor(state["run_counts"], device=self.args.device)
        self._train_steps = state["steps"]
        self._flops.total = state["flops"]
        self._train_start -= state["seconds"]

    def _record_sources(self):
        if self._mixture is not None:
            streaming, loaded = self._mixture.streaming, self._mixture.loaded
            sizes = [None] * len(loaded) if streaming else map(len, loaded)
            return [describe_source(source, size) for source, size in zip(self._mixture.sources, sizes)]
        rows = self.train_dataset
        return [] if rows is None else [{"name": "train_dataset", **({"rows": len(rows)} if has_length(rows) else {})}]

    def _record_counts(self, seen):
        counts = self._run_counts.tolist()
        named = {name.removeprefix("num_"): number for name, number in zip(NAMES, counts)}
        # Tokens with padding, which the model does not see.
        named.pop("positions")
        if self._mixture is None:
            reasons = [f"0/skipped:{reason}" for reason in BAD_ROW_REASONS]
            seen.update({name: number for name, number in zip(reasons, counts[len(NAMES) :]) if number})
            seen["0/used_rows"] = named["rows"] - self._counts.num_bad_rows(counts)
        # A mixture's readers are ahead of training.
        named["rows"] = sum(number for name, number in seen.items() if name.endswith("/used_rows"))
        return named

    def _data_settings(self):
        if self._mixture is None:
            return {}
        names = (
            "world_size",
            "dataloader_num_workers",
            "seed",
            "mask_seed",
            "shuffle_window",
            "max_cost",
            "max_length",
        )
        settings = {name: getattr(self.args, name) for name in names}
        settings["per_device_train_batch_size"] = self.args.per_device_train_batch_size
        settings["streaming"] = self._mixture.streaming
        settings["sources"] = [source.label for source in self._mixture.sources]
        if not self._mixture.streaming:
            settings["rows"] = [len(rows) for rows in self._mixture.loaded]
        return settings

    def log(self, logs, start_time=None):
        """Log; training logs get both losses, counts and speed since the last log, over all ranks."""
        if "loss" in logs and self.is_in_train:
            losses = self.accelerator.reduce(self._train_losses, "sum") / max(self._train_steps, 1)
            logs["mlm_loss"], logs["mae_loss"] = losses.tolist()
            # From the same sums: the stock one starts anew when a run is resumed between two logs.
            logs["loss"] = logs["mlm_loss"] + self.args.mae_loss_weight * logs["mae_loss"]
            seconds, num_ranks = time.perf_counter() - self._train_start, self.accelerator.num_processes
            logs |= self._counts.logs(self._train_counts.tolist(), seconds)
            flops = torch.tensor(self._flops.total, device=self.args.device)
            logs |= self._flops.logs(self.accelerator.reduce(flops, "sum").item(), seconds, num_ranks)
            self._start_train_window()
            self._write_rejected()
        super().log(logs, start_time)

    def _start_run(self):
        # Anew for every run, since what is trained may have been changed.
        self._flops = FlopsMeter(self.accelerator.unwrap_model(self.model), self.args.device)
        super()._start_run()
        self._run_counts = self._counts.zeros(self.args.device)
        self._start_train_window()

    def _start_train_window(self):
        """Start a new stretch between two logs; sums stay on the device, so that no step waits for it."""
        self._train_losses = torch.zeros(2, device=self.args.device)  # MLM, MAE
        self._train_counts = self._counts.zeros(self.args.device)
        self._train_steps, self._flops.total = 0, 0.0
        self._train_start = time.perf_counter()


def _check_mask_token(config, tokenizer):
    """Refuse a tokenizer whose mask token the model does not know; write it into a configuration without one."""
    mask_token_id = tokenizer.mask_token_id
    if config.mask_token_id is None:
        config.mask_token_id = mask_token_id
    if config.mask_token_id != mask_token_id:
        raise ValueError(
            f"The model's mask_token_id is {config.mask_token_id}, the tokenizer's is {mask_token_id} "
            f"({tokenizer.mask_token!r}): model and processor do not belong together."
        )
    if mask_token_id is not None and mask_token_id >= config.vocab_size:
        raise ValueError(
            f"The mask token's id {mask_token_id} lies outside the model's {config.vocab_size} embeddings; give "
            "mask_token_id to MoCaForPreTraining.from_backbone, which makes room for it."
        )


def _collator(processor, args):
    return CPTCollator(
        processor,
        mlm_ratio=args.mlm_ratio,
        mae_ratio=args.mae_ratio,
        patch_noise=args.patch_noise,
        shift_labels=args.shift_labels,
        max_length=args.max_length,
        seed=args.seed if args.mask_seed is None else args.mask_seed,
        on_bad_row=args.on_bad_row,
        packing=args.packing,
        exact_resize=args.exact_resize,
        ignored_columns=(args.length_column_name,),
    )


def _losses(outputs):
    """Return MLM and MAE loss of one batch, 0 where it has none: float32 of shape `(2,)`."""
    zero = outputs["loss"].new_zeros(())
    return torch.stack([outputs["mlm_loss"], outputs.get("mae_loss", zero)]).detach().float()


__all__ = ["CPTTrainer"]
