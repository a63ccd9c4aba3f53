"""Train a tiny model on ranks that share its weights, where one rank's batches hold images and the other's none.

Started by test_cpt_sharded.py: `python -m torch.distributed.run ... cpt_sharded.py MODE FOLDER`, where FOLDER holds the
model to start from; `train("whole", FOLDER)` is one process, for comparison.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_processor
from tests.trainers.cpt_rows import make_row
from tests.two_ranks import zero_settings
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


def train(mode, folder):
    """Take two steps of plain SGD on eight rows; leave the losses and the trained model in the folder."""
    world_size = 1 if mode == "whole" else 2
    config = CPTConfig(
        output_dir=str(folder / mode),
        deepspeed=None if mode == "whole" else zero_settings(int(mode[-1])),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        max_length=256,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=4 // world_size,
        logging_steps=1,
        train_sampling_strategy="sequential",
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    # A step has four rows; with two ranks the second one gets those without an image.
    rows = [make_row(seed, 10, 1 if seed % 4 < 2 else 0) for seed in range(8)]
    model = MoCaForPreTraining.from_pretrained(folder / "start")
    trainer = CPTTrainer(model, config, train_dataset=rows, processing_class=tiny_processor())
    trainer.train()
    trainer.save_model()
    entries = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    losses = [[entry[name] for name in ("loss", "mlm_loss", "mae_loss")] for entry in entries]
    if trainer.is_world_process_zero():
        (folder / f"{mode}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
