"""mteb's command line, which then knows the published MoCa models, and the export that `--model` names.

python -m hub_cards.mteb_run run -m moca-3b -t SciFact
python -m hub_cards.mteb_run run -m moca-embed/MoCa-Qwen25VL-3B -b "ViDoRe(v2)"
python -m hub_cards.mteb_run mock-run -m org/moca-3b
"""

import argparse
import sys

from mteb.cli.build_cli import main as mteb_main
from mteb.models.model_implementations import MODEL_REGISTRY

from .mteb_models import register
from .mteb_published import register_published


def main():
    """Register what mteb does not know, then hand the command line, unchanged, to mteb.

    Raises:
        ValueError: `--model` is no export of a MoCa model.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-m", "--model")
    parser.add_argument("--model-revision", "--model_revision")
    args, _ = parser.parse_known_args(sys.argv[1:])
    register_published()
    if args.model is not None and args.model not in MODEL_REGISTRY:
        register(args.model, revision=args.model_revision)
    mteb_main()


if __name__ == "__main__":
    main()
