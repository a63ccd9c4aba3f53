"""Small checkpoints and rows for the tests of stage 2, and the program that two ranks run:
`accelerate launch tests/trainers/contrastive_cases.py MODEL_FOLDER OUTPUT_FOLDER`.
"""

import json
import sys
from io import BytesIO
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback, set_seed

from modeling_moca import MoCaForPreTraining
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers import contrastive_run
from trainers.adapters import add_embedding_adapters
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_evaluation import RetrievalSet, evaluate_retrieval
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer

WORDS = ("sea", "sky", "page", "picture", "tide", "harbour", "night", "lamp", "boat", "rope", "sand", "gull")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "brown", "pink", "gray", "cyan", "orange")


# The third one: how the authors' released code puts its batches together, and which negatives it counts.
SCENARIOS = {
    "plain": {"symmetric": True},
    "cached": {"symmetric": True, "mini_batch_tokens": 40, "matryoshka_dims": [32, 8]},
    "reference": {"all_negatives": False, "task_batches": False, "mask_equal_positives": False},
    "adapters": {"adapters": {"r": 4}, "mini_batch_size": 2},
}


def save_checkpoint(folder):
    """Write what stage 1 leaves: a tiny pre-training model, heads included, and its processor."""
    MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def picture(index):
    return Image.new("RGB", (28 * (1 + index % 2), 28), COLOURS[index % 12])


def texts_task(num_rows=8):
    """Texts only, two hard negatives a row, some missing, one blank, one equal to the positive."""
    rows = [
        {
            "query": f"the {WORDS[index % 12]} {index}",
            "positive": f"a picture of the {WORDS[index % 12]} {index}",
            "negative_1": None if index % 3 == 0 else f"no {WORDS[(index + 1) % 12]}",
            "negative_2": " " if index % 4 == 0 else f"the {WORDS[(index + 5) % 12]} " * 3,
        }
        for index in range(num_rows)
    ]
    rows[1]["negative_1"] = rows[1]["positive"]
    return datasets.Dataset.from_list(rows)


def mixed_task(num_rows=8):
    """Sides of text, image, both; one hard negative, often missing."""
    image = datasets.Image()
    sides = {"text": datasets.Value("string"), "image": image}
    features = datasets.Features({"query": sides, "positive": sides, "negative_1": image})
    rows = [
        {
            "query": {"text": f"find the {COLOURS[index % 12]} page", "image": None},
            "positive": {"text": None if index % 2 else f"page {index}", "image": picture(index)},
            "negative_1": picture(index + 3) if index % 4 == 1 else None,
        }
        for index in range(num_rows)
    ]
    rows[2]["query"]["image"] = picture(2)
    rows[3]["positive"] = {"text": f"{COLOURS[3]} page", "image": None}
    return datasets.Dataset.from_list(rows, features=features)


def damaged_task():
    """Pairs of a text and an image; the image of the last of four rows is cut off."""
    with BytesIO() as file:
        picture(1).save(file, "PNG")
        image = file.getvalue()
    images = [image, image, image, image[:60]]
    rows = [{"query": f"page {number}", "positive": {"bytes": image}} for number, image in enumerate(images)]
    features = datasets.Features({"query": datasets.Value("string"), "positive": datasets.Image()})
    return datasets.Dataset.from_list(rows, features=features)


def build(model_folder, **kwargs):
    return build_sentence_transformer(model_folder, device="cpu", **kwargs)


def arguments(output_folder, **kwargs):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "warmup_steps": 0,
    }
    return ContrastiveConfig(output_dir=str(output_folder), **{**defaults, **kwargs})


RETRIEVAL_NAMES = ("ndcg_at_10", "p_at_1")


class GradientRecorder(TrainerCallback):
    """Keep the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        # A step without images gives the vision tower no gradient in one process, and zeros in several.
        self.steps.append(
            {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in model.named_parameters()
            }
        )


class RecordingTrainer(ContrastiveTrainer):
    """Remember which task each step's batch is of."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.tasks_seen = [*getattr(self, "tasks_seen", []), inputs.get("dataset_name")]
        return super().compute_loss(model, inputs, *args, **kwargs)


def run(model_folder, output_folder, global_batch_size, world_size, adapters=None, **settings):
    """Train one epoch in float64, with `adapters`, settings of peft, only these.

    Returns:
        The logs, the gradients of every step, the tasks of this rank's batches, what evaluation finds, and the weights.
    """
    model = build(model_folder, model_kwargs={"dtype": torch.float64})
    if adapters is not None:
        set_seed(0)
        add_embedding_adapters(model, LoraConfig(**adapters))
    recorder = GradientRecorder()
    trainer = RecordingTrainer(
        model,
        arguments(
            output_folder,
            per_device_train_batch_size=global_batch_size // world_size,
            per_device_eval_batch_size=global_batch_size // world_size,
            max_grad_norm=0.0,
            optim="sgd",
            **{"learning_rate": 0.05, **settings},
        ),
        {"texts": texts_task(16), "mixed": mixed_task(16)},
        callbacks=[recorder],
    )
    assert trainer.args.world_size == world_size, trainer.args.world_size
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # One full global batch and a partial one of two rows.
    metrics = trainer.evaluate({"texts": texts_task(10), "mixed": mixed_task(9)})
    names = ["eval_texts_loss", *(f"eval_{task}_{name}" for task in ("texts", "mixed") for name in RETRIEVAL_NAMES)]
    evaluation = {name: metrics[name] for name in names}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return history, recorder.steps, trainer.tasks_seen[: len(history)], evaluation, weights


RESUMED = {"False": (False, None), "True": (True, None), "adapters": (False, {"r": 4, "lora_dropout": 0.1})}


def resume(folder, name, streaming, adapters):
    """Train on a mixture on two ranks, then again from the middle of an epoch; return logs and weights of both."""
    results = []
    for again in (False, True):
        # 24 batches an epoch, 2 a step.
        settings = {"max_steps": 5, "save_steps": 3, "save_strategy": "no" if again else "steps", "logging_steps": 2}
        output = folder / f"resume-{name}"
        trainer = contrastive_run.make_trainer(folder, output, streaming, adapters=adapters, **settings)
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if again else None)
        assert trainer.state.global_step == 5 and trainer.args.world_size == 2
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        results.append((contrastive_run.curve(trainer), weights))
    return results


def evaluate_damaged_rows(model_folder, output_folder):
    """Evaluate dev rows of which only the last rank gets the damaged one; return what this rank raises."""
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    trainer = ContrastiveTrainer(build(model_folder), arguments(output_folder, **settings), {"mixed": mixed_task(8)})
    rows = damaged_task()
    messages = []
    for evaluate in (
        lambda: trainer.evaluate({"dev": rows}),
        lambda: evaluate_retrieval(trainer, RetrievalSet(rows, "dev")),
    ):
        try:
            evaluate()
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def main():
    model_folder, output_folder = sys.argv[1], Path(sys.argv[2])
    for name, settings in SCENARIOS.items():
        history, gradients, tasks, evaluation, weights = run(model_folder, output_folder, 8, 2, **settings)
        rank = torch.distributed.get_rank()
        record = {"history": history, "tasks": tasks, "evaluation": evaluation}
        (output_folder / f"{name}-{rank}.json").write_text(json.dumps(record))
        torch.save((gradients, weights), output_folder / f"{name}-{rank}.pt")
    for name, how in RESUMED.items():
        torch.save(resume(output_folder, name, *how), output_folder / f"resume-{name}-{rank}.pt")
    messages = evaluate_damaged_rows(model_folder, output_folder)
    (output_folder / f"damaged-{rank}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
