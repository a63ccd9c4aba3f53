"""Continual pre-training (MoCa stage 1): reconstruct masked tokens and masked patches.

    accelerate launch examples/train_cpt.py --config examples/configs/cpt_tiny.yaml --max_steps 5

Every setting stands in the YAML file or on the command line, where it wins; an unknown key is an error. The output
folder holds model and processor, and is what stage 2 starts from.

With `--use_peft true` only adapters in the language model (LoRA; with `--use_dora true` DoRA) and the MAE head learn;
checkpoints hold these alone, and the output folder the whole, merged model. A backbone that is converted in the run is
kept there as well, in `converted`, which checkpoints name. `--load_in_4bit true` or `--load_in_8bit true` keep other
weights quantised meanwhile: that needs bitsandbytes, and a MoCa folder to start from.
"""

import logging
import os
from dataclasses import dataclass, field

from transformers import AutoConfig, set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hub_cards import write_training_card
from modeling_moca import MoCaForPreTraining, MoCaProcessor
from trainers.adapters import NEW_MODULES, add_adapters, check_adapter_settings
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixture, CPTMixtureConfig
from trainers.cpt_trainer import CPTTrainer

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments(ModelConfig):
    """What this script itself needs: the model to start from, its adapters, and limits of images."""

    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct",
        metadata={"help": "A stock vision-language model, or a MoCa pre-training folder to go on with."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the trained weights. Steps of 2e-6 vanish in bfloat16 weights: keep float32, and set "
            "`bf16: true` for the arithmetic.",
            "choices": ["float32", "bfloat16"],
        },
    )
    attn_implementation: str | None = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get adapters: the end of their names, or a regular expression of whole names; the "
            "linear maps of the language model's layers when not set."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that learn in full beside adapters; the MAE head when not set."}
    )
    lora_task_type: str | None = field(
        default=None, metadata={"help": "Must stay unset: peft would put the task's forward before the model's own."}
    )
    processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Where tokenizer and image processor come from, for a checkpoint that brings none (the published "
            "MoCa models: the Qwen checkpoint they were made from)."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smaller images are enlarged to this area; 256 image tokens when not set."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Larger images are shrunk to this area; 1024 image tokens when not set."}
    )
    longest_edge: int | None = field(
        default=None,
        metadata={"help": "Idefics3 and SmolVLM instead: side that images are resized to before they become tiles."},
    )


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    parser = TrlParser((ScriptArguments, CPTMixtureConfig, CPTConfig))
    script_args, mixture, training_args = parser.parse_args_and_config()
    check_adapter_settings(script_args)
    set_seed(training_args.seed)

    name, revision = script_args.model_name_or_path, script_args.model_revision
    is_moca = AutoConfig.from_pretrained(name, revision=revision).model_type == "moca"
    limits = {key: getattr(script_args, key) for key in ("min_pixels", "max_pixels") if getattr(script_args, key)}
    if script_args.longest_edge is not None:
        limits["size"] = {"longest_edge": script_args.longest_edge}
    if script_args.processor_name is not None:
        if is_moca:
            raise ValueError(
                f"{name} brings its own processor: leave processor_name unset, got {script_args.processor_name}."
            )
        limits["processor_name"] = script_args.processor_name
    load_processor = MoCaProcessor.from_pretrained if is_moca else MoCaProcessor.from_backbone
    processor = load_processor(name, revision=revision, max_length=training_args.max_length, **limits)
    load_model = MoCaForPreTraining.from_pretrained if is_moca else MoCaForPreTraining.from_backbone
    quantized = {}
    if (quantization := get_quantization_config(script_args)) is not None:
        if not is_moca:
            raise ValueError(
                f"Quantised weights are not converted: load_in_4bit and load_in_8bit need a MoCa folder "
                f"(examples/convert.py --for-training), got {name}."
            )
        quantization.llm_int8_skip_modules = [*NEW_MODULES, "mlm_head"]
        quantized["quantization_config"] = quantization
    model = load_model(
        name,
        revision=revision,
        mask_token_id=processor.tokenizer.mask_token_id,
        dtype=script_args.dtype,
        attn_implementation=script_args.attn_implementation,
        **quantized,
    )
    if (peft_config := get_peft_config(script_args)) is not None:
        if is_moca:
            peft_config.revision = revision
        else:
            # What adapters belong to must lie somewhere: checkpoints hold these alone, and name it.
            model.name_or_path = os.path.abspath(os.path.join(training_args.output_dir, "converted"))
            if training_args.should_save:
                model.save_pretrained(model.name_or_path)
                processor.save_pretrained(model.name_or_path)
        model = add_adapters(model, peft_config)

    with training_args.main_process_first(desc="loading the data"):
        rows = CPTMixture(mixture.datasets, streaming=mixture.streaming, seed=training_args.seed)
    eval_rows = rows.split(mixture.test_split_size) if mixture.test_split_size is not None else None

    trainer = CPTTrainer(
        model,
        training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        card_writer=write_training_card,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.stopped:
        logger.info("Stopped by a signal; go on with --resume_from_checkpoint true.")
        return
    if eval_rows is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    logger.info("Model and processor are in %s.", training_args.output_dir)


if __name__ == "__main__":
    main()
