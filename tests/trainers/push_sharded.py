"""Push from ranks that share weights.

Started by test_hub_push.py, with a Hub to talk to: `accelerate launch ... push_sharded.py FOLDER`, where FOLDER holds
the model to `start` from.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if os.environ["RANK"] != "0":
        # Nobody is there: what another rank wants from the Hub fails.
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

import pytest

from hub_cards import write_training_card
from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_processor
from tests.trainers.contrastive_cases import build, mixed_task
from tests.trainers.cpt_rows import make_rows
from tests.two_ranks import shard_on_cpus
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer

SETTINGS = {
    "max_steps": 2,
    "save_steps": 1,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "push_to_hub": True,
    "hub_always_push": True,
    "hub_strategy": "checkpoint",
}


def train(trainer):
    assert trainer.is_fsdp_enabled and trainer.args.world_size == 2
    trainer.train()
    trainer.save_model()
    # A push that fails in training is logged only.
    assert trainer.is_world_process_zero() or getattr(trainer, "push_in_progress", None) is None


def main(folder):
    start = str(folder / "start")
    stage1 = CPTTrainer(
        MoCaForPreTraining.from_pretrained(start),
        CPTConfig(str(folder / "stage1"), max_length=256, hub_model_id="org/sharded1", **SETTINGS),
        train_dataset=make_rows(8),
        processing_class=tiny_processor(),
        card_writer=write_training_card,
    )
    train(stage1)
    config = ContrastiveConfig(str(folder / "stage2"), hub_model_id="org/sharded2", **SETTINGS)
    train(ContrastiveTrainer(build(start), config, {"mixed": mixed_task(16)}, card_writer=write_training_card))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        shard_on_cpus(monkeypatch)
        main(Path(sys.argv[1]))
