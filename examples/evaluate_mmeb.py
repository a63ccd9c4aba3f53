"""Evaluate a model on MMEB: Precision@1 on 36 tasks, their averages, result files for the model card.

    python examples/evaluate_mmeb.py --model_name_or_path moca-3b --image_folder images.zip --output_dir mmeb \
        --dtype bfloat16

Rows are streamed from `TIGER-Lab/MMEB-eval`, whose `images.zip` must be there, as it is or unpacked (`hf download
TIGER-Lab/MMEB-eval images.zip --repo-type dataset --local-dir .`); `--dataset_path FOLDER` takes a local copy instead.
Settings are those of `trainers.mmeb_config.MMEBConfig`, as flags or from `--config FILE.yaml`. A run that was killed
goes on behind the last finished task when it is started again.
"""

import logging

from trl import TrlParser

from trainers.mining_embeddings import load_encoder
from trainers.mmeb import MMEBEvaluator
from trainers.mmeb_config import MMEBConfig


def main():
    """Parse, load, evaluate, print the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    (config,) = TrlParser((MMEBConfig,)).parse_args_and_config()
    MMEBEvaluator(config, load_encoder(config)).evaluate()
    with open(f"{config.output_dir}/summary.md", encoding="utf-8") as file:
        print(file.read())


if __name__ == "__main__":
    main()
