"""Search the demo's held-out rows with a published model, the way a user of the Hub would load it.

    python examples/demo_search.py --model demo_output/export --output demo_output/search.json

Nothing here knows MoCa: sentence-transformers loads the folder, and the code it brings, by itself.
"""

import argparse
import json
import logging

import torch
from demo_data import pair_rows
from sentence_transformers import SentenceTransformer

from trainers.evaluation import retrieval_metrics

logger = logging.getLogger(__name__)


def as_input(side):
    """Return one side of a pair in the form that `encode` takes: text, image, or both."""
    if side["image"] is None:
        return side["text"]
    return {"text": side["text"], "image": side["image"]} if side["text"] else side["image"]


def search(model, pairs, batch_size=32):
    """Rank every task's positives for every query of that task.

    Args:
        model (`SentenceTransformer`): embeds text and images.
        pairs (`dict[str, list[dict]]`): what `demo_data.pair_rows` returns; the positive of row i answers query i.
        batch_size (`int`, defaults to 32): inputs a forward pass.

    Returns:
        `dict[str, dict]`: by task, the metrics `P@1` and `nDCG@5`, and `top5`, candidate numbers of every query.
    """
    options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    results = {}
    for task, rows in pairs.items():
        embeddings = [
            model.encode([as_input(row[side]) for row in rows], **options).float() for side in ("query", "positive")
        ]  # 2 x [n, d]
        metrics = retrieval_metrics(*embeddings, [[row] for row in range(len(rows))])
        top5 = (embeddings[0] @ embeddings[1].T).topk(min(5, len(rows))).indices
        results[task] = {**metrics, "num_candidates": len(rows), "top5": top5.tolist()}
    return results


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--split", default="test", help="which held-out rows")
    args = parser.parse_args()
    model = SentenceTransformer(args.model, trust_remote_code=True, device="cpu")
    with torch.no_grad():
        results = search(model, pair_rows(args.split, 0))
    # Which code ran: the folder's own, not an installed package.
    results["module"] = type(model[0].model).__module__
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(results, file)
    logger.info("Wrote %s", args.output)


if __name__ == "__main__":
    main()
