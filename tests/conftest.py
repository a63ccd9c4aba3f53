"""Settings that every test shares: no network, one thread, the repository importable."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# The files that take longest, in this order: when short ones are left for the end, two workers end together.
LONG_FILES = """
trainers/test_contrastive_sharded.py examples/test_quickstart.py trainers/test_cpt_sharded.py
modeling_moca/test_attention.py hub_cards/test_export.py hub_cards/test_verify.py
trainers/test_contrastive_distributed.py test_both_stages.py hub_cards/test_card.py hub_cards/test_multi_vector.py
trainers/test_contrastive_resume.py hub_cards/test_push.py modeling_moca/test_packing.py trainers/test_cpt_resume.py
trainers/test_contrastive_adapters.py trainers/test_contrastive_trainer.py trainers/test_contrastive_mixture.py
trainers/test_cpt_distributed.py hub_cards/test_space.py trainers/test_hub_push.py hub_cards/test_checkpoints.py
hub_cards/test_mteb.py trainers/test_cpt_mixture_training.py examples/test_convert.py
modeling_moca/test_checkpoints.py test_readme.py trainers/test_cpt_trainer.py hub_cards/test_cpt_dataset.py
test_demo_data.py test_versions.py
""".split()


def pytest_collection_modifyitems(items):
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch, so that a test does not depend on the ones before it."""
    torch.manual_seed(0)
