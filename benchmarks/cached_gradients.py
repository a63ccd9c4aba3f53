"""Contrastive steps with cached gradients: memory and time as the batch grows, against plain ones, and the stock loss.

    python benchmarks/cached_gradients.py
    python benchmarks/cached_gradients.py --device cuda --hidden_size 1024 --num_layers 8 --mini_batch_tokens 16384

A step is the loss and its backward pass on made-up rows of query, positive and one hard negative; lengths are spread on
a logarithmic scale. `text` rows have text only, `image` rows an image (of 4 x 4 to 12 x 12 patches) in every document,
`equal` rows texts of one length, where sorting by length cannot help. Three tables of ratios:

- growth: `InfoNCELoss` with one `mini_batch_tokens` at growing batches;
- plain: the same rows with cached gradients and without;
- stock: sentence-transformers' `CachedMultipleNegativesRankingLoss` with `--stock_rows` rows a mini-batch, and
  `InfoNCELoss` with the smallest `mini_batch_tokens` that takes no more mini-batches than that.

The peak is what a step takes beyond weights, their gradients and the rows on the host, each figure in a process of its
own: on CUDA `max_memory_allocated`. On a CPU the host is the device; what the stock trainer would move to the device
before the step, all features, is copied there, and `InfoNCELoss` gets the rows as they are and copies a mini-batch. The
peak is then the largest resident memory (VmHWM, set back before the step by /proc/self/clear_refs), with large blocks
given back at once (MALLOC_MMAP_THRESHOLD_). Times that are compared are taken in turn in one process, the best of
several rounds; on a CPU in seconds of its one thread, so that other programs count little.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_moca import MoCaModel
from trainers.contrastive_loss import InfoNCELoss
from trainers.contrastive_minibatches import Column

VISION_START, IMAGE_TOKEN, VISION_END = 2, 3, 5
TEMPERATURE = 0.03
KINDS = ("text", "image", "equal")
TABLES = ("growth", "plain", "stock")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--mini_batch_tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="rows of the growing batches")
    parser.add_argument("--compared", type=int, default=64, help="rows of the batch compared with plain and stock")
    parser.add_argument("--stock_rows", type=int, default=16, help="rows of a mini-batch of the stock loss")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=6, help="of timed steps; a third of them for growing batches")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


class Embedder(nn.Module):
    """What a SentenceTransformer of Transformer, Pooling and Normalize computes, without tokenizer and files."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(0)
        heads = max(args.hidden_size // 64, 2)
        head = args.hidden_size // heads
        text = {
            "vocab_size": 4096,
            "hidden_size": args.hidden_size,
            "intermediate_size": 4 * args.hidden_size,
            "num_hidden_layers": args.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, head // 16 * 3, head // 16 * 3],
            },
        }
        vision = {
            "depth": args.num_layers,
            "hidden_size": args.hidden_size // 2,
            "intermediate_size": 2 * args.hidden_size,
            "num_heads": heads,
            "out_hidden_size": args.hidden_size,
            "fullatt_block_indexes": [1],
        }
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=VISION_START,
            image_token_id=IMAGE_TOKEN,
            video_token_id=4,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=True,
        )
        backbone = Qwen2_5_VLForConditionalGeneration(config)
        self.model = MoCaModel.from_backbone(backbone).train().to(args.device)

    def __getitem__(self, index):
        return self.model

    def forward(self, features):
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        pooled = self.model(**{name: features[name] for name in names if name in features}).pooler_output
        return {"sentence_embedding": nn.functional.normalize(pooled, dim=-1)}


def make_column(num_rows, shortest, longest, has_images, generator):
    """Features of a column, whose rows are in random order."""
    rows, grids, pixels = [], [], []
    for _ in range(num_rows):
        draw = torch.rand((), generator=generator).item()
        tokens = torch.randint(7, 4096, (int(shortest * (longest / shortest) ** draw),), generator=generator)
        if has_images:
            height, width = (2 * torch.randint(2, 7, (2,), generator=generator)).tolist()
            image = torch.full((height * width // 4,), IMAGE_TOKEN)
            tokens = torch.cat([torch.tensor([VISION_START]), image, torch.tensor([VISION_END]), tokens])
            grids.append([1, height, width])
            pixels.append(torch.randn(height * width, 1176, generator=generator))
        rows.append(tokens)
    lengths = torch.tensor([len(row) for row in rows])
    features = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
    }
    if has_images:
        features["pixel_values"] = torch.cat(pixels)
        features["image_grid_thw"] = torch.tensor(grids)
        features["num_images_per_sample"] = torch.ones(num_rows, dtype=torch.long)
    return features


def make_columns(kind, num_rows):
    """Features of query, positive and a hard negative."""
    generator = torch.Generator().manual_seed(num_rows)
    if kind == "equal":
        return [make_column(num_rows, 32, 32, False, generator) for _ in range(3)]
    documents = (8, 48) if kind == "image" else (16, 256)
    return [
        make_column(num_rows, 8, 32, False, generator),
        *(make_column(num_rows, *documents, kind == "image", generator) for _ in range(2)),
    ]


def same_number_of_mini_batches(columns, stock_rows):
    """The smallest budget of tokens that takes no more mini-batches than the stock loss."""
    columns = [Column(features, "") for features in columns]
    number = sum(-(-column.num_rows // stock_rows) for column in columns)
    low, high = 1, max(column.cost(range(column.num_rows)) for column in columns)
    while low < high:
        middle = (low + high) // 2
        if sum(len(column.plan(max_tokens=middle)) for column in columns) <= number:
            high = middle
        else:
            low = middle + 1
    return low


def prepare(args, kind, num_rows, variant):
    """Return a function that takes a step of one variant, and what is to be told of it."""
    columns = make_columns(kind, num_rows)
    if args.device.startswith("cuda"):
        # As a loader gives them.
        columns = [{name: value.pin_memory() for name, value in column.items()} for column in columns]
    model = Embedder(args)
    budget = args.mini_batch_tokens
    if variant == "same number":
        budget = same_number_of_mini_batches(columns, args.stock_rows)
    if variant == "stock":
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=args.stock_rows)
    else:
        loss = InfoNCELoss(model, TEMPERATURE, mini_batch_tokens=None if variant == "plain" else budget)
    on_host = variant not in ("stock", "plain")
    result = {"budget": budget, "forwards": 0}

    def count(*_):
        result["forwards"] += 1

    model.register_forward_hook(count)

    def step(columns=columns):
        model.zero_grad(set_to_none=False)
        result["forwards"] = 0
        given = [
            {name: value if on_host else value.to(args.device, copy=True) for name, value in column.items()}
            for column in columns
        ]
        value = loss(given, None)
        value.backward()
        result["loss"] = value.item()

    step(make_columns(kind, 4))  # makes the gradients' buffers
    return step, result


def resident(name):
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def take_memory(args, cells):
    """Return what is to be told of one variant, with the peak of its step."""
    ((kind, num_rows, variant),) = cells
    cuda = args.device.startswith("cuda")
    step, result = prepare(args, kind, num_rows, variant)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    step()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {**result, "peak": peak - before}


def take_time(args, cells):
    """Return seconds a row of each variant: in each round all take equally many rows, one variant after the other."""
    cuda = args.device.startswith("cuda")
    steps = [prepare(args, *cell)[0] for cell in cells]
    largest = max(num_rows for _, num_rows, _ in cells)
    clock = time.perf_counter if cuda else time.process_time
    best = [float("inf")] * len(cells)
    for _ in range(args.rounds if len({num_rows for _, num_rows, _ in cells}) == 1 else -(-args.rounds // 3)):
        for number, ((_, num_rows, _), step) in enumerate(zip(cells, steps)):
            start = clock()
            for _ in range(largest // num_rows):
                step()
            if cuda:
                torch.cuda.synchronize()
            best[number] = min(best[number], (clock() - start) / (largest // num_rows * num_rows))
    return best


def measure(args, cells):
    """Measure variants in processes: the memory of each alone, the times of all together."""

    def start(figure, cells):
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if figure == "memory":
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", json.dumps([figure, cells])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    results = [start("memory", [cell]) for cell in cells]
    for result, seconds in zip(results, start("time", cells)):
        result["seconds"] = seconds
    return results


def table(titles, rows):
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.alone:
        figure, cells = json.loads(args.alone)
        print(json.dumps({"memory": take_memory, "time": take_time}[figure](args, cells)))
        return
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    print(f"{device}, torch {torch.__version__}, hidden size {args.hidden_size}, {args.num_layers} layers")
    if "growth" in args.tables:
        rows = []
        for kind in args.kinds:
            results = measure(args, [(kind, num_rows, "cached") for num_rows in args.batches])
            # Query, positive and negative, in float32.
            embeddings = [num_rows * 3 * args.hidden_size * 4 for num_rows in args.batches]
            for num_rows, held, result in zip(args.batches, embeddings, results):
                ratio = (result["peak"] - held) / (results[0]["peak"] - embeddings[0])
                cells = [kind, num_rows, result["forwards"], f"{result['seconds'] * 1e3:.1f}"]
                cells += [f"{result['seconds'] / results[0]['seconds']:.2f}", f"{result['peak'] / 1e6:.0f}"]
                rows.append([*cells, f"{held / 1e6:.1f}", f"{ratio:.2f}"])
        print(f"\nGrowth, {args.mini_batch_tokens} tokens a mini-batch; ratios to the smallest batch")
        titles = ["rows", "batch", "forward passes", "ms a row", "ratio", "peak MB", "of it embeddings", "ratio beyond"]
        table(titles, rows)
    for base, variant in (("plain", "cached"), ("stock", "same number")):
        if base not in args.tables:
            continue
        rows = []
        for kind in args.kinds:
            results = measure(args, [(kind, args.compared, base), (kind, args.compared, variant)])
            theirs = results[0]
            for title, result in zip((base, "cached"), results):
                cells = [kind, title, result["forwards"], "-" if title == base else result["budget"]]
                cells += [f"{result['seconds'] * 1e3:.1f}", f"{result['seconds'] / theirs['seconds']:.2f}"]
                cells += [f"{result['peak'] / 1e6:.0f}", f"{result['peak'] / theirs['peak']:.2f}"]
                rows.append([*cells, f"{result['loss']:.5f}"])
        print(f"\nBatch of {args.compared}; ratios to {base}")
        titles = ["rows", "loss of", "forward passes", "token budget", "ms a row", "ratio", "peak MB", "ratio", "loss"]
        table(titles, rows)


if __name__ == "__main__":
    main()
