"""Weights that ranks share (FSDP, ZeRO): sums over ranks are precise, and what is saved at the end is whole."""

from contextlib import contextmanager
from dataclasses import replace

import torch


def sum_in_float32(accelerator):
    """Let FSDP2 sum gradients over ranks and return losses in float32, whatever type the layers compute in.

    accelerate casts both to the type of `mixed_precision`: a loss in bfloat16 has three digits.

    Args:
        accelerator ([`~accelerate.Accelerator`]): changed in place, before a model is prepared; left alone without
            FSDP2 or without mixed precision.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if accelerator.is_fsdp2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def shard_by_layer(accelerator, model):
    """Let FSDP share the weights of a sentence-transformers model layer by layer.

    Such a model does not name its layers, so that accelerate would fetch all weights at once; and accelerate takes the
    module `Normalize`, which has no weights, for the last norm of a language model.

    Args:
        accelerator ([`~accelerate.Accelerator`]): changed in place, before a model is prepared; layers that its
            settings name stay.
        model ([`~sentence_transformers.SentenceTransformer`]): left alone without FSDP.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(model.transformers_model._no_split_modules)
    # Where accelerate looks for norms.
    model.base_model_prefix = "transformers_model"


@contextmanager
def whole_weights(accelerator):
    """Let Trainer save one whole file instead of the parts of every rank, as checkpoints of FSDP may be.

    Args:
        accelerator ([`~accelerate.Accelerator`]): left alone where FSDP is not in use.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    from torch.distributed.fsdp import StateDictType

    # Trainer reads the type alone; the settings that go with it are those of checkpoints, and stay.
    state_dict_type, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = state_dict_type


@contextmanager
def own_class(model):
    """Give a model back its own class while it is saved.

    FSDP2 puts one of its own in front, and its code, not the model's, would be copied beside the weights for whoever
    loads the folder as remote code.

    Args:
        model (`nn.Module`): changed in place, and back.
    """
    sharded_class = type(model)
    model_class = next(parent for parent in sharded_class.__mro__ if not parent.__module__.startswith("torch."))
    model.__class__ = model_class
    try:
        yield
    finally:
        model.__class__ = sharded_class


def without_copies(model, state_dict):
    """Return gathered weights without those that are another's under a second name.

    Parts of a tied weight are gathered under each name; the file would hold the largest matrix twice.

    Args:
        model (`PreTrainedModel`): knows which weights are tied.
        state_dict (`dict`): whole tensors by name.

    Returns:
        `dict`
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if tied.get(name) not in state_dict}


__all__ = ["own_class", "shard_by_layer", "sum_in_float32", "whole_weights", "without_copies"]
