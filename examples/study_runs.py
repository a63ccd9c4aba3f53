"""What the study runs: backbone, stage 1, stage 2 and evaluation, each one job of one process.

A job is a function of plain values that returns a `dict` for JSON, so that `study.py` can run several at once, keep
their results and pass over those that are there.
"""

import io
import os
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from study_backbone import make_processor, next_token_training, save_untrained
from study_data import FAMILIES, labelled_pairs, searches, unlabelled_rows
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from modeling_moca import MoCaForPreTraining, MoCaModel
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer
from trainers.evaluation import retrieval_metrics

METRICS = ("P@1", "nDCG@5")
NUM_DEV_ROWS = 100  # of stage 1, at least, at equal distances
EIGHTHS = (1, 2, 4)  # of stage 1, after which the model is kept


def begin_process(scale):
    """Prepare a worker: with several jobs at a time, one thread each, and no progress bars between the lines."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // scale.num_processes) if scale.device == "cpu" else 1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def trainer_settings(folder, scale, seed):
    """Return the settings that all trainers share."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": scale.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        **scale.precision,
    }


def next_token_settings(folder, scale, seed, num_steps, learning_rate):
    """Return the settings of next-token training: those of stage 1, where it has the same ones."""
    return {
        **trainer_settings(folder, scale, seed),
        "max_steps": num_steps,
        "per_device_train_batch_size": scale.cpt_batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "max_grad_norm": 5.0,
        "train_sampling_strategy": "group_by_length",
    }


def make_backbone(folder, data, scale):
    """Train the small causal model, and write it with its two forms as MoCa models: causal and bidirectional."""
    start, untrained = time.perf_counter(), Path(folder) / "untrained"
    save_untrained(untrained, Path(data) / "tokenizer", scale)
    settings = next_token_settings(folder, scale, 0, scale.backbone_steps, scale.backbone_learning_rate)
    settings["dataloader_num_workers"] = 1  # nothing else runs yet
    rows = unlabelled_rows(data, "train", scale.num_characters)
    state = next_token_training(untrained, folder, rows, settings, scale)
    for name, bidirectional in (("causal", False), ("bidirectional", True)):
        _as_moca(folder, Path(folder) / name, bidirectional, scale)
    model = MoCaModel.from_pretrained(Path(folder) / "causal")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "history": _losses(state.log_history),
        "num_tokens": int(state.num_input_tokens_seen),
        "num_rows": len(rows),
        "num_parameters": parameters,
        "seconds": _since(start),
    }


def pretrain(folder, data, scale, backbone, settings, learning_rate, seed):
    """Stage 1, or with settings None next-token training in its place, on the same rows; return its losses and tokens.

    The models after an eighth, a quarter and a half lie beside the last one.
    """
    start, folder = time.perf_counter(), Path(folder)
    rows, dev = (unlabelled_rows(data, split, scale.num_characters) for split in ("train", "dev"))
    if settings is None:
        training = next_token_settings(folder / "vlm", scale, seed, scale.cpt_steps, learning_rate)
        state = next_token_training(backbone, folder / "vlm", rows, training, scale)
        _as_moca(folder / "vlm", folder / "last", False, scale)
        losses, num_tokens = _losses(state.log_history), int(state.num_input_tokens_seen)
        return {"history": losses, "num_tokens": num_tokens, "seconds": _since(start)}
    set_seed(seed)
    processor = make_processor(backbone, scale.num_image_tokens, scale.cpt_max_length)
    model = MoCaForPreTraining.from_backbone(backbone, mask_token_id=processor.mask_token_id, dtype=torch.float32)
    config = CPTConfig(
        **trainer_settings(folder, scale, seed),
        max_steps=scale.cpt_steps,
        per_device_train_batch_size=scale.cpt_batch_size,
        per_device_eval_batch_size=scale.cpt_batch_size,
        learning_rate=learning_rate,
        max_length=scale.cpt_max_length,
        on_bad_row="raise",
        train_sampling_strategy="group_by_length",
        **settings,
    )

    class KeepParts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for eighths in EIGHTHS:
                if state.global_step * 8 == eighths * state.max_steps:
                    _save(model, processor, folder / f"{eighths}-8")

    trainer = CPTTrainer(
        model,
        config,
        train_dataset=rows,
        eval_dataset=dev.shard(max(1, len(dev) // NUM_DEV_ROWS), 0),
        processing_class=processor,
        callbacks=[KeepParts()],
    )
    trainer.train()
    held_out = trainer.evaluate()
    _save(model, processor, folder / "last")
    return {
        "history": _losses(trainer.state.log_history),
        "num_tokens": trainer.training_record()["stages"][-1]["tokens"],
        "held_out": {name: held_out[f"eval_{name}"] for name in ("mlm_loss", "mae_loss") if f"eval_{name}" in held_out},
        "seconds": _since(start),
    }


def fine_tune(folder, data, scale, start_model, leave_out, task_batches, learning_rate, seed):
    """Stage 2; return its losses and what the model scores on the dev rows."""
    start = time.perf_counter()
    set_seed(seed)
    model = build_sentence_transformer(start_model, max_length=scale.pair_max_length, device=scale.device)
    model.model_card_data.generate_widget_examples = False
    config = ContrastiveConfig(
        **trainer_settings(folder, scale, seed),
        max_steps=scale.cl_steps,
        per_device_train_batch_size=scale.cl_batch_size,
        learning_rate=learning_rate,
        task_batches=task_batches,
        on_bad_row="raise",
    )
    trainer = ContrastiveTrainer(model, config, labelled_pairs(data, "train", scale.rows_per_class, leave_out))
    trainer.train()
    trainer.save_model(str(Path(folder) / "model"))
    trained = time.perf_counter()
    dev = evaluate(model, data, "dev", scale.num_dev_queries)
    return {
        "history": _losses(trainer.state.log_history),
        "num_tokens": trainer.training_record()["stages"][-1]["tokens"],
        "dev": {task: {name: statistics.mean(values) for name, values in found.items()} for task, found in dev.items()},
        "score": family_mean({task: statistics.mean(found["nDCG@5"]) for task, found in dev.items()}),
        "seconds": trained - start,
        "evaluation_seconds": _since(trained),
    }


def search_held_out(folder, data, scale, model):
    """Search the test rows with a model of stage 2; return every query's metrics by task."""
    loaded = build_sentence_transformer(model, max_length=scale.pair_max_length, device=scale.device)
    return {"test": evaluate(loaded, data, "test")}


def evaluate(model, data, split, num_queries=None):
    """Return for every task and metric the values of all queries (of the first `num_queries`, among all candidates)."""
    results = {}
    for task, search in searches(data, split).items():
        queries, candidates = (
            model.encode([_opened(side) for side in sides], batch_size=64, convert_to_tensor=True).float().cpu()
            for sides in (search["queries"][:num_queries], search["candidates"])
        )  # [Q, d], [C, d]
        found = [
            retrieval_metrics(query[None], candidates, [relevant])
            for query, relevant in zip(queries, search["relevant"])
        ]
        results[task] = {name: [one[name] for one in found] for name in METRICS}
    return results


def family_mean(by_task):
    """Return the mean over families of the means over their tasks."""
    return statistics.mean(statistics.mean(by_task[task] for task in tasks) for tasks in FAMILIES.values())


def _as_moca(backbone, folder, bidirectional, scale):
    processor = make_processor(backbone, scale.num_image_tokens, scale.pair_max_length)
    model = MoCaModel.from_backbone(
        backbone, bidirectional=bidirectional, mask_token_id=processor.mask_token_id, dtype=torch.float32
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _opened(side):
    opened = {key: value for key, value in side.items() if key == "text"}
    if "image" in side:
        with Image.open(io.BytesIO(side["image"])) as image:
            opened["image"] = image.convert("RGB")
    return opened


def _losses(history):
    names = ("loss", "mlm_loss", "mae_loss")
    return [
        {name: entry[name] for name in ("step", *names) if name in entry}
        for entry in history
        if any(name in entry for name in names)
    ]


def _since(start):
    return time.perf_counter() - start
