"""Stage 2: contrastive fine-tuning of a MoCa checkpoint, on several data sets of pairs.

    accelerate launch examples/train_contrastive.py --config examples/configs/contrastive_tiny.yaml \
        --model_name_or_path OUT_OF_STAGE_1

Settings come from the YAML file; flags override them and unknown keys are errors. The fields are those of
`trainers.PairMixtureConfig` (the data), trl's `ModelConfig` and `trainers.ContrastiveConfig`. The output folder is a
sentence-transformers model; `examples/export.py` publishes it.

With `--use_peft true` only adapters in the language model learn (LoRA; with `--use_dora true` DoRA); checkpoints hold
these alone, and the output folder the whole, merged model. `--load_in_4bit true` or `--load_in_8bit true` keep the
other weights quantised meanwhile: that needs bitsandbytes.
"""

import logging
from dataclasses import dataclass, field

from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hub_cards import write_training_card
from trainers.adapters import add_embedding_adapters, check_adapter_settings
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_mixture import PairMixture, as_columns, prompts_of
from trainers.contrastive_sources import PairMixtureConfig
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments(ModelConfig):
    """What this script itself needs: the model to start from, and its adapters."""

    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get adapters: the end of their names, or a regular expression of whole names; the "
            "linear maps of the language model's layers when not set."
        },
    )
    lora_task_type: str | None = field(
        default=None, metadata={"help": "Must stay unset: this is none of peft's tasks."}
    )


def main():
    """Parse, load, train, save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    mixture, model_args, training_args = TrlParser(
        (PairMixtureConfig, ScriptArguments, ContrastiveConfig)
    ).parse_args_and_config()
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: it names the MoCa model to start from, as stage 1 leaves it.")
    check_adapter_settings(model_args)
    # New adapters are drawn by chance.
    set_seed(training_args.seed)
    # float32 weights by default; bf16 in the training arguments computes in bfloat16 on top of them.
    model_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    # Trainer decides where the model goes; quantised weights are made where they stay.
    device = "cpu"
    if (quantization := get_quantization_config(model_args)) is not None:
        device = str(training_args.device)
        model_kwargs |= {"quantization_config": quantization, "device_map": {"": device}}
    model = build_sentence_transformer(
        model_args.model_name_or_path,
        max_length=training_args.max_length,
        model_kwargs=model_kwargs,
        device=device,
        revision=model_args.model_revision,
    )
    if (peft_config := get_peft_config(model_args)) is not None:
        peft_config.revision = model_args.model_revision
        add_embedding_adapters(model, peft_config)
    # The first process of each machine prepares the cache that the others read.
    with training_args.main_process_first(desc="loading the data"):
        train = PairMixture(
            mixture.datasets,
            streaming=mixture.streaming,
            seed=training_args.seed,
            num_proc=training_args.dataloader_num_workers or None,
        )
        evaluation = as_columns(mixture.eval_datasets, seed=training_args.seed)
    if mixture.eval_datasets:
        training_args.prompts = {**prompts_of(mixture.eval_datasets), **(training_args.prompts or {})} or None
    trainer = ContrastiveTrainer(model, training_args, train, evaluation or None, card_writer=write_training_card)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.stopped:
        logger.info("Stopped by a signal; go on with --resume_from_checkpoint true.")
        return
    trainer.save_model(training_args.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
