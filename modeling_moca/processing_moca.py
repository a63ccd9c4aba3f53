"""MoCaProcessor: text and images in, model inputs out, through one code path for every door.

This file travels to the Hub as remote code: it imports torch and transformers, and Pillow only once an image comes.
"""

import io
import logging
import os

import torch
from transformers import AutoTokenizer, BatchFeature, image_utils
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_vision_available

logger = logging.getLogger(__name__)

# Pillow is reached as image_utils.PIL: the remote-code loader refuses a file that imports a package which is not
# installed, even inside a function, and text alone needs no Pillow.

# Pillow is reached as image_utils.PIL: the remote-code loader refuses a file that imports a package which is not
# installed, even inside a function, and text alone needs no Pillow.

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
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


def to_rgb(image):
    """Return a Pillow image as RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8.

    Args:
        image (`PIL.Image.Image`): any mode.
    """
    Image, ImageOps = image_utils.PIL.Image, image_utils.PIL.ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        # A plain convert("RGB") clips 16-bit values at 255 instead of scaling them.
        return image.point(lambda value: value / 257, "L" if image.mode != "I" else None).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class MoCaProcessor(ProcessorMixin):
    """Turn text, images and interleaved input into `input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`.

    Args:
        image_processor (`Qwen2VLImageProcessorPil`): makes patches; the Pillow one, so that torchvision is not needed.
        tokenizer (`PreTrainedTokenizerBase`): has the vision tokens; for pre-training also a mask token.
        chat_template (`str`, *optional*): MoCa's plain format when omitted.
        max_length (`int`, defaults to 2048): most tokens of a row, image tokens included. Text is cut from the end of
            a longer row, an image never.

    Example:

    ```python
    >>> processor = MoCaProcessor.from_backbone("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|>A harbour."], images=[[picture]])
    ```
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, max_length=2048, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.max_length = max_length

    def check_argument_for_proper_class(self, argument_name, argument):
        # Without Pillow there is no image processor, and text needs none.
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved processor; without Pillow, one that takes text only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder.
            kwargs: see `ProcessorMixin.from_pretrained`; `max_length`, `min_pixels` and `max_pixels` replace what was
                saved.
        """
        if is_vision_available():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        logger.warning("Pillow is not installed: the processor takes text only.")
        passed_on = ("revision", "token", "cache_dir", "trust_remote_code")
        hub_options = {key: value for key, value in kwargs.items() if key in passed_on}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub_options)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub_options)
        max_length = kwargs.get("max_length", saved.get("max_length", 2048))
        return cls(None, tokenizer, chat_template=saved.get("chat_template"), max_length=max_length)

    @classmethod
    def from_backbone(
        cls,
        backbone,
        *,
        mask_token="<|mask|>",
        min_pixels=256 * 28 * 28,
        max_pixels=1024 * 28 * 28,
        max_length=2048,
        **kwargs,
    ):
        """Build the processor of a stock vision-language checkpoint, and give its tokenizer a mask token.

        Args:
            backbone (`str` or `os.PathLike`): Hub id or folder with tokenizer and image processor files.
            mask_token (`str`, defaults to `"<|mask|>"`): added if the tokenizer has no mask token.
            min_pixels, max_pixels (`int`): area that images are resized into; 28 x 28 pixels are one image token, so
                the defaults are the paper's 256 to 1024 tokens an image.
            max_length (`int`, defaults to 2048): most tokens of a row.
            kwargs: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

        Raises:
            ValueError: the tokenizer has no vision tokens.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(backbone, **kwargs)
        missing = [token for token in (VISION_START, IMAGE_PAD, VISION_END) if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"The tokenizer of {os.fspath(backbone)} lacks {missing}; MoCa needs a Qwen-VL tokenizer.")
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": mask_token})
        tokenizer.padding_side = "right"
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            backbone, min_pixels=min_pixels, max_pixels=max_pixels, **kwargs
        )
        return cls(image_processor, tokenizer, max_length=max_length)

    @property
    def image_token_id(self):
        """Id of the token that stands for one merged group of image patches."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    @property
    def vision_start_token_id(self):
        """Id of the token before an image."""
        return self.tokenizer.convert_tokens_to_ids(VISION_START)

    @property
    def vision_end_token_id(self):
        """Id of the token after an image."""
        return self.tokenizer.convert_tokens_to_ids(VISION_END)

    @property
    def mask_token_id(self):
        """Id of the mask token, or None if the tokenizer has none."""
        return self.tokenizer.mask_token_id

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"]

    def __call__(self, images=None, text=None, *, max_length=None, padding=True, return_tensors="pt", **kwargs):
        """Encode rows in the plain format.

        Args:
            images (*optional*): images of every row, `list[list]`; or one flat list, dealt to the placeholders in
                order; or one image. A Pillow image, `numpy` array (uint8), encoded bytes, or a path.
            text (`str` or `list[str]`, *optional*): every image stands as
                `<|vision_start|><|image_pad|><|vision_end|>`. Any other control token in the text is taken as the
                characters it is written with. Without text, every image is a row.
            max_length (`int`, *optional*): the processor's own `max_length` when omitted.
            padding (`bool` or `str`, defaults to `True`): pad rows to the longest; `"max_length"` pads to `max_length`.
            return_tensors (`str`, defaults to `"pt"`): PyTorch only.
            kwargs: `text_kwargs`, `images_kwargs`, `common_kwargs` of the stock processors; `max_length` and `padding`
                in them are heeded.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`; with images also
            `pixel_values` of shape `(num_patches, patch_dim)` and `image_grid_thw` of shape `(num_images, 3)`.

        Raises:
            ValueError: an empty row; placeholders and images of a row differ in number; an image does not open; the
                images of a row alone exceed `max_length`. The message names the row.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is None:
            images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
            texts = [PLACEHOLDER * (len(row) if isinstance(row, (list, tuple)) else 1) for row in images]
        per_row = self._deal_images(images, [sample.count(PLACEHOLDER) for sample in texts])
        rows = []
        for row, (sample, row_images) in enumerate(zip(texts, per_row)):
            pieces = sample.split(PLACEHOLDER)
            if len(pieces) - 1 != len(row_images):
                raise ValueError(
                    f"Row {row}: the text has {len(pieces) - 1} image placeholders, but there are {len(row_images)} "
                    "images."
                )
            if not sample:
                raise ValueError(f"Row {row} is empty: it has neither text nor images.")
            parts = [pieces[0]]
            for image, piece in zip(row_images, pieces[1:]):
                parts += [(image,), piece]
            rows.append(parts)
        return self._encode(rows, max_length=max_length, padding=padding, return_tensors=return_tensors, **kwargs)

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, processor_kwargs=None, **kwargs):
        """Render chats as plain text, or encode them.

        Encoding does not go through the rendered text: images are blocks, so that text which looks like a placeholder
        or any other control token stays text.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): one chat or many, with `role` and `content`; content is
                a string or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. System
                messages are the prompt: it follows the leading images.
            chat_template (`str`, *optional*): another template, for rendering only.
            tokenize (`bool`, defaults to `False`): encode instead of rendering.
            processor_kwargs (`dict`, *optional*): as `kwargs` of calling the processor.
            kwargs: passed to the stock method when rendering; ignored when encoding.

        Returns:
            `str` or `list[str]`, or a `BatchFeature` as from calling the processor. An empty chat becomes one padding
            token that is attended to, so that its embedding is finite.

        Raises:
            ValueError: a block of another type, or what calling the processor raises.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template=chat_template, tokenize=False, **kwargs)
        if conversation and isinstance(conversation[0], dict):
            conversation = [conversation]
        rows = [self._chat_parts(row, chat) for row, chat in enumerate(conversation)]
        return self._encode(rows, **(processor_kwargs or {}))

    def _chat_parts(self, row, chat):
        """Return a chat as text parts and image parts: leading images, the prompt, the rest."""
        prompt, parts = "", []
        for message in self._flat_messages(chat):
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
                    raise ValueError(
                        f"Row {row}: a content block must be of type 'text' or 'image', got {block!r:.200}."
                    )
        texts = [part for part in parts if isinstance(part, str)]
        if texts and parts[:1] == texts:
            # {"text": ..., "image": ...}: MoCa's format has the images first, whatever the order of the keys.
            parts = [*parts[1:], *texts]
        num_leading = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
        return [*parts[:num_leading], prompt, *parts[num_leading:]]

    def _flat_messages(self, chat):
        """Yield messages; a chat inside a batch of other inputs arrives wrapped in blocks of type "message"."""
        for message in chat:
            content = message["content"]
            if isinstance(content, str):
                yield message
                continue
            for block in content or []:
                if isinstance(block, dict) and block.get("type") == "message":
                    inner = block["message"]
                    yield from self._flat_messages([inner] if isinstance(inner, dict) else inner)
                elif block is not None:
                    yield {**message, "content": [block]}

    def _encode(
        self,
        rows,
        *,
        max_length=None,
        padding=True,
        return_tensors="pt",
        text_kwargs=None,
        images_kwargs=None,
        common_kwargs=None,
        **kwargs,
    ):
        """Encode rows of parts: a string is text, a 1-tuple holds an image."""
        options = {**(common_kwargs or {}), **(text_kwargs or {})}
        if (return_tensors or "pt") != "pt" or options.get("return_tensors", "pt") not in ("pt", None):
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}.")
        limit = max_length or options.get("max_length") or min(self.max_length, self.tokenizer.model_max_length)
        padding = options.get("padding", padding)
        rows = [[part for part in parts if part != ""] for parts in rows]
        image_inputs, num_tokens = self._encode_images(rows, images_kwargs or {})
        sequences = self._encode_text(rows, num_tokens, limit)
        width = limit if padding == "max_length" else max(map(len, sequences), default=0)
        if not padding and len({len(sequence) for sequence in sequences}) > 1:
            raise ValueError("Rows differ in length: padding must be True or 'max_length', got False.")
        pad_token_id = self.tokenizer.pad_token_id
        left = self.tokenizer.padding_side == "left"
        input_ids = torch.full((len(sequences), width), pad_token_id)  # [B, T]
        attention_mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(sequences):
            real = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            input_ids[row, real] = torch.tensor(sequence)
            attention_mask[row, real] = 1
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **image_inputs})

    def _encode_text(self, rows, num_image_tokens, limit):
        """Return one list of ids a row, text cut from the end where the row exceeds `limit`."""
        counts = iter(num_image_tokens)
        sequences, cut_rows, cut_tokens = [], 0, 0
        for row, parts in enumerate(rows):
            segments = []  # (ids, is text)
            text = ""
            for part in [*parts, None]:
                if isinstance(part, str):
                    text += part
                    continue
                if text:
                    # split_special_tokens: what a user writes is never a control token.
                    ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                    segments.append((ids, True))
                    text = ""
                if part is not None:
                    ids = [self.vision_start_token_id, *[self.image_token_id] * next(counts), self.vision_end_token_id]
                    segments.append((ids, False))
            fixed = sum(len(ids) for ids, is_text in segments if not is_text)
            if fixed > limit:
                raise ValueError(
                    f"Row {row}: its images take {fixed} tokens, more than max_length={limit}. Images are never cut: "
                    "lower max_pixels, or raise max_length."
                )
            excess = sum(len(ids) for ids, _ in segments) - limit
            if excess > 0:
                cut_rows, cut_tokens = cut_rows + 1, cut_tokens + excess
                for position in reversed(range(len(segments))):
                    ids, is_text = segments[position]
                    if is_text and excess > 0:
                        segments[position] = (ids[: max(len(ids) - excess, 0)], True)
                        excess -= min(len(ids), excess)
            sequences.append([token for ids, _ in segments for token in ids] or [self.tokenizer.pad_token_id])
        if cut_rows:
            logger.warning(
                "Cut %d text tokens from the ends of %d of %d rows to keep max_length=%d.",
                cut_tokens,
                cut_rows,
                len(rows),
                limit,
            )
        return sequences

    def _encode_images(self, rows, images_kwargs):
        """Return `pixel_values` and `image_grid_thw` of all images, and the number of tokens of each."""
        opened, places = [], []
        for row, parts in enumerate(rows):
            for index, part in enumerate(part for part in parts if isinstance(part, tuple)):
                places.append(f"Row {row}, image {index}")
                if self.image_processor is None:
                    raise ValueError(f"{places[-1]}: images need Pillow (pip install pillow), which was not there.")
                opened.append(self._open_image(part[0], places[-1]))
        if not opened:
            return {}, []
        options = {key: value for key, value in images_kwargs.items() if key != "return_tensors"}
        try:
            encoded = self.image_processor(images=opened, return_tensors="pt", **options)
        except ValueError:
            for place, image in zip(places, opened):
                try:
                    self.image_processor(images=[image], return_tensors="pt", **options)
                except ValueError as error:
                    raise ValueError(f"{place} of {image.width}x{image.height} pixels is refused: {error}") from error
            raise
        grids = encoded["image_grid_thw"]  # [num_images, 3]
        num_tokens = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        return {"pixel_values": encoded["pixel_values"], "image_grid_thw": grids}, num_tokens

    def _open_image(self, image, place):
        Image = image_utils.PIL.Image
        try:
            if isinstance(image, dict) and image.get("bytes") is not None:
                image = image["bytes"]
            elif isinstance(image, dict):
                image = image["path"]
            if isinstance(image, (bytes, bytearray)):
                image = Image.open(io.BytesIO(image))
            elif isinstance(image, (str, os.PathLike)):
                image = image_utils.load_image(os.fspath(image))
            elif not isinstance(image, Image.Image):
                image = Image.fromarray(image)
            image.load()
            return to_rgb(image)
        except Exception as error:
            raise ValueError(f"{place} does not open: {error}") from error

    def _deal_images(self, images, num_placeholders):
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


__all__ = ["MoCaProcessor", "to_rgb"]
