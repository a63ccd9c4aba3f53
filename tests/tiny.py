"""Tiny models, tokenizers and processors, built from code in milliseconds: nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from modeling_moca import MoCaProcessor

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|pad|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_end|>",
    "<|mask|>",
]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VOCAB_SIZE = 320
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def tiny_tokenizer(mask_token="<|mask|>", renamed=None):
    """Return a byte-level BPE tokenizer of 256 bytes and the special tokens (ids 0 to 6), some of them renamed."""
    special_tokens = [(renamed or {}).get(token, token) for token in SPECIAL_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = special_tokens if mask_token else special_tokens[:-1]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 20,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the page shows a picture of the sea and the sky"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        mask_token=mask_token,
        additional_special_tokens=special_tokens[2:6],
        padding_side="right",
    )


def tiny_processor(mask_token="<|mask|>", min_pixels=28 * 28, max_pixels=16 * 28 * 28, **kwargs):
    """Return a MoCaProcessor with the tiny tokenizer and the Pillow image processor (1 to 16 image tokens)."""
    image_processor = Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
    return MoCaProcessor(image_processor, tiny_tokenizer(mask_token), **kwargs)


def tiny_config(tie_word_embeddings=True, vision_overrides=None, **text_overrides):
    """Return a stock Qwen2.5-VL configuration of four 32-wide layers and two vision blocks."""
    text = {**TEXT, "rope_parameters": dict(ROPE)}
    return Qwen2_5_VLConfig(
        text_config={**text, **text_overrides},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            **(vision_overrides or {}),
        },
        vision_start_token_id=2,
        image_token_id=3,
        video_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=tie_word_embeddings,
    )


def tiny_backbone(seed=0, tie_word_embeddings=True, vision_overrides=None, **text_overrides):
    """Return a stock, randomly initialised Qwen2.5-VL of about 60K parameters."""
    torch.manual_seed(seed)
    config = tiny_config(tie_word_embeddings, vision_overrides, **text_overrides)
    # Wider than the usual 0.02: attention must matter, or a leak would not show.
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.2
    return Qwen2_5_VLForConditionalGeneration(config).eval()
