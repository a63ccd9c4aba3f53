"""One tiny stock model of every supported family of backbones, and its processor; nothing is downloaded."""

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from modeling_moca import MoCaProcessor
from tests.tiny import ROPE, TEXT, tiny_backbone, tiny_tokenizer

QWEN_IDS = {
    "vision_start_token_id": 2,
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_end_token_id": 5,
}
# Patches of 4 pixels, 2 x 2 of which are an image token: a tile of 32 pixels is 4 x 4 tokens.
TILE = {"patch_size": 4, "merge_size": 2, "side": 32}


def _qwen2_vl(tied):
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": dict(ROPE)},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=tied,
        **QWEN_IDS,
    )
    return Qwen2VLForConditionalGeneration, config


def _qwen3_vl(tied):
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=tied,
        **QWEN_IDS,
    )
    return Qwen3VLForConditionalGeneration, config


def _tiles(config_class, model_class):
    def build(tied):
        config = config_class(
            text_config=LlamaConfig(**TEXT, tie_word_embeddings=tied),
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": TILE["side"],
                "patch_size": TILE["patch_size"],
            },
            scale_factor=TILE["merge_size"],
            image_token_id=3,
            tie_word_embeddings=tied,
        )
        return model_class, config

    return build


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _tiles(Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": _tiles(SmolVLMConfig, SmolVLMForConditionalGeneration),
}
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"]
TILED = ["idefics3", "smolvlm"]


def family_backbone(family, seed=0, tied=True):
    """Return a stock, randomly initialised model of a family (`str`), wide enough that attention matters."""
    if family == "qwen2_5_vl":
        return tiny_backbone(seed, tie_word_embeddings=tied)
    model_class, config = _BUILDERS[family](tied)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.2
    config.initializer_range = 0.2
    torch.manual_seed(seed)
    return model_class(config).eval()


def family_image_processor(family):
    """Return the family's stock Pillow image processor: 1 to 16 image tokens, or tiles of 32 pixels."""
    if family in TILED:
        image_processor = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[family]
        return image_processor(size={"longest_edge": 64}, max_image_size={"longest_edge": TILE["side"]})
    patch_size = 16 if family == "qwen3_vl" else 14
    token_area = (2 * patch_size) ** 2
    return Qwen2VLImageProcessorPil(patch_size=patch_size, min_pixels=token_area, max_pixels=16 * token_area)


def family_tokenizer(family, mask_token="<|mask|>"):
    """Return the tiny tokenizer with the image tokens of a family; the image token's id is 3."""
    if family not in TILED:
        return tiny_tokenizer(mask_token)
    renamed = {
        "<|vision_start|>": "<fake_token_around_image>",
        "<|image_pad|>": "<image>",
        "<|video_pad|>": "<global-img>",
    }
    return tiny_tokenizer(mask_token, renamed)


def family_processor(family, **kwargs):
    """Return a MoCaProcessor of a family."""
    sizes = {key: TILE[key] for key in ("patch_size", "merge_size")} if family in TILED else {}
    return MoCaProcessor(family_image_processor(family), family_tokenizer(family), **sizes, **kwargs)
