"""Padding, and cost from rank to rank, of micro-batches made from a realistic mix of rows.

    python benchmarks/padding.py
    python benchmarks/padding.py --data "rows/*.parquet" --processor Qwen/Qwen2.5-VL-3B-Instruct

- `plain`: rows in random order, a fixed number a micro-batch.
- `stock`: the same number of rows by transformers' `LengthGroupedSampler` (`train_sampling_strategy: group_by_length`).
- `by cost`: what the trainer does (`CostBatches`), one line a window; each of `--ranks` readers has rows of its own.

Prints positions that hold padding as a share of all, the same of the square of the length (what attention costs), and
how far the cheapest rank of a step is below the dearest, at worst and on average. Rows are made up when `--data` is
omitted: captions with one image, long texts, pages, and texts with two images, a quarter each.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_pt_utils import LengthGroupedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_moca import MoCaProcessor
from trainers.cpt_batches import CostBatches
from trainers.cpt_collator import CPTCollator
from trainers.cpt_mixture import CPTMixture, DataSource
from trainers.cpt_rows import row_cost

MAX_LENGTH = 2048


@dataclass
class Row:
    """What batching asks of a row, and the tokens of each of its images."""

    num_tokens: int
    cost: int
    image_tokens: tuple = ()


def made_up_row(chance):
    """Return a row of one of four kinds."""
    kind, text = chance.randrange(4), int(chance.lognormvariate(5, 1))
    num_images = (1, 0, 1, 2)[kind]
    size = (chance.randint(256, 1024), 0, 1024, chance.randint(256, 900))[kind]
    num_image_tokens = num_images * size
    num_tokens = min(num_image_tokens + 2 * num_images + (4 * text if kind == 1 else text) + 1, MAX_LENGTH)
    cost = row_cost(num_tokens, num_image_tokens, num_images, MAX_LENGTH)
    return Row(num_tokens, cost, (size,) * num_images)


def measured_rows(files, processor):
    """Return the rows of Parquet files, measured as the trainer measures them."""
    collator = CPTCollator(MoCaProcessor.from_backbone(processor), max_length=MAX_LENGTH)
    rows = CPTMixture([DataSource("parquet", data_files=files)]).read(num_epochs=1)
    prepared = [collator.prepare(row.content, row.row) for row in rows]
    return [Row(row.num_tokens, row.cost) for row in prepared]


class Reader:
    """One rank's rows, in random order, without end."""

    def __init__(self, rows, rank, num_ranks):
        self._rows, self._chance = rows[rank::num_ranks], random.Random(rank)
        self._order = []

    def __next__(self):
        if not self._order:
            self._order = self._chance.sample(self._rows, len(self._rows))
        return self._order.pop()

    def state_dict(self):
        """Nobody goes on from here."""
        return None


def waste(batches):
    """Return the shares of positions, and of their squares, that are padding."""
    shares = []
    for power in (1, 2):
        real = sum(row.num_tokens**power for batch in batches for row in batch)
        padded = sum(len(batch) * max(row.num_tokens for row in batch) ** power for batch in batches)
        shares.append(1 - real / padded)
    return shares


def spread(ranks):
    """Return by how much the cheapest rank of a step is below the dearest: worst and mean."""
    gaps = []
    for step in zip(*ranks):
        costs = [sum(row.cost for row in batch) for batch in step]
        gaps.append(1 - min(costs) / max(costs))
    return max(gaps), sum(gaps) / len(gaps)


def cut(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]


def main():
    """Print a line a way of making micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Parquet files with the columns text and images; made up when omitted")
    parser.add_argument("--processor", help="checkpoint of tokenizer and image processor; the demo's when omitted")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to make up")
    parser.add_argument("--max_cost", type=int, default=12_800)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 256, 1024])
    args = parser.parse_args()

    chance = random.Random(0)
    if args.data:
        backbone = args.processor or str(Path(__file__).resolve().parents[1] / "examples" / "demo_backbone")
        rows = measured_rows(args.data, backbone)
    else:
        rows = [made_up_row(chance) for _ in range(args.rows)]
    shuffled = chance.sample(rows, len(rows))
    size = max(round(args.max_cost / (sum(row.cost for row in rows) / len(rows))), 1)
    lengths = [row.num_tokens for row in rows]
    print(
        f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(rows):.0f} on average; "
        f"{args.ranks} ranks, {args.steps} steps, micro-batches of {size} rows or a cost of {args.max_cost}\n"
    )
    print("| micro-batches | padding | of squares | ranks differ: worst | mean |")
    print("|---|---|---|---|---|")
    grouped = [rows[index] for index in LengthGroupedSampler(size, lengths=lengths)]
    for name, ordered in (("plain", shuffled), ("stock", grouped)):
        batches = cut(ordered, size)[: args.ranks * args.steps]
        print_line(name, batches, [batches[rank :: args.ranks] for rank in range(args.ranks)])
    for window in args.windows:
        ranks = []
        for rank in range(args.ranks):
            batches = CostBatches(Reader(shuffled, rank, args.ranks), lambda row: row, args.max_cost, window, rank)
            ranks.append([batches.next_batch() for _ in range(args.steps)])
        print_line(f"by cost, window {window}", [batch for rank in ranks for batch in rank], ranks)


def print_line(name, batches, ranks):
    padding, squares = waste(batches)
    worst, mean = spread(ranks)
    print(f"| {name} | {padding:.1%} | {squares:.1%} | {worst:.1%} | {mean:.1%} |")


if __name__ == "__main__":
    main()
