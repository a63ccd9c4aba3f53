"""The study's starting point: a small causal vision-language model, trained to predict the next token.

The architecture is stock Qwen2.5-VL; the trainer is the stock one. The tokenizer is Qwen2.5's, whole or with its first
merges only: merges stand in the order they were learned in, so that these are what a smaller vocabulary of the same
training would have been.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from modeling_moca import MoCaProcessor
from trainers.cpt_collator import CPTCollator

SPECIAL_TOKENS = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|mask|>")
NUM_BYTES = 256


def make_tokenizer(folder, num_merges):
    """Return Qwen2.5's tokenizer with its first `num_merges` merges (all when None) and a mask token.

    Args:
        folder: `vocab.json` and `merges.txt`, as Qwen publishes them.
        num_merges: how many merges to keep.
    """
    stock = Qwen2TokenizerFast.from_pretrained(folder)
    if num_merges is None:
        stock.add_special_tokens({"mask_token": "<|mask|>"})
        return stock
    vocabulary = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
    lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")][:num_merges]
    kept = {token: index for token, index in vocabulary.items() if index < NUM_BYTES + num_merges}
    tokenizer = Tokenizer(models.BPE(vocab=kept, merges=merges))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(tokenizer, part, getattr(stock.backend_tokenizer, part))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, shape):
    """Return an untrained causal model.

    Args:
        tokenizer: gives the ids of the image tokens.
        shape: `hidden_size`, `num_layers`, `num_heads`, `vision_hidden_size`, `vision_depth` and `rope_theta`.
    """
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    special = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    hidden_size, head_dim = shape["hidden_size"], shape["hidden_size"] // shape["num_heads"]
    spatial = 3 * (head_dim // 2) // 8  # Qwen's shares: a quarter for time, three eighths each for height and width
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": shape["num_layers"],
            "num_attention_heads": shape["num_heads"],
            "num_key_value_heads": shape["num_heads"],
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape["rope_theta"],
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": shape["vision_depth"],
            "hidden_size": shape["vision_hidden_size"],
            "intermediate_size": 3 * shape["vision_hidden_size"],
            "num_heads": shape["vision_hidden_size"] // 32,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(shape["vision_depth"])),
        },
        tie_word_embeddings=True,
        **special,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_processor(folder, num_image_tokens, max_length):
    """Return the processor of the backbone in `folder`; images keep between 4 and `num_image_tokens` image tokens."""
    area = 28 * 28
    return MoCaProcessor.from_backbone(
        folder, min_pixels=4 * area, max_pixels=num_image_tokens * area, max_length=max_length
    )


def save_untrained(folder, tokenizer_folder, scale):
    """Write the untrained backbone with tokenizer and image processor to `folder`."""
    tokenizer = make_tokenizer(tokenizer_folder, scale.num_merges)
    torch.manual_seed(0)
    build_model(tokenizer, scale.shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)


def next_token_training(backbone, folder, rows, settings, scale):
    """Train the causal model of `backbone` to predict the next token of `rows`, and write it to `folder`.

    Args:
        backbone: folder of the model to start from.
        folder: where to; the same layout.
        rows: what `study_data.unlabelled_rows` returns.
        settings: of `TrainingArguments`: seed, steps, batch size, learning rate, ...
        scale: image tokens and length of a row.

    Returns:
        `TrainerState`: log history and number of tokens.
    """
    set_seed(settings["seed"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32)
    processor = make_processor(backbone, scale.num_image_tokens, scale.cpt_max_length)
    # Stage 1's own collator reads the rows, so that this and MoCa see the same tokens; nothing is hidden.
    reader = CPTCollator(processor, mlm_ratio=0.0, mae_ratio=0.0, max_length=scale.cpt_max_length, on_bad_row="raise")

    def collate(batch):
        inputs = {
            key: value
            for key, value in reader(batch).items()
            if key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        }
        ids = inputs["input_ids"]  # [B, T]
        hidden = torch.isin(ids, reader.special_ids) | (inputs["attention_mask"] == 0)  # [B, T]
        inputs["labels"] = ids.masked_fill(hidden, -100)
        inputs["mm_token_type_ids"] = (ids == processor.image_token_id).long()
        return inputs

    args = TrainingArguments(
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        **settings,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate)
    trainer.train()
    model.save_pretrained(folder)
    for part in (processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    return trainer.state
