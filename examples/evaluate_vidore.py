"""Evaluate page retrieval with mteb, with the reference's prompts and without, and show what the prompts are worth.

    python examples/evaluate_vidore.py --model moca-3b --output results --benchmarks "ViDoRe(v2)" "ViDoRe(v3)"
    python examples/evaluate_vidore.py --model moca-3b --output results --local-pages my_pages --split test
    python examples/evaluate_vidore.py --model moca-3b --output results --local-pages my_pages \
        --prompts '{"query": "Find: ", "document": "A page."}'

--model is an export, a folder or a Hub id. Prompts are written behind a page's image; the reference's are "Represent
the given document image." with a line break for pages, and nothing for queries. --local-pages is a folder of Parquet
files as the head of hub_cards/mteb_pages.py describes them. A run that was killed goes on when it is started again.

Intervals are paired and over queries. Where a task has several languages (ViDoRe v2 and v3), translations of one
question are drawn together if every language has them in the same order; else the intervals are too narrow, and
--languages eng leaves one.
"""

import argparse
import json
import logging
from pathlib import Path

import mteb

from hub_cards.mteb_models import model_meta
from hub_cards.mteb_pages import local_pages
from hub_cards.mteb_prompts import REFERENCE_PROMPTS, as_json, as_table, compare_prompts


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that examples/export.py wrote, or Hub id")
    parser.add_argument("--output", required=True, help="folder of results, a cache of mteb")
    parser.add_argument("--name", help="the model's name in results, for example org/moca-3b")
    parser.add_argument("--benchmarks", nargs="+", default=[], help='of mteb, for example "ViDoRe(v2)"')
    parser.add_argument("--languages", nargs="+", help="only these of the benchmarks, for example eng")
    parser.add_argument("--local-pages", help="folder of Parquet files")
    parser.add_argument("--split", default="test", help="--local-pages: which files (%(default)s)")
    parser.add_argument(
        "--prompts", type=json.loads, default=REFERENCE_PROMPTS, help='JSON, for example {"document": "A page."}'
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", help="for example cuda:0")
    args = parser.parse_args()
    groups = {name: list(mteb.get_benchmark(name).tasks) for name in args.benchmarks}
    if args.languages:
        for tasks in groups.values():
            tasks[:] = [task for task in (task.filter_languages(args.languages) for task in tasks) if task.hf_subsets]
    if args.local_pages:
        groups[args.local_pages] = [local_pages(args.local_pages, args.split)]
    if not groups:
        parser.error("give --benchmarks, --local-pages or both")
    meta = model_meta(args.model, name=args.name)
    written, card_files = {}, []
    for name, tasks in groups.items():
        rows, files = compare_prompts(
            meta, tasks, args.output, prompts=args.prompts, device=args.device, batch_size=args.batch_size
        )
        written[name] = as_json(meta, args.prompts, rows)
        card_files += files
        print(f"{name}\n\n{as_table(rows)}\n")
    table = Path(args.output) / "prompts.json"
    table.write_text(json.dumps(written, indent=2), encoding="utf-8")
    print(f"Wrote {table}. With the prompts, for examples/export.py --results:", *card_files, sep="\n")


if __name__ == "__main__":
    main()
