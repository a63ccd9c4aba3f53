"""Fine-tune a tiny model on ranks that share its weights.

Started by test_contrastive_sharded.py as `contrastive_sharded.py MODE FOLDER` on two ranks, where FOLDER holds the
model to start from; `train_all("whole", FOLDER)` is one process, for comparison.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import pytest
from transformers import TrainerCallback

from tests.trainers.contrastive_cases import arguments, build, mixed_task, picture, texts_task
from tests.two_ranks import compile_nothing, shard_on_cpus, zero_settings
from trainers.contrastive_trainer import ContrastiveTrainer

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 3}
SCENARIOS = {
    # With evaluation in between.
    "plain": {
        **SGD,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
        "metric_for_best_model": "ndcg_at_10",
    },
    "cached": {
        **SGD,
        "mini_batch_tokens": 40,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "freeze_vision": True,
    },
    "bf16": {**SGD, "bf16": True, "max_steps": 1},
    "resumed": {"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "mini_batch_size": 2},
}


def one_image_task(num_rows=16):
    """Texts, and one row with an image: the rank that does not get it has none in any column."""
    sides = {"text": datasets.Value("string"), "image": datasets.Image()}
    rows = [
        {
            "query": {"text": f"find page {index}", "image": None},
            "positive": {"text": f"page {index}", "image": picture(index) if index == 0 else None},
        }
        for index in range(num_rows)
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features({"query": sides, "positive": sides}))


class Watch(TrainerCallback):
    """Note what of the model its ranks share."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters = sorted({type(parameter).__name__ for parameter in model.parameters()})
        layers = model[0].model.language_model.layers
        blocks = model[0].model.backbone.visual.blocks
        self.layers = sorted({type(layer).__name__ for layer in [*layers, *blocks]})


def train(mode, folder, scenario="plain", resume=None):
    """Take a few steps on batches of text and of images; leave losses, evaluations and the model in the folder."""
    world_size = 1 if mode == "whole" else 2
    output = folder / mode / (scenario if resume is None else f"{scenario}_again")
    config = arguments(
        output,
        deepspeed=zero_settings(int(mode[-1])) if mode.startswith("zero") else None,
        per_device_train_batch_size=8 // world_size,
        **SCENARIOS[scenario],
    )
    assert config.world_size == world_size, f"{config.world_size} ranks run, not {world_size}"
    tasks = {"texts": texts_task(16), "mixed": mixed_task(16), "one_image": one_image_task()}
    dev_sets = {"texts": texts_task(9), "mixed": mixed_task(9)} if scenario == "plain" else None
    watch = Watch()
    trainer = ContrastiveTrainer(build(folder / "start"), config, tasks, dev_sets, callbacks=[watch])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    entries = [entry for entry in trainer.state.log_history if "rows_per_second" in entry]
    result = {
        "losses": [entry["loss"] for entry in entries],
        "gradient_norms": [entry["grad_norm"] for entry in entries],
        "evaluations": [entry for entry in trainer.state.log_history if "eval_ndcg_at_10" in entry],
        "tasks": [name for entry in entries for name in entry if name.startswith("loss_")],
        "parameters": watch.parameters,
        "layers": watch.layers,
    }
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result))
    return output


def train_all(mode, folder):
    """Run every scenario; go on with one of them from its checkpoint in the middle."""
    for scenario in SCENARIOS:
        output = train(mode, folder, scenario)
    train(mode, folder, scenario, resume=str(output / "checkpoint-2"))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        if sys.argv[1] == "fsdp2":
            shard_on_cpus(monkeypatch)
            train_all(sys.argv[1], Path(sys.argv[2]))
        else:
            compile_nothing()
            train(sys.argv[1], Path(sys.argv[2]))
