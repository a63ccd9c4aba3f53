"""Hard negatives for stage 2, mined with a model.

    python examples/mine_negatives.py --config examples/configs/mine_tiny.yaml --model_name_or_path OUT_OF_STAGE_2

Settings come from the YAML file; flags override them and unknown keys are errors. The fields are those of
`trainers.mining_config.MiningConfig`. The output folder holds a Parquet file a data set, `datasets.yaml` with the
entries that `examples/train_contrastive.py` takes, and `mining_report.json`. A run that was killed goes on when it is
started again.
"""

import logging

from trl import TrlParser

from trainers.mining import NegativeMiner
from trainers.mining_config import MiningConfig
from trainers.mining_embeddings import load_encoder


def main():
    """Parse, load, mine."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    (config,) = TrlParser((MiningConfig,)).parse_args_and_config()
    NegativeMiner(config, load_encoder(config)).mine()


if __name__ == "__main__":
    main()
