"""Train both stages for a few steps with trackers, in a process of its own, since trackers start threads and servers.

Started as `python tracked_run.py FOLDER TRACKER ...`; leaves `FOLDER/<stage>/history.json`, what was logged,
`FOLDER/<stage>/trackio.json`, what trackio kept of it, `FOLDER/<stage>/run.wandb`, what wandb did, and
`FOLDER/connections.json`, the hosts that were connected to.
"""

import json
import shutil
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.contrastive_cases import build, mixed_task, save_checkpoint, texts_task
from tests.trainers.cpt_rows import make_rows
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer


def settings(folder, stage, trackers):
    return {
        "output_dir": str(folder / stage),
        "report_to": trackers,
        "project": stage,
        "run_name": "tiny",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
    }


def cpt_trainer(folder, trackers):
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    config = CPTConfig(**settings(folder, "cpt", trackers), max_length=256)
    rows, dev_rows = make_rows(12), make_rows(4)
    return CPTTrainer(model, config, train_dataset=rows, eval_dataset=dev_rows, processing_class=tiny_processor())


def contrastive_trainer(folder, trackers):
    model = build(save_checkpoint(folder / "start"))
    config = ContrastiveConfig(**settings(folder, "contrastive", trackers))
    tasks = {"texts": texts_task(8), "mixed": mixed_task(8)}
    return ContrastiveTrainer(model, config, tasks, {"texts": texts_task(8), "mixed": mixed_task(8)})


def main(folder, trackers):
    connections = []
    connect = socket.socket.connect

    def recording(self, address):
        connections.append(str(address[0]) if isinstance(address, tuple) else "local")
        return connect(self, address)

    socket.socket.connect = recording
    for make in (cpt_trainer, contrastive_trainer):
        trainer = make(folder, trackers)
        trainer.train()
        output = Path(trainer.args.output_dir)
        (output / "history.json").write_text(json.dumps(trainer.state.log_history))
        if "trackio" in trackers:
            # Its folder is chosen when it is imported.
            from trackio.sqlite_storage import SQLiteStorage

            (output / "trackio.json").write_text(json.dumps(SQLiteStorage.get_logs(trainer.args.project, run="tiny")))
        if "wandb" in trackers:
            import wandb

            log = wandb.run.settings.sync_file
            # Else the next stage goes on with this run.
            wandb.finish()
            shutil.copy(log, output / "run.wandb")
    (folder / "connections.json").write_text(json.dumps(connections))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
