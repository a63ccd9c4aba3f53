"""A MoCa checkpoint as the sentence-transformers model that stage 2 trains."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor
from transformers import AutoConfig

from modeling_moca import MoCaConfig

from .adapters import is_adapted, merge_adapters
from .sentence_modules import POOLING_MODES
from .sharding import own_class


def build_sentence_transformer(
    model_name_or_path: str | os.PathLike,
    max_length: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: str | None = None,
    **kwargs,
) -> SentenceTransformer:
    """Wrap a MoCa checkpoint in a `SentenceTransformer` of stock modules: Transformer, Pooling, Normalize.

    Args:
        model_name_or_path: folder or Hub id of a checkpoint with its processor: what stage 1 wrote, what
            `MoCaModel.from_backbone(...).save_pretrained` wrote, or a finished model.
        max_length: most tokens of an input; the processor's own limit when None.
        model_kwargs: passed to `AutoModel.from_pretrained`, for example `{"dtype": "bfloat16"}`.
        device: where to put the model; chosen by sentence-transformers when None.
        kwargs: `revision`, `token` and `cache_dir`, for a model on the Hub.

    Returns:
        A `SentenceTransformer` whose pooling is the checkpoint's `config.pooling`.

    Raises:
        ValueError: when the checkpoint is not a MoCa model: a causal backbone must be converted first.

    Example:
        >>> model = build_sentence_transformer("output/stage1")
        >>> model.encode(["a harbour at night"]).shape
    """
    path = str(model_name_or_path)
    config = AutoConfig.from_pretrained(path, **kwargs)
    if config.model_type != MoCaConfig.model_type:
        raise ValueError(
            f"{path!r} holds a model of type {config.model_type!r}, allowed is {MoCaConfig.model_type!r}: convert it "
            "with MoCaModel.from_backbone(...).save_pretrained first, or it would be trained with causal attention."
        )
    transformer = Transformer(
        path,
        model_kwargs={**kwargs, **(model_kwargs or {})},
        processor_kwargs=dict(kwargs),
        config_kwargs=dict(kwargs),
        # The backbone's image positions need padded rows.
        unpad_inputs=False,
        max_seq_length=max_length,
    )
    if max_length is not None:
        # Saved with the model; the tokenizer's own limit can only lower it.
        transformer.processor.max_length = max_length
    pooling = Pooling(config.hidden_size, pooling_mode=POOLING_MODES[config.pooling])
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)


def save_sentence_transformer(
    model: SentenceTransformer,
    folder: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
    merge: bool = False,
) -> None:
    """Save a `SentenceTransformer` that stage 2 trained, also one whose weights ranks share.

    Args:
        model: what `build_sentence_transformer` returns, as the trainer made it.
        folder: where to.
        state_dict: the model's whole weights by name, where the model itself holds parts only.
        merge: put adapters into the weights; else a model with adapters leaves them alone, without the other weights.
    """
    transformer = model[0]
    trained = transformer.model
    with ExitStack() as stack:
        # FSDP2 gives the model a class of its own, whose name would be saved.
        stack.enter_context(own_class(model))
        if merge and is_adapted(trained):
            transformer.model = merge_adapters(trained)
            stack.callback(setattr, transformer, "model", trained)
        elif state_dict:
            prefix = next(name for name, module in model.named_modules() if module is trained) + "."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
            # The module saves its model without being told of weights.
            trained.save_pretrained = partial(trained.save_pretrained, state_dict=weights)
            stack.callback(delattr, trained, "save_pretrained")
        model.save_pretrained(str(folder), create_model_card=False)
