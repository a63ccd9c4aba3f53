"""Training a part of the weights: a frozen vision tower, and adapters (LoRA, DoRA) that are merged in the end."""

import copy
import re

# New with the pre-training model, hence trained in full beside adapters.
NEW_MODULES = ("mae_head",)


def freeze_vision_tower(model):
    """Keep the vision tower as it is.

    What maps its output to the language model (Qwen-VL: the merger and, in Qwen3-VL, the deepstack mergers; Idefics3
    and SmolVLM: the connector) goes on learning, as in Qwen's own fine-tuning.

    Args:
        model ([`MoCaForPreTraining`]): changed in place; with adapters or without.
    """
    tower = model.moca.backbone.get_encoder(modality="image")
    for name, parameter in tower.named_parameters():
        if "merger" not in name:
            parameter.requires_grad_(False)


def language_model_layers(model):
    """Return a regular expression for the linear maps of the language model's layers, for `target_modules` of peft.

    Their short names would also hit the vision tower and the MAE decoder, which have a `gate_proj` of their own.

    Args:
        model ([`MoCaForPreTraining`]): the model that will get adapters.

    Returns:
        `str`: matches whole module names.
    """
    language_model = model.moca.language_model
    name = next(name for name, module in model.named_modules() if module is language_model)
    return rf"{re.escape(name)}\.layers\.\d+\..*_proj"


def add_adapters(model, peft_config):
    """Put adapters into the language model, and train the MAE head, which is new, in full beside them.

    Args:
        model ([`MoCaForPreTraining`]): its modules are changed in place.
        peft_config ([`~peft.LoraConfig`]): `target_modules` is [`language_model_layers`] and `modules_to_save` is
            `["mae_head"]` when not set; peft puts no adapters inside the latter.

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

    if peft_config.task_type is not None:
        raise ValueError(
            f"task_type must be None, got {peft_config.task_type!r}: another task's forward would not pass on patch "
            "masks and counts. In YAML: `lora_task_type: null`."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = language_model_layers(model)
    if peft_config.modules_to_save is None:
        peft_config.modules_to_save = list(NEW_MODULES)
    return get_peft_model(model, peft_config)


def is_adapted(model):
    """Tell whether a model (`nn.Module`) carries adapters of peft, which need not be installed."""
    return hasattr(model, "merge_and_unload")


def merge_adapters(model):
    """Return a whole model from one with adapters, which is left as it is.

    Args:
        model ([`~peft.PeftModel`]): on one device; a copy of it, or for a quantised one its checkpoint at full
            precision, is in memory for a while.

    Returns:
        [`MoCaForPreTraining`]
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config = copy.deepcopy(model.active_peft_config)
        whole = type(base).from_pretrained(config.base_model_name_or_path, revision=config.revision)
        model_state = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = get_peft_model(whole, config)
        set_peft_model_state_dict(model, model_state)
    else:
        model = copy.deepcopy(model)
    return model.merge_and_unload()


__all__ = ["add_adapters", "freeze_vision_tower", "is_adapted", "language_model_layers", "merge_adapters"]
