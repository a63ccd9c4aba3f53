"""Load what training left: whole models, and adapters, which are merged into the model they were trained on."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from modeling_moca import MoCaConfig, MoCaForPreTraining, MoCaModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Beside adapters the trainers keep the configuration under this name: transformers takes a folder with a `config.json`
# for a whole model.
MOCA_CONFIG = "moca_config.json"
# What it says beyond the configuration of the model that training started from.
SETTINGS = ("bidirectional", "pooling", "mask_token_id", "shift_labels", "mae_loss_weight")


def load_checkpoint(folder, model_class=MoCaModel, dtype="auto"):
    """Load a MoCa model from a folder, with its adapters merged if it holds these alone.

    Args:
        folder (`pathlib.Path`): of either stage; of adapters (LoRA, DoRA) the model that they were trained on is loaded
            from where their `adapter_config.json` says.
        model_class (`type`): [`modeling_moca.MoCaModel`] or [`modeling_moca.MoCaForPreTraining`].
        dtype (`str`, defaults to `"auto"`): type of the weights, after merging; that of the checkpoint by default.

    Raises:
        ValueError: files or weights are missing, the folder or what adapters were trained on is no MoCa model.
    """
    folder = Path(folder)
    has_adapters = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    _check_files(folder, has_adapters)
    if has_adapters:
        return _merged(folder, model_class, dtype)
    _check_model_type(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    return model_class.from_pretrained(folder, dtype=dtype)


def _check_files(folder, has_adapters):
    weights = ADAPTER_WEIGHTS if has_adapters else "*.safetensors"
    needed = ["processor_config.json", "tokenizer_config.json", weights]
    missing = [name for name in ([] if has_adapters else ["config.json"]) + needed if not list(folder.glob(name))]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing}: give a folder with both model and processor, as the trainers write it."
        )


def _check_model_type(name, model_type):
    if model_type != MoCaConfig.model_type:
        raise ValueError(
            f"{name} holds a model of type {model_type!r}, allowed is {MoCaConfig.model_type!r}: convert it with "
            "examples/convert.py or MoCaModel.from_backbone."
        )


def _merged(folder, model_class, dtype):
    """Return the model that adapters were trained on, with these merged into its weights."""
    from peft import PeftConfig, PeftModel

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        # Those of stage 1 are adapters of the pre-training model, whatever is made of it.
        of_pretraining = any(name.startswith("base_model.model.moca.") for name in file.keys())  # noqa: SIM118
    if model_class is MoCaForPreTraining and not of_pretraining:
        raise ValueError(f"{folder} holds adapters of an embedding model, which has no pre-training heads.")
    base = _base_model(folder, PeftConfig.from_pretrained(folder), MoCaForPreTraining if of_pretraining else MoCaModel)
    model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    if of_pretraining and model_class is MoCaModel:
        model = model.moca
    return (model if dtype == "auto" else model.to(getattr(torch, dtype))).eval()


def _base_model(folder, peft_config, model_class):
    """Load what adapters were trained on: a MoCa model, or the backbone that training converted."""
    name, revision = peft_config.base_model_name_or_path, peft_config.revision
    if not name:
        raise ValueError(
            f"The adapters in {folder} do not say what they were trained on, as after a conversion in memory: export "
            "the run's final folder, in which they are merged; or save and load the model before it gets adapters."
        )
    path = folder / MOCA_CONFIG
    settings = {}
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = {key: config[key] for key in SETTINGS}
    if AutoConfig.from_pretrained(name, revision=revision).model_type == MoCaConfig.model_type:
        return model_class.from_pretrained(name, revision=revision, **settings)
    raise ValueError(
        f"The adapters in {folder} were trained on {name}, which is no MoCa model: export the run's final folder."
    )
