"""Masking against plain loops: rates, exclusions, layout, and what the draws depend on."""

import pytest
import torch

from trainers.masking import mask_patches, mask_tokens, row_generator

MASK = 6


def generators(count, seed=0, epoch=0, first=0):
    return [row_generator(seed, epoch, b"row %d" % (first + row)) for row in range(count)]


def test_only_maskable_tokens_become_the_mask_token():
    input_ids = torch.randint(10, 300, (4, 200))
    maskable = torch.rand(4, 200) < 0.5
    masked, labels = mask_tokens(
        input_ids, mask_token_id=MASK, maskable=maskable, ratio=0.4, generators=generators(4), shift_labels=False
    )
    num_chosen = 0
    for row in range(4):
        for position in range(200):
            original = input_ids[row, position]
            if labels[row, position] == -100:
                assert masked[row, position] == original
            else:
                num_chosen += 1
                assert maskable[row, position]
                assert labels[row, position] == original and masked[row, position] == MASK
    assert num_chosen > 0


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.6, 0.99])
def test_rates(ratio):
    input_ids = torch.full((4, 10_000), 9)
    _, labels = mask_tokens(
        input_ids, mask_token_id=MASK, maskable=input_ids == 9, ratio=ratio, generators=generators(4)
    )
    # Four standard deviations of a binomial of 40,000 draws at most.
    assert abs((labels != -100).float().mean().item() - ratio) < 4 * 0.5 / 200
    _, patch_mask, _ = mask_patches(
        torch.zeros(40_000, 1),
        image_tokens=input_ids == 9,
        num_patches_per_token=1,
        ratio=ratio,
        generators=generators(4),
    )
    assert abs(patch_mask.float().mean().item() - ratio) < 4 * 0.5 / 200


def test_position_zero_is_chosen_only_without_shift():
    input_ids = torch.full((500, 2), 9)
    settings = {"mask_token_id": MASK, "maskable": input_ids == 9, "ratio": 0.5}
    _, shifted = mask_tokens(input_ids, generators=generators(500), **settings)
    _, unshifted = mask_tokens(input_ids, generators=generators(500), shift_labels=False, **settings)
    assert (shifted[:, 0] == -100).all() and (shifted[:, 1] != -100).any()
    assert (unshifted[:, 0] != -100).any()
    assert settings["maskable"].all(), "the caller's mask was changed"


def patches_case():
    image_tokens = torch.zeros(3, 12, dtype=torch.bool)
    image_tokens[0, 2:8] = True
    image_tokens[2, 1:4] = image_tokens[2, 6:11] = True  # two images; row 1 has none
    num_tokens = int(image_tokens.sum())
    # Each row of pixels holds its own number, so that a shuffled layout shows.
    pixel_values = torch.arange(num_tokens * 4, dtype=torch.float32)[:, None].expand(-1, 5).clone()
    return pixel_values, image_tokens


def test_a_token_owns_consecutive_rows():
    pixel_values, image_tokens = patches_case()
    before = pixel_values.clone()
    masked, patch_mask, patch_labels = mask_patches(
        pixel_values, image_tokens=image_tokens, num_patches_per_token=4, ratio=0.5, generators=generators(3)
    )
    assert torch.equal(pixel_values, before)
    token = chosen = 0
    for row in range(3):
        for position in range(12):
            if not image_tokens[row, position]:
                assert not patch_mask[row, position]
                continue
            rows = slice(4 * token, 4 * token + 4)
            if patch_mask[row, position]:
                assert torch.equal(patch_labels[chosen], before[rows])
                assert (masked[rows] != before[rows]).all()
                chosen += 1
            else:
                assert torch.equal(masked[rows], before[rows])
            token += 1
    assert 0 < chosen < token and patch_labels.shape == (chosen, 4, 5)


def test_noise_is_a_unit_gaussian_for_each_patch_or_one_for_all():
    image_tokens = torch.ones(2, 100, dtype=torch.bool)
    settings = {"image_tokens": image_tokens, "num_patches_per_token": 4, "ratio": 0.5}
    pixels = torch.full((800, 300), 7.0)
    masked, _, _ = mask_patches(pixels, generators=generators(2), **settings)
    noise = masked[masked[:, 0] != 7.0]
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1.0) < 0.02
    assert len(noise.unique(dim=0)) == len(noise)
    masked, _, _ = mask_patches(pixels, generators=generators(2), noise="shared", **settings)
    noise = masked[masked[:, 0] != 7.0]
    assert len(noise) > 1 and len(noise.unique(dim=0)) == 1


def test_a_row_is_masked_alike_in_every_batch_and_padding():
    ids = torch.randint(10, 300, (2, 40))
    settings = {"mask_token_id": MASK, "ratio": 0.5, "shift_labels": False}
    _, together = mask_tokens(ids, maskable=ids > 0, generators=generators(2), **settings)
    for left in (0, 7):
        padded = torch.nn.functional.pad(ids[1:], (left, 30))
        _, alone = mask_tokens(padded, maskable=padded > 0, generators=generators(1, first=1), **settings)
        assert torch.equal(together[1], alone[0, left : left + 40])
        assert (alone[padded == 0] == -100).all()

    pixel_values, image_tokens = patches_case()
    settings = {"num_patches_per_token": 4, "ratio": 0.5}
    masked, _, _ = mask_patches(pixel_values, image_tokens=image_tokens, generators=generators(3), **settings)
    last, _, _ = mask_patches(
        pixel_values[24:], image_tokens=image_tokens[2:], generators=generators(1, first=2), **settings
    )
    assert torch.equal(masked[24:], last)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"first": 1}])
def test_seed_epoch_and_row_change_the_mask(other):
    ids = torch.full((1, 100), 9)
    settings = {"mask_token_id": MASK, "maskable": ids == 9, "ratio": 0.5}
    _, one = mask_tokens(ids, generators=generators(1), **settings)
    _, same = mask_tokens(ids, generators=generators(1), **settings)
    _, different = mask_tokens(ids, generators=generators(1, **other), **settings)
    assert torch.equal(one, same)
    # Independent masks of 100 tokens agree in about half of them.
    assert 20 < ((one == -100) != (different == -100)).sum() < 80


def test_nothing_to_mask():
    ids = torch.full((2, 3), 9)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    masked, labels = mask_tokens(ids, mask_token_id=MASK, maskable=nothing, ratio=0.5, generators=generators(2))
    assert torch.equal(masked, ids) and (labels == -100).all()
    for noise in ("per_patch", "shared"):
        masked, patch_mask, patch_labels = mask_patches(
            torch.ones(24, 5),
            image_tokens=~nothing,
            num_patches_per_token=4,
            ratio=0.0,
            generators=generators(2),
            noise=noise,
        )
        assert (masked == 1).all() and not patch_mask.any() and patch_labels.shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"ratio must lie in \[0, 1\), got -0.1"),
        ({"ratio": float("nan")}, "got nan"),
        ({"maskable": torch.ones(2, 3)}, r"maskable must be a bool tensor of shape \(2, 3\), got torch.float32"),
        ({"maskable": torch.ones(2, 4, dtype=torch.bool)}, r"got torch.bool of shape \(2, 4\)"),
        ({"generators": generators(1)}, "One generator a row is needed: got 1 for 2 rows"),
    ],
)
def test_mask_tokens_refuses(change, message):
    arguments = {"mask_token_id": MASK, "maskable": torch.ones(2, 3, dtype=torch.bool), "ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        mask_tokens(torch.ones(2, 3, dtype=torch.long), **{**arguments, "generators": generators(2), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 2.0}, r"ratio must lie in \[0, 1\), got 2.0"),
        ({"noise": "black"}, r"noise must be one of \['per_patch', 'shared'\], got 'black'"),
        ({"num_patches_per_token": 9}, r"6 image tokens own 54 rows of pixel_values \(9 each\), got 24 rows"),
        ({"image_tokens": torch.ones(2, 3)}, "image_tokens must be a bool tensor"),
        ({"generators": generators(3)}, "got 3 for 2 rows"),
    ],
)
def test_mask_patches_refuses(change, message):
    arguments = {"image_tokens": torch.ones(2, 3, dtype=torch.bool), "num_patches_per_token": 4, "ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        mask_patches(torch.ones(24, 5), **{**arguments, "generators": generators(2), **change})
