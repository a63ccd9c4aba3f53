"""What a long run of continual pre-training needs: steps, time, memory a GPU, bandwidth; computed, on no GPU.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --shape 7b --gpus 64 --mfu 0.35 --images_per_worker 60

Sizes of models are counted on weights without storage; FLOPs are those of `trainers.flops` for micro-batches that
`CostBatches` makes from the mix of rows of `benchmarks/padding.py`. `--mfu` is yours to measure
(`benchmarks/training_step.py --shape 3b` on one GPU; `mfu` in the logs of a run), as is `--images_per_worker`
(`benchmarks/input_pipeline.py`). Memory is an estimate that leaves out the allocator's gaps and buffers of NCCL.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.padding import Reader, made_up_row, waste
from modeling_moca import MoCaConfig, MoCaForPreTraining
from modeling_moca.heads_moca import DEFAULT_CHUNK_ROWS
from trainers.cpt_batches import CostBatches
from trainers.flops import step_flops

# Sizes of the language model, and whether it shares its embeddings with the vocabulary projection.
SHAPES = {"3b": ((2048, 11008, 36, 16, 2), True), "7b": ((3584, 18944, 28, 28, 4), False)}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
GB = 1e9


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--peak", type=float, default=989e12, help="bf16 FLOPs a second of one GPU (H100)")
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.30, 0.40, 0.45])
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of the mixture")
    parser.add_argument("--max_cost", type=int, default=12_800)
    parser.add_argument("--accumulation", type=int, default=6)
    parser.add_argument("--mask_ratio", type=float, default=0.4)
    parser.add_argument("--patch_ratio", type=float, default=0.5)
    parser.add_argument("--image_bytes", type=float, default=150e3, help="mean size of an encoded image")
    parser.add_argument("--images_per_worker", type=float, default=50.0, help="images a second of one worker")
    return parser.parse_args()


def make_config(shape):
    sizes, tied = SHAPES[shape]
    text = {**dict(zip(SIZES, sizes)), "vocab_size": 151936}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"]}
    return MoCaConfig(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))


def flops_of(config, batch, args):
    """Return the FLOPs of a micro-batch; images are squares of as many patches as their tokens own."""
    grids = []
    for tokens in (tokens for row in batch for tokens in row.image_tokens):
        side = 2 * max(round(tokens**0.5), 1)
        grids.append((1, side, side))
    image_tokens = sum(tokens for row in batch for tokens in row.image_tokens)
    text_tokens = sum(row.num_tokens for row in batch) - image_tokens
    return step_flops(
        config,
        [row.num_tokens for row in batch],
        grids,
        round(args.mask_ratio * text_tokens),
        round(args.patch_ratio * image_tokens),
    )


def activations(config, positions, image_tokens):
    """Return bytes of activations in bf16 with gradient checkpointing: what layers keep, and one layer at work."""
    text, vision = config.get_text_config(), config.backbone_config.vision_config
    patches = image_tokens * config.num_patches_per_token
    kept = 2 * positions * text.hidden_size * (text.num_hidden_layers + 4) + 2 * patches * vision.hidden_size * (
        vision.depth + 2
    )
    # Recomputed with its gradients: states around attention and norms, and three products of the MLP.
    at_work = 4 * positions * (8 * text.hidden_size + 3 * text.intermediate_size)
    # The vocabulary's gradient in float32, and the scores of one chunk of rows, twice.
    head = 4 * text.vocab_size * text.hidden_size + 8 * DEFAULT_CHUNK_ROWS * text.vocab_size
    pixels = 2 * 4 * patches * config.patch_dim
    return kept + max(at_work, head) + pixels


def plans(num_parameters, largest_unit, gpus):
    """Return bytes of weights, gradients and AdamW's moments on a GPU by plan."""
    n = num_parameters
    return {
        # Float32 weights, gradients, buckets of the same size to reduce them in, two moments; autocast's bf16 copies.
        "DDP": 4 * n + 4 * n + 4 * n + 8 * n + 2 * n,
        # bf16 weights; gradients, master weights and moments in parts.
        "ZeRO-2": 2 * n + (2 + 4 + 8) * n / gpus,
        # All in parts; two units (layers) at a time are whole, in bf16, and one unit's gradients. Gradients that wait
        # for the last micro-batch of a step are whole, unless every micro-batch sums them (sync_each_batch).
        "FSDP2": 16 * n / gpus + 2 * 2 * largest_unit + 4 * n,
        "FSDP2, sync_each_batch": 16 * n / gpus + 2 * 2 * largest_unit + 4 * largest_unit,
        "ZeRO-3": (2 + 2 + 4 + 8) * n / gpus + 2 * 2 * largest_unit + 4 * largest_unit,
    }


def main():
    """Print what the run needs."""
    args = parse_arguments()
    config = make_config(args.shape)
    with torch.device("meta"):
        model = MoCaForPreTraining(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # Embedding and vocabulary projection are the largest unit that a sharded run gathers.
    largest_unit = model.get_input_embeddings().weight.numel()
    chance = random.Random(0)
    rows = [made_up_row(chance) for _ in range(20_000)]
    batches = CostBatches(Reader(rows, 0, 1), lambda row: row, args.max_cost)
    batches = [batches.next_batch() for _ in range(200)]

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    rows_a_batch = mean(len(batch) for batch in batches)
    tokens = mean(sum(row.num_tokens for row in batch) for batch in batches)
    image_tokens = mean(sum(sum(row.image_tokens) for row in batch) for batch in batches)
    images = mean(sum(len(row.image_tokens) for row in batch) for batch in batches)
    flops = mean(flops_of(config, batch, args) for batch in batches)
    longest = max(len(batch) * max(row.num_tokens for row in batch) for batch in batches)
    micro_batches = args.gpus * args.accumulation
    steps = args.rows / (rows_a_batch * micro_batches)
    print(f"shape {args.shape}: {num_parameters / 1e9:.2f} B parameters, heads of pre-training included")
    print(
        f"a micro-batch (cost {args.max_cost}): {rows_a_batch:.1f} rows, {tokens:.0f} tokens, "
        f"{image_tokens:.0f} of them of {images:.1f} images; padding {waste(batches)[0]:.1%}; {flops / 1e12:.0f} TFLOPs"
    )
    print(
        f"a step ({args.gpus} GPUs x {args.accumulation}): {rows_a_batch * micro_batches:.0f} rows, "
        f"{tokens * micro_batches / 1e6:.2f} M tokens, {flops * micro_batches / 1e15:.1f} PFLOPs; "
        f"{args.rows / 1e6:.1f} M rows are {steps:.0f} steps, {steps * tokens * micro_batches / 1e9:.1f} B tokens\n"
    )
    print("| MFU | s a step | hours | tokens/s/GPU | images/s/GPU | workers/GPU | MB/s/GPU | Gbit/s in all |")
    print("|---|---|---|---|---|---|---|---|")
    for mfu in args.mfu:
        seconds = flops * args.accumulation / (mfu * args.peak)
        image_rate = images * args.accumulation / seconds
        bandwidth = image_rate * args.image_bytes
        cells = [f"{mfu:.0%}", f"{seconds:.2f}", f"{seconds * steps / 3600:.1f}"]
        cells += [f"{tokens * args.accumulation / seconds:.0f}", f"{image_rate:.1f}"]
        cells += [f"{image_rate / args.images_per_worker:.2f}", f"{bandwidth / 1e6:.1f}"]
        print("| " + " | ".join([*cells, f"{bandwidth * args.gpus * 8 / 1e9:.2f}"]) + " |")
    kept = activations(config, longest, max(sum(sum(row.image_tokens) for row in batch) for batch in batches))
    print(f"\n| plan | weights, gradients, moments | activations | GB a GPU ({args.gpus} GPUs) |")
    print("|---|---|---|---|")
    for plan, size in plans(num_parameters, largest_unit, args.gpus).items():
        print(f"| {plan} | {size / GB:.1f} | {kept / GB:.1f} | {(size + kept) / GB:.1f} |")


if __name__ == "__main__":
    main()
