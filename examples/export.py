"""Export a trained model as one folder that transformers and sentence-transformers load by name.

python examples/export.py --model output/stage2 --output moca-3b --base-model Qwen/Qwen2.5-VL-3B-Instruct
python examples/export.py --model output/stage2 --output moca-3b-multi-vector --layout multi_vector
"""

import argparse
import json
import logging

from hub_cards.export import LAYOUTS, export


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with model and processor, of either stage")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--model-id", help="name that the card's snippets load, for example org/moca-3b")
    parser.add_argument("--base-model", help="Hub id of the backbone, for the card")
    parser.add_argument("--license", help="licence id of the weights, for the card")
    parser.add_argument(
        "--results", nargs="*", default=[], help="result files (JSON) for the card, see hub_cards/results.py"
    )
    parser.add_argument("--prompts", type=json.loads, help='JSON, for example {"query": "Find: "}')
    parser.add_argument(
        "--layout", default="embedding", choices=LAYOUTS, help="one vector an input, or one a token (late interaction)"
    )
    parser.add_argument(
        "--projection-dim",
        type=int,
        help="multi_vector: width of the token vectors, by a new map that is to be trained",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    export(
        args.model,
        args.output,
        prompts=args.prompts,
        model_id=args.model_id,
        base_model=args.base_model,
        license=args.license,
        results=args.results,
        layout=args.layout,
        projection_dim=args.projection_dim,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    main()
