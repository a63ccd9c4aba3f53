"""The masked-token loss that keeps no logits: value and gradients of the plain one, in every type, chunk by chunk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_moca import MoCaForPreTraining
from modeling_moca.heads_moca import MoCaMLMHead, VocabularyProjection, summed_token_loss
from tests.modeling_moca.batches import masked_batch
from tests.tiny import tiny_backbone

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def head_and_batch(dtype, hidden_size=32, vocab_size=320, tokens=150):
    """More than one chunk of rows is chosen; the first positions are not."""
    torch.manual_seed(0)
    head = MoCaMLMHead(hidden_size, vocab_size)
    nn.init.normal_(head.lm_head.weight, std=0.3)
    states = torch.randn(3, tokens, hidden_size)
    labels = torch.randint(vocab_size, (3, tokens))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[:, 0] = -100
    assert (labels != -100).sum() > 2 * 128
    return head.to(dtype), states.to(dtype).requires_grad_(), labels


def plain(head, states, labels, shift, num_items):
    """All logits at once, in float64."""
    states, weight = (t.detach().double().requires_grad_() for t in (states, head.lm_head.weight))
    logits = states @ weight.T
    read, wanted = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    loss = F.cross_entropy(read.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum") / num_items
    return loss, *torch.autograd.grad(loss, [states, weight])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("path", ["fused", "logits", "plain module"])
def test_loss_and_gradients_equal_the_plain_ones(dtype, shift, path):
    head, states, labels = head_and_batch(dtype)
    expected = plain(head, states, labels, shift, 500)
    if path == "plain module":  # such as an adapter puts in its place
        linear = nn.Linear(32, 320, bias=False)
        linear.weight = head.lm_head.weight
        head.lm_head = linear
    loss, logits = head(states, labels, shift, torch.tensor(500), return_logits=path == "logits")
    assert (logits is not None) == (path == "logits")
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    gradients = torch.autograd.grad(loss, [states, head.lm_head.weight])
    # The sum itself is not rounded to the type of the states.
    torch.testing.assert_close(loss.double(), expected[0], rtol=min(TOLERANCE[dtype], 1e-3), atol=0)
    for ours, theirs in zip(gradients, expected[1:]):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < TOLERANCE[dtype] * theirs.norm()


def test_autocast_multiplies_in_its_type_and_gives_gradients_in_that_of_the_weights():
    head, states, labels = head_and_batch(torch.float32)
    expected = plain(head, states, labels, True, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head(states, labels, True, 1)
        by_logits, logits = head(states, labels, True, 1, return_logits=True)
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(loss, by_logits, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, [states, head.lm_head.weight]), expected[1:]):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("shift", [True, False])
def test_nothing_chosen_is_zero_with_zero_gradients(shift):
    head, states, labels = head_and_batch(torch.float32)
    loss, _ = head(states, labels.fill_(-100), shift)
    assert loss == 0
    loss.backward()
    assert not states.grad.any() and not head.lm_head.weight.grad.any()


def test_frozen_parts_get_no_gradient():
    head, states, labels = head_and_batch(torch.float64)
    expected = plain(head, states, labels, True, 1)
    head.lm_head.weight.requires_grad_(False)
    head(states, labels, True, 1)[0].backward()
    assert head.lm_head.weight.grad is None
    torch.testing.assert_close(states.grad, expected[1])
    head.lm_head.weight.requires_grad_(True)
    head(states.detach(), labels, True, 1)[0].backward()
    torch.testing.assert_close(head.lm_head.weight.grad, expected[2])
    with torch.no_grad():
        assert not head(states, labels, True, 1)[0].requires_grad


def test_second_backward_is_refused():
    states, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = summed_token_loss(states, weight, torch.arange(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once only"):
        loss.backward()


def test_logits_exist_one_chunk_at_a_time():
    """The largest tensor saved or made on the way is a chunk of logits, not all of them."""
    head, states, labels = head_and_batch(torch.float32, vocab_size=5000)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Largest():
        head(states, labels)[0].backward()
    assert max(sizes) == max(128 * 5000, 32 * 5000) < (labels != -100).sum() * 5000 / 2


def test_logits_come_in_evaluation_mode_or_when_asked_for():
    model, batch = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6), masked_batch()
    assert type(model.mlm_head.lm_head) is VocabularyProjection
    evaluated = model.eval()(**batch)
    assert evaluated.mlm_logits.shape == (6, 320)
    assert model(**batch, return_logits=False).mlm_logits is None
    model.train()
    trained = model(**batch)
    assert trained.mlm_logits is None
    assert torch.equal(model(**batch, return_logits=True).mlm_logits, evaluated.mlm_logits)
    torch.testing.assert_close(trained.mlm_loss, evaluated.mlm_loss)


def test_another_projection_becomes_one_that_takes_labels():
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    model.resize_token_embeddings(330)
    assert type(model.get_output_embeddings()) is VocabularyProjection
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.shape == (330, 32)
    # What does more than multiply stays what it is.
    for module in (nn.Linear(32, 320), nn.Sequential(nn.Linear(32, 320))):
        model.set_output_embeddings(module)
        assert model.get_output_embeddings() is module
