"""Train the demo's starting point: a small causal vision-language model that reads pages and handwritten digits.

The architecture is stock Qwen2.5-VL, built from a config; the objective is next-token prediction of the text behind an
image. Nothing is downloaded: pages are drawn from the `train` pool of `demo_data.py`, and from docstrings of Python's
standard library for more words; digits are scikit-learn's scans. Duration 20 minutes on two shared CPU cores; expected
held-out loss 0.06 for digit words (chance 2.30), 2.5 for a page's prose (5.0 with the image of another page).

    python examples/pretrain_backbone.py --output examples/demo_backbone --minutes 20
"""

import argparse
import ast
import json
import math
import pathlib
import re
import sysconfig
import time

import numpy as np
import torch
from demo_data import (
    PAGE_COLUMNS,
    PAGE_LINES,
    PLACEHOLDER,
    SHORT_PAGE_LINES,
    digit_scans,
    draw_digits,
    is_prose,
    pages,
    render_page,
    sections,
    to_ascii,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
VOCAB_SIZE = 1520
SPARE_ROWS = 16
PAGES_PER_STEP, STRIPS_PER_STEP = 24, 16
# Lines and columns of the pages, small ones first (to read one word, then to find the next one, is learnt several times
# faster on them), and the share of the run at which each level begins.
LEVELS = ((2, 8), (4, 12), (SHORT_PAGE_LINES, PAGE_COLUMNS), (PAGE_LINES, PAGE_COLUMNS))
LEVEL_STARTS = (0.0, 0.15, 0.3, 0.5)


def docstrings(held_out):
    """Return the prose of the standard library's docstrings that shares no eight words in a row with held-out text."""

    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    forbidden = set().union(*map(runs, held_out))
    found = {}
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    paragraph = to_ascii(block)
                    if is_prose(paragraph) and not runs(paragraph) & forbidden:
                        found[paragraph] = None
    return list(found)


def train_tokenizer(texts):
    """Return a byte-level BPE tokenizer with Qwen's special tokens; the mask token is left to the next stage."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer):
    """Return an untrained causal model with a few spare rows in its vocabulary."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    special = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + SPARE_ROWS,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            # Pages are six image tokens wide: Qwen's base of a million would make neighbours indistinguishable.
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 5, 7]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **special,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def collate(rows, tokenizer, image_processor):
    """Turn rows of (text with placeholders, images) into model inputs; the text's tokens are the labels."""
    images = [image for _, row_images in rows for image in row_images]
    inputs = dict(image_processor(images=images, return_tensors="pt")) if images else {}
    sizes = iter((inputs["image_grid_thw"].prod(-1) // 4).tolist() if images else [])
    texts = []
    for text, _ in rows:
        head, *tail = text.split("<|image_pad|>")
        texts.append(head + "".join("<|image_pad|>" * next(sizes) + part for part in tail) + tokenizer.eos_token)
    inputs.update(tokenizer(texts, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    ids = inputs["input_ids"]
    special = torch.tensor(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[1:]))
    inputs["labels"] = ids.masked_fill(torch.isin(ids, special), -100)
    inputs["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return inputs


def losses(model, inputs):
    """Return the cross-entropy of each label, `[number of labels]`; position i is read from the state at i - 1."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels != -100
    return F.cross_entropy(model.lm_head(hidden[chosen]), labels[chosen], reduction="none")


class Reader:
    """Draws training rows from paragraphs: pages of words to read, strips of digits, prose."""

    def __init__(self, paragraphs, seed):
        self.words = " ".join(paragraphs).split()
        self.generator = np.random.default_rng(seed)

    def window(self, lines, columns):
        words = []
        while not words:
            start = self.generator.integers(len(self.words) - 100)
            # More words than a page holds, without those that would be broken.
            words = [word for word in self.words[start : start + lines * columns // 2] if len(word) <= columns]
        if self.generator.random() < 0.5:
            # Words in a random order cannot be guessed, only read.
            self.generator.shuffle(words)
        return [*pages(" ".join(words), lines, columns), ""][:2]

    def page(self, lines, columns):
        text, following = self.window(lines, columns)
        kind = self.generator.random() if lines == PAGE_LINES else 1.0
        if kind < 0.1:
            return f"{PLACEHOLDER}{following}", [render_page(text, lines, columns)]
        if kind < 0.2:
            return f"{text} {following}", []
        return f"{PLACEHOLDER}{text}", [render_page(text, lines, columns)]

    def digits(self):
        image, words = draw_digits("train", self.generator)
        return f"{PLACEHOLDER}{words}", [image]


@torch.no_grad()
def evaluate(model, tokenizer, image_processor):
    """Return held-out losses per token, on the words that only the image tells.

    Each is given with the row's own image, with the image of another row (`_swapped`) and with an empty one
    (`_blank`). Pages are the reference's prose of the `dev` pool and the same words shuffled (`shuffled_page`).
    """
    model.eval()
    generator = np.random.default_rng(1)
    digits = [draw_digits("dev", generator) for _ in range(128)]
    texts = [chunk for part in sections("dev").values() for chunk in pages(" ".join(part)) if len(chunk) > 120][:64]
    shuffled = [pages(" ".join(generator.permutation(text.split())))[0] for text in texts]
    kinds = {
        "digit_words": [(f"{PLACEHOLDER}{words}", [image]) for image, words in digits],
        "page": [(f"{PLACEHOLDER}{text}", [render_page(text)]) for text in texts],
        "shuffled_page": [(f"{PLACEHOLDER}{text}", [render_page(text)]) for text in shuffled],
    }
    metrics = {}
    for name, rows in kinds.items():
        changes = {
            "": [images for _, images in rows],
            "_swapped": [rows[i - 1][1] for i in range(len(rows))],
            "_blank": [[image.point(lambda _: 255) for image in images] for _, images in rows],
        }
        for change, images in changes.items():
            inputs = collate([(text, part) for (text, _), part in zip(rows, images)], tokenizer, image_processor)
            # The end of the text is no word that the image tells.
            inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == tokenizer.eos_token_id, -100)
            metrics[name + change] = round(losses(model, inputs).mean().item(), 3)
    model.train()
    return metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="examples/demo_backbone", help="folder of weights, tokenizer and log")
    parser.add_argument("--steps", type=int, default=100000, help="stop after this many steps")
    parser.add_argument("--minutes", type=float, default=20.0, help="or after this time, which paces the schedule")
    parser.add_argument("--start-from", help="folder of an earlier run to go on from, at the largest pages at once")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = pathlib.Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    reference = [paragraph for part in sections("train").values() for paragraph in part]
    held_out = [p for pool in ("cl", "dev", "test") for part in sections(pool).values() for p in part]
    extra = docstrings(held_out)
    words = ["zero one two three four five six seven eight nine zero"] * 200
    tokenizer = train_tokenizer(reference + words)
    # From 1 to 64 image tokens: none of the demo's images is resized.
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28})
    model = build_model(tokenizer).train()
    if arguments.start_from:
        start_model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.start_from, dtype=torch.float32)
        model.load_state_dict(start_model.state_dict())
    reader = Reader(reference + extra, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    # A run that goes on from another one keeps its log.
    past = pathlib.Path(arguments.start_from) / "log.jsonl" if arguments.start_from else None
    lines_before = past.read_text(encoding="utf-8") if past and past.exists() else ""
    log = (output / "log.jsonl").open("w", encoding="utf-8")
    log.write(lines_before)
    start, progress, step, recent = time.time(), 0.0, 0, []

    def record(**metrics):
        line = {"step": step, "minutes": round((time.time() - start) / 60, 2), **metrics}
        print(json.dumps(line), flush=True)
        print(json.dumps(line), file=log, flush=True)

    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "start_from")}
    scans = len(digit_scans("train")[1])
    record(settings=settings, parameters=parameters, words=len(reader.words), scans=scans, goes_on=bool(lines_before))
    while progress < 1.0:
        progress = max(step / arguments.steps, (time.time() - start) / 60 / arguments.minutes)
        rate = arguments.learning_rate * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        level = sum(arguments.start_from is not None or progress >= begin for begin in LEVEL_STARTS) - 1
        if step % 4 == 3:
            level = int(reader.generator.integers(level + 1))
        lines, columns = LEVELS[level]
        number = min(96, PAGES_PER_STEP * LEVELS[-1][0] * LEVELS[-1][1] // (lines * columns))
        page_rows = [reader.page(lines, columns) for _ in range(number)]
        digit_rows = [reader.digits() for _ in range(STRIPS_PER_STEP)]
        page_loss = losses(model, collate(page_rows, tokenizer, image_processor)).mean()
        digit_loss = losses(model, collate(digit_rows, tokenizer, image_processor)).mean()
        (page_loss + 0.2 * digit_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append((page_loss.item(), digit_loss.item()))
        if step % 50 == 0:
            page_mean, digit_mean = np.mean(recent, axis=0)
            record(level=level, lr=round(rate, 6), page_loss=round(page_mean, 3), digit_loss=round(digit_mean, 3))
            recent = []
        if step % 500 == 0:
            record(held_out=evaluate(model, tokenizer, image_processor))

    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    image_processor.save_pretrained(output)
    record(held_out=evaluate(model.float(), tokenizer, image_processor), final=True)


if __name__ == "__main__":
    main()
