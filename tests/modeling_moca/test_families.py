"""Every family of backbones: weights arrive, attention is what the flag says, pixels belong to their image tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from modeling_moca.images_moca import from_patch_rows, real_tiles, to_patch_rows
from tests.families import (
    FAMILIES,
    TILE,
    TILED,
    family_backbone,
    family_image_processor,
    family_processor,
    family_tokenizer,
)
from tests.tiny import IMAGE

IMAGE_TOKEN = 3


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(processor):
    """Two images with text between them, text alone, one small image."""
    texts = [f"the sea{IMAGE}and {IMAGE}the sky", "short", f"{IMAGE}a page"]
    return dict(processor(text=texts, images=[[noise(64, 40, 0), noise(20, 20, 1)], [], [noise(32, 64, 2)]]))


def stock_states(stock, batch):
    extra = {} if hasattr(stock.config, "scale_factor") else {"mm_token_type_ids": (batch["input_ids"] == 3).int()}
    with torch.no_grad():
        return stock.model(**batch, **extra).last_hidden_state


def row_alone(batch, row, processor):
    texts = [f"the sea{IMAGE}and {IMAGE}the sky", "short", f"{IMAGE}a page"]
    images = [[noise(64, 40, 0), noise(20, 20, 1)], [], [noise(32, 64, 2)]]
    return processor(text=[texts[row]], images=[images[row]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_causal_model_equals_the_stock_model(family, padding_side, tmp_path):
    processor = family_processor(family)
    processor.tokenizer.padding_side = padding_side
    batch = batch_of(processor)
    stock = family_backbone(family)
    expected = stock_states(stock, batch)
    stock.save_pretrained(tmp_path)
    model = MoCaModel.from_backbone(tmp_path, bidirectional=False)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_last_token_reaches_the_first_only_if_bidirectional(family, bidirectional, tmp_path):
    processor = family_processor(family)
    MoCaForPreTraining.from_backbone(family_backbone(family), bidirectional=bidirectional).save_pretrained(tmp_path)
    model = MoCaModel.from_pretrained(tmp_path)
    for batch in (batch_of(processor), row_alone(None, 0, processor)):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        last = int(batch["attention_mask"][0].sum()) - 1
        changed["input_ids"][0, last] = 99
        with torch.no_grad():
            moved = (model(**changed).last_hidden_state - model(**batch).last_hidden_state).abs().amax(-1)
        assert (moved[0, 0] > 1e-3) == bidirectional
        assert moved[0, last] > 1e-3 and (len(moved) == 1 or moved[1:].max() == 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_row_alone_equals_the_row_in_a_padded_batch(family, padding_side):
    processor = family_processor(family)
    processor.tokenizer.padding_side = padding_side
    model = MoCaModel.from_backbone(family_backbone(family))
    with torch.no_grad():
        together = model(**batch_of(processor)).pooler_output
        for row in range(3):
            alone = model(**row_alone(None, row, processor)).pooler_output[0]
            torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_arrives_and_stays(family, tied, tmp_path):
    stock = family_backbone(family, tied=tied)
    expected = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    stock.save_pretrained(tmp_path / "stock")
    model = MoCaForPreTraining.from_backbone(tmp_path / "stock", mask_token_id=6)
    ours = model.state_dict()
    for name, tensor in expected.items():
        own_name = f"mlm_head.{name}" if name.startswith("lm_head.") else f"moca.backbone.{name.removeprefix('model.')}"
        assert torch.equal(ours.pop(own_name), tensor), name
    assert ours and all(name.startswith("mae_head.") for name in ours)
    middle = model.moca.language_model.layers[2].state_dict()
    for name, tensor in model.mae_head.decoder.state_dict().items():
        assert torch.equal(tensor, middle[name]), name
    assert (model.mlm_head.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "moca")
    again = MoCaForPreTraining.from_pretrained(tmp_path / "moca").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_deepstack_features_reach_every_token_under_bidirectional_attention():
    model = MoCaModel.from_backbone(family_backbone("qwen3_vl"))
    batch = batch_of(family_processor("qwen3_vl"))
    states = model(**batch).last_hidden_state
    mergers = model.backbone.visual.deepstack_merger_list
    assert len(mergers) == 2
    for parameters in (merger.parameters() for merger in mergers):
        gradients = torch.autograd.grad(states[0, 0].square().sum(), list(parameters), retain_graph=True)
        # The first text token stands before both images: it hears of them only if attention goes both ways.
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    model.config.bidirectional = False
    causal = model(**batch).last_hidden_state[0, 0].square().sum()
    parameters = list(mergers.parameters())
    assert all(gradient is None or not gradient.any() for gradient in torch.autograd.grad(causal, parameters))


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_comes_from_the_configuration(family):
    model = MoCaForPreTraining.from_backbone(family_backbone(family))
    batch = batch_of(family_processor(family))
    rows = to_patch_rows(batch["pixel_values"], model.config.patch_size, model.config.merge_size)
    num_image_tokens = int((batch["input_ids"] == IMAGE_TOKEN).sum())
    assert rows.shape == (num_image_tokens * model.config.num_patches_per_token, model.config.patch_dim)
    assert model.mae_head.proj.out_features == model.config.num_patches_per_token * model.config.patch_dim
    if family == "qwen3_vl":
        assert model.config.patch_dim == 3 * 2 * 16 * 16
    if family in TILED:
        assert model.config.patch_dim == 3 * 4 * 4


@pytest.mark.parametrize("family", TILED)
def test_patch_rows_follow_the_image_tokens_of_a_tile(family):
    """What the stock model merges into image token k is what `to_patch_rows` gives for image token k."""
    stock = family_backbone(family).model
    side = TILE["side"] // TILE["patch_size"]
    numbers = torch.arange(1, 2 * side**2 + 1, dtype=torch.float32)  # one number a patch, two tiles
    merged = stock.connector.pixel_shuffle(numbers.view(2, side**2, 1), TILE["merge_size"])  # [2, tokens, m*m]
    tiles = numbers.view(1, 2, 1, side, 1, side, 1).expand(-1, -1, 3, -1, TILE["patch_size"], -1, TILE["patch_size"])
    tiles = tiles.reshape(1, 2, 3, TILE["side"], TILE["side"])
    rows = to_patch_rows(tiles, TILE["patch_size"], TILE["merge_size"])  # [patches, 48]
    assert torch.equal(rows[:, 0], rows[:, -1])
    expected = merged.reshape(-1, TILE["merge_size"] ** 2)  # [tokens, m*m]
    assert torch.equal(rows[:, 0].view(expected.shape), expected)


def test_patch_rows_go_back_to_where_they_came_from():
    tiles = torch.randn(2, 3, 3, 8, 8)
    tiles[0, 2] = tiles[1, 1:] = 0  # padding
    assert real_tiles(tiles).tolist() == [[True, True, False], [True, False, False]]
    rows = to_patch_rows(tiles, 2, 2)
    assert rows.shape == (3 * 16, 12)
    assert torch.equal(from_patch_rows(rows, tiles, 2, 2), tiles)
    changed = from_patch_rows(rows + 1, tiles, 2, 2)
    assert torch.equal(changed, torch.where(real_tiles(tiles)[:, :, None, None, None], tiles + 1, tiles))
    patch = rows[16 + 4 * 1 + 2].view(3, 2, 2)  # tile 1, image token 1, its third patch: below the first
    assert torch.equal(patch, tiles[0, 1, :, 2:4, 4:6])
    flat = torch.randn(8, 12)
    assert to_patch_rows(flat, 2, 2) is flat and from_patch_rows(rows, flat, 2, 2) is rows


@pytest.mark.parametrize("family", TILED)
def test_tiles_are_announced_as_the_backbone_was_trained(family):
    processor = family_processor(family)
    image, around = "<image>" * 16, "<fake_token_around_image>"
    small = processor(text=[f"a{IMAGE}b"], images=[[noise(32, 32)]])
    # 32 x 32 is enlarged to 64 x 64: four tiles and an overview of one tile's size.
    expected = f"a{around}<row_1_col_1>{image}{around}<row_1_col_2>{image}\n"
    expected += f"{around}<row_2_col_1>{image}{around}<row_2_col_2>{image}\n\n{around}<global-img>{image}{around}b"
    assert processor.tokenizer.decode(small["input_ids"][0]) == expected
    assert small["pixel_values"].shape == (1, 5, 3, 32, 32)
    whole = processor(text=[IMAGE], images=[[noise(32, 32)]], images_kwargs={"do_image_splitting": False})
    assert processor.tokenizer.decode(whole["input_ids"][0]) == f"{around}<global-img>{image}{around}"
    assert whole["pixel_values"].shape == (1, 1, 3, 32, 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "height"), [(20, 20), (64, 40), (200, 33), (40, 300)])
def test_tokens_of_an_image_are_known_from_its_size(family, width, height):
    processor = family_processor(family)
    row = processor(text=[IMAGE], images=[[noise(width, height)]])
    assert processor.num_image_tokens(height, width) == row["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_text_stay_text(family):
    processor = family_processor(family)
    ids = processor(text=["a <image> <|image_pad|> <fake_token_around_image> b"])["input_ids"]
    assert not (ids < 7).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_of_a_checkpoint(family, tmp_path):
    family_backbone(family).save_pretrained(tmp_path)
    family_tokenizer(family, mask_token=None).save_pretrained(tmp_path)
    family_image_processor(family).save_pretrained(tmp_path)
    limits = {"size": {"longest_edge": 32}} if family in TILED else {"min_pixels": 1024, "max_pixels": 4096}
    processor = MoCaProcessor.from_backbone(tmp_path, **limits)
    assert processor.mask_token_id is not None
    processor.save_pretrained(tmp_path / "processor")
    MoCaModel.from_backbone(family_backbone(family)).save_pretrained(tmp_path / "processor")
    loaded = AutoProcessor.from_pretrained(tmp_path / "processor")
    assert isinstance(loaded, MoCaProcessor)
    for name, tensor in batch_of(processor).items():
        assert torch.equal(batch_of(loaded)[name], tensor), name
    wrong = {"min_pixels": 1024} if family in TILED else {"size": {"longest_edge": 32}}
    with pytest.raises(ValueError, match="belongs? to backbones that take"):
        MoCaProcessor.from_backbone(tmp_path, **wrong)


def test_default_limits_are_the_papers_number_of_image_tokens(tmp_path):
    for family, side in (("qwen2_5_vl", 28), ("qwen3_vl", 32)):
        folder = tmp_path / family
        family_backbone(family).save_pretrained(folder)
        family_tokenizer(family).save_pretrained(folder)
        family_image_processor(family).save_pretrained(folder)
        size = MoCaProcessor.from_backbone(folder).image_processor.size
        assert (size["shortest_edge"], size["longest_edge"]) == (256 * side**2, 1024 * side**2)


def test_processor_of_another_patch_size_is_refused(tmp_path):
    family_backbone("qwen3_vl").save_pretrained(tmp_path)
    family_tokenizer("qwen3_vl").save_pretrained(tmp_path)
    family_image_processor("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"patches of {'patch_size': 14, 'merge_size': 2}, the model {'patch_size': 16"
    ):
        MoCaProcessor.from_backbone(tmp_path)
    with pytest.raises(ValueError, match="cuts tiles .* give patch_size and merge_size, got None and None"):
        MoCaProcessor(family_image_processor("smolvlm"), family_tokenizer("smolvlm"))


@pytest.mark.parametrize("family", TILED)
def test_tiles_that_do_not_belong_to_the_text_are_refused(family):
    model, batch = MoCaModel.from_backbone(family_backbone(family)), batch_of(family_processor(family))
    with pytest.raises(ValueError, match="which own 832 patches; got 768 in 12 tiles of 32 x 32 pixels"):
        model(**{**batch, "pixel_values": batch["pixel_values"] * (torch.arange(10) < 9).view(1, 10, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"must have the shape \(batch_size, num_tiles, channels, side, side\)"):
        model(**{**batch, "pixel_values": batch["pixel_values"][0]})
    blank = {**batch, "input_ids": batch["input_ids"].clamp(min=9), "pixel_values": batch["pixel_values"] * 0}
    expected = model(input_ids=blank["input_ids"], attention_mask=blank["attention_mask"])
    assert torch.equal(model(**blank).pooler_output, expected.pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_anchor_uses_every_weight_of_the_vision_side_and_changes_nothing(family):
    model = MoCaModel.from_backbone(family_backbone(family))
    anchor = model.vision_anchor()
    assert anchor.item() == 0
    parameters = {name: weight for name, weight in model.named_parameters() if "language_model" not in name}
    parameters = {name: weight for name, weight in parameters.items() if "text_model" not in name}
    assert parameters
    gradients = torch.autograd.grad(anchor, list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients) if gradient is None]
    assert unused == []
    assert not any(gradient.any() for gradient in gradients)
