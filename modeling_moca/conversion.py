"""Turn a vision-language checkpoint into a MoCa model without losing or inventing a single tensor.

The stock class of transformers loads the checkpoint, since its renaming of old key layouts applies only there; then
its modules are moved. This file stays at home: the copy of a model on the Hub does not carry it.
"""

import json
import logging
import os
from contextlib import nullcontext

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .base_moca import refuse_misfit
from .configuration_moca import MoCaConfig
from .modeling_moca import MoCaForPreTraining

logger = logging.getLogger(__name__)

# The published pre-training checkpoints keep their MAE head beside the stock layout under these names.
PUBLISHED_HEADS = {"mae_decoder.": "decoder.", "mae_proj.": "proj."}


def convert(
    model_class,
    backbone,
    *,
    bidirectional=True,
    pooling=None,
    mask_token_id=None,
    shift_labels=True,
    mae_loss_weight=0.5,
    **load_kwargs,
):
    """Build `model_class` from a stock vision-language model or checkpoint.

    Args:
        model_class (`type`): [`MoCaModel`] or [`MoCaForPreTraining`].
        backbone (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or loaded model (its modules are moved).
        bidirectional (`bool`, defaults to `True`): attend both ways.
        pooling (`str`, *optional*): `"mean"` or `"last"`; mean for a bidirectional model, last for a causal one.
        mask_token_id (`int`, *optional*): the tokenizer's mask token; the embedding matrix grows if the id lies
            outside it (Qwen's has spare rows).
        shift_labels, mae_loss_weight: see [`MoCaConfig`].
        load_kwargs: passed to `from_pretrained` of the stock class (`dtype`, `attn_implementation`, `revision`, ...);
            only with a name or folder.

    Returns:
        The MoCa model, in evaluation mode. Its MAE decoder starts from the middle layer (index n // 2) unless the
        checkpoint brings a trained one.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors (all are listed), a backbone of another family than those
            that [`MoCaConfig`] takes, or `load_kwargs` beside a loaded model.
    """
    published_head = {}
    if isinstance(backbone, PreTrainedModel):
        if load_kwargs:
            raise ValueError(f"{sorted(load_kwargs)} only apply when a checkpoint is loaded, but a model was given.")
        stock, source = backbone, type(backbone).__name__
        # Read now: a model that is built from the same configuration sets it anew.
        attn_implementation = backbone.config._attn_implementation
    else:
        attn_implementation = load_kwargs.get("attn_implementation")
        if attn_implementation == "flex_attention":  # ours to set: the stock class may refuse it
            load_kwargs = {**load_kwargs, "attn_implementation": "sdpa"}
        stock, published_head = _load_stock(backbone, issubclass(model_class, MoCaForPreTraining), load_kwargs)
        source = os.fspath(backbone)
    # A model without vocabulary projection has the layers itself.
    inner = stock if stock.get_output_embeddings() is None else stock.model

    config = MoCaConfig(
        backbone_config=stock.config,
        bidirectional=bidirectional,
        pooling=pooling or ("mean" if bidirectional else "last"),
        mask_token_id=mask_token_id,
        shift_labels=shift_labels,
        mae_loss_weight=mae_loss_weight,
        dtype=stock.dtype,
    )
    if is_deepspeed_zero3_enabled():
        # DeepSpeed cannot divide tensors without data; it frees what the moved modules take the place of.
        model = model_class._from_config(config, dtype=stock.dtype)
    else:
        with torch.device("meta"):  # every tensor is moved in below: none is allocated, none stays random
            model = model_class(config)
    body = model.moca if hasattr(model, "mae_head") else model
    body.backbone = inner
    if hasattr(model, "mae_head"):
        _fill_heads(model, stock, published_head, source)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"conversion left tensors unfilled: {left}"
    model.set_attn_implementation(attn_implementation or stock.config._attn_implementation)
    if mask_token_id is not None and mask_token_id >= config.vocab_size:
        logger.info(
            "Growing the embedding matrix from %d rows to hold mask token %d.", config.vocab_size, mask_token_id
        )
        model.resize_token_embeddings(mask_token_id + 1)
    return model.eval()


def _load_stock(name, needs_lm_head, load_kwargs):
    """Load a checkpoint with its stock class; return it and the MAE head tensors a published checkpoint brings."""
    hub_kwargs = {key: load_kwargs[key] for key in ("revision", "cache_dir", "token") if key in load_kwargs}
    MoCaConfig.of_backbone(name, **hub_kwargs)  # refuses what it does not know before anything is loaded
    stock, info = AutoModelForImageTextToText.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **load_kwargs
    )
    optional = tuple(PUBLISHED_HEADS) if needs_lm_head else (*PUBLISHED_HEADS, "lm_head.")
    refuse_misfit(name, type(stock), info, optional)
    if not needs_lm_head:
        return stock, {}
    # The files are asked as well: under ZeRO-3 the loading report names no unexpected tensor.
    shards = _shards(name, hub_kwargs)
    head_keys = {key for key in (*info["unexpected_keys"], *shards) if key.startswith(tuple(PUBLISHED_HEADS))}
    if not head_keys <= shards.keys():
        raise ValueError(f"The MAE head of {name} is read from safetensors files only, and there are none.")
    return stock, _read_tensors(name, {key: shards[key] for key in head_keys}, hub_kwargs)


def _shards(name, hub_kwargs):
    """Return which file holds each tensor of a safetensors checkpoint; nothing for one of another format."""
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    # One file, then many: the order in which the stock class has looked, so that nothing new is asked of the Hub.
    if (weights_file := cached_file(name, SAFE_WEIGHTS_NAME, **optional)) is not None:
        with safe_open(weights_file, framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    if (index_file := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **optional)) is not None:
        with open(index_file, encoding="utf-8") as file:
            return json.load(file)["weight_map"]
    return {}


def _read_tensors(name, shards, hub_kwargs):
    """Read tensors from the files that hold them (`shards`, by tensor), without loading the rest."""
    tensors = {}
    for shard in sorted(set(shards.values())):
        with safe_open(cached_file(name, shard, **hub_kwargs), framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in shards if shards[key] == shard})
    return tensors


def _fill_heads(model, stock, published_head, source):
    """Move the vocabulary projection; give the MAE head its trained weights or those of the middle layer."""
    lm_head = stock.get_output_embeddings()
    if lm_head is None:
        raise ValueError(f"{source} has no lm_head, which masked language modelling needs: give the full model.")
    model.set_output_embeddings(lm_head)
    layers = model.moca.language_model.layers
    head = model.mae_head
    if head.proj.weight.is_meta:
        head.to_empty(device=lm_head.weight.device).to(lm_head.weight.dtype)
    middle = layers[len(layers) // 2]
    with _whole([*middle.parameters(), *head.parameters()]):
        # Copied into the new layer, not a copy of the layer: that one would carry a configuration of its own.
        head.decoder.load_state_dict(middle.state_dict())
        torch.nn.init.normal_(head.proj.weight, std=0.02)
        torch.nn.init.zeros_(head.proj.bias)
        if published_head:
            _load_published_head(head, published_head, source)


def _load_published_head(head, published_head, source):
    renamed = {}
    for key, tensor in published_head.items():
        prefix = next(prefix for prefix in PUBLISHED_HEADS if key.startswith(prefix))
        renamed[PUBLISHED_HEADS[prefix] + key.removeprefix(prefix)] = tensor
    try:
        head.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"The MAE head of {source} does not fit: {error}") from error
    logger.info("Took over the trained MAE head of %s.", source)


def _whole(parameters):
    """Return a context in which parameters are whole and may be changed: under ZeRO-3 a rank holds a part of each."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    # What the first rank writes counts for all.
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
