"""The published MoCa models in mteb, converted by this project on first use.

mteb's own entry needs transformers < 4.53 without flash-attn, since it removes the causal mask by patching. Here the
same weights become a MoCa model, and inputs are written as the authors' evaluation writes them, as in mteb's entry.
"""

import logging
import os
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.models.model_implementations import MODEL_REGISTRY
from tqdm.auto import tqdm

from modeling_moca import MoCaModel, MoCaProcessor

from .export import export_model
from .mteb_models import MoCaModelMeta

logger = logging.getLogger(__name__)

# An image stands before them; a line break ends them. Text alone goes in as it is.
IMAGE_ONLY = "Represent the given document image.\n"
IMAGE_AND_TEXT = "Represent the given image with the following question: {text}\n"


class PublishedMoCaWrapper(SentenceTransformerEncoderWrapper):
    """A published MoCa model in mteb: instructions depend on what an input holds, not on the task.

    Args:
        args, kwargs: see `mteb.models.SentenceTransformerEncoderWrapper`.
    """

    def encode(self, inputs, *, show_progress_bar=True, **kwargs):
        """Embed the batches of a task.

        Args:
            inputs (`torch.utils.data.DataLoader`): batches with `text`, `image` or both.
            show_progress_bar (`bool`, defaults to `True`): over batches.
            kwargs: `task_metadata`, `hf_split`, `hf_subset` and `prompt_type` of mteb, which change nothing here; the
                rest goes to `SentenceTransformer.encode`.

        Returns:
            `torch.Tensor` of shape `(num_inputs, hidden_size)`, float32, on the CPU.

        Raises:
            ValueError: a batch has neither text nor images.
        """
        for name in ("task_metadata", "hf_split", "hf_subset", "prompt_type"):
            kwargs.pop(name, None)
        embeddings = []
        for batch in tqdm(inputs, desc="Encoding", disable=not show_progress_bar):
            rows = published_inputs(batch.get("text"), batch.get("image"))
            embedded = self.model.encode(rows, show_progress_bar=False, convert_to_tensor=True, **kwargs)  # [B, d]
            embeddings.append(embedded.float().cpu())
        return torch.cat(embeddings)


def published_inputs(texts, images):
    """Write the inputs of one batch as the authors' evaluation does.

    Args:
        texts (`list[str]`, *optional*), images (`list[PIL.Image.Image]`, *optional*): of equal length if both.

    Returns:
        `list`: a string, or `{"text": ..., "image": ...}`, for `SentenceTransformer.encode`.

    Raises:
        ValueError: neither is given.
    """
    if images is None and texts is None:
        raise ValueError("The published MoCa models take text and images, and the batch has neither.")
    if images is None:
        return list(texts)
    texts = [""] * len(images) if texts is None else texts
    return [
        {"image": image, "text": IMAGE_AND_TEXT.format(text=text) if text else IMAGE_ONLY}
        for text, image in zip(texts, images, strict=True)
    ]


def load_published(name, revision=None, *, source=None, processor_name=None, folder=None, dtype="auto", **kwargs):
    """Convert a published MoCa model once, then load the result; the `loader` of `PUBLISHED`.

    Args:
        name (`str`): Hub id.
        revision (`str`, *optional*): commit.
        source (`str`, *optional*): folder with the published checkpoint, instead of the Hub.
        processor_name (`str`, *optional*): where tokenizer and image processor come from: the checkpoints bring none.
        folder (`str`, *optional*): where the converted model is kept; in the Hugging Face home when omitted.
        dtype (`str`, defaults to `"auto"`): type of the converted weights; the checkpoint's own.
        kwargs: see [`PublishedMoCaWrapper`].

    Returns:
        [`PublishedMoCaWrapper`]
    """
    folder = Path(folder or Path(HF_HOME) / "moca" / f"{name.replace('/', '--')}--{revision}")
    if not folder.is_dir():
        source, hub = (source, {}) if source is not None else (name, {"revision": revision})
        processor = MoCaProcessor.from_backbone(source, processor_name=processor_name, **hub)
        model = MoCaModel.from_backbone(source, mask_token_id=processor.mask_token_id, dtype=dtype, **hub)
        # Under its own name only once it is whole.
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        os.replace(export_model(model, processor, unfinished, model_id=name), folder)
        logger.info("Converted %s to %s", name, folder)
    return PublishedMoCaWrapper(str(folder), trust_remote_code=True, **kwargs)


# Facts about the checkpoints are mteb's; what they need, and the length of inputs, is this project's.
MOCA_3B = MoCaModelMeta(
    **{
        **dict(MODEL_REGISTRY["moca-embed/MoCa-Qwen25VL-3B"]),
        "loader": load_published,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "max_tokens": 2048,
        "extra_requirements_groups": None,
    }
)
# What is None here, neither the paper nor mteb tells.
MOCA_7B = MOCA_3B.model_copy(
    update={
        "name": "moca-embed/MoCa-Qwen25VL-7B",
        "loader_kwargs": {"processor_name": "Qwen/Qwen2.5-VL-7B-Instruct"},
        "revision": None,
        "release_date": None,
        "license": None,
        "n_parameters": None,
        "n_embedding_parameters": 152064 * 3584,
        "memory_usage_mb": None,
        "embed_dim": 3584,
        "reference": "https://huggingface.co/moca-embed/MoCa-Qwen25VL-7B",
        "adapted_from": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
)
PUBLISHED = (MOCA_3B, MOCA_7B)


def register_published():
    """Make `mteb.get_model` load the published MoCa models by this project's code, in place of mteb's own entry."""
    MODEL_REGISTRY.update({meta.name: meta for meta in PUBLISHED})
