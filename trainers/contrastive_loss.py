"""The loss of a global batch: InfoNCE over all ranks, Matryoshka prefixes, and cached gradients in mini-batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from sentence_transformers.base.losses.merged_forward import column_merging_disabled, embed_columns
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn

from .contrastive_info_nce import info_nce
from .contrastive_minibatches import Column, plan_mini_batches

_LABELS = ("negatives_mask", "positive_hash", "negative_hash")
# Rows whose cosines with all candidates are held at a time: in float32 128 x 6144 take 3 MB, 2048 x 6144 50 MB.
_ROWS_AT_A_TIME = 128


class InfoNCELoss(CachedLossMixin, nn.Module):
    """`info_nce` on the columns of a batch, gathered over all ranks, for `SentenceTransformerTrainer`.

    Every rank computes the loss of its own rows against the candidates of all ranks, and the gather carries
    gradients back to the rank that made an embedding. Data parallelism averages gradients over ranks, so that the
    result is the gradient of the mean over the global batch, as one process would compute it.

    With cached gradients (GradCache, arXiv 2101.06983) memory follows the mini-batch while the loss sees the whole
    batch, for one more forward pass. Rows of a column are embedded in order of length, so that little is padding, and
    features stay where they are, on the host for instance, until their mini-batch comes.

    Args:
        model: the model that embeds a column's features into `sentence_embedding` [B, d].
        temperature: see `info_nce`.
        all_negatives: see `info_nce`.
        symmetric: see `info_nce`.
        false_negative_margin: see `info_nce`.
        matryoshka_dims: lengths of prefixes of the embedding, each renormalised, whose losses are added
            (arXiv 2205.13147); None for the whole embedding alone.
        matryoshka_weights: what each prefix's loss is multiplied by; 1 each when None.
        mini_batch_size: most rows of a mini-batch.
        mini_batch_tokens: most tokens of a mini-batch through the language model, padding included, plus image patches
            through the vision tower: a patch counts as a token. A row that has more stands alone. With both limits,
            whichever is reached first; with neither, whole columns are embedded, without cached gradients.

    Raises:
        ValueError: for a mini_batch_size or mini_batch_tokens below 1, Matryoshka dimensions that are not distinct
            numbers from 1 to the model's, or weights that do not fit them.

    Example:
        >>> loss = InfoNCELoss(model, temperature=0.03, mini_batch_tokens=16_384)
        >>> value = loss([query_features, positive_features, negative_features], negatives_mask)
    """

    # What the mixin would cut by: mini-batches reach it cut.
    mini_batch_size = sys.maxsize

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.03,
        all_negatives: bool = True,
        symmetric: bool = False,
        false_negative_margin: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        mini_batch_size: int | None = None,
        mini_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_tokens", mini_batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value} (InfoNCELoss).")
        check_matryoshka(matryoshka_dims, matryoshka_weights, "InfoNCELoss")
        self.model = model
        self.temperature = temperature
        self.all_negatives = all_negatives
        self.symmetric = symmetric
        self.false_negative_margin = false_negative_margin
        self.matryoshka_dims = None if matryoshka_dims is None else list(matryoshka_dims)
        self.matryoshka_weights = None if matryoshka_weights is None else list(matryoshka_weights)
        self.max_rows = mini_batch_size
        self.max_tokens = mini_batch_tokens
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_tokens is not None

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Loss of this rank's rows.

        Args:
            sentence_features: features of the query, the positive and K hard negatives, a dict a column.
            labels: the negatives mask, booleans of shape [B, K], or a dict of any of `negatives_mask`, `positive_hash`
                (int64 of shape [B]) and `negative_hash` ([B, K]), see `info_nce`; None when every negative exists. The
                same on every rank.

        Raises:
            ValueError: for fewer than two columns, unknown labels, or too long a Matryoshka prefix.
        """
        sentence_features = list(sentence_features)
        if len(sentence_features) < 2:
            raise ValueError(
                f"InfoNCELoss needs the columns query, positive and optionally negatives, got {len(sentence_features)}."
            )
        if not isinstance(labels, Mapping):
            labels = {} if labels is None else {"negatives_mask": labels}
        if unknown := sorted(set(labels) - set(_LABELS)):
            raise ValueError(f"Labels hold {unknown}, allowed are {list(_LABELS)} (InfoNCELoss).")
        if not self.uses_gradient_cache:
            # Columns would be merged into one forward pass by what they hold, which differs between ranks, and ranks
            # that share weights must run equally many.
            with column_merging_disabled() if get_world_size() > 1 else nullcontext():
                columns = embed_columns(self.model, sentence_features)
            return self._global_loss(torch.stack(columns, dim=1), labels)
        columns = [Column(features, f"column {number}") for number, features in enumerate(sentence_features)]
        plan = plan_mini_batches(columns, self.max_rows, self.max_tokens, self._device())
        # The tensor tells the mixin how many rows there are.
        mini_batches = [{"rows": torch.tensor(rows), "column": columns[number]} for number, rows in plan]
        num_rows = columns[0].num_rows
        order = torch.tensor([number * num_rows + row for number, rows in plan for row in rows])  # [(2 + K) * B]
        return self.forward_cached(mini_batches, (order.argsort().view(-1, num_rows), labels))

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed one mini-batch, as `CachedLossMixin` asks for it; only then are its features on the device."""
        features = sentence_feature["column"].cut(sentence_feature["rows"].tolist(), self._device())
        with random_state or nullcontext(), torch.set_grad_enabled(with_grad):
            random_state = RandContext(*features.values()) if copy_random_state else None
            return self.model(features)["sentence_embedding"], random_state  # [n, d]

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: tuple[Tensor, Mapping[str, Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Loss from the embeddings of mini-batches and where each row's stands, as `CachedLossMixin` asks for it."""
        places, labels = labels  # [2 + K, B]
        embeddings = torch.cat([embeddings for (embeddings,) in reps])  # [(2 + K) * B, d], mini-batch by mini-batch
        return self._global_loss(embeddings[places.T.to(embeddings.device)], labels, with_backward)

    def _global_loss(self, columns: Tensor, labels: Mapping[str, Tensor], with_backward: bool = False) -> Tensor:
        """Loss of this rank's rows from the columns' embeddings [B, 2 + K, d]."""
        columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
        num_rows, first = len(columns), 0
        if self.matryoshka_dims is not None and max(self.matryoshka_dims) > columns.shape[-1]:
            raise ValueError(
                f"matryoshka_dims must not exceed the embedding's {columns.shape[-1]} dimensions, got "
                f"{self.matryoshka_dims} (InfoNCELoss)."
            )
        if get_world_size() > 1:
            columns = all_gather_with_grad(columns)  # [W * B, 2 + K, d]
            # Not every backend gathers booleans.
            masks = {name: value.dtype == torch.bool for name, value in labels.items()}
            labels = {name: all_gather(value.byte() if masks[name] else value) for name, value in labels.items()}
            labels = {name: value.bool() if masks[name] else value for name, value in labels.items()}
            first = get_rank() * num_rows
        if not with_backward:
            return sum(self._prefix_losses(columns, labels, (first, first + num_rows)))
        # A few rows at a time, up to the embeddings: their cosines would outgrow a mini-batch's activations.
        embeddings = columns.detach().requires_grad_()
        total = columns.new_zeros(())
        for begin in range(first, first + num_rows, _ROWS_AT_A_TIME):
            end = min(begin + _ROWS_AT_A_TIME, first + num_rows)
            for loss in self._prefix_losses(embeddings, labels, (begin, end)):
                loss = loss * ((end - begin) / num_rows)
                loss.backward()
                total += loss.detach()
        columns.backward(embeddings.grad)
        return total

    def _prefix_losses(self, columns: Tensor, labels: Mapping[str, Tensor], rows: tuple[int, int]) -> Iterator[Tensor]:
        """Weighted loss of some rows for each Matryoshka prefix, from all ranks' embeddings [N, 2 + K, d]."""
        has_negatives = columns.shape[1] > 2
        labels = {name: value for name, value in labels.items() if has_negatives or name == "positive_hash"}
        dims = self.matryoshka_dims or [columns.shape[-1]]
        for dim, weight in zip(dims, self.matryoshka_weights or [1.0] * len(dims)):
            loss = info_nce(
                columns[:, 0, :dim],
                columns[:, 1, :dim],
                columns[:, 2:, :dim] if has_negatives else None,
                **labels,
                temperature=self.temperature,
                all_negatives=self.all_negatives,
                symmetric=self.symmetric,
                false_negative_margin=self.false_negative_margin,
                rows=rows,
            )
            yield weight * loss

    def _device(self) -> torch.device:
        """Where mini-batches go: a wrapped model has no `device`."""
        return next(self.model.parameters()).device

    def get_config_dict(self) -> dict[str, Any]:
        """The loss's settings."""
        return {
            "temperature": self.temperature,
            "all_negatives": self.all_negatives,
            "symmetric": self.symmetric,
            "false_negative_margin": self.false_negative_margin,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "mini_batch_size": self.max_rows,
            "mini_batch_tokens": self.max_tokens,
        }


def check_matryoshka(dims: Sequence[int] | None, weights: Sequence[float] | None, where: str) -> None:
    """Refuse Matryoshka dimensions and weights that cannot be meant.

    Raises:
        ValueError: for no dimensions, one below 1 or given twice, weights without dimensions, of another number, or not
            positive; the message ends with `where`.
    """
    if dims is not None and (len(dims) == 0 or min(dims) < 1 or len(set(dims)) < len(dims)):
        raise ValueError(f"matryoshka_dims must be distinct numbers of at least 1, got {list(dims)} ({where}).")
    if weights is not None and (dims is None or len(weights) != len(dims) or min(weights) <= 0):
        raise ValueError(
            f"matryoshka_weights must be positive, one for each of matryoshka_dims {dims}, got {list(weights)} "
            f"({where})."
        )
