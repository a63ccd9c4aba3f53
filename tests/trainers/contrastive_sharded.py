"""Fine-tune a tiny model on ranks that share its weights.

Started by test_contrastive_sharded.py: `python -m torch.distributed.run ... contrastive_sharded.py MODE FOLDER`, where
FOLDER holds the model to start from; `train("whole", FOLDER)` is one process, for comparison.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.trainers.contrastive_cases import arguments, build, mixed_task, texts_task
from tests.two_ranks import zero_settings
from trainers.contrastive_trainer import ContrastiveTrainer


def train(mode, folder):
    """Take three steps of plain SGD on batches of text and of images, with evaluation in between.

    The losses, what evaluation found and the model are left in the folder.
    """
    world_size = 1 if mode == "whole" else 2
    config = arguments(
        folder / mode,
        deepspeed=None if mode == "whole" else zero_settings(int(mode[-1])),
        per_device_train_batch_size=8 // world_size,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.05,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        metric_for_best_model="ndcg_at_10",
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    data, dev_sets = [{"texts": texts_task(rows), "mixed": mixed_task(rows)} for rows in (16, 9)]
    trainer = ContrastiveTrainer(build(folder / "start"), config, data, dev_sets)
    trainer.train()
    trainer.save_model(str(folder / mode))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_ndcg_at_10" in entry]
    if trainer.is_world_process_zero():
        (folder / f"{mode}.json").write_text(json.dumps([losses, evaluations]))


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
