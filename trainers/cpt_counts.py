"""What is counted in every step of stage 1: targets, tokens, rows, and bad rows by data set and reason."""

import torch

from .cpt_rows import BAD_ROW_REASONS
from .masking import IGNORE_INDEX

NAMES = (
    "num_masked_tokens",
    "num_masked_patches",
    "num_tokens",
    "num_positions",
    "num_rows",
    "num_cut_rows",
    "num_cut_tokens",
)


class StepCounts:
    """The numbers of a step as one vector, which is summed over accumulation and ranks: int64 of shape `(num_counts,)`.

    It holds `NAMES`, bad rows by data set and reason, and one place for a signal.

    Args:
        num_patches_per_token (`int`): rows of pixels that an image token owns.
        sources (`Sequence[str]`, *optional*): names of the data sets of a mixture; without, bad rows are not told apart
            by data set.
    """

    def __init__(self, num_patches_per_token, sources=None):
        self._num_patches_per_token = num_patches_per_token
        self._named = sources is not None
        # Two sources may have one name.
        self._sources = list(dict.fromkeys(sources)) if self._named else [None]

    def zeros(self, device):
        """Return no counts.

        Args:
            device (`torch.device`): where.
        """
        number = len(NAMES) + len(self._sources) * len(BAD_ROW_REASONS) + 1
        return torch.zeros(number, dtype=torch.int64, device=device)

    def rejected(self, rows):
        """Return bad rows by data set and reason: int64 of shape `(num_sources * num_reasons,)`.

        Args:
            rows (`list[dict]`): lines of `rejected.jsonl`, of which `dataset` and `reason` are read.
        """
        counts = torch.zeros(len(self._sources), len(BAD_ROW_REASONS), dtype=torch.int64)
        for row in rows:
            counts[self._sources.index(row["dataset"]), BAD_ROW_REASONS.index(row["reason"])] += 1
        return counts.flatten()

    def pop(self, batch):
        """Return the counts of one batch, and take out of it what is no input of the model.

        Args:
            batch (`dict`): a masked batch, finished or not; `skipped_rows`, `cut_rows` and `num_rows` are taken out.
        """
        labels = batch["labels"]
        skipped = batch.pop("skipped_rows", None)
        if skipped is None:
            skipped = labels.new_zeros(len(self._sources) * len(BAD_ROW_REASONS))
        cut = batch.pop("cut_rows", labels.new_zeros(2))
        num_rows = batch.pop("num_rows", None)
        mask = batch.get("attention_mask")
        if num_rows is None:
            num_rows = skipped.sum() + (batch["cu_seq_lens"].shape[0] - 1 if mask is None else mask.shape[0])
        numbers = [
            (labels != IGNORE_INDEX).sum(),
            batch["patch_mask"].sum() * self._num_patches_per_token if "patch_mask" in batch else 0,
            labels.numel() if mask is None else mask.sum(),
            labels.numel(),
            num_rows,
            *cut,
            *skipped,
            0,
        ]
        return torch.stack([torch.as_tensor(number, dtype=torch.int64, device=labels.device) for number in numbers])

    def num_bad_rows(self, counts):
        """Return all bad rows (`int`) of counts that were brought to the host (`list[int]`)."""
        return sum(counts[len(NAMES) : -1])

    def logs(self, counts, seconds):
        """Return counts as they are logged.

        Args:
            counts (`list[int]`): sums over steps.
            seconds (`float`): time they took.

        Returns:
            `dict`: numbers by name; `padding`, the share of positions without a token; `tokens_per_second`; and of bad
            rows `skipped_rows`, `skipped_rows/<reason>` and, in a mixture, `skipped_rows/<data set>/<reason>`.
        """
        named = dict(zip(NAMES, counts))
        num_tokens, num_positions = named.pop("num_tokens"), named.pop("num_positions")
        named["padding"] = 1 - num_tokens / max(num_positions, 1)
        named["tokens_per_second"] = num_tokens / max(seconds, 1e-9)
        named["skipped_rows"] = self.num_bad_rows(counts)
        skipped = torch.tensor(counts[len(NAMES) : -1]).view(len(self._sources), -1)
        for name, number in zip(BAD_ROW_REASONS, skipped.sum(0).tolist()):
            if number:
                named[f"skipped_rows/{name}"] = number
        for source, numbers in zip(self._sources if self._named else (), skipped.tolist()):
            for name, number in zip(BAD_ROW_REASONS, numbers):
                if number:
                    named[f"skipped_rows/{source}/{name}"] = number
        return named


__all__ = ["NAMES", "StepCounts"]
