"""One small batch of interleaved input, made from token ids and random patches."""

import torch

from tests.tiny import VOCAB_SIZE

PAD, VISION_START, IMAGE_TOKEN, VISION_END, MASK = 1, 2, 3, 5, 6
GRIDS = [(1, 4, 6), (1, 2, 4), (1, 4, 4)]  # 6, 2 and 4 image tokens


def interleaved_batch(padding_side="right", seed=0):
    """Return inputs of three rows: text and one image, two images, text alone (the shortest)."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(7, VOCAB_SIZE, (length,), generator=generator).tolist()

    def image(grid):
        return [VISION_START] + [IMAGE_TOKEN] * (grid[1] * grid[2] // 4) + [VISION_END]

    rows = [image(GRIDS[0]) + text(9), text(3) + image(GRIDS[1]) + text(4) + image(GRIDS[2]), text(7)]
    width = max(map(len, rows))
    input_ids, attention_mask = [], []
    for row in rows:
        padding = [PAD] * (width - len(row))
        input_ids.append(row + padding if padding_side == "right" else padding + row)
        ones, zeros = [1] * len(row), [0] * len(padding)
        attention_mask.append(ones + zeros if padding_side == "right" else zeros + ones)
    num_patches = sum(height * width_ for _, height, width_ in GRIDS)
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(attention_mask),
        "pixel_values": torch.randn(num_patches, 1176, generator=generator),
        "image_grid_thw": torch.tensor(GRIDS),
    }


def masked_batch(dtype=torch.float32):
    """Return the batch with some tokens and image tokens chosen, as the collator would."""
    batch = interleaved_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    patch_mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, column in [(0, 9), (0, 12), (1, 1), (1, 9), (2, 1), (2, 6)]:
        labels[row, column] = batch["input_ids"][row, column]
        batch["input_ids"][row, column] = MASK
    assert not ((labels >= 0) & (labels < 7)).any(), "a special token was chosen: adapt the positions"
    image_positions = (batch["input_ids"] == IMAGE_TOKEN).nonzero()
    chosen_tokens = [0, 3, 7, 8, 11]
    for index in chosen_tokens:
        patch_mask[tuple(image_positions[index])] = True
    pixel_values = batch["pixel_values"].view(-1, 4, 1176)
    patch_labels = pixel_values[chosen_tokens].clone()
    pixel_values[chosen_tokens] = torch.randn(len(chosen_tokens), 4, 1176, generator=torch.Generator().manual_seed(1))
    batch["pixel_values"] = pixel_values.reshape(-1, 1176).to(dtype)
    return {**batch, "labels": labels, "patch_mask": patch_mask, "patch_labels": patch_labels.to(dtype)}
