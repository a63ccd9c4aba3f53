"""Train a tiny model on a mixture of pairs in a process of its own, for tests that kill it.

Started as `python contrastive_run.py FOLDER OUTPUT [name=value ...]`; FOLDER holds the model `start` and what
`write_mixture` writes.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, set_seed

from tests.trainers.pair_sources import published_rows, write_images, write_pages, write_texts
from trainers.adapters import add_embedding_adapters
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_mixture import PairMixture
from trainers.contrastive_sources import PairSource
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer

# Rows of the published layout that are bad: an image is truncated, a query is empty.
BAD_ROWS = (5, 11)


def write_mixture(folder):
    """Write three data sets to the folder (`Path`), each in two files."""
    write_pages(folder / "pages", 20, num_files=2)
    write_texts(folder / "texts", 34, num_files=2)
    write_images(folder / "images", 24)
    rows = published_rows(24)
    rows[BAD_ROWS[1]].update(qry=" ", qry_image_path="")
    image = folder / "images" / f"{BAD_ROWS[0]}.png"
    image.write_bytes(image.read_bytes()[:60])
    for part in range(2):
        datasets.Dataset.from_list(rows[part::2]).to_parquet(folder / "published" / f"{part}.parquet")


def sources(folder, **settings):
    """Return the three data sets in the folder (`Path`)."""

    def source(name, layout, **own):
        files = str(folder / name / "*.parquet")
        return PairSource("parquet", data_files=files, task=name, layout=layout, **{**own, **settings})

    return [
        source("pages", "pages", kind="long_form", batch_size=2, document_instruction="A page: "),
        source("texts", "text_pairs", kind="text", query_instruction="Find: "),
        source("published", "moca_pairs", kind="multimodal", image_folder=str(folder / "images")),
    ]


def make_trainer(folder, output, streaming=False, trainer_class=ContrastiveTrainer, adapters=None, **settings):
    """Return a trainer on the mixture of the folder (`Path`); with `adapters`, settings of peft, only these learn.

    Among them `load_in_4bit` quantises the other weights.
    """
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 2,
        "shuffle_window": 6,
        # Neither every step, nor in step with each other.
        "logging_steps": 3,
        "save_steps": 2,
        "max_bad_row_share": 0.5,
        "mini_batch_size": 2,
        **settings,
    }
    config = ContrastiveConfig(output_dir=str(output), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    adapters, model_kwargs = adapters and dict(adapters), None
    if adapters is not None and adapters.pop("load_in_4bit", False):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model_kwargs = {"quantization_config": quantization, "device_map": {"": "cpu"}}
    model = build_sentence_transformer(folder / "start", device="cpu", model_kwargs=model_kwargs)
    if adapters is not None:
        set_seed(config.seed)
        add_embedding_adapters(model, LoraConfig(**adapters))
    return trainer_class(model, config, PairMixture(sources(folder), streaming=streaming, seed=config.seed))


def curve(trainer):
    """Return what is logged in training, without what depends on the clock."""
    logged = [entry for entry in trainer.state.log_history if "rows_per_second" in entry]
    clocked = ("rows_per_second", "tokens_per_second", "tflops_per_device")
    return [{name: value for name, value in entry.items() if name not in clocked} for entry in logged]


if __name__ == "__main__":
    values = {name: json.loads(value) for name, value in (argument.split("=") for argument in sys.argv[3:])}
    trainer = make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), **values)
    trainer.train(resume_from_checkpoint="auto")
    if not trainer.stopped and trainer.is_world_process_zero():
        (Path(sys.argv[2]) / "curve.json").write_text(json.dumps(curve(trainer)))
        trainer.save_model(str(Path(sys.argv[2]) / "final"))
