"""Attention paths side by side: the same weights, one padded batch of text and images, eager, sdpa, flex and flash.

    python benchmarks/attention_paths.py
    python benchmarks/attention_paths.py --device cuda --dtype bfloat16 --hidden-size 1024 --layers 16 --tokens 2048

Prints one row a path: the largest difference of an embedding from eager in float32 on the CPU, the time of a forward
pass and of forward plus backward as a ratio to sdpa (median of runs after warm-up), and on CUDA the peak memory. A
path that does not run here says why.
"""

import argparse
import statistics
import time

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_moca import MoCaModel

PATHS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
VOCAB_SIZE, IMAGE_TOKEN = 1000, 3


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="length of the longest row; the others are shorter")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def make_model(hidden_size, layers):
    torch.manual_seed(0)
    heads = hidden_size // 64
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=2,
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=True,
    )
    return MoCaModel.from_backbone(Qwen2_5_VLForConditionalGeneration(config))


def make_batch(num_rows, num_tokens):
    """Every other row begins with an image of 8 x 8 tokens; rows are a half to the whole of `num_tokens` long."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(6, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)
    lengths = torch.linspace(num_tokens, num_tokens // 2, num_rows).long()
    attention_mask = (torch.arange(num_tokens) < lengths[:, None]).long()
    input_ids[::2, 1:65] = IMAGE_TOKEN
    num_images = len(input_ids[::2])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(num_images * 256, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 16, 16]]).repeat(num_images, 1),
    }


def embed(model, batch):
    return torch.nn.functional.normalize(model(**batch).pooler_output.float(), dim=-1)


def measure(step, device, runs):
    """Return median seconds and, on CUDA, peak bytes."""
    seconds = []
    for run in range(runs + 2):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if run >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if device == "cuda" else None


def main():
    args = parse_arguments()
    dtype = getattr(torch, args.dtype)
    model, batch = make_model(args.hidden_size, args.layers), make_batch(args.rows, args.tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reference = embed(model, batch)
    model.to(args.device, dtype)
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)

    def forward():
        with torch.no_grad():
            embed(model, batch)

    def backward():
        embed(model, batch)[:, 0].sum().backward()
        model.zero_grad()

    results, reasons = {}, {}
    for path in PATHS:
        try:
            model.set_attn_implementation(path)
            with torch.no_grad():
                error = (embed(model, batch).cpu() - reference).abs().max().item()
            results[path] = [error, measure(forward, args.device, args.runs)]
        # Whatever a missing package, compiler or device raises is the answer.
        except Exception as problem:
            reasons[path] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            continue
        try:
            results[path].append(measure(backward, args.device, args.runs))
        except Exception as problem:
            reasons[f"{path}, backward"] = f"{type(problem).__name__}: {problem}".splitlines()[0]

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"{name}, {args.dtype}, torch {torch.__version__}, hidden size {args.hidden_size}, {args.layers} layers, ",
        end="",
    )
    print(f"{args.rows} rows of up to {args.tokens} tokens\n")
    print("| path | largest difference | forward, x sdpa | forward + backward, x sdpa | peak memory, x sdpa |")
    print("|---|---|---|---|---|")
    for path, (error, *measured) in results.items():
        cells = []
        for (seconds, _), (base, _) in zip(measured, results["sdpa"][1:]):
            cells.append(f"{seconds / base:.2f}")
        cells += ["-"] * (2 - len(cells))
        memory = "-"
        if args.device == "cuda" and len(measured) == 2:
            memory = f"{measured[1][1] / results['sdpa'][2][1]:.2f}"
        print(f"| {path} | {error:.1e} | {cells[0]} | {cells[1]} | {memory} |")
    for path, reason in reasons.items():
        print(f"\n{path} does not run here: {reason}")


if __name__ == "__main__":
    main()
