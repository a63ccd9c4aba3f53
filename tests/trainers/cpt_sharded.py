"""Train a tiny model on ranks that share its weights, where one rank's batches hold images and the other's none.

Started by test_cpt_sharded.py as `cpt_sharded.py MODE FOLDER` on two ranks, where FOLDER holds `start`, the
model to start from, and `stock`, the checkpoint that it was made from; `train_all("whole", FOLDER)` is one process, for
comparison.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
from transformers import TrainerCallback, set_seed

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_processor
from tests.trainers.cpt_rows import make_row
from tests.two_ranks import compile_nothing, shard_on_cpus
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer

# Adam's steps are of one size, whatever the gradient, so that rounding shows in the weights: only where it is wanted.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
SCENARIOS = {
    "steps": SGD,
    "accumulated": {**SGD, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "gradient_checkpointing": True},
    "converted": {**SGD, "max_steps": 1},
    "frozen": {
        **SGD,
        "freeze_vision": True,
        "gradient_accumulation_steps": 2,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    },
    "bf16": {**SGD, "bf16": True},
    "resumed": {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_grad_norm": 0.5},
}
SCENARIOS_OF = {"zero2": ("steps",), "zero3": ("steps", "accumulated")}


class Watch(TrainerCallback):
    """Note the types of the parameters that are trained."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.types = sorted({type(parameter).__name__ for parameter in model.parameters()})


def train(mode, folder, scenario, resume=None):
    """Take a few steps of four rows or eight; leave losses and the trained model in the folder."""
    world_size = 1 if mode == "whole" else 2
    output = folder / mode / (scenario if resume is None else f"{scenario}_again")
    settings = {"save_strategy": "no", "max_steps": 2, **SCENARIOS[scenario]}
    config = CPTConfig(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_length=256,
        warmup_steps=0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4 // world_size,
        logging_steps=1,
        train_sampling_strategy="sequential",
        **settings,
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    # A step has four rows; with two ranks the second one gets those without an image.
    rows = [make_row(seed, 10, 1 if seed % 4 < 2 else 0) for seed in range(16)]
    set_seed(0)
    if scenario == "converted":
        model = MoCaForPreTraining.from_backbone(folder / "stock", mask_token_id=6)
    else:
        model = MoCaForPreTraining.from_pretrained(folder / "start")
    watch = Watch()
    trainer = CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor(), callbacks=[watch])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    entries = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    result = {
        "losses": [[entry[name] for name in ("loss", "mlm_loss", "mae_loss")] for entry in entries],
        "gradient_norms": [entry["grad_norm"] for entry in entries],
        "types": watch.types,
        "distributed_type": str(trainer.accelerator.distributed_type),
    }
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result))
    return output


def train_all(mode, folder):
    """Run every scenario of the mode; go on with one of them from its checkpoint in the middle."""
    scenarios = SCENARIOS_OF.get(mode, tuple(SCENARIOS))
    for scenario in scenarios:
        output = train(mode, folder, scenario)
    if "resumed" in scenarios:
        train(mode, folder, "resumed", resume=str(output / "checkpoint-2"))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        if sys.argv[1] == "fsdp2":
            shard_on_cpus(monkeypatch)
        else:
            compile_nothing()
        train_all(sys.argv[1], Path(sys.argv[2]))
