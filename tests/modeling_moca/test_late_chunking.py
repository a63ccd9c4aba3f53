"""Late chunking against pooling by hand, with characters counted from the tokens themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_moca import MoCaModel, MoCaProcessor
from modeling_moca.late_chunking import _windows, embed_passages
from tests.families import family_backbone, family_processor
from tests.tiny import IMAGE, tiny_backbone, tiny_processor

IMAGE_IDS = (2, 3, 5)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model():
    return MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def members_by_hand(processor, passages, input_ids):
    """For each token its passages: an image's tokens are its own, text tokens are as many characters as bytes (ASCII).

    Every passage is one text or one image.
    """
    texts = ["" if isinstance(passage, Image.Image) else passage for passage in passages]
    ends = np.cumsum([len(text) for text in texts])
    images = [number for number, passage in enumerate(passages) if isinstance(passage, Image.Image)]
    position, members = 0, []
    for token in input_ids:
        if token in IMAGE_IDS:
            members.append({images[0]})
            if token == 5:
                images.pop(0)
            continue
        length = len(processor.tokenizer.convert_ids_to_tokens(token))
        span = range(position, position + length)
        members.append(
            {number for number, end in enumerate(ends) if set(span) & set(range(end - len(texts[number]), end))}
        )
        position += length
    return members


PASSAGES = ["the page shows", noise(56, 84), " a picture", noise(28, 28, 1), "of the", " sea and the s", "ky."]


@pytest.mark.parametrize("seed", range(3))
def test_passages_equal_pooling_by_hand(model, processor, seed):
    passages = [PASSAGES[i] for i in np.random.default_rng(seed).permutation(len(PASSAGES))] if seed else PASSAGES
    text = "".join(IMAGE if isinstance(passage, Image.Image) else passage for passage in passages)
    images = [passage for passage in passages if isinstance(passage, Image.Image)]
    inputs = processor(text=[text], images=[images])
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    members = members_by_hand(processor, passages, inputs["input_ids"][0].tolist())
    # Some token lies across a border, or this would show less.
    assert seed or any(len(owners) == 2 for owners in members)
    expected = torch.stack(
        [states[[number in owners for owners in members]].mean(0) for number in range(len(passages))]
    )
    found = embed_passages(model, processor, passages)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    # Without their document the passages are others.
    alone = torch.cat([embed_passages(model, processor, [passage]) for passage in passages])
    assert (alone - found).abs().amax(dim=1).min() > 0.01


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_one_passage_is_the_ordinary_embedding(family):
    processor = family_processor(family)
    model = MoCaModel.from_backbone(family_backbone(family), mask_token_id=6).eval()
    first, second = noise(64, 40), noise(32, 64, 1)
    inputs = processor(text=[f"the sea{IMAGE}and é🌊 {IMAGE}sky"], images=[[first, second]])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**inputs).pooler_output, dim=-1)
    found = embed_passages(model, processor, [["the sea", first, "and é🌊 ", second, "sky"]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_characters_of_several_tokens_and_control_tokens_are_text(model, processor):
    passages = ["é🌊", "日本", f"a {IMAGE} b", "<|mask|>"]
    inputs = processor(text=["é🌊日本a "], images=None)
    counts = [len(passage.encode()) for passage in passages]
    seen = []

    def forward(input_ids, **inputs):
        seen.append(input_ids[0].tolist())
        # The state says where a token stands.
        return SimpleNamespace(last_hidden_state=torch.eye(input_ids.shape[1])[None])

    found = embed_passages(_Callable(model, forward), processor, passages)
    (ids,) = seen
    assert not set(ids) & {2, 3, 4, 5, 6} and "".join(passages) == processor.tokenizer.decode(ids)
    assert inputs["input_ids"][0].tolist()[: counts[0] + counts[1]] == ids[: counts[0] + counts[1]]
    # All bytes of these characters are tokens of their own here, and belong to their passage alone.
    assert (found[0] > 0).nonzero().flatten().tolist() == list(range(counts[0]))
    assert (found[1] > 0).nonzero().flatten().tolist() == list(range(counts[0], counts[0] + counts[1]))


class _Callable:
    """A stand-in for a model, whose states are known."""

    def __init__(self, like, forward):
        self.config, self.device, self.forward = like.config, like.device, forward

    def __call__(self, **inputs):
        return self.forward(**inputs)


def test_windows_keep_every_token_once_and_cut_no_image(model, processor):
    """With states that do not depend on context, windows change nothing; each of them is within the limit."""
    images = [noise(56, 84, 2), noise(84, 84, 3)]
    passages = ["the page " * 6, images[0], "shows a picture " * 7, images[1], "of the sea and the sky" * 5]
    table = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    lengths = []

    def forward(input_ids, attention_mask, pixel_values=None, image_grid_thw=None):
        lengths.append(input_ids.shape[1])
        num_pads = int((input_ids == 3).sum())
        assert num_pads == (0 if image_grid_thw is None else int(image_grid_thw.prod(-1).sum()) // 4)
        return SimpleNamespace(last_hidden_state=table[input_ids])

    stand_in = _Callable(model, forward)
    expected = embed_passages(stand_in, processor, passages)
    (num_tokens,) = lengths
    for max_length, overlap in ((60, 0), (40, 8), (40, 39), (30, None), (11, 5)):
        lengths.clear()
        found = embed_passages(stand_in, processor, passages, max_length=max_length, overlap=overlap)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert max(lengths) <= max_length and sum(lengths) >= num_tokens and len(lengths) > 1


def test_windows_of_text_by_hand(model, processor):
    passages = ["the page shows a picture ", "of the sea", " and the sky " * 3]
    ids = processor(text=["".join(passages)], images=None)["input_ids"]
    states = torch.zeros(ids.shape[1], 32)
    # Windows of 16 that share 4: each gives the states up to the middle of what it shares.
    begin, kept = 0, 0
    while kept < ids.shape[1]:
        end = min(begin + 16, ids.shape[1])
        until = end if end == ids.shape[1] else end - 2
        window = ids[:, begin:end]
        with torch.no_grad():
            inside = model(input_ids=window, attention_mask=torch.ones_like(window)).last_hidden_state[0]
        states[kept:until] = inside[kept - begin : until - begin]
        begin, kept = end - 4, until
    members = members_by_hand(processor, passages, ids[0].tolist())
    expected = torch.stack([states[[number in owners for owners in members]].mean(0) for number in range(3)])
    found = embed_passages(model, processor, passages, max_length=16, overlap=4)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_windows_go_on_where_an_image_takes_all_of_one():
    # Units of 3, 10, 1, 1, 10 tokens: an image of 10 leaves no room for what was before it.
    assert list(_windows([0, 3, 13, 14, 15, 25], 10, 4)) == [
        (0, 1, (0, 3)),
        (1, 2, (3, 13)),
        (2, 4, (13, 15)),
        (4, 5, (15, 25)),
    ]
    assert list(_windows([0, 3], 10, 4)) == [(0, 1, (0, 3))]


def test_bad_input_is_named(model, processor):
    with pytest.raises(ValueError, match="at least one passage, got none"):
        embed_passages(model, processor, [])
    for empty in ("", [], ["", ""]):
        with pytest.raises(ValueError, match="Passage 1 is empty"):
            embed_passages(model, processor, ["the sea", empty])
    with pytest.raises(ValueError, match="Passage 1, part 0 does not open"):
        embed_passages(model, processor, ["the sea", b"no image"])
    with pytest.raises(ValueError, match=r"Passage 0, part 1: its images take \d+ tokens, more than max_length=5"):
        embed_passages(model, processor, [["a", noise(84, 84)]], max_length=5)
    for overlap in (-1, 8):
        with pytest.raises(ValueError, match=rf"overlap must be from 0 to 7 \(max_length is 8\), got {overlap}"):
            embed_passages(model, processor, ["the sea"], max_length=8, overlap=overlap)
    last = MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6, pooling="last")
    with pytest.raises(ValueError, match="pools by mean, but the model pools by 'last'"):
        embed_passages(last, processor, ["the sea"])
    slow = SimpleNamespace(is_fast=False, model_max_length=512)
    with pytest.raises(ValueError, match="does not tell which characters a token stands for"):
        embed_passages(model, SimpleNamespace(tokenizer=slow, max_length=512), ["the sea"])


def test_a_saved_processor_gives_the_same(model, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MoCaProcessor.from_pretrained(tmp_path)
    passages = ["the sea ", noise(56, 56), "and the sky"]
    expected = embed_passages(model, processor, passages)
    torch.testing.assert_close(embed_passages(model, again, passages), expected)
