"""Model FLOPs of a training step, and what a GPU could do at best: together they give the model FLOPs utilisation."""

import re
from collections.abc import Collection, Iterable, Sequence

import torch

from .masking import IGNORE_INDEX

# Dense bf16 FLOPs a second, from the vendor's data sheets (half of what they print "with sparsity").
_PEAK_FLOPS = {
    r"\bB200\b": 2250e12,
    r"\bH200\b(?! NVL)": 989e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b.*\bHBM3\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bA10\b": 125e12,
    r"\bL4\b": 121e12,
    r"\bRTX 4090\b(?! D)": 165e12,
}


def peak_flops(device: torch.device | str | int) -> float | None:
    """Return the dense bf16 FLOPs a second of a GPU, as its vendor's data sheet says.

    Args:
        device (`torch.device`, `str` or `int`): where the model runs.

    Returns:
        `float`, or None for CPUs, for GPUs that are not known here and for slices of one (MIG).
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:
        return None
    return next((flops for pattern, flops in _PEAK_FLOPS.items() if re.search(pattern, name)), None)


def step_flops(
    config,
    row_lengths: Iterable[int],
    image_grid_thw: Iterable[Sequence[int]] = (),
    num_chosen_tokens: int = 0,
    num_chosen_image_tokens: int = 0,
    frozen: Collection[str] = (),
) -> int:
    """Return the model FLOPs of forward and backward pass of one batch; sum it over the batches of a step.

    Counted are multiplications and additions of matrix products: three times those of the forward pass, since a product
    has two gradients, but twice at the patch embedding, as pixels need none. Padding is not counted, nor is what
    gradient checkpointing computes again: both cost time, but no model needs them (as in PaLM, arXiv 2204.02311,
    appendix B). A causal model attends to half of each row's pairs of tokens.

    Args:
        config ([`MoCaConfig`]): the architecture, with a backbone of the `"rows"` layout of pixels.
        row_lengths (iterable of `int`): tokens of each row, image tokens included, padding not.
        image_grid_thw (iterable of three `int`): patches of each image in time, height and width.
        num_chosen_tokens (`int`, defaults to 0): masked tokens, for which the vocabulary is scored.
        num_chosen_image_tokens (`int`, defaults to 0): image tokens with masked patches. The MAE decoder runs on all
            tokens of a batch that has any.
        frozen (collection of `str`, defaults to none): see [`frozen_parts`]. What is frozen has no gradients of its
            own, and passes them on only to what is not.

    Returns:
        `int`

    Raises:
        ValueError: the backbone takes tiles.

    Example:

    ```python
    >>> step_flops(model.config, [900, 300], [(1, 32, 32)], num_chosen_tokens=200, num_chosen_image_tokens=100)
    ```
    """
    if config.pixel_layout != "rows":
        raise ValueError(
            f"FLOPs are known for backbones that take rows of patches, got {config.backbone_config.model_type!r}."
        )
    row_lengths, grids = list(row_lengths), [tuple(map(int, grid)) for grid in image_grid_thw]
    text = config.get_text_config()
    tokens, pairs = sum(row_lengths), sum(length**2 for length in row_lengths)
    projections, attention = _text_layer(text, tokens, pairs)
    seen = attention if config.bidirectional else attention / 2
    vocabulary = 2 * num_chosen_tokens * text.hidden_size * text.vocab_size
    products = 2 if "text" in frozen else 3
    total = text.num_hidden_layers * (products * projections + 3 * seen) + products * vocabulary
    if num_chosen_image_tokens:
        patch_values = config.num_patches_per_token * config.patch_dim
        total += 3 * (projections + attention + 2 * num_chosen_image_tokens * text.hidden_size * patch_values)
    vision = config.backbone_config.vision_config
    # Under another name in Qwen2-VL, where hidden_size is the language model's.
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    patch_embedding = 2 * sum(t * h * w for t, h, w in grids) * config.patch_dim * width
    blocks, merging = _vision_layers(config, width, grids)
    if "vision" in frozen:
        # A merger that is trained normalises first, with weights of its own that ask for gradients.
        total += blocks + patch_embedding + (1 if "merger" in frozen else 3) * merging
    else:
        total += 3 * blocks + 2 * patch_embedding + (2 if "merger" in frozen else 3) * merging
    return int(total)


def frozen_parts(model) -> set[str]:
    """Return which parts of a model are not trained, for [`step_flops`].

    Args:
        model ([`MoCaForPreTraining`] or [`MoCaModel`]): may be wrapped by peft.

    Returns:
        `set` of `"vision"`, `"merger"` and `"text"`: the vision tower, what maps its output to the language model, and
        the language model, where most of their weights are not trained (with LoRA, whose own products are not counted).
    """
    moca = getattr(model, "moca", model)
    tower = moca.backbone.get_encoder(modality="image")
    parts = {
        "vision": [parameter for name, parameter in tower.named_parameters() if "merger" not in name],
        "merger": [parameter for name, parameter in tower.named_parameters() if "merger" in name],
        "text": list(moca.language_model.parameters()),
    }
    frozen = set()
    for part, parameters in parts.items():
        num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        if 2 * num_trained < sum(parameter.numel() for parameter in parameters):
            frozen.add(part)
    return frozen


class FlopsMeter:
    """Model FLOPs of this rank's batches, and their share of what its device could do.

    Args:
        model ([`MoCaForPreTraining`] or [`MoCaModel`]): may be wrapped by peft. Which parts are trained is looked at
            now.
        device (`torch.device`): where it runs.
    """

    def __init__(self, model, device):
        self._config = model.config
        # Of backbones that take tiles they are not known.
        self._known = self._config.pixel_layout == "rows"
        self._frozen = frozen_parts(model) if self._known else ()
        self._peak = peak_flops(device)
        self.total = 0.0

    def add(self, batch):
        """Add those of one batch (`dict`), masked, finished or not, or without labels: cheapest while on the host."""
        if not self._known:
            return
        mask = batch.get("attention_mask")
        lengths = batch["cu_seq_lens"].diff() if mask is None else mask.sum(-1)
        grids = batch["image_grid_thw"].tolist() if "image_grid_thw" in batch else ()
        num_chosen = int((batch["labels"] != IGNORE_INDEX).sum()) if "labels" in batch else 0
        num_image_tokens = int(batch["patch_mask"].sum()) if "patch_mask" in batch else 0
        self.total += step_flops(self._config, lengths.tolist(), grids, num_chosen, num_image_tokens, self._frozen)

    def logs(self, total, seconds, num_devices):
        """Return what is logged.

        Args:
            total (`float`): FLOPs of all ranks.
            seconds (`float`): time they took.
            num_devices (`int`): devices that shared the work.

        Returns:
            `dict`: `tflops_per_device`, 10^12 FLOPs a second; on GPUs whose peak is known `mfu`, the model FLOPs
            utilisation, from 0 to 1. Empty for backbones whose FLOPs are not known.
        """
        if not self._known:
            return {}
        rate = total / max(seconds, 1e-9) / num_devices
        return {"tflops_per_device": rate / 1e12, **({"mfu": rate / self._peak} if self._peak else {})}


def _text_layer(text, tokens, pairs):
    """Forward FLOPs of one decoder layer: projections and gated MLP, and attention both ways."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys) + 3 * text.hidden_size * text.intermediate_size
    # Scores and weighted values.
    return 2 * tokens * weights, 4 * pairs * queries


def _vision_layers(config, width, grids):
    """Forward FLOPs of the vision tower after its patch embedding: of its blocks and of the mergers."""
    vision, family = config.backbone_config.vision_config, config.backbone_config.model_type
    patches = sum(t * h * w for t, h, w in grids)
    mlp, out, mergers = {
        "qwen2_vl": lambda: (2 * width * int(width * vision.mlp_ratio), vision.hidden_size, 1),
        "qwen2_5_vl": lambda: (3 * width * vision.intermediate_size, vision.out_hidden_size, 1),
        "qwen3_vl": lambda: (
            2 * width * vision.intermediate_size,
            vision.out_hidden_size,
            1 + len(vision.deepstack_visual_indexes),
        ),
    }[family]()
    whole = sum(t * (h * w) ** 2 for t, h, w in grids)
    num_whole, pairs_in_windows = vision.depth, 0
    if family == "qwen2_5_vl":
        num_whole = len(set(vision.fullatt_block_indexes) & set(range(vision.depth)))
        side = vision.window_size // vision.patch_size // config.merge_size * config.merge_size
        pairs_in_windows = sum(t * _squares(h, side) * _squares(w, side) for t, h, w in grids)
    attention = 4 * width * (num_whole * whole + (vision.depth - num_whole) * pairs_in_windows)
    merged = width * config.num_patches_per_token
    merging = 2 * mergers * patches // config.num_patches_per_token * (merged**2 + merged * out)
    return vision.depth * 2 * patches * (4 * width**2 + mlp) + attention, merging


def _squares(length, side):
    """Sum of squares of the pieces of a length that is cut every `side`, the rest at the end."""
    return length // side * side**2 + (length % side) ** 2


__all__ = ["FlopsMeter", "frozen_parts", "peak_flops", "step_flops"]
