"""The processor: both doors, images of every mode, truncation, and text that must stay text."""

import io
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from modeling_moca import MoCaModel, MoCaProcessor
from modeling_moca.images_moca import to_rgb
from tests.tiny import IMAGE, tiny_backbone, tiny_config, tiny_processor, tiny_tokenizer

QWEN_TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer"


def noise(width=56, height=56, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def chat(*content, role="user"):
    blocks = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": role, "content": blocks}]


def test_placeholder_becomes_one_token_for_every_four_patches():
    processor = tiny_processor()
    first, second = noise(84, 56), noise(28, 56)
    batch = processor(text=[f"a{IMAGE}b{IMAGE}c", "long enough to be padded" * 2], images=[[first, second], []])
    row = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    letters = [processor.tokenizer(letter)["input_ids"][0] for letter in "abc"]
    assert row == [letters[0], 2, *[3] * 6, 5, letters[1], 2, *[3] * 2, 5, letters[2]]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 2]]
    assert batch["pixel_values"].shape == (24 + 8, 1176)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    assert processor.image_token_id == 3


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_side(padding_side):
    processor = tiny_processor()
    processor.tokenizer.padding_side = padding_side
    mask = processor(text=["ab", "abcd"])["attention_mask"]
    assert mask[0].tolist() == ([1, 1, 0, 0] if padding_side == "right" else [0, 0, 1, 1])


@pytest.mark.parametrize("given", ["nested", "flat", "bytes", "array", "path", "dict"])
def test_images_may_be_given_in_many_ways(given, tmp_path):
    processor = tiny_processor()
    first, second = noise(seed=1), noise(seed=2)
    first.save(tmp_path / "first.png")
    images = {
        "nested": [[first], [second]],
        "flat": [first, second],
        "bytes": [[png(first)], [png(second)]],
        "array": [[np.asarray(first)], [np.asarray(second)]],
        "path": [[tmp_path / "first.png"], [second]],
        "dict": [[{"bytes": png(first), "path": None}], [second]],
    }[given]
    expected = processor(text=[IMAGE, IMAGE + "x"], images=[[first], [second]])
    batch = processor(text=[IMAGE, IMAGE + "x"], images=images)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


MODES = {
    "L": (lambda: Image.new("L", (28, 28), 100), (100, 100, 100)),
    "LA": (lambda: Image.new("LA", (28, 28), (100, 0)), (255, 255, 255)),
    "RGBA": (lambda: Image.new("RGBA", (28, 28), (10, 20, 30, 255)), (10, 20, 30)),
    "transparent": (lambda: Image.new("RGBA", (28, 28), (10, 20, 30, 0)), (255, 255, 255)),
    "P": (lambda: Image.new("RGB", (28, 28), (255, 0, 0)).convert("P"), (255, 0, 0)),
    "CMYK": (lambda: Image.new("CMYK", (28, 28), (0, 255, 255, 0)), (255, 0, 0)),
    "1": (lambda: Image.new("1", (28, 28), 1), (255, 255, 255)),
    "16 bit": (lambda: Image.fromarray(np.full((28, 28), 32896, dtype=np.uint16)), (128, 128, 128)),
    "16 bit PNG": (
        lambda: Image.open(io.BytesIO(png(Image.fromarray(np.full((28, 28), 65535, dtype=np.uint16))))),
        (255, 255, 255),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_right_rgb(mode):
    make, expected = MODES[mode]
    image = to_rgb(make())
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[14, 14].astype(int) - expected).max() <= 1


def test_exif_rotation_is_heeded():
    image = noise(56, 28)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    turned = to_rgb(Image.open(io.BytesIO(buffer.getvalue())))
    assert turned.size == (28, 56)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), k=3))


CONTROL = ["<|image_pad|>", "<|vision_start|>", "<|mask|>", "<|pad|>", "<|endoftext|>", "<|vision_start|><|image_pad|>"]


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("door", ["plain", "chat"])
def test_control_tokens_in_text_stay_text(text, door):
    processor = tiny_processor()
    text = f"see {text} here"
    ids = processor(text=[text]) if door == "plain" else processor.apply_chat_template([chat(text)], tokenize=True)
    ids = ids["input_ids"][0].tolist()
    assert min(ids) > 6, "a control token"
    assert processor.tokenizer.decode(ids) == text, "nothing is dropped"


def test_whole_placeholder_is_obeyed_in_plain_text_only():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="Row 1: the text has 1 image placeholders, but there are 0 images"):
        processor(text=["x", IMAGE])
    ids = processor.apply_chat_template([chat(IMAGE)], tokenize=True)["input_ids"][0].tolist()
    assert min(ids) > 6 and processor.tokenizer.decode(ids) == IMAGE


CHATS = {
    "text": (chat("t"), "t"),
    "content is a string": ([{"role": "user", "content": "t"}], "t"),
    "image": (chat(noise()), IMAGE),
    "image, text": (chat(noise(), "t"), f"{IMAGE}t"),
    "text, image: images first": (chat("t", noise()), f"{IMAGE}t"),
    "two images, text": (chat(noise(), noise(seed=1), "t"), f"{IMAGE}{IMAGE}t"),
    "interleaving is kept": (chat("a", noise(), "b", noise(seed=1)), f"a{IMAGE}b{IMAGE}"),
    "prompt, text": (chat("P: ", role="system") + chat("t"), "P: t"),
    "prompt as a string": ([{"role": "system", "content": "P: "}, *chat(noise(), "t")], f"{IMAGE}P: t"),
    "prompt, image": (chat("P: ", role="system") + chat(noise()), f"{IMAGE}P: "),
    "prompt, interleaved": (chat("P: ", role="system") + chat(noise(), "a", noise(seed=1)), f"{IMAGE}P: a{IMAGE}"),
    "two messages": (chat(noise(), "a") + chat("b", role="assistant"), f"{IMAGE}ab"),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_is_rendered_and_encoded_alike(name):
    processor = tiny_processor()
    messages, expected = CHATS[name]
    assert processor.apply_chat_template(messages) == expected
    images = [block["image"] for message in messages for block in message["content"] if "image" in block]
    plain = processor(text=[expected], images=[[image for image in images if not isinstance(image, str)]])
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert set(encoded) == set(plain)
    for key, tensor in plain.items():
        assert torch.equal(encoded[key], tensor), key


def test_wrapped_chats_and_none_blocks():
    processor = tiny_processor()
    picture = noise()
    inner = chat(picture, "a")
    wrapped = [{"role": "user", "content": [{"type": "message", "message": inner}]}]
    expected = processor.apply_chat_template([inner], tokenize=True)
    with_none = [{"role": "user", "content": [None, *inner[0]["content"], {"type": "image", "image": None}]}]
    for messages in (wrapped, with_none):
        encoded = processor.apply_chat_template([messages], tokenize=True)
        assert torch.equal(encoded["input_ids"], expected["input_ids"])
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])


def test_empty_rows():
    processor = tiny_processor()
    encoded = processor.apply_chat_template([chat(""), chat("a")], tokenize=True)
    assert encoded["input_ids"][0, 0] == processor.tokenizer.pad_token_id and encoded["attention_mask"].min() == 1
    alone = processor.apply_chat_template([chat("")], tokenize=True)
    assert MoCaModel.from_backbone(tiny_backbone())(**alone).pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="Row 1 is empty: it has neither text nor images"):
        processor(text=["a", ""])


def test_truncation_cuts_text_from_the_end_and_says_so(caplog):
    processor = tiny_processor(max_length=20)
    text = f"abcdefgh{IMAGE}ijklmnop"  # 8 + 6 + 8 tokens or fewer
    whole = tiny_processor()(text=[text], images=[[noise()]])["input_ids"][0].tolist()
    for limit in (len(whole), len(whole) - 3, 10, 6):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cut = processor(text=[text, "a"], images=[[noise()], []], max_length=limit)["input_ids"][0].tolist()
        assert len(cut) == limit and cut.count(3) == 4
        start = whole.index(2)
        kept = min(limit - 6, start)
        assert cut[:kept] == whole[:kept] and cut[kept : kept + 6] == whole[start : start + 6]
        assert cut[kept + 6 :] == whole[start + 6 :][: limit - kept - 6]
        messages = [record.getMessage() for record in caplog.records]
        if limit < len(whole):
            assert messages == [
                f"Cut {len(whole) - limit} text tokens from the ends of 1 of 2 rows to keep max_length={limit}."
            ]
        else:
            assert messages == []


def test_max_length_of_the_processor_is_the_default():
    assert tiny_processor(max_length=4)(text=["abcdefgh"])["input_ids"].shape == (1, 4)
    assert tiny_processor()(text=["ab"], padding="max_length", max_length=9)["input_ids"].shape == (1, 9)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        ([IMAGE * 2], [[noise()]], "Row 0: the text has 2 image placeholders, but there are 1 images"),
        (["a", "b"], [[], [noise()]], "Row 1: the text has 0 image placeholders, but there are 1 images"),
        ([IMAGE, IMAGE], [noise()], "2 image placeholders in 2 rows .* but there are 1 images"),
        ([IMAGE, IMAGE], [[noise()]], "images for 1 rows, but text for 2"),
        (["a", IMAGE], [[], [b"no image"]], "Row 1, image 0 does not open"),
        ([IMAGE], [[png(noise(112, 112))[:3000]]], "Row 0, image 0 does not open"),
        ([IMAGE], [["missing.png"]], "Row 0, image 0 does not open"),
        (["a", IMAGE], [[], [noise(56 * 101, 28)]], "Row 1, image 0 of 5656x28 pixels is refused"),
    ],
)
def test_bad_rows_are_named(texts, images, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(text=texts, images=images)


def test_image_over_the_budget_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"Row 0: its images take 18 tokens, more than max_length=17.*lower max_pixels"
    ):
        tiny_processor(max_length=17)(text=[f"{IMAGE}text"], images=[[noise(112, 112)]])


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="Rows differ in length"):
        tiny_processor()(text=["a", "abc"], padding=False)
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        tiny_processor()(text=["a"], return_tensors="np")
    with pytest.raises(ValueError, match="must be of type 'text' or 'image', got {'type': 'audio'"):
        tiny_processor().apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=True)


def test_saved_and_loaded(tmp_path):
    MoCaModel.from_backbone(tiny_backbone()).save_pretrained(tmp_path)
    processor = tiny_processor(max_length=33)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MoCaProcessor) and loaded.max_length == 33 and loaded.mask_token_id == 6
    arguments = {"text": [f"{IMAGE}hi"], "images": [[noise(200, 300)]]}
    for name, tensor in processor(**arguments).items():
        assert torch.equal(loaded(**arguments)[name], tensor), name
    changed = MoCaProcessor.from_pretrained(tmp_path, max_pixels=4 * 28 * 28, max_length=40)
    assert changed.max_length == 40 and int((changed(**arguments)["input_ids"] == 3).sum()) <= 4


def test_without_pillow_there_is_still_text(tmp_path, monkeypatch):
    processor = tiny_processor(max_length=33)
    MoCaModel.from_backbone(tiny_backbone()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("modeling_moca.processing_moca.is_vision_available", lambda: False)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor is None and loaded.max_length == 33
    assert loaded.chat_template == processor.chat_template
    assert torch.equal(loaded(text=["hello"])["input_ids"], processor(text=["hello"])["input_ids"])
    with pytest.raises(ValueError, match="Row 0, image 0: images need Pillow"):
        loaded(text=[IMAGE], images=[[noise()]])


def test_from_backbone_adds_a_mask_token(tmp_path):
    stock = tiny_processor(mask_token=None)
    assert stock.mask_token_id is None
    tiny_config().save_pretrained(tmp_path)
    stock.tokenizer.save_pretrained(tmp_path)
    stock.image_processor.save_pretrained(tmp_path)
    processor = MoCaProcessor.from_backbone(tmp_path, min_pixels=28 * 28, max_pixels=2 * 28 * 28, max_length=50)
    assert processor.mask_token_id == len(stock.tokenizer) and processor.tokenizer.mask_token == "<|mask|>"
    assert processor.max_length == 50
    assert int((processor(text=[IMAGE], images=[[noise(112, 112)]])["input_ids"] == 3).sum()) <= 2
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert MoCaProcessor.from_backbone(tmp_path).mask_token_id == tokenizer.mask_token_id


def test_from_backbone_needs_vision_tokens(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="brings no tokenizer or image processor of its own.*Give processor_name"):
        MoCaProcessor.from_backbone(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny_processor().image_processor.save_pretrained(tmp_path)
    content = tokenizer.backend_tokenizer.to_str().replace("<|image_pad|>", "<|picture|>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    config = re.sub(r"<\|image_pad\|>", "<|picture|>", (tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"lacks the image tokens.*'rows': \['<\|image_pad\|>'\]"):
        MoCaProcessor.from_backbone(tmp_path)


@pytest.mark.skipif(not QWEN_TOKENIZER.is_dir(), reason="the real Qwen tokenizer is not there (shared/data/tokenizer)")
def test_real_qwen_tokenizer_gives_the_ids_of_the_plain_format():
    tokenizer = AutoTokenizer.from_pretrained(QWEN_TOKENIZER)
    processor = MoCaProcessor(tiny_processor().image_processor, tokenizer)
    text = f"{IMAGE}What is it? {IMAGE} Fünf 漢字.\n"
    ids = processor(text=[text], images=[[noise(28, 28), noise(28, 28)]])["input_ids"][0].tolist()
    assert ids == tokenizer(text)["input_ids"]
    assert 151655 in ids and processor.image_token_id == 151655
