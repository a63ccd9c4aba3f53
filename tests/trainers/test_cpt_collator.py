"""Rows to masked inputs: what is chosen, what a row's masks depend on, and what is refused."""

import io
import logging
import struct
import zlib

import pytest
import torch
from PIL import Image, ImageFile

from modeling_moca.images_moca import resize_pixels
from tests.tiny import IMAGE, tiny_processor, tiny_tokenizer
from tests.trainers.cpt_rows import encoded_image, make_row, make_rows
from trainers.cpt_collator import CPTCollator
from trainers.cpt_rows import BAD_ROW_REASONS

MODEL_INPUTS = {
    "input_ids",
    "attention_mask",
    "labels",
    "pixel_values",
    "image_grid_thw",
    "patch_mask",
    "patch_labels",
    "skipped_rows",
    "cut_rows",
}
TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "skipped_rows", "cut_rows"}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def test_restoring_the_targets_gives_the_processors_inputs(processor):
    rows = make_rows(8)
    batch = CPTCollator(processor)(rows)
    assert set(batch) == MODEL_INPUTS
    images = [[Image.open(io.BytesIO(image)) for image in row["images"]] for row in rows]
    plain = processor(
        text=[row["text"] for row in rows], images=images, max_length=2048, padding=True, return_tensors="pt"
    )
    chosen = batch["labels"] != -100
    assert torch.equal(torch.where(chosen, batch["labels"], batch["input_ids"]), plain["input_ids"])
    assert (batch["input_ids"][chosen] == processor.tokenizer.mask_token_id).all()
    assert torch.equal(batch["attention_mask"], plain["attention_mask"])
    assert torch.equal(batch["image_grid_thw"], plain["image_grid_thw"])

    image_tokens = plain["input_ids"] == processor.image_token_id
    merged = processor.image_processor.merge_size**2
    pixel_values = batch["pixel_values"].clone()
    number = restored = 0
    for row in range(len(rows)):
        for position in range(image_tokens.shape[1]):
            if not image_tokens[row, position]:
                assert not batch["patch_mask"][row, position]
                continue
            if batch["patch_mask"][row, position]:
                pixel_values[number * merged : (number + 1) * merged] = batch["patch_labels"][restored]
                restored += 1
            number += 1
    assert restored == len(batch["patch_labels"]) > 0
    assert torch.equal(pixel_values, plain["pixel_values"])


@pytest.mark.parametrize("exact_resize", [True, False])
def test_resized_pixels_are_those_of_the_stock_image_processor(processor, exact_resize):
    noise = torch.randint(256, (2, 61, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = noise[1, ::6, ::6].numpy()
    images = [Image.fromarray(noise[0].numpy()), Image.fromarray(smooth).resize((150, 40), Image.BICUBIC)]
    rows = [{"text": IMAGE + "a page", "images": [image]} for image in images]
    collator = CPTCollator(processor, mae_ratio=0.0, exact_resize=exact_resize)
    ours = collator(rows)["pixel_values"]
    stock = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    height, width = processor.image_processor(images=images[:1], return_tensors="pt")["image_grid_thw"][0, 1:].tolist()
    assert (height * processor.patch_size, width * processor.patch_size) != (61, 90)
    if exact_resize:
        assert torch.equal(ours, stock)
        return
    level = 1 / 255 / min(processor.image_processor.image_std)
    difference = (ours - stock).abs()
    assert 0 < difference.max() <= 2.01 * level
    assert (difference > 0.01 * level).float().mean() < 0.02


def test_filters_that_torch_lacks_are_pillows(processor):
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    exact = resize_pixels(image, 56, 84, Image.LANCZOS, exact=True)
    assert torch.equal(resize_pixels(image, 56, 84, Image.LANCZOS, exact=False), exact)
    assert not torch.equal(resize_pixels(image, 56, 84, Image.BICUBIC, exact=False), exact)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("shift_labels", [True, False])
def test_special_tokens_images_and_padding_are_never_chosen(padding_side, shift_labels):
    processor = tiny_processor()
    processor.tokenizer.padding_side = padding_side
    batch = CPTCollator(processor, mlm_ratio=0.999, shift_labels=shift_labels)(make_rows(8) + [make_row(9, 2, 0)])
    chosen = batch["labels"] != -100
    originals = torch.where(chosen, batch["labels"], batch["input_ids"])
    # Ids 0 to 6 of the tiny tokenizer are its special tokens.
    assert (batch["labels"][chosen] > 6).all()
    assert batch["attention_mask"][chosen].all()
    before = torch.cat([torch.zeros(9, 1), batch["attention_mask"][:, :-1]], dim=1).bool()
    ordinary = (originals > 6) & batch["attention_mask"].bool() & (before | (not shift_labels))
    assert not chosen[~ordinary].any() and chosen[ordinary].float().mean() > 0.95


def test_batch_without_images(processor):
    for images in ([], None):
        batch = CPTCollator(processor)([{"text": "the sea and the sky", "images": images}, {"text": "quiet hills"}])
        assert set(batch) == TEXT_INPUTS


def test_masks_do_not_depend_on_the_batch_but_on_seed_and_epoch(processor):
    rows = make_rows(6)
    collator = CPTCollator(processor)
    together = collator(rows)
    alone = collator(rows[3:4])
    width = int(alone["attention_mask"].sum())
    assert torch.equal(together["labels"][3, :width], alone["labels"][0])
    assert torch.equal(together["patch_mask"][3, :width], alone["patch_mask"][0])
    first, last = [int(grid.prod()) for grid in together["image_grid_thw"]][:3], alone["pixel_values"].shape[0]
    start = sum(first)
    assert torch.equal(together["pixel_values"][start : start + last], alone["pixel_values"])

    again = CPTCollator(processor)(rows)
    assert torch.equal(again["labels"], together["labels"])
    assert torch.equal(again["pixel_values"], together["pixel_values"])
    collator.set_epoch(1)
    next_epoch, other_seed = collator(rows), CPTCollator(processor, seed=1)(rows)
    for other in (next_epoch, other_seed):
        assert not torch.equal(other["labels"], together["labels"])
        assert not torch.equal(other["patch_mask"], together["patch_mask"])
    assert not torch.equal(next_epoch["labels"], other_seed["labels"])


def test_running_loader_workers_see_the_epoch(processor):
    collator = CPTCollator(processor)
    loader = torch.utils.data.DataLoader(
        make_rows(4), batch_size=2, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    epochs = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        epochs.append([batch["labels"] for batch in loader])
    assert not any(torch.equal(*pair) for pair in zip(*epochs))
    assert torch.equal(epochs[1][0], collator(make_rows(2))["labels"])


def test_every_form_of_an_image_gives_the_same_batch(processor):
    image = encoded_image(56, 56)
    forms = [image, {"bytes": image, "path": None}, Image.open(io.BytesIO(image))]
    batches = [CPTCollator(processor, mae_ratio=0.0)([{"text": IMAGE, "images": [form]}]) for form in forms]
    assert all(torch.equal(batch["pixel_values"], batches[0]["pixel_values"]) for batch in batches)


def test_control_tokens_in_the_text_are_characters(processor):
    text = "a text file holding <|image_pad|>, <|mask|> and <|endoftext|> as text"
    batch = CPTCollator(processor, mlm_ratio=0.0)([{"text": text}])
    assert set(batch) == TEXT_INPUTS
    assert (batch["input_ids"] > 6).all() and processor.tokenizer.decode(batch["input_ids"][0]) == text
    batch = CPTCollator(processor, mae_ratio=0.9)([{"text": text + IMAGE, "images": [encoded_image(56, 56)]}])
    assert batch["patch_mask"].sum() <= 4 == (batch["input_ids"] == processor.image_token_id).sum()


def test_transparent_pixels_become_white(processor):
    buffer = io.BytesIO()
    Image.new("RGBA", (56, 56), (0, 0, 0, 0)).save(buffer, "PNG")
    white = io.BytesIO()
    Image.new("RGB", (56, 56), (255, 255, 255)).save(white, "PNG")
    batches = [
        CPTCollator(processor, mae_ratio=0.0)([{"text": IMAGE, "images": [image.getvalue()]}])
        for image in (buffer, white)
    ]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


def test_ratios_of_a_batch(processor):
    rows = [make_row(seed, 60, 2) for seed in range(40)]
    batch = CPTCollator(processor, mlm_ratio=0.3, mae_ratio=0.6, max_length=512)(rows)
    text = batch["attention_mask"].bool() & ((batch["input_ids"] > 6) | (batch["labels"] != -100))
    assert abs((batch["labels"] != -100).sum() / text.sum() - 0.3) < 0.03
    image_tokens = batch["input_ids"] == processor.image_token_id
    assert abs(batch["patch_mask"].sum() / image_tokens.sum() - 0.6) < 0.1


def huge_png(side):
    """Return a small file that says it holds side x side pixels."""
    image = encoded_image(8, 8)
    header = b"IHDR" + struct.pack(">II", side, side) + image[24:29]
    return image[:12] + header + struct.pack(">I", zlib.crc32(header)) + image[33:]


def bad_rows():
    image = encoded_image(56, 56, format="JPEG")
    noise = io.BytesIO()
    # Noise does not compress, so half of the file is surely missing pixels.
    Image.effect_noise((64, 64), 80).save(noise, "PNG")
    return {
        "empty_text": [{"text": " ", "images": []}, {"text": None, "images": []}],
        "undecodable_image": [
            {"text": IMAGE, "images": [b"no image"]},
            {"text": IMAGE, "images": [b""]},
            {"text": IMAGE, "images": [None]},
            {"text": IMAGE, "images": [noise.getvalue()[: len(noise.getvalue()) // 2]]},
        ],
        "placeholder_mismatch": [
            {"text": f"a text file holding {IMAGE} as text", "images": []},
            {"text": "<|image_pad|>", "images": [image]},
            {"text": IMAGE + IMAGE, "images": [image]},
            {"text": "no place", "images": [image]},
        ],
        "decompression_bomb": [{"text": IMAGE, "images": [huge_png(side)]} for side in (10_000, 100_000)],
        "aspect_ratio": [{"text": IMAGE, "images": [encoded_image(4020, 20)]}],
        "does_not_fit": [{"text": IMAGE * 9, "images": [encoded_image(112, 112)] * 9}],
    }


@pytest.mark.parametrize("reason", BAD_ROW_REASONS)
def test_bad_rows_raise_and_name_the_row(processor, reason):
    messages = {
        "empty_text": "Row 1 of the batch .* has no text",
        "undecodable_image": "Row 1 of the batch .*: image 0 cannot be decoded",
        "placeholder_mismatch": r"Row 1 of the batch .* image placeholders '.*<\|image_pad\|>.*', but . images",
        "decompression_bomb": "Row 1 of the batch .*: image 0 is too large: .* pixels",
        "aspect_ratio": "Row 1 of the batch .*: image 0 of 4020 x 20 pixels has an aspect ratio over 200",
        "does_not_fit": "Row 1 of the batch .*: its images take 162 tokens, more than max_length=100",
    }
    for row in bad_rows()[reason]:
        with pytest.raises(ValueError, match=messages[reason]):
            CPTCollator(processor, max_length=100, on_bad_row="raise")([make_row(0), row])


def test_bad_rows_are_skipped_and_counted(processor, caplog):
    good = make_rows(3)
    bad = bad_rows()
    collator = CPTCollator(processor, max_length=100)
    mixed = [good[0], *bad["empty_text"], *bad["does_not_fit"], good[1], *bad["undecodable_image"], good[2]]
    with caplog.at_level(logging.WARNING):
        batch = collator(mixed)
    counts = dict(zip(BAD_ROW_REASONS, batch.pop("skipped_rows").tolist()))
    assert {reason: count for reason, count in counts.items() if count} == {
        "empty_text": 2,
        "undecodable_image": 4,
        "does_not_fit": 1,
    }
    assert len(caplog.records) == 7
    alone = CPTCollator(processor, max_length=100)(good)
    assert not alone.pop("skipped_rows").any()
    for name, tensor in alone.items():
        assert torch.equal(batch[name], tensor), name


def test_a_batch_of_bad_rows_alone_trains_nothing_and_stays_finite(processor):
    for packing in (False, True):
        batch = CPTCollator(processor, packing=packing)(bad_rows()["empty_text"])
        assert batch["skipped_rows"].sum() == 2
        assert batch["input_ids"].tolist() == [[processor.tokenizer.pad_token_id]]
        assert batch["labels"].tolist() == [[-100]] and "pixel_values" not in batch


def test_packed_rows_hold_the_same_tokens_masks_and_noise(processor):
    rows = make_rows(6)
    padded, packed = (CPTCollator(processor, packing=packing)(rows) for packing in (False, True))
    real = padded["attention_mask"].bool()
    assert "attention_mask" not in packed and packed["cu_seq_lens"].dtype == torch.int32
    assert packed["cu_seq_lens"].diff().tolist() == real.sum(-1).tolist()
    for name in ("input_ids", "labels", "patch_mask"):
        assert torch.equal(packed[name], padded[name][real][None]), name
    for name in ("pixel_values", "patch_labels", "image_grid_thw"):
        assert torch.equal(packed[name], padded[name]), name


def test_rows_are_measured_without_decoding(processor, monkeypatch):
    rows = make_rows(8)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (84, 28)).save(turned, "JPEG", exif=exif)
    rows.append({"text": "a turned picture " + IMAGE, "images": [turned.getvalue()]})
    lengths = [int(CPTCollator(processor)([row])["attention_mask"].sum()) for row in rows]
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    prepared = [CPTCollator(processor).prepare(row, "here") for row in rows]
    assert [row.num_tokens for row in prepared] == lengths
    for row in prepared:
        num_image_tokens = row.input_ids.count(processor.image_token_id)
        assert row.cost == row.num_tokens + 3 * num_image_tokens + 2 * len(row.images)


def test_a_long_row_loses_text_from_its_end_and_counts_it(processor):
    row = make_row(2, 60, 2)
    whole = CPTCollator(processor).prepare(row, "here")
    limit = whole.num_tokens - 7
    cut = CPTCollator(processor, max_length=limit).prepare(row, "here")
    assert (cut.num_tokens, cut.num_cut_tokens, whole.num_cut_tokens) == (limit, 7, 0)
    assert cut.input_ids == whole.input_ids[:limit] and cut.cost == limit
    # An image at the end is kept, and text before it goes.
    last = {"text": "the sea and the sky " * 4 + IMAGE, "images": [encoded_image(56, 56)]}
    cut = CPTCollator(processor, max_length=10).prepare(last, "here")
    assert cut.num_tokens == 10 and cut.input_ids.count(processor.image_token_id) == 4 and cut.input_ids[-1] == 5


@pytest.mark.parametrize("row", [{"text": "a", "image": []}, {"images": []}, {"text": "a", "images": [], "id": 1}])
def test_columns_are_checked_even_when_bad_rows_are_skipped(processor, row):
    with pytest.raises(ValueError, match=r"Row 0 .* columns \[.*\]; allowed are \['text', 'images', 'length'\]"):
        CPTCollator(processor, on_bad_row="skip")([row])


def test_settings_are_checked(processor):
    with pytest.raises(ValueError, match="on_bad_row must be one of"):
        CPTCollator(processor, on_bad_row="black image")
    with pytest.raises(ValueError, match="patch_noise must be one of"):
        CPTCollator(processor, patch_noise="zero")
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\), got 1.5"):
        CPTCollator(processor, mlm_ratio=1.5)([make_row()])
    unmasked = tiny_processor()
    unmasked.tokenizer = tiny_tokenizer(mask_token=None)
    with pytest.raises(ValueError, match="has no mask token"):
        CPTCollator(unmasked)
