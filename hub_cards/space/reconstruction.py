"""A page with some patches hidden, and as masked autoencoding fills them in (arXiv 2506.23115, section 3.1)."""

import torch
from PIL import Image

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def can_reconstruct(model):
    """Tell whether a model has a reconstruction head and takes images as rows of patches (Qwen-VL)."""
    return hasattr(model, "mae_head") and model.config.pixel_layout == "rows"


@torch.no_grad()
def reconstruct(model, processor, image, ratio=0.5, seed=0):
    """Hide image tokens of a picture, and let the model restore them from the rest.

    The model gets unit Gaussian noise in the place of hidden patches, as in pre-training; what a person sees there is
    grey. Visible patches are shown as they are: the head predicts hidden ones only.

    Args:
        model (`MoCaForPreTraining`): from `AutoModelForPreTraining`.
        processor (`MoCaProcessor`): of the same folder.
        image (`PIL.Image.Image`): any picture.
        ratio (`float`, defaults to 0.5): probability from 0 to 1 that an image token's patches are hidden; at least one
            token is hidden, and one is not.
        seed (`int`, defaults to 0): seed of the choice and of the noise.

    Returns:
        `dict`: `masked`, `reconstructed` and `original` (`PIL.Image.Image`, of the size the model sees), `num_tokens`,
        `num_hidden`, and `mae_loss`, the mean squared error of the hidden patches.
    """
    inputs = processor(text=[PLACEHOLDER], images=[[image]]).to(model.device)
    image_tokens = inputs["input_ids"] == model.config.image_token_id  # [1, T]
    num_tokens, per_token = int(image_tokens.sum()), model.config.num_patches_per_token
    original = inputs["pixel_values"].view(num_tokens, per_token, -1)  # [N, m*m, P]
    generator = torch.Generator().manual_seed(seed)
    num_hidden = min(max(round(ratio * num_tokens), 1), max(num_tokens - 1, 1))
    hidden = torch.zeros(num_tokens, dtype=torch.bool)
    hidden[torch.randperm(num_tokens, generator=generator)[:num_hidden]] = True  # [N]
    noise = torch.randn(original[hidden].shape, generator=generator)  # [n, m*m, P]
    noisy = original.clone()
    noisy[hidden] = noise.to(original)
    patch_mask = torch.zeros_like(image_tokens)
    patch_mask[image_tokens] = hidden.to(image_tokens.device)
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=noisy.flatten(0, 1).to(model.dtype),
        image_grid_thw=inputs["image_grid_thw"],
        patch_mask=patch_mask,
        patch_labels=original[hidden],
    )
    filled, grey = original.clone(), original.clone()
    filled[hidden] = outputs.patch_predictions.to(original)
    # What every pixel is at 128, in the values of the model.
    grey[hidden] = _constant_patch(processor.image_processor, 128, original.shape[-1]).to(original)
    grid = inputs["image_grid_thw"][0].tolist()
    pictures = {"masked": grey, "reconstructed": filled, "original": original}
    return {
        **{name: to_picture(rows.flatten(0, 1), grid, processor.image_processor) for name, rows in pictures.items()},
        "num_tokens": num_tokens,
        "num_hidden": num_hidden,
        "mae_loss": outputs.mae_loss.item(),
    }


def to_picture(rows, grid, image_processor):
    """Put rows of patches back into a picture.

    Args:
        rows (`torch.Tensor` of shape `(num_patches, patch_dim)`): normalised, in the order of the image tokens.
        grid (`list[int]`): patches in time, height and width.
        image_processor (`BaseImageProcessor`): gives sizes, mean and standard deviation.

    Returns:
        `PIL.Image.Image`: RGB; values outside of what a pixel can be are cut.
    """
    merge, size = image_processor.merge_size, image_processor.patch_size
    _, height, width = grid
    # A still image repeats itself in time: the frames' mean is what a prediction says of it.
    shape = (height // merge, width // merge, merge, merge, 3, image_processor.temporal_patch_size, size, size)
    patches = rows.float().cpu().view(shape).mean(5)  # [I, J, m, m, C, p, p]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, 3)  # [H, W, C]
    pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def _constant_patch(image_processor, value, patch_dim):
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    return ((value / 255 - mean) / std).repeat_interleave(patch_dim // 3)  # [P], channel by channel
