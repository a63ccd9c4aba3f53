"""Train a tiny model on a mixture in a process of its own, for tests that kill it.

Started as `python cpt_run.py FOLDER OUTPUT [name=value ...]`; FOLDER holds the sources `p` (Parquet) and `w` (tars).
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_backbone, tiny_processor
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixture, DataSource
from trainers.cpt_trainer import CPTTrainer


def sources(folder):
    """Return the two sources in the folder (`Path`)."""
    return [
        DataSource("parquet", data_files=str(folder / "p" / "*.parquet")),
        DataSource(
            "webdataset",
            data_files=str(folder / "w" / "*.tar"),
            column_map={"text": "json.caption", "images": "png"},
        ),
    ]


def make_trainer(folder, output, streaming=False, **settings):
    """Return a trainer on the mixture of the folder (`Path`)."""
    settings = {
        "max_steps": 12,
        "max_cost": 256,
        "max_length": 256,
        "shuffle_window": 8,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        # Neither every step, nor in step with each other.
        "logging_steps": 3,
        "save_steps": 2,
        "max_bad_row_share": 0.5,
        **settings,
    }
    config = CPTConfig(output_dir=str(output), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    return CPTTrainer(
        MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6),
        config,
        train_dataset=CPTMixture(sources(folder), streaming=streaming, seed=config.seed),
        processing_class=tiny_processor(),
    )


def curve(trainer):
    """Return what is logged in training, without what depends on the clock."""
    timed = ("tokens_per_second", "tflops_per_device", "mfu")
    logged = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    return [{name: value for name, value in entry.items() if name not in timed} for entry in logged]


if __name__ == "__main__":
    values = {name: json.loads(value) for name, value in (argument.split("=") for argument in sys.argv[3:])}
    trainer = make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), **values)
    trainer.train(resume_from_checkpoint="auto")
    if not trainer.stopped and trainer.is_world_process_zero():
        (Path(sys.argv[2]) / "curve.json").write_text(json.dumps(curve(trainer)))
        trainer.model.save_pretrained(Path(sys.argv[2]) / "final")
