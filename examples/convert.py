"""Turn a vision-language checkpoint into a MoCa folder: with all of its weights, or an error that lists what is wrong.

    python examples/convert.py --model moca-embed/MoCa-Qwen25VL-3B --processor-name Qwen/Qwen2.5-VL-3B-Instruct \
        --output moca-3b --license mit --base-model Qwen/Qwen2.5-VL-3B-Instruct
    python examples/convert.py --model Qwen/Qwen2.5-VL-3B-Instruct --output moca-3b-start --for-training

Takes Hub ids and folders of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM and the published MoCa models. The
first command writes a finished embedding model, ready to publish; the second a start of stage 1, with its heads.
"""

import argparse
import json
import logging
from pathlib import Path

from hub_cards.export import LAYOUTS, export_model
from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor

logger = logging.getLogger(__name__)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--processor-name", help="where tokenizer and image processor come from; --model when not set")
    parser.add_argument("--for-training", action="store_true", help="keep or make the heads of stage 1")
    parser.add_argument("--causal", action="store_true", help="keep causal attention and pool the last token")
    parser.add_argument("--dtype", default="auto", help="type of the weights; the checkpoint's own when not set")
    parser.add_argument("--max-length", type=int, default=2048, help="most tokens of an input")
    parser.add_argument("--min-pixels", type=int, help="area of an image at least (Qwen-VL); 256 tokens when not set")
    parser.add_argument("--max-pixels", type=int, help="area of an image at most (Qwen-VL); 1024 tokens when not set")
    parser.add_argument("--longest-edge", type=int, help="longer side of an image (Idefics3, SmolVLM)")
    parser.add_argument("--layout", default="embedding", choices=LAYOUTS, help="one vector an input, or one a token")
    parser.add_argument("--prompts", type=json.loads, help='JSON, for example {"query": "Find: "}')
    parser.add_argument("--model-id", help="name that the card's snippets load, for example org/moca-3b")
    parser.add_argument("--base-model", help="Hub id of the backbone, for the card")
    parser.add_argument("--license", help="licence id of the weights, for the card")
    return parser.parse_args()


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    args = parse_arguments()
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: give a new folder.")
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    if args.longest_edge is not None:
        limits["size"] = {"longest_edge": args.longest_edge}
    processor = MoCaProcessor.from_backbone(
        args.model, processor_name=args.processor_name, max_length=args.max_length, **limits
    )
    model_class = MoCaForPreTraining if args.for_training else MoCaModel
    model = model_class.from_backbone(
        args.model, bidirectional=not args.causal, mask_token_id=processor.mask_token_id, dtype=args.dtype
    )
    if args.for_training:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    else:
        export_model(
            model,
            processor,
            output,
            layout=args.layout,
            prompts=args.prompts,
            model_id=args.model_id,
            base_model=args.base_model,
            license=args.license,
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s of %d parameters is in %s.", model_class.__name__, num_parameters, output)


if __name__ == "__main__":
    main()
