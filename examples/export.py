"""Export a trained model as one folder that transformers and sentence-transformers load by name, and verify it.

python examples/export.py --model output/stage2 --repo org/moca-3b --base-model Qwen/Qwen2.5-VL-3B-Instruct \
    --dtype bfloat16 --license apache-2.0 --language en
python examples/export.py --model output/stage2 --repo org/moca-3b-multi-vector --layout multi_vector
python examples/export.py --model output/stage1 --repo org/moca-3b-pretrained --layout pretraining
python examples/export.py --model output/stage2 --repo org/moca-3b --push --dry-run

The model may be a finished folder of either stage, a checkpoint, or a checkpoint of adapters (LoRA, DoRA), which
are merged. The folder is named by --output, or like the model in --repo; it is verified in a process of its own, as
`python -m hub_cards.verify FOLDER` does again.
"""

import argparse
import json
import logging

from hub_cards.export import DTYPES, LAYOUTS, export
from hub_cards.hub_metadata import check_metadata
from hub_cards.push import push, report


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with model and processor, of either stage")
    parser.add_argument("--repo", help="name on the Hub, which the card's snippets load, for example org/moca-3b")
    parser.add_argument("--output", help="new folder; the last part of --repo when omitted")
    parser.add_argument(
        "--layout",
        default="embedding",
        choices=LAYOUTS,
        help="one vector an input, one a token (late interaction), or one an input with the pre-training heads",
    )
    parser.add_argument(
        "--projection-dim",
        type=int,
        help="multi_vector: width of the token vectors, by a new map that is to be trained",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; that of the checkpoint when omitted")
    parser.add_argument("--max-shard-size", default="4GB", help="largest file of weights (%(default)s)")
    parser.add_argument("--prompts", type=json.loads, help='JSON, for example {"query": "Find: "}')
    parser.add_argument("--base-model", help="Hub id of the backbone, for the card")
    parser.add_argument("--license", help="licence id of the weights, for the card, as the Hub lists them")
    parser.add_argument("--license-name", help="for --license other")
    parser.add_argument("--license-link", help="for --license other")
    parser.add_argument("--language", nargs="+", help="language codes, for the card")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the training data, for the card")
    parser.add_argument(
        "--results", nargs="+", default=[], help="result files (JSON) for the card, see hub_cards/results.py"
    )
    parser.add_argument("--push", action="store_true", help="push the verified folder to the Hub, as --repo")
    parser.add_argument("--public", action="store_true", help="--push: a new repository is public, not private")
    parser.add_argument("--dry-run", action="store_true", help="--push: only list what would be sent")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    if args.repo is None and args.output is None:
        parser.error("give --repo, --output or both")
    if args.push and args.repo is None:
        parser.error("--push needs --repo, the repository")
    if (args.public or args.dry_run) and not args.push:
        parser.error("--public and --dry-run go with --push")
    check_metadata(repo=args.repo)
    folder = export(
        args.model,
        args.output,
        layout=args.layout,
        projection_dim=args.projection_dim,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        prompts=args.prompts,
        model_id=args.repo,
        base_model=args.base_model,
        license=args.license,
        license_name=args.license_name,
        license_link=args.license_link,
        language=args.language,
        datasets=args.datasets,
        results=args.results,
        overwrite=args.overwrite,
        verify=True,
    )
    if args.push:
        report(push(folder, args.repo, private=not args.public, dry_run=args.dry_run))


if __name__ == "__main__":
    main()
