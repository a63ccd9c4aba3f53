"""Train a tiny model on one rank or several and write losses, evaluation and weights to a file.

Started by test_cpt_distributed.py: `accelerate launch ... cpt_two_ranks.py FOLDER WORLD_SIZE`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import datasets
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import make_row
from trainers.adapters import add_adapters
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer

SCENARIOS = ("uneven", "text", "stream", "nothing", "adapted")
ACCUMULATIONS = (1, 2, 4)


class Recorder(TrainerCallback):
    """Keep the gradients of the first step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def first_step(folder, world_size, accumulation):
    """Return both losses and all gradients of one step of eight rows, cut into `accumulation` batches a rank."""
    rows = [make_row(seed, 4 + 9 * (seed % 3), (2, 1, 0, 0)[seed % 4]) for seed in range(8)]
    config = CPTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=1,
        max_grad_norm=0.0,
        max_length=256,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8 // world_size // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    recorder = Recorder()
    trainer = CPTTrainer(
        MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6),
        config,
        train_dataset=rows,
        processing_class=tiny_processor(),
        callbacks=[recorder],
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    return {"losses": torch.tensor([entry["mlm_loss"], entry["mae_loss"]]), **recorder.gradients}


def run(folder, world_size, scenario):
    """Train two steps of eight rows, evaluate five rows, and return what should not depend on `world_size`."""
    torch.manual_seed(0)
    # With two ranks, rank 1 gets rows 2, 3, 6 and 7 of a step: none of its batches holds an image in "uneven".
    # In "nothing" its rows are bad as well, so that nothing is drawn on it.
    images = {"text": (0, 0, 0, 0), "stream": (0, 1, 2, 0)}.get(scenario, (2, 1, 0, 0))
    rows = [make_row(seed, 4 + 9 * (seed % 3), images[seed % 4]) for seed in range(16)]
    if scenario == "nothing":
        rows = [{**row, "text": " "} if seed % 4 > 1 else row for seed, row in enumerate(rows)]
    config = CPTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_length=256,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // world_size,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        max_bad_row_share=1.0,
        # Recomputed layers and parameters that a rank does not use are a known bad pair under DDP.
        gradient_checkpointing=scenario == "uneven",
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    trainer = CPTTrainer(
        add_adapters(model, LoraConfig(r=4, lora_dropout=0.0)) if scenario == "adapted" else model,
        config,
        train_dataset=datasets.Dataset.from_list(rows).to_iterable_dataset() if scenario == "stream" else rows,
        eval_dataset=rows[:5],
        processing_class=tiny_processor(),
    )
    trainer.train()
    trainer.evaluate()
    kept = ("loss", "mlm_loss", "mae_loss", "num_masked_tokens", "num_masked_patches", "eval_mlm_loss", "eval_mae_loss")
    logs = [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
    return {"logs": logs, "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()}}


if __name__ == "__main__":
    target, number = Path(sys.argv[1]), int(sys.argv[2])
    results = {scenario: run(target, number, scenario) for scenario in SCENARIOS}
    results |= {accumulation: first_step(target, number, accumulation) for accumulation in ACCUMULATIONS}
    if torch.distributed.get_rank() == 0:
        torch.save(results, target / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
