"""Stage 2: contrastive fine-tuning of a MoCa checkpoint, on one data set a task.

    accelerate launch examples/train_contrastive.py --config examples/configs/contrastive_tiny.yaml \
        --model_name_or_path OUT_OF_STAGE_1

Settings come from the YAML file; flags override them and unknown keys are errors. The fields are those of
`ScriptArguments` below, trl's `ModelConfig` and `trainers.ContrastiveConfig`. The output folder is a
sentence-transformers model; `examples/export.py` publishes it.
"""

import json
import logging
import os
from dataclasses import dataclass, field

import datasets
from trl import ModelConfig, TrlParser

from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_data import convert_moca_pairs
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer

logger = logging.getLogger(__name__)

_TASK_KEYS = {"path", "name", "split", "data_files", "image_folder", "num_negatives"}


@dataclass
class ScriptArguments:
    """Which data to train on.

    Args:
        datasets: data sets by task (JSON on the command line). Each is a parquet file, a folder of parquet files, a
            Hub id, or a mapping: `path`, `name`, `split` and `data_files` as `datasets.load_dataset` takes them, and
            for the published pairs `image_folder` and `num_negatives` (default 2).
        eval_datasets: the same, for the evaluation loss; none by default.
        resume: continue from the newest checkpoint in the output folder.
    """

    datasets: dict | str | None = field(default=None, metadata={"help": "Data sets by task, as a mapping."})
    eval_datasets: dict | str | None = field(
        default=None, metadata={"help": "Data sets of the evaluation loss, by task."}
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the newest checkpoint."})

    def __post_init__(self):
        for name in ("datasets", "eval_datasets"):
            value = getattr(self, name)
            value = json.loads(value) if isinstance(value, str) else value or {}
            if not isinstance(value, dict):
                raise ValueError(f"{name} must map tasks to data sets, got {value!r}.")
            setattr(self, name, value)
        if not self.datasets:
            raise ValueError("datasets is empty: name at least one task, for example {'captions': 'captions.parquet'}.")


def load_task(task, spec):
    """Load one task's rows; see `ScriptArguments.datasets` for the forms of `spec`."""
    spec = {"path": spec} if isinstance(spec, str) else dict(spec)
    if unknown := sorted(set(spec) - _TASK_KEYS):
        raise ValueError(f"Data set {task!r} has the unknown keys {unknown}; allowed are {sorted(_TASK_KEYS)}.")
    image_folder, num_negatives = spec.pop("image_folder", None), spec.pop("num_negatives", 2)
    spec.setdefault("split", "train")
    path = spec["path"]
    if os.path.isdir(path):
        rows = datasets.load_dataset("parquet", data_files=os.path.join(path, "*.parquet"), split="train")
    elif path.endswith(".parquet"):
        rows = datasets.load_dataset("parquet", data_files=path, split="train")
    else:
        rows = datasets.load_dataset(**spec)
    if image_folder is not None:
        rows = convert_moca_pairs(rows, image_folder, num_negatives)
    logger.info("task %s: %d rows from %s", task, len(rows), path)
    return rows


def main():
    """Parse, load, train, save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    script_args, model_args, training_args = TrlParser(
        (ScriptArguments, ModelConfig, ContrastiveConfig)
    ).parse_args_and_config()
    model = build_sentence_transformer(
        model_args.model_name_or_path,
        max_length=training_args.max_length,
        # float32 weights by default; bf16 in the training arguments computes in bfloat16 on top of them.
        model_kwargs={"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation},
        # Trainer decides where the model goes.
        device="cpu",
    )
    # The first process prepares the cache that the others read.
    with training_args.main_process_first(local=False):
        train = {task: load_task(task, spec) for task, spec in script_args.datasets.items()}
        evaluation = {task: load_task(task, spec) for task, spec in script_args.eval_datasets.items()}
    trainer = ContrastiveTrainer(model, training_args, train, evaluation or None)
    trainer.train(resume_from_checkpoint=script_args.resume or None)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
