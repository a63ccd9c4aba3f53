"""Two real ranks give the loss and the gradients of one process, however they share the model and cut the batch."""

import pytest
import torch

from tests.trainers import contrastive_loss_ranks
from tests.trainers.contrastive_cases import save_checkpoint
from tests.two_ranks import fork_two_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_checkpoint(folder)
    fork_two_ranks(contrastive_loss_ranks.__file__, folder)
    return folder, contrastive_loss_ranks.compute("whole", "plain", folder)


@pytest.mark.parametrize("setting", contrastive_loss_ranks.SETTINGS)
@pytest.mark.parametrize("wrapper", contrastive_loss_ranks.WRAPPERS)
def test_two_ranks_equal_one_process(results, wrapper, setting):
    """With duplicates, Matryoshka prefixes, differing K, and images on one rank only."""
    folder, (loss, gradients) = results
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 1e-3 and any("visual" in name for name in gradients)
    for rank in range(2):
        their_loss, theirs = torch.load(folder / f"{wrapper}-{setting}-{rank}.pt")
        torch.testing.assert_close(their_loss, loss, atol=1e-9, rtol=0)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, atol=1e-9 * largest, rtol=1e-8, msg=name)
