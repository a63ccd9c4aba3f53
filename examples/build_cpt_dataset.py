"""Data for stage 1, ready for the Hub: Parquet files and a data set card, from documents or captioned images.

    python examples/build_cpt_dataset.py --documents pages/ --output_dir pages-dataset --repo_id org/pages \
        --license cc-by-4.0 --language en --validation_share 0.01
    python examples/build_cpt_dataset.py --tables captions.csv --image_column file --caption_column title \
        --output_dir captions-dataset
    python -m hub_cards.push pages-dataset org/pages --repo-type dataset

Documents are Markdown, HTML and PDF files (`pip install moca[pdf]`) at any depth, with images below the same folder.
The flags are the fields of `hub_cards.cpt_config.CPTDatasetConfig`; `--config` takes them from a YAML file. A run that
was killed goes on when it is started again; `rejected.jsonl` in the output folder names what could not be used.
"""

import logging

from trl import TrlParser

from hub_cards.cpt_config import CPTDatasetConfig
from hub_cards.cpt_dataset import build_cpt_dataset


def main():
    """Parse and build."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    (config,) = TrlParser((CPTDatasetConfig,)).parse_args_and_config()
    build_cpt_dataset(config)


if __name__ == "__main__":
    main()
