"""How fast a contrastive run goes: tokens, padding and FLOPs of its batches, and a progress bar that shows rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProgressCallback

from .contrastive_minibatches import Column
from .flops import FlopsMeter

# What stands behind the progress bar, and how it is called there.
_SHOWN = {
    "loss": "loss",
    "rows_per_second": "rows/s",
    "tokens_per_second": "tokens/s",
    "eval_ndcg_at_10": "nDCG@10",
    "eval_p_at_1": "P@1",
}


class RateProgressCallback(ProgressCallback):
    """The stock progress bar, behind which the newest loss, rates and results on dev sets stand."""

    def on_train_begin(self, args, state, control, **kwargs):
        """See [`~transformers.TrainerCallback`] for `args`, `state`, `control` and `kwargs`."""
        super().on_train_begin(args, state, control, **kwargs)
        self._shown = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """See [`~transformers.TrainerCallback`]; `logs` are the numbers by name."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None:
            self._shown |= {label: f"{logs[name]:.4g}" for name, label in _SHOWN.items() if name in logs}
            self.training_bar.set_postfix(self._shown)


class TokenMeter:
    """Tokens, positions and model FLOPs of this rank's batches.

    Args:
        model: the `MoCaModel` that is trained; may be wrapped by peft.
        device: where it runs.
        max_rows, max_tokens: limits of mini-batches, as `Column.plan` takes them, which leave out padding that whole
            columns have; None for whole columns.

    Attributes:
        totals: tokens, positions with padding, and FLOPs so far.
    """

    def __init__(
        self, model: Any, device: torch.device, max_rows: int | None = None, max_tokens: int | None = None
    ) -> None:
        self._flops = FlopsMeter(model, device)
        self._limits = max_rows, max_tokens
        self.totals = [0, 0, 0.0]

    def add(self, columns: Sequence[dict[str, Any]]) -> None:
        """Count a batch.

        Args:
            columns: features of query, positive and hard negatives, on the host. Placeholders of negatives that are
                missing count as what they are for the model, a short text.
        """
        self._flops.total = 0.0
        for number, features in enumerate(columns):
            mask = features.get("attention_mask")
            self.totals[0] += features["input_ids"].numel() if mask is None else int(mask.sum())
            if self._limits == (None, None):
                self.totals[1] += features["input_ids"].numel()
            else:
                column = Column(features, f"column {number}")
                plan = column.plan(*self._limits)
                self.totals[1] += sum(len(rows) * max(column.num_tokens[row] for row in rows) for rows in plan)
            self._flops.add(features)
        self.totals[2] += self._flops.total

    def logs(self, totals: Sequence[float], seconds: float, num_devices: int) -> dict[str, float]:
        """Return what is logged.

        Args:
            totals: those of all ranks.
            seconds: time they took.
            num_devices: devices that shared the work.

        Returns:
            `tokens_per_second`, without padding; `padding`, the share of positions without a token; and
            `tflops_per_device` and `mfu`, see [`trainers.flops.FlopsMeter`]. They count one forward and one backward
            pass: the second forward pass of cached gradients costs time, but no model needs it.
        """
        num_tokens, num_positions, flops = totals
        return {
            "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 2),
            "padding": round(1 - num_tokens / max(num_positions, 1), 6),
            **self._flops.logs(flops, seconds, num_devices),
        }


__all__ = ["RateProgressCallback", "TokenMeter"]
