"""Several rows in one sequence without padding: where they begin and end, and attention that stays within them.

Every attention path gets the rows in its own way: flash attention as cumulative lengths, eager and flex attention as a
mask, and sdpa, which stock code could only give a mask of the whole sequence squared, by the function below, one row
after the other. This file travels to the Hub as remote code: it imports torch and transformers only.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, create_causal_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch below 2.10
    varlen_attn = None

PACKED_SDPA = "moca_packed_sdpa"


@dataclass(frozen=True)
class PackedRows:
    """The rows of one packed sequence; see [`PackedRows.of`].

    Args:
        cu_seq_lens (`torch.IntTensor` of shape `(num_rows + 1,)`): where each row starts, and the end of the last.
        lengths (`tuple` of `int`): tokens of each row.
    """

    cu_seq_lens: torch.Tensor
    lengths: tuple

    @classmethod
    def of(cls, cu_seq_lens, input_ids, attention_mask=None):
        """Return the rows of a packed sequence, or None where nothing is packed.

        Args:
            cu_seq_lens (`torch.IntTensor` of shape `(num_rows + 1,)`, *optional*): 0, then the end of every row.
            input_ids (`torch.LongTensor` of shape `(1, sequence_length)`): the rows, one after another.
            attention_mask (`torch.Tensor`, *optional*): must be None beside `cu_seq_lens`, for nothing is padded.

        Raises:
            ValueError: `cu_seq_lens` is not a vector of integers that rises from 0 to the sequence length, the batch
                size is not 1, or there is an attention mask as well.
        """
        if cu_seq_lens is None:
            return None
        if attention_mask is not None:
            raise ValueError(
                "cu_seq_lens and attention_mask exclude each other: packed rows have no padding. Got an "
                f"attention_mask of shape {tuple(attention_mask.shape)}."
            )
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens needs input_ids of shape (1, sequence_length), got {tuple(input_ids.shape)}."
            )
        if cu_seq_lens.ndim != 1 or len(cu_seq_lens) < 2 or cu_seq_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "cu_seq_lens must be an int32 tensor of shape (num_rows + 1,) with at least one row, got "
                f"{cu_seq_lens.dtype} of shape {tuple(cu_seq_lens.shape)}."
            )
        bounds = cu_seq_lens.tolist()
        if bounds[0] != 0 or bounds[-1] != input_ids.shape[1]:
            raise ValueError(
                f"cu_seq_lens must go from 0 to the sequence length {input_ids.shape[1]}, got {bounds[0]} to "
                f"{bounds[-1]}."
            )
        lengths = tuple(end - start for start, end in zip(bounds, bounds[1:]))
        if min(lengths) < 1:
            row = next(row for row, length in enumerate(lengths) if length < 1)
            raise ValueError(
                f"cu_seq_lens must rise with every row, but row {row} goes from {bounds[row]} to {bounds[row + 1]}."
            )
        return cls(cu_seq_lens.to(input_ids.device, torch.int32), lengths)

    @property
    def starts(self):
        """First position of every row (`torch.LongTensor` of shape `(num_rows,)`)."""
        return self.cu_seq_lens[:-1].long()

    @property
    def ends(self):
        """Last position of every row (`torch.LongTensor` of shape `(num_rows,)`)."""
        return self.cu_seq_lens[1:].long() - 1

    @property
    def row_numbers(self):
        """Number of the row that each token belongs to (`torch.LongTensor` of shape `(1, sequence_length)`)."""
        lengths = self.cu_seq_lens.diff().long()  # [R]
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))[None]

    def unpack(self, packed):
        """Return the rows as a batch, padded on the right with -1, and its attention mask.

        Args:
            packed (`torch.LongTensor` of shape `(1, sequence_length)`).

        Returns:
            `tuple`: `torch.LongTensor` and `torch.BoolTensor`, both of shape `(num_rows, longest_row)`.
        """
        columns = torch.arange(max(self.lengths), device=packed.device)  # [L]
        mask = columns < self.cu_seq_lens.diff()[:, None]  # [R, L]
        rows = packed.new_full(mask.shape, -1)
        rows[mask] = packed[0]
        return rows, mask

    def attention_inputs(self, config, hidden_states, bidirectional=None):
        """Return the arguments that keep a stock layer, or a stock stack of layers, within the rows.

        Args:
            config (`PretrainedConfig`): the text configuration; `_attn_implementation` and `is_causal` are read, and
                `"sdpa"` is replaced by this file's own version of it.
            hidden_states (`torch.Tensor` of shape `(1, sequence_length, hidden_size)`): for shape, type and device.
            bidirectional (`bool`, *optional*): attend both ways; as `config.is_causal` says when omitted.

        Returns:
            `tuple`: the attention mask, None where the path needs none, and further keyword arguments (`dict`).

        Raises:
            ValueError: the layers attend within sliding windows, or on a path that is not known here.
        """
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError("cu_seq_lens needs layers with full attention, but config.layer_types has sliding ones.")
        path = config._attn_implementation
        if path in ("sdpa", PACKED_SDPA):
            # For good, not for this pass alone: gradient checkpointing looks the function up again in the backward
            # pass. Without rows it is the stock function, so that passes before and after see no difference.
            config._attn_implementation = PACKED_SDPA
            return None, {"row_lengths": self.lengths, "row_bounds": self.cu_seq_lens}
        if path in ("flash_attention_2", "flash_attention_3"):
            longest = max(self.lengths)
            return None, {
                "cu_seq_lens_q": self.cu_seq_lens,
                "cu_seq_lens_k": self.cu_seq_lens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        if path not in ("eager", "flex_attention"):
            raise ValueError(
                "cu_seq_lens needs the attention implementation eager, sdpa, flex_attention, flash_attention_2 or "
                f"flash_attention_3, got {path!r}."
            )
        row_numbers = self.row_numbers  # [1, T]

        def same_row(batch_index, head_index, query_index, key_index):
            return row_numbers[batch_index, query_index] == row_numbers[batch_index, key_index]

        arguments = {"config": config, "inputs_embeds": hidden_states, "attention_mask": None}
        arguments |= {"past_key_values": None, "and_mask_function": same_row}
        mask = create_bidirectional_mask(**arguments) if bidirectional else create_causal_mask(**arguments)
        return mask, {}


def packed_sdpa_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """Attend within packed rows, or as stock `sdpa` does where nothing is packed.

    Args:
        module (`nn.Module`): the attention layer.
        query (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`).
        key, value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, sequence_length, head_dim)`).
        attention_mask (`torch.Tensor`, *optional*): for the stock function; packed rows have none.
        dropout (`float`, defaults to 0.0): on attention weights.
        scaling (`float`, *optional*): factor of the scores.
        is_causal (`bool`, *optional*): attend backwards only; as `module.is_causal` says when omitted.
        kwargs: `row_lengths` (`tuple` of `int`) and `row_bounds` (`torch.IntTensor` of shape `(num_rows + 1,)`) where
            rows are packed; what the stock function takes.

    Returns:
        `tuple`: `torch.Tensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`, and None.
    """
    lengths, bounds = kwargs.pop("row_lengths", None), kwargs.pop("row_bounds", None)
    stock = functools.partial(
        sdpa_attention_forward, module, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    if lengths is None:
        return stock(query, key, value, attention_mask)
    if dropout == 0 and _runs_varlen(query, value):
        causal = module.is_causal if is_causal is None else is_causal
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, head_dim]
        attended = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            max(lengths),
            max(lengths),
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # [T, heads, head_dim]
        return attended[None], None
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    attended = [stock(*row, None)[0] for row in rows]
    return torch.cat(attended, dim=1), None


@functools.cache
def _has_varlen():
    """Tell whether this torch has attention over packed rows with everything that is needed of it."""
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn is not None and needed <= inspect.signature(varlen_attn).parameters.keys()


def _runs_varlen(query, value):
    """Tell whether the kernel takes these states: half precision, on a GPU since Ampere, heads of at most 256."""
    head_dim = query.shape[-1]
    return (
        _has_varlen()
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


__all__ = ["PACKED_SDPA", "PackedRows", "packed_sdpa_forward"]
