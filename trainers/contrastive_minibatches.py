"""Mini-batches for cached gradients: rows of like length, cut by rows or by tokens and image patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

# Tiles come as pixels, without the size of the patches that the vision tower cuts: 14 x 14 counts rather too many.
_TILE_PATCH_AREA = 14 * 14


class Column:
    """Features of one column (query, positive or a hard negative) of a batch, to be cut into mini-batches.

    Features stay where they are until `cut` moves a mini-batch's: the pixels of a whole batch would not fit beside the
    model (an image of 1024 tokens takes 19 MB). From pinned memory, as a loader gives it on a GPU machine, pixels are
    copied without waiting.

    Args:
        features: what `SentenceTransformer.preprocess` returns: `input_ids` and `attention_mask` [B, T], and with
            images either `pixel_values` [num_patches, P], `image_grid_thw` [num_images, 3] and `num_images_per_sample`
            [B], or `pixel_values` [B, num_tiles, C, S, S] and `pixel_attention_mask` [B, num_tiles, S, S].
        where: what the column is called in messages.

    Raises:
        ValueError: for features without `input_ids`, or a feature whose rows cannot be told apart.
    """

    def __init__(self, features: dict[str, Any], where: str) -> None:
        if "input_ids" not in features:
            raise ValueError(f"Cached gradients need input_ids, got {sorted(features)} ({where}).")
        self._features = features
        self.num_rows, self._width = features["input_ids"].shape[:2]
        self.num_tokens = self._count_tokens()  # [B]
        # Where a feature that is not indexed by row keeps each row's part.
        self._parts = self._find_images(where)
        self.num_patches = self._count_patches()  # [B]
        for name, value in features.items():
            by_row = not isinstance(value, Tensor) or name == "prompt_length" or value.shape[:1] == (self.num_rows,)
            if name not in self._parts and not by_row:
                raise ValueError(
                    f"Feature {name!r} of shape {tuple(value.shape)} cannot be cut into mini-batches: allowed are "
                    f"features of {self.num_rows} rows, and images with image_grid_thw ({where})."
                )

    def _count_tokens(self) -> list[int]:
        """Tokens of each row up to its last real one: padding on the left stays, since positions may depend on it."""
        attention_mask = self._features.get("attention_mask")
        if attention_mask is None:
            return [self._width] * self.num_rows
        last = attention_mask.ne(0) * torch.arange(1, self._width + 1, device=attention_mask.device)  # [B, T]
        return last.amax(dim=1).clamp(min=1).tolist()

    def _find_images(self, where: str) -> dict[str, list[tuple[int, int]]]:
        """Begin and end of each row's images in `image_grid_thw`, and of their patches in `pixel_values`."""
        grid = self._features.get("image_grid_thw")
        if grid is None:
            return {}
        counts = self._features.get("num_images_per_sample")
        counts = [1] * self.num_rows if counts is None else counts.tolist()
        if len(counts) != self.num_rows or sum(counts) != len(grid):
            raise ValueError(
                f"image_grid_thw holds {len(grid)} images, but the {self.num_rows} rows have {sum(counts)}: give "
                f"num_images_per_sample [B] ({where})."
            )
        images = torch.tensor([0, *counts]).cumsum(0)  # [B + 1]
        patches = F.pad(grid.cpu().prod(dim=1).cumsum(0), (1, 0))[images]  # [B + 1]
        starts = {"image_grid_thw": images.tolist(), "pixel_values": patches.tolist()}
        return {name: list(zip(ends[:-1], ends[1:])) for name, ends in starts.items()}

    def _count_patches(self) -> list[int]:
        """Patches of each row in the vision tower."""
        if "pixel_values" in self._parts:
            return [end - begin for begin, end in self._parts["pixel_values"]]
        pixels = self._features.get("pixel_values")
        if pixels is None:
            return [0] * self.num_rows
        patches = math.ceil(pixels.shape[-1] * pixels.shape[-2] / _TILE_PATCH_AREA)
        mask = self._features.get("pixel_attention_mask")
        if mask is None:
            return [pixels.shape[1:-3].numel() * patches] * self.num_rows
        # The first pixel of a tile is padding only where the whole tile is.
        return (mask[:, :, 0, 0].ne(0).sum(dim=1) * patches).tolist()

    def cost(self, rows: Sequence[int]) -> int:
        """Tokens that a mini-batch of these rows takes through the language model, padding included, plus patches."""
        return len(rows) * max(self.num_tokens[row] for row in rows) + sum(self.num_patches[row] for row in rows)

    def plan(self, max_rows: int | None = None, max_tokens: int | None = None) -> list[list[int]]:
        """Cut the rows into mini-batches of like length, long ones first, so that the largest comes at once.

        Args:
            max_rows: most rows of a mini-batch; None for no limit.
            max_tokens: most that a mini-batch may `cost`; a row that costs more stands alone. None for no limit.

        Returns:
            Row numbers of each mini-batch; every row stands in one.
        """
        by_length = sorted(range(self.num_rows), key=lambda row: (-self.num_tokens[row], -self.num_patches[row], row))
        mini_batches: list[list[int]] = []
        patches = 0
        for row in by_length:
            last = mini_batches[-1] if mini_batches else []
            # The first row is the longest.
            cost = (len(last) + 1) * self.num_tokens[(last or [row])[0]] + patches + self.num_patches[row]
            if not last or len(last) == max_rows or (max_tokens is not None and cost > max_tokens):
                mini_batches.append([row])
                patches = self.num_patches[row]
            else:
                last.append(row)
                patches += self.num_patches[row]
        return mini_batches

    def cut(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Features of some rows, without padding that none of them needs, on `device`."""
        longest = max(self.num_tokens[row] for row in rows)
        features: dict[str, Any] = {}
        for name, value in self._features.items():
            if not isinstance(value, Tensor) or name == "prompt_length":
                features[name] = value
            elif name in self._parts:
                parts = [self._parts[name][row] for row in rows]
                parts = [value[begin:end].to(device, non_blocking=True) for begin, end in parts if begin < end]
                if parts:
                    features[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
            else:
                is_tokens = value.ndim == 2 and value.shape[1] == self._width
                value = value[:, :longest] if is_tokens else value
                features[name] = value[torch.as_tensor(rows, device=value.device)].to(device, non_blocking=True)
        return features


def plan_mini_batches(
    columns: Sequence[Column], max_rows: int | None, max_tokens: int | None, device: torch.device
) -> list[tuple[int, list[int]]]:
    """Cut all columns into mini-batches, equally many on every rank.

    Ranks that share weights gather them in every forward pass, and would wait forever for one that runs fewer.

    Args:
        columns: columns of this rank's batch, with equally many rows on all ranks.
        max_rows: see `Column.plan`.
        max_tokens: see `Column.plan`.
        device: where ranks exchange tensors.

    Returns:
        Number of the column and of its rows, for each mini-batch.
    """
    mini_batches = [
        (number, rows) for number, column in enumerate(columns) for rows in column.plan(max_rows, max_tokens)
    ]
    if get_world_size() > 1:
        most = torch.tensor(len(mini_batches), device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        missing = int(most.item()) - len(mini_batches)
        for _ in range(missing):
            costs = [columns[number].cost(rows) if len(rows) > 1 else 0 for number, rows in mini_batches]
            largest = costs.index(max(costs))
            number, rows = mini_batches[largest]
            middle = len(rows) // 2
            mini_batches[largest : largest + 1] = [(number, rows[:middle]), (number, rows[middle:])]
    return mini_batches
