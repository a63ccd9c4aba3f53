"""Rows of differing length, four ways: padded as they come, padded by length, packed with a mask, packed by row.

    python benchmarks/packing.py
    python benchmarks/packing.py --device cuda --dtype bfloat16 --hidden-size 1024 --layers 16 --longest 4096

Prints forward plus backward time of each (median of runs after warm-up) as a ratio to one padded batch of all rows in
random order, positions computed per token that is no padding, and the largest difference of a vector from the first.
"""

import argparse

import torch
from attention_paths import VOCAB_SIZE, make_model, measure


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=32)
    parser.add_argument("--longest", type=int, default=985)
    parser.add_argument("--bucket-rows", type=int, default=4, help="rows of a batch of similar length")
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def make_rows(num_rows, shortest, longest):
    """Text rows in random order; as many between 32 and 64 tokens as between 512 and 1024."""
    generator = torch.Generator().manual_seed(0)
    lengths = (shortest * (longest / shortest) ** torch.linspace(0, 1, num_rows)).long()
    lengths = lengths[torch.randperm(num_rows, generator=generator)]
    return [torch.randint(6, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def pad(rows, device):
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.arange(input_ids.shape[1], device=device) < lengths[:, None],
    }


def pack(rows, device):
    bounds = torch.tensor([0, *map(len, rows)], device=device).cumsum(0).int()  # [R + 1]
    return {"input_ids": torch.cat(rows)[None].to(device), "cu_seq_lens": bounds}


def main():
    args = parse_arguments()
    rows = make_rows(args.rows, args.shortest, args.longest)
    model = make_model(args.hidden_size, args.layers).to(args.device, getattr(torch, args.dtype))
    model.set_attn_implementation("sdpa")
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    buckets = [order[start : start + args.bucket_rows] for start in range(0, len(order), args.bucket_rows)]
    one_batch = pad(rows, args.device)
    bucketed = [pad([rows[row] for row in bucket], args.device) for bucket in buckets]
    packed = pack(rows, args.device)
    bounds = packed["cu_seq_lens"].long()
    numbers = torch.repeat_interleave(bounds.diff())  # [T]
    mask = (numbers[:, None] == numbers)[None, None]  # [1, 1, T, T]
    positions = model.get_position_ids(packed["input_ids"], cu_seq_lens=packed["cu_seq_lens"])

    def as_they_come():
        yield list(range(len(rows))), model(**one_batch).pooler_output

    def by_length():
        for bucket, batch in zip(buckets, bucketed):
            yield bucket, model(**batch).pooler_output

    def with_mask():
        model.set_attn_implementation("sdpa")  # the stock one
        outputs = model.backbone(
            input_ids=packed["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
        )
        states = outputs.last_hidden_state[0].split(bounds.diff().tolist())
        yield list(range(len(rows))), torch.stack([row.mean(0) for row in states])

    def by_row():
        yield list(range(len(rows))), model(**packed).pooler_output

    def computed(batches):
        return sum(batch["input_ids"].numel() for batch in batches) / int(bounds[-1])

    variants = {
        "padded, random order": (as_they_come, computed([one_batch])),
        "padded by length": (by_length, computed(bucketed)),
        "packed, sdpa with a 4-D mask": (with_mask, computed([packed])),
        "packed, row by row": (by_row, computed([packed])),
    }
    results = {}
    for name, (forward, positions_per_token) in variants.items():
        vectors = torch.zeros(len(rows), args.hidden_size)
        with torch.no_grad():
            for indices, pooled in forward():
                vectors[indices] = torch.nn.functional.normalize(pooled.float().cpu(), dim=-1)

        def step(forward=forward):
            for _, pooled in forward():
                pooled.float().square().sum().backward()
            model.zero_grad()

        results[name] = (measure(step, args.device, args.runs), positions_per_token, vectors)

    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, {args.dtype}, torch {torch.__version__}, hidden size {args.hidden_size}, {args.layers} layers, ")
    print(f"{len(rows)} rows of {args.shortest} to {args.longest} tokens, {int(bounds[-1])} in all\n")
    print(
        "| rows | positions per token | forward + backward, x padded | times faster | memory, x padded | difference |"
    )
    print("|---|---|---|---|---|---|")
    (base, base_memory), _, reference = results["padded, random order"]
    for name, ((seconds, memory), positions_per_token, vectors) in results.items():
        memory = "-" if memory is None else f"{memory / base_memory:.2f}"
        difference = (vectors - reference).abs().max()
        print(
            f"| {name} | {positions_per_token:.2f} | {seconds / base:.2f} | {base / seconds:.2f} | {memory} | "
            f"{difference:.0e} |"
        )


if __name__ == "__main__":
    main()
