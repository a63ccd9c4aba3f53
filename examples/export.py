"""Export a trained model as one folder that transformers and sentence-transformers load by name.

python examples/export.py --model output/stage2 --output moca-3b --base-model Qwen/Qwen2.5-VL-3B-Instruct
python examples/export.py --model output/stage2 --output moca-3b --model-id org/moca-3b --push --dry-run
python examples/export.py --model output/stage2 --output moca-3b-multi-vector --layout multi_vector
"""

import argparse
import json
import logging

from hub_cards.export import LAYOUTS, export
from hub_cards.push import push, report


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with model and processor, of either stage")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--model-id", help="name that the card's snippets load, for example org/moca-3b")
    parser.add_argument("--base-model", help="Hub id of the backbone, for the card")
    parser.add_argument("--license", help="licence id of the weights, for the card")
    parser.add_argument("--prompts", type=json.loads, help='JSON, for example {"query": "Find: "}')
    parser.add_argument(
        "--layout", default="embedding", choices=LAYOUTS, help="one vector an input, or one a token (late interaction)"
    )
    parser.add_argument(
        "--projection-dim",
        type=int,
        help="multi_vector: width of the token vectors, by a new map that is to be trained",
    )
    parser.add_argument("--push", action="store_true", help="push the folder to the Hub, as --model-id")
    parser.add_argument("--public", action="store_true", help="--push: a new repository is public, not private")
    parser.add_argument("--dry-run", action="store_true", help="--push: only list what would be sent")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    if args.push and args.model_id is None:
        parser.error("--push needs --model-id, the repository.")
    if (args.public or args.dry_run) and not args.push:
        parser.error("--public and --dry-run go with --push.")
    folder = export(
        args.model,
        args.output,
        prompts=args.prompts,
        model_id=args.model_id,
        base_model=args.base_model,
        license=args.license,
        layout=args.layout,
        projection_dim=args.projection_dim,
        overwrite=args.overwrite,
    )
    if args.push:
        report(push(folder, args.model_id, private=not args.public, dry_run=args.dry_run))


if __name__ == "__main__":
    main()
