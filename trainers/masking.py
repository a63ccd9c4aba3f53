"""Masking of continual pre-training: which tokens and patches are hidden, and what stands in their place.

Pure functions of their arguments: every random draw comes from one generator a row, so that a row's mask depends on
(seed, epoch, row) and neither on the rank it lands on, nor on the other rows of its batch, nor on their padding.

Source: MoCa, arXiv 2506.23115, section 3.1.
"""

import hashlib
from collections.abc import Sequence

import torch

IGNORE_INDEX = -100
PATCH_NOISES = ("per_patch", "shared")


def row_generator(seed: int, epoch: int, row_key: bytes) -> torch.Generator:
    """Return the generator that draws one row's masks.

    Args:
        seed (`int`): seed of the run.
        epoch (`int`): pass over the data; the same row is masked anew in every epoch.
        row_key (`bytes`): what tells this row from others, for example its encoded content.

    Returns:
        `torch.Generator` on the CPU, equal for equal arguments on every machine.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/".encode() + row_key, digest_size=8).digest()
    # manual_seed takes 64 bits, signed.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def mask_tokens(
    input_ids: torch.Tensor,
    *,
    mask_token_id: int,
    maskable: torch.Tensor,
    ratio: float,
    generators: Sequence[torch.Generator],
    shift_labels: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each maskable token by the mask token with probability `ratio` (paper section 3.1).

    There is no 80/10/10 split: a chosen token always becomes the mask token.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids; left as they are.
        mask_token_id (`int`): id that stands in place of a chosen token.
        maskable (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): tokens that may be chosen, that is
            neither special tokens, nor image tokens, nor padding.
        ratio (`float`): probability in [0, 1) that a maskable token is chosen (paper: 0.4 for 3B, 0.6 for 7B).
        generators (`Sequence[torch.Generator]`): one a row.
        shift_labels (`bool`, defaults to `True`): the prediction for position i is read from the state at i - 1, so
            position 0, which has no state before it, is never chosen.

    Returns:
        `tuple`: masked `input_ids`, and `labels` of the same shape: the original id where a token was chosen, -100
        elsewhere.

    Raises:
        ValueError: `ratio` is outside [0, 1), `maskable` is not a bool tensor of the shape of `input_ids`, or there is
            not one generator a row.

    Example:

    ```python
    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> masked, labels = mask_tokens(
    ...     ids, mask_token_id=1, maskable=ids > 5, ratio=0.5, generators=[torch.Generator().manual_seed(0)]
    ... )
    ```
    """
    _check_ratio("ratio", ratio)
    _check_mask("maskable", maskable, input_ids.shape)
    _check_generators(generators, input_ids.shape[0])
    if shift_labels:
        maskable = maskable.clone()
        maskable[:, 0] = False
    chosen = _choose(maskable, ratio, generators)  # [B, T]
    labels = torch.where(chosen, input_ids, IGNORE_INDEX)  # [B, T]
    return torch.where(chosen, mask_token_id, input_ids), labels


def mask_patches(
    pixel_values: torch.Tensor,
    *,
    image_tokens: torch.Tensor,
    num_patches_per_token: int,
    ratio: float,
    generators: Sequence[torch.Generator],
    noise: str = "per_patch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replace the pixel rows of each image token by unit Gaussian noise with probability `ratio` (paper section 3.1).

    An image token owns `num_patches_per_token` consecutive rows of `pixel_values`, and image tokens own them in the
    order in which they stand in the batch, row by row; the rows of a token are chosen together.

    Args:
        pixel_values (`torch.Tensor` of shape `(num_patches, patch_dim)`): processor-normalised patches of all images
            of the batch; left as they are.
        image_tokens (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): where image tokens stand.
        num_patches_per_token (`int`): merge size squared.
        ratio (`float`): probability in [0, 1) that an image token is chosen (paper: 0.5 for 3B, 0.6 for 7B).
        generators (`Sequence[torch.Generator]`): one a row.
        noise (`str`, defaults to `"per_patch"`): `"per_patch"` draws every hidden patch anew (paper); `"shared"` puts
            one and the same vector into all hidden patches of the batch (the authors' released code). The shared
            vector is drawn from the first row's generator, so it alone depends on the composition of the batch.

    Returns:
        `tuple`: masked `pixel_values`; `patch_mask`, bool `(batch_size, sequence_length)`, the chosen image tokens;
        `patch_labels` of shape `(num_chosen, num_patches_per_token, patch_dim)`, their original rows.

    Raises:
        ValueError: `ratio` is outside [0, 1), `noise` is unknown, `image_tokens` is not a bool tensor, image tokens
            and rows of `pixel_values` do not belong together, or there is not one generator a row.

    Example:

    ```python
    >>> masked_pixels, patch_mask, patch_labels = mask_patches(
    ...     torch.rand(8, 1176),
    ...     image_tokens=torch.tensor([[False, True, True, False]]),
    ...     num_patches_per_token=4,
    ...     ratio=0.5,
    ...     generators=[torch.Generator().manual_seed(0)],
    ... )
    ```
    """
    patch_mask = choose_patches(image_tokens, ratio=ratio, generators=generators)
    masked, patch_labels = hide_patches(
        pixel_values,
        chosen=patch_mask[image_tokens],
        counts=patch_mask.sum(-1).tolist(),
        num_patches_per_token=num_patches_per_token,
        generators=generators,
        noise=noise,
    )
    return masked, patch_mask, patch_labels


def choose_patches(image_tokens: torch.Tensor, *, ratio: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Choose each image token with probability `ratio`: the first half of [`mask_patches`], which needs no pixels.

    Args:
        image_tokens, ratio, generators: see [`mask_patches`].

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length)`: the chosen image tokens.

    Raises:
        ValueError: `ratio` is outside [0, 1), `image_tokens` is not a bool tensor, or there is not one generator a row.
    """
    _check_ratio("ratio", ratio)
    _check_mask("image_tokens", image_tokens, image_tokens.shape)
    _check_generators(generators, image_tokens.shape[0])
    return _choose(image_tokens, ratio, generators)  # [B, T]


def hide_patches(
    pixel_values: torch.Tensor,
    *,
    chosen: torch.Tensor,
    counts: Sequence[int],
    num_patches_per_token: int,
    generators: Sequence[torch.Generator],
    noise: str = "per_patch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put noise in the place of the pixels of chosen image tokens: the second half of [`mask_patches`].

    Args:
        pixel_values (`torch.Tensor` of shape `(num_patches, patch_dim)`): patches of all image tokens of the batch;
            left as they are.
        chosen (`torch.BoolTensor` of shape `(num_image_tokens,)`): which of them are hidden.
        counts (`Sequence[int]`): how many are hidden in each row of the batch; their sum is that of `chosen`.
        num_patches_per_token, noise: see [`mask_patches`].
        generators (`Sequence[torch.Generator]`): one a row, on the device of `pixel_values`.

    Returns:
        `tuple`: masked `pixel_values`; `patch_labels` of shape `(num_chosen, num_patches_per_token, patch_dim)`.

    Raises:
        ValueError: `noise` is unknown, or image tokens and rows of `pixel_values` do not belong together.
    """
    if noise not in PATCH_NOISES:
        raise ValueError(f"noise must be one of {list(PATCH_NOISES)}, got {noise!r}.")
    num_image_tokens, patch_dim = chosen.shape[0], pixel_values.shape[-1]
    if num_image_tokens * num_patches_per_token != pixel_values.shape[0]:
        raise ValueError(
            f"{num_image_tokens} image tokens own {num_image_tokens * num_patches_per_token} rows of pixel_values "
            f"({num_patches_per_token} each), got {pixel_values.shape[0]} rows."
        )
    device = pixel_values.device
    if noise == "per_patch":
        # One draw a row of the batch, sized by that row alone.
        replacement = torch.cat(
            [
                torch.randn(count, num_patches_per_token, patch_dim, generator=generator, device=device)
                for count, generator in zip(counts, generators, strict=True)
            ]
        )  # [n, m*m, P]
    else:
        # Broadcast over tokens and patches.
        replacement = torch.randn(patch_dim, generator=generators[0], device=device)  # [P]

    grouped = pixel_values.unflatten(0, (num_image_tokens, num_patches_per_token))  # [N, m*m, P]
    patch_labels = grouped[chosen]  # [n, m*m, P]
    masked = grouped.clone()
    masked[chosen] = replacement.to(pixel_values.dtype)
    return masked.flatten(0, 1), patch_labels


def _choose(candidates, ratio, generators):
    """Choose each true position of `candidates` [B, T] with probability `ratio`, a row from its own generator."""
    chosen = torch.zeros_like(candidates)
    for row, generator in enumerate(generators):
        # One draw a candidate, not a position: the padding that longer neighbours add changes nothing.
        chosen[row, candidates[row]] = torch.rand(int(candidates[row].sum()), generator=generator) < ratio
    return chosen


def _check_ratio(name, ratio):
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {ratio}.")


def _check_mask(name, mask, shape):
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name} must be a bool tensor of shape {tuple(shape)}, got {mask.dtype} of shape {tuple(mask.shape)}."
        )


def _check_generators(generators, batch_size):
    if len(generators) != batch_size:
        raise ValueError(f"One generator a row is needed: got {len(generators)} for {batch_size} rows.")


__all__ = [
    "IGNORE_INDEX",
    "PATCH_NOISES",
    "choose_patches",
    "hide_patches",
    "mask_patches",
    "mask_tokens",
    "row_generator",
]
