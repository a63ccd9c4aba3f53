"""Rows to masked inputs: what is chosen, what a row's masks depend on, and what is refused."""

import io
import logging

import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE, tiny_processor, tiny_tokenizer
from tests.trainers.cpt_rows import encoded_image, make_row, make_rows
from trainers.cpt_collator import BAD_ROW_REASONS, CPTCollator

MODEL_INPUTS = {
    "input_ids",
    "attention_mask",
    "labels",
    "pixel_values",
    "image_grid_thw",
    "patch_mask",
    "patch_labels",
}


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
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


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
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
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
        "does_not_fit": [{"text": IMAGE * 9, "images": [encoded_image(112, 112)] * 9}],
    }


@pytest.mark.parametrize("reason", BAD_ROW_REASONS)
def test_bad_rows_raise_and_name_the_row(processor, reason):
    messages = {
        "empty_text": "Row 1 of the batch .* has no text",
        "undecodable_image": "Row 1 of the batch .*: image 0 cannot be decoded",
        "placeholder_mismatch": r"Row 1 of the batch .* image placeholders '.*<\|image_pad\|>.*', but . images",
        "does_not_fit": "(?i)row 1",
    }
    for row in bad_rows()[reason]:
        with pytest.raises(ValueError, match=messages[reason]):
            CPTCollator(processor, max_length=100)([make_row(0), row])


def test_bad_rows_are_skipped_and_counted(processor, caplog):
    good = make_rows(3)
    bad = bad_rows()
    collator = CPTCollator(processor, max_length=100, on_bad_row="skip")
    mixed = [good[0], *bad["empty_text"], *bad["does_not_fit"], good[1], *bad["undecodable_image"], good[2]]
    with caplog.at_level(logging.WARNING):
        batch = collator(mixed)
    counts = dict(zip(BAD_ROW_REASONS, batch.pop("skipped_rows").tolist()))
    assert counts == {
        "empty_text": 2,
        "undecodable_image": 4,
        "placeholder_mismatch": 0,
        "does_not_fit": 1,
    }
    assert len(caplog.records) == 7
    for name, tensor in CPTCollator(processor, max_length=100)(good).items():
        assert torch.equal(batch[name], tensor), name
    with pytest.raises(ValueError, match="All 2 rows of a batch are bad, by reason: {'empty_text': 2}"):
        collator(bad["empty_text"])
    with pytest.raises(ValueError, match="All 1 rows of a batch are bad, by reason: {'does_not_fit': 1}"):
        collator(bad["does_not_fit"])


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
