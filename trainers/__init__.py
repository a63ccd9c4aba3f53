"""Training of MoCa models: continual pre-training (stage 1), contrastive fine-tuning (stage 2), evaluation.

Names are imported when first used, so that one stage does not need the other one's dependencies.
"""

import importlib

_EXPORTS = {
    "ContrastiveConfig": "contrastive_config",
    "ContrastiveDataCollator": "contrastive_data",
    "ContrastiveTrainer": "contrastive_trainer",
    "InfoNCELoss": "contrastive_loss",
    "MiningConfig": "mining_config",
    "MMEBConfig": "mmeb_config",
    "MMEBEvaluator": "mmeb",
    "NegativeMiner": "mining",
    "PairMixture": "contrastive_mixture",
    "PairMixtureConfig": "contrastive_sources",
    "PairSource": "contrastive_sources",
    "TaskPlan": "contrastive_sampler",
    "add_adapters": "adapters",
    "add_embedding_adapters": "adapters",
    "build_sentence_transformer": "contrastive_model",
    "info_nce": "contrastive_info_nce",
    "CPTCollator": "cpt_collator",
    "CPTConfig": "cpt_config",
    "CPTMixture": "cpt_mixture",
    "CPTMixtureConfig": "cpt_mixture",
    "CPTTrainer": "cpt_trainer",
    "DataSource": "cpt_mixture",
    "mask_patches": "masking",
    "mask_tokens": "masking",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return __all__
