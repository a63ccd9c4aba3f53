"""Training a part of the weights: a frozen vision tower, and adapters (LoRA, DoRA) that are merged in the end."""

import copy
import os
import re
from dataclasses import fields

from safetensors.torch import load_file

# New with the pre-training model, hence trained in full beside adapters.
NEW_MODULES = ("mae_head",)


def freeze_vision_tower(model):
    """Keep the vision tower as it is.

    What maps its output to the language model (Qwen-VL: the merger and, in Qwen3-VL, the deepstack mergers; Idefics3
    and SmolVLM: the connector) goes on learning, as in Qwen's own fine-tuning.

    Args:
        model ([`MoCaForPreTraining`] or [`MoCaModel`]): changed in place; with adapters or without.
    """
    tower = getattr(model, "moca", model).backbone.get_encoder(modality="image")
    for name, parameter in tower.named_parameters():
        if "merger" not in name:
            parameter.requires_grad_(False)


def language_model_layers(model):
    """Return a regular expression for the linear maps of the language model's layers, for `target_modules` of peft.

    Their short names would also hit the vision tower and the MAE decoder, which have a `gate_proj` of their own.

    Args:
        model ([`MoCaForPreTraining`] or [`MoCaModel`]): the model that will get adapters.

    Returns:
        `str`: matches whole module names.
    """
    language_model = getattr(model, "moca", model).language_model
    name = next(name for name, module in model.named_modules() if module is language_model)
    # With the outer name or without: AutoModel loads adapters of the pre-training model into the model inside it.
    name = re.sub(r"^moca\\\.", r"(moca\\.)?", re.escape(name))
    return rf"{name}\.layers\.\d+\..*_proj"


def add_adapters(model, peft_config):
    """Put adapters into the language model, and train the MAE head, which is new, in full beside them.

    Args:
        model ([`MoCaForPreTraining`]): its modules are changed in place. Checkpoints hold adapters alone, and name
            what the model was loaded from: save and load one that was converted in memory, or they will not open.
        peft_config ([`~peft.LoraConfig`]): `target_modules` is [`language_model_layers`] and `modules_to_save` is
            `["mae_head"]` when not set; peft puts no adapters inside the latter. Set `revision` to that of a quantised
            model: it is merged with the checkpoint that it was made from.

    Returns:
        [`~peft.PeftModel`], for [`CPTTrainer`].

    Raises:
        ValueError: a `task_type`, which would put another forward before the model's own.

    Example:

    ```python
    >>> model = add_adapters(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05))
    ```
    """
    from peft import get_peft_model

    _prepare(peft_config, model)
    if peft_config.modules_to_save is None:
        peft_config.modules_to_save = list(NEW_MODULES)
    return get_peft_model(model, peft_config)


def add_embedding_adapters(model, peft_config):
    """Put adapters into the language model of a sentence-transformers model; nothing else learns.

    They go where sentence-transformers' own `add_adapter` puts them: inside the layers, so that the model keeps its
    class, and with it its forward pass, its configuration, and saving.

    Args:
        model ([`~sentence_transformers.SentenceTransformer`]): changed in place.
        peft_config ([`~peft.LoraConfig`]): `target_modules` is [`language_model_layers`] when not set. Set `revision`
            to that of a quantised model: it is merged with the checkpoint that it was made from.

    Raises:
        ValueError: a `task_type`: stage 2 has none.

    Example:

    ```python
    >>> model = build_sentence_transformer("output/stage1")
    >>> add_embedding_adapters(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05))
    ```
    """
    _prepare(peft_config, model.transformers_model)
    model.add_adapter(peft_config)


def _prepare(peft_config, model):
    """Refuse a task, and choose the language model's layers if nothing is chosen."""
    if peft_config.task_type is not None:
        raise ValueError(
            f"task_type must be None, got {peft_config.task_type!r}: another task's forward would not pass on patch "
            "masks and counts. In YAML: `lora_task_type: null`."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = language_model_layers(model)


def check_adapter_settings(settings):
    """Refuse settings of adapters and of quantisation that would have no effect.

    Args:
        settings ([`~trl.ModelConfig`]): what a script was told.

    Raises:
        ValueError: a `lora_*` setting, `use_dora`, `use_rslora` or a quantisation without `use_peft`; a setting of
            4-bit weights without `load_in_4bit`.
    """
    changed = sorted(field.name for field in fields(settings) if getattr(settings, field.name) != field.default)
    needs_adapters = [name for name in changed if name.startswith(("lora_", "use_dora", "use_rslora", "load_in_"))]
    if needs_adapters and not settings.use_peft:
        raise ValueError(f"{needs_adapters} have no effect without adapters: set use_peft, or leave them out.")
    needs_4bit = [name for name in changed if name.startswith(("bnb_4bit_", "use_bnb_"))]
    if needs_4bit and not settings.load_in_4bit:
        raise ValueError(f"{needs_4bit} have no effect without 4-bit weights: set load_in_4bit, or leave them out.")


def is_adapted(model):
    """Tell whether a model (`nn.Module`) carries adapters of peft, which need not be installed."""
    return hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False)


def load_adapters(model, folder):
    """Give a model back the adapters that a checkpoint holds; its other weights stay.

    Args:
        model ([`MoCaModel`]): with adapters inside its layers ([`add_embedding_adapters`]).
        folder (`str`): holds `adapter_model.safetensors`.

    Raises:
        ValueError: the checkpoint's adapters are not those of the model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    saved = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = sorted(
        name
        for name in {*saved, *expected}
        if name not in saved or name not in expected or saved[name].shape != expected[name].shape
    )
    if differing:
        raise ValueError(
            f"The adapters in {folder} are not those of this run: {len(differing)} weights are missing, unexpected or "
            f"of another shape, {differing[0]} for one. Go on with the settings it was saved with."
        )
    set_peft_model_state_dict(model, saved)


def merge_adapters(model):
    """Return a whole model from one with adapters, which is left as it is.

    Args:
        model ([`~peft.PeftModel`], or [`MoCaModel`] with adapters inside its layers): on one device; a copy of it, or
            for a quantised one its checkpoint at full precision, is in memory for a while.

    Returns:
        [`MoCaForPreTraining`] or [`MoCaModel`]
    """
    wrapped = hasattr(model, "merge_and_unload")
    base = model.get_base_model() if wrapped else model
    if getattr(base, "is_quantized", False):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config = copy.deepcopy(model.active_peft_config if wrapped else model.peft_config[model.active_adapters()[0]])
        whole = type(base).from_pretrained(config.base_model_name_or_path, revision=config.revision)
        model_state = get_peft_model_state_dict(model, save_embedding_layers=False)
        if wrapped:
            model = get_peft_model(whole, config)
        else:
            model = whole
            model.add_adapter(config)
        set_peft_model_state_dict(model, model_state)
    else:
        model = copy.deepcopy(model)
    return model.merge_and_unload() if wrapped else _merge_layers(model)


def _merge_layers(model):
    """Merge adapters inside a model's layers, in place; peft does so for models that it wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if hasattr(module, "unload_and_optionally_merge_module"):  # modules_to_save
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            whole = module.get_base_layer()
        else:
            continue
        model.set_submodule(name, whole)
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model


__all__ = [
    "add_adapters",
    "add_embedding_adapters",
    "check_adapter_settings",
    "freeze_vision_tower",
    "is_adapted",
    "language_model_layers",
    "load_adapters",
    "merge_adapters",
]
