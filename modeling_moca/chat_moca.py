"""MoCa's plain format: rows of text and images, and what a chat of messages looks like as one.

This file travels to the Hub as remote code.
"""

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
# Where an image stands in a text, whichever backbone reads it.
PLACEHOLDER = VISION_START + IMAGE_PAD + VISION_END

# What a chat looks like as plain text: leading images, then the prompt (its system messages), then the rest in order.
# A single text with images behind it is how sentence-transformers passes {"text": ..., "image": ...}: images go first.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(prompt='', blocks=[], leading=true) -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- for block in content or [] -%}"
    "{%- if block['type'] == 'text' and message['role'] == 'system' -%}"
    "{%- set ns.prompt = ns.prompt + block['text'] -%}"
    "{%- elif block['type'] == 'image' or block['text'] -%}{%- set ns.blocks = ns.blocks + [block] -%}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if ns.blocks and ns.blocks[0]['type'] == 'text'"
    " and not ns.blocks[1:] | rejectattr('type', 'equalto', 'image') | list -%}"
    "{%- set ns.blocks = ns.blocks[1:] + ns.blocks[:1] -%}{%- endif -%}"
    "{%- for block in ns.blocks -%}"
    "{%- if block['type'] == 'image' -%}{{- '" + PLACEHOLDER + "' -}}"
    "{%- else -%}{%- if ns.leading -%}{{- ns.prompt -}}{%- set ns.leading = false -%}{%- endif -%}"
    "{{- block['text'] -}}{%- endif -%}{%- endfor -%}"
    "{%- if ns.leading -%}{{- ns.prompt -}}{%- endif -%}"
)


def chat_parts(row, chat):
    """Return a chat as parts in the order of the plain format: leading images, the prompt, the rest.

    Args:
        row (`int`): the chat's place in the batch, for messages.
        chat (`list[dict]`): messages with `role` and `content`, as sentence-transformers passes them too: blocks that
            are None are left out, and a chat inside a batch of other inputs may be wrapped in blocks of type "message".

    Returns:
        `list`: a `str` for text, a 1-tuple for an image.

    Raises:
        ValueError: a block is neither text nor image.
    """
    prompt, parts = "", []
    for message in _flat_messages(chat):
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for block in blocks:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text" and message.get("role") == "system":
                prompt += block["text"] or ""
            elif kind == "text" and block["text"]:
                parts.append(block["text"])
            elif kind == "text":
                continue
            elif kind == "image":
                image = next((block[key] for key in ("image", "url", "path", "base64") if key in block), None)
                if image is not None:
                    parts.append((image,))
            else:
                raise ValueError(f"Row {row}: a content block must be of type 'text' or 'image', got {block!r:.200}.")
    texts = [part for part in parts if isinstance(part, str)]
    if texts and parts[:1] == texts:
        # {"text": ..., "image": ...}: MoCa's format has the images first, whatever the order of the keys.
        parts = [*parts[1:], *texts]
    num_leading = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
    return [*parts[:num_leading], prompt, *parts[num_leading:]]


def plain_parts(texts, images):
    """Return rows of the plain format as parts.

    Args:
        texts (`list[str]`): a row each, in which `PLACEHOLDER` stands for an image.
        images (*optional*): images of every row, `list[list]`; or one flat list, dealt to the placeholders in order;
            or one image.

    Returns:
        `list[list]`: a `str` for text, a 1-tuple for an image.

    Raises:
        ValueError: a row is empty, or placeholders and images differ in number.
    """
    per_row = _deal_images(images, [text.count(PLACEHOLDER) for text in texts])
    rows = []
    for row, (text, row_images) in enumerate(zip(texts, per_row)):
        pieces = text.split(PLACEHOLDER)
        if len(pieces) - 1 != len(row_images):
            raise ValueError(
                f"Row {row}: the text has {len(pieces) - 1} image placeholders, but there are {len(row_images)} images."
            )
        if not text:
            raise ValueError(f"Row {row} is empty: it has neither text nor images.")
        parts = [pieces[0]]
        for image, piece in zip(row_images, pieces[1:]):
            parts += [(image,), piece]
        rows.append(parts)
    return rows


def _flat_messages(chat):
    """Yield messages; a chat inside a batch of other inputs arrives wrapped in blocks of type "message"."""
    for message in chat:
        content = message["content"]
        if isinstance(content, str):
            yield message
            continue
        for block in content or []:
            if isinstance(block, dict) and block.get("type") == "message":
                inner = block["message"]
                yield from _flat_messages([inner] if isinstance(inner, dict) else inner)
            elif block is not None:
                yield {**message, "content": [block]}


def _deal_images(images, num_placeholders):
    """Return a list of images for every row, whichever way they were given."""
    if images is None:
        return [[] for _ in num_placeholders]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(row, (list, tuple)) or row is None for row in images):
        nested = [[] if row is None else list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
        if len(nested) != len(num_placeholders):
            raise ValueError(f"Got images for {len(nested)} rows, but text for {len(num_placeholders)}.")
        return nested
    if len(images) != sum(num_placeholders):
        raise ValueError(
            f"The text has {sum(num_placeholders)} image placeholders in {len(num_placeholders)} rows "
            f"({num_placeholders}), but there are {len(images)} images."
        )
    remaining = iter(images)
    return [[next(remaining) for _ in range(count)] for count in num_placeholders]


__all__ = ["CHAT_TEMPLATE", "IMAGE_PAD", "PLACEHOLDER", "VISION_END", "VISION_START", "chat_parts", "plain_parts"]
