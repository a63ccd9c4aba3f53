"""A MoCa checkpoint as the sentence-transformers model that stage 2 trains."""

from __future__ import annotations

import os
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoConfig

from modeling_moca import MoCaConfig

_POOLING_MODES = {"mean": "mean", "last": "lasttoken"}


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
    pooling = Pooling(config.hidden_size, pooling_mode=_POOLING_MODES[config.pooling])
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)
