"""Late chunking: a document is encoded as a whole, then each of its passages is pooled from its token states.

A passage that is embedded alone knows nothing of the rest of its document; the states of a bidirectional model do
(arXiv 2409.04701). This file stays at home: it works with any loaded MoCa model.
"""

import torch
import torch.nn.functional as F

from .chat_moca import PLACEHOLDER
from .images_moca import open_image


@torch.no_grad()
def embed_passages(model, processor, passages, max_length=None, overlap=None):
    """Embed the passages of one document, each in the context of all others.

    The document is its passages one after the other, with nothing in between: white space and line breaks belong to the
    passages. Text is tokenized across their borders, as the whole document is; a token that lies across one counts for
    both sides. An instruction is a passage of its own, whose vector nobody uses.

    A document of more than `max_length` tokens is read in windows that overlap. Of two windows that hold a token, the
    one in which it is farther from the edge gives its state. Images are never cut.

    Args:
        model ([`MoCaModel`]): loaded in any way; of a `SentenceTransformer`, `model[0].model`.
        processor ([`MoCaProcessor`]): the model's; of a `SentenceTransformer`, `model[0].processor`.
        passages (`list`): a text, an image as the processor takes it, or a list of both, each.
        max_length (`int`, *optional*): most tokens of a window; the processor's limit when omitted.
        overlap (`int`, *optional*): tokens that two windows share, fewer where an image is in the way; an eighth of
            `max_length` when omitted.

    Returns:
        `torch.Tensor` of shape `(num_passages, hidden_size)`, float32: unit vectors. The one of a single passage is the
        document's ordinary embedding.

    Raises:
        ValueError: the model does not pool by mean, the tokenizer tells no offsets, there is no passage, one is empty,
            an image does not open or takes more than `max_length` tokens, or a number is out of range.

    Example:

    ```python
    >>> vectors = embed_passages(model, processor, ["Tides. ", "They follow the moon. ", figure])
    >>> vectors.shape
    torch.Size([3, 2048])
    ```
    """
    if model.config.pooling != "mean":
        raise ValueError(f"Late chunking pools by mean, but the model pools by {model.config.pooling!r}.")
    limit = max_length or min(processor.max_length, processor.tokenizer.model_max_length)
    overlap = limit // 8 if overlap is None else overlap
    if not 0 <= overlap < limit:
        raise ValueError(f"overlap must be from 0 to {limit - 1} (max_length is {limit}), got {overlap}.")
    units = _tokenize(processor, passages, limit)
    starts = torch.tensor([0, *(len(ids) for ids, _, _ in units)]).cumsum(0).tolist()
    sums = counts = None
    for first, last, keep in _windows(starts, limit, overlap):
        window = units[first:last]
        input_ids = torch.tensor([[token for ids, _, _ in window for token in ids]])  # [1, T]
        images = [image for _, image, _ in window if image is not None]
        inputs = processor.encode_images([images]) if images else {}
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        states = model(**inputs).last_hidden_state[0].float()  # [T, d]
        if sums is None:
            sums = states.new_zeros(len(passages), states.shape[-1])  # [P, d]
            counts = states.new_zeros(len(passages), 1)  # [P, 1]
        # Every kept token, with each of its passages.
        places = [
            (position - starts[first], passage)
            for unit, (_, _, members) in enumerate(window, start=first)
            for position in range(max(starts[unit], keep[0]), min(starts[unit + 1], keep[1]))
            for passage in members
        ]
        tokens, owners = torch.tensor(places, dtype=torch.long, device=states.device).reshape(-1, 2).unbind(1)
        sums.index_add_(0, owners, states[tokens])
        counts.index_add_(0, owners, counts.new_ones(len(owners), 1))
    return F.normalize(sums / counts, dim=-1)


def _tokenize(processor, passages, limit):
    """Return the document as units that no window cuts, a text token or an image: (ids, image or None, passages)."""
    if not passages:
        raise ValueError("There must be at least one passage, got none.")
    if not processor.tokenizer.is_fast:
        raise ValueError(f"{type(processor.tokenizer).__name__} does not tell which characters a token stands for.")
    units, text, ends = [], "", []
    for number, passage in enumerate(passages):
        parts = list(passage) if isinstance(passage, (list, tuple)) else [passage]
        if not any(not isinstance(part, str) or part for part in parts):
            raise ValueError(f"Passage {number} is empty.")
        for index, part in enumerate(parts):
            if isinstance(part, str):
                text += part
                ends.append((len(text), number))
                continue
            units += _text_units(processor.tokenizer, text, ends)
            text, ends = "", []
            where = f"Passage {number}, part {index}"
            image = open_image(part, where)
            try:
                ids, _ = processor.row_ids(PLACEHOLDER, [(image.height, image.width)], limit)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            units.append((ids, image, [number]))
    return units + _text_units(processor.tokenizer, text, ends)


def _text_units(tokenizer, text, ends):
    """Return the tokens of a run of text, each with the passages that it touches; `ends` are (end, passage)."""
    if not text:
        return []
    # As the processor does it: what a user writes is never a control token.
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    units, covered = [], 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        # Some tokenizers leave the space before a word out of its offsets.
        start = min(start, covered)
        covered = max(covered, end)
        end = max(end, start + 1)
        begins = [0, *(stop for stop, _ in ends)]
        touched = {number for begin, (stop, number) in zip(begins, ends) if begin < end and start < stop}
        units.append(([token], None, sorted(touched)))
    return units


def _windows(starts, limit, overlap):
    """Yield (first unit, unit behind the last, (first token to keep, token behind the last)) of each window.

    Args:
        starts (`list[int]`): the token at which each unit begins, and the number of tokens.
        limit, overlap (`int`): tokens.
    """
    num_units = len(starts) - 1
    first, keep_from = 0, 0
    while True:
        last = first + 1
        while last < num_units and starts[last + 1] - starts[first] <= limit:
            last += 1
        if last == num_units:
            yield first, last, (keep_from, starts[last])
            return
        following = last
        # Back by the overlap, as far as the next unit still has a place.
        while (
            following - 1 > first
            and starts[last] - starts[following - 1] <= overlap
            and starts[last + 1] - starts[following - 1] <= limit
        ):
            following -= 1
        keep_to = (starts[following] + starts[last]) // 2
        yield first, last, (keep_from, keep_to)
        first, keep_from = following, keep_to


__all__ = ["embed_passages"]
