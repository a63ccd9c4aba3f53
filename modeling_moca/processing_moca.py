"""MoCaProcessor: text and images in, model inputs out, through one code path for every door.

This file travels to the Hub as remote code: it imports torch and transformers only, and needs Pillow only once an image
comes.
"""

import logging
import os

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_vision_available

from .chat_moca import CHAT_TEMPLATE, PLACEHOLDER, chat_parts, plain_parts
from .configuration_moca import MoCaConfig
from .image_inputs_moca import IMAGE_TOKENS, ImageInputsMixin

logger = logging.getLogger(__name__)


class MoCaProcessor(ImageInputsMixin, ProcessorMixin):
    """Turn text, images and interleaved input into `input_ids`, `attention_mask`, `pixel_values` and what goes with it.

    Args:
        image_processor (`BaseImageProcessor`): the backbone's own, the Pillow one, so that torchvision is not needed:
            `Qwen2VLImageProcessorPil` makes rows of patches, `Idefics3ImageProcessorPil` and
            `SmolVLMImageProcessorPil` make tiles.
        tokenizer (`PreTrainedTokenizerBase`): has the backbone's image tokens; for pre-training also a mask token.
        chat_template (`str`, *optional*): MoCa's plain format when omitted.
        max_length (`int`, defaults to 2048): most tokens of a row, image tokens included. Text is cut from the end of
            a longer row, an image never.
        patch_size (`int`, *optional*): side of a patch in pixels; needed with tiles, else the image processor's.
        merge_size (`int`, *optional*): side, in patches, of the square that becomes one image token; needed with tiles,
            else the image processor's.

    Raises:
        ValueError: the tokenizer has no image tokens, or sizes are missing.

    Example:

    ```python
    >>> processor = MoCaProcessor.from_backbone("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|>A harbour."], images=[[picture]])
    ```
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        max_length=2048,
        patch_size=None,
        merge_size=None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.max_length = max_length
        self.patch_size = patch_size or getattr(image_processor, "patch_size", None)
        self.merge_size = merge_size or getattr(image_processor, "merge_size", None)
        missing = {layout: self._missing(tokens) for layout, tokens in IMAGE_TOKENS.items()}
        if all(missing.values()):
            raise ValueError(
                f"{type(tokenizer).__name__} lacks the image tokens of every supported family of backbones: {missing}."
            )
        self._layout = next(layout for layout, tokens in missing.items() if not tokens)
        if image_processor is not None and not (self.patch_size and self.merge_size):
            raise ValueError(
                f"{type(image_processor).__name__} cuts tiles and does not know how the backbone divides them: give "
                f"patch_size and merge_size, got {patch_size} and {merge_size}."
            )
        self._image_ids_cache = {}

    def _missing(self, tokens):
        ids = [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]
        return [token for token, index in zip(tokens, ids) if index is None or index == self.tokenizer.unk_token_id]

    def check_argument_for_proper_class(self, argument_name, argument):
        """Accept no image processor: without Pillow there is none, and text needs none.

        Args:
            argument_name, argument: see `ProcessorMixin.check_argument_for_proper_class`.
        """
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved processor; without Pillow, one that takes text only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder.
            kwargs: see `ProcessorMixin.from_pretrained`; `max_length` and the image processor's settings (`min_pixels`,
                `max_pixels`, `size`) replace what was saved.
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
        processor_name=None,
        mask_token="<|mask|>",
        min_pixels=None,
        max_pixels=None,
        size=None,
        max_length=2048,
        **kwargs,
    ):
        """Build the processor of a stock vision-language checkpoint, and give its tokenizer a mask token.

        Args:
            backbone (`str` or `os.PathLike`): Hub id or folder of the model; its configuration gives the patch layout.
            processor_name (`str` or `os.PathLike`, *optional*): Hub id or folder of tokenizer and image processor, for
                a model that brings none; `backbone` when omitted.
            mask_token (`str`, defaults to `"<|mask|>"`): added if the tokenizer has no mask token.
            min_pixels, max_pixels (`int`, *optional*): area that images are resized into; 256 and 1024 image tokens
                when omitted (paper). Only for backbones that take rows of patches (Qwen-VL).
            size (`dict`, *optional*): `{"longest_edge": pixels}` that images are resized to before they are cut into
                tiles; the checkpoint's own when omitted. Only for backbones that take tiles (Idefics3, SmolVLM).
            max_length (`int`, defaults to 2048): most tokens of a row.
            kwargs: `token`, `cache_dir`, ... of `from_pretrained`, and `revision` of the model.

        Raises:
            ValueError: there is no tokenizer or image processor, the tokenizer lacks the image tokens, patches are not
                of the model's size, or a limit belongs to the other layout.
        """
        config = MoCaConfig.of_backbone(backbone, **kwargs)
        source = backbone if processor_name is None else processor_name
        if processor_name is not None:
            kwargs.pop("revision", None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
            image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(source)} brings no tokenizer or image processor of its own ({error}). Give "
                "processor_name, Qwen/Qwen2.5-VL-3B-Instruct for the published MoCa-Qwen25VL-3B."
            ) from error
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": mask_token})
        tokenizer.padding_side = "right"
        if config.pixel_layout == "rows":
            if size is not None:
                raise ValueError(
                    f"size belongs to backbones that take tiles; give min_pixels and max_pixels, got {size}."
                )
            token_area = (config.patch_size * config.merge_size) ** 2
            image_processor.size = {
                "shortest_edge": 256 * token_area if min_pixels is None else min_pixels,
                "longest_edge": 1024 * token_area if max_pixels is None else max_pixels,
            }
        else:
            if min_pixels is not None or max_pixels is not None:
                raise ValueError(
                    "min_pixels and max_pixels belong to backbones that take rows of patches; give "
                    f"size={{'longest_edge': ...}}, got {min_pixels} and {max_pixels}."
                )
            image_processor.size = size or image_processor.size
        sizes = {"patch_size": config.patch_size, "merge_size": config.merge_size}
        other = {name: getattr(image_processor, name, size) for name, size in sizes.items()}
        if other != sizes:
            raise ValueError(f"The image processor of {os.fspath(source)} has patches of {other}, the model {sizes}.")
        return cls(image_processor, tokenizer, max_length=max_length, **sizes)

    @property
    def image_token_id(self):
        """Id of the token that stands for one merged group of image patches."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[self._layout][0])

    @property
    def mask_token_id(self):
        """Id of the mask token, or None if the tokenizer has none."""
        return self.tokenizer.mask_token_id

    @property
    def model_input_names(self):
        """Names of what the processor makes, and the model takes."""
        last = {"rows": "image_grid_thw", "tiles": "pixel_attention_mask"}[self._layout]
        return ["input_ids", "attention_mask", "pixel_values", last]

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
            `pixel_values` of shape `(num_patches, patch_dim)` and `image_grid_thw` of shape `(num_images, 3)`, or for
            backbones that take tiles `pixel_values` of shape `(batch_size, num_tiles, channels, side, side)` and
            `pixel_attention_mask` of shape `(batch_size, num_tiles, side, side)`, zero where a row has fewer tiles.

        Raises:
            ValueError: an empty row; placeholders and images of a row differ in number; an image does not open; the
                images of a row alone exceed `max_length`. The message names the row.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is None:
            images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
            texts = [PLACEHOLDER * (len(row) if isinstance(row, (list, tuple)) else 1) for row in images]
        rows = plain_parts(texts, images)
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
        rows = [chat_parts(row, chat) for row, chat in enumerate(conversation)]
        return self._encode(rows, **(processor_kwargs or {}))

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
        image_inputs, image_ids = self._encode_images(rows, images_kwargs or {})
        sequences = self._encode_text(rows, image_ids, limit)
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

    def _encode_text(self, rows, image_ids, limit):
        """Return one list of ids a row, text cut from the end where the row exceeds `limit`."""
        image_ids = iter(image_ids)
        sequences, cut_rows, cut_tokens = [], 0, 0
        for row, parts in enumerate(rows):
            try:
                ids, num_cut = self._row_ids(parts, image_ids, limit)
            except ValueError as error:
                raise ValueError(f"Row {row}: {error}") from error
            cut_rows, cut_tokens = cut_rows + (num_cut > 0), cut_tokens + num_cut
            sequences.append(ids or [self.tokenizer.pad_token_id])
        if cut_rows:
            logger.warning(
                "Cut %d text tokens from the ends of %d of %d rows to keep max_length=%d.",
                cut_tokens,
                cut_rows,
                len(rows),
                limit,
            )
        return sequences

    def _row_ids(self, parts, image_ids, limit):
        """Return the ids of one row and how many text tokens were cut from its end; `image_ids` is an iterator."""
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
                segments.append((next(image_ids), False))
        fixed = sum(len(ids) for ids, is_text in segments if not is_text)
        if fixed > limit:
            raise ValueError(
                f"its images take {fixed} tokens, more than max_length={limit}. Images are never cut: "
                "lower max_pixels (or size, where images are cut into tiles), or raise max_length."
            )
        num_cut = excess = max(sum(len(ids) for ids, _ in segments) - limit, 0)
        for position in reversed(range(len(segments))):
            ids, is_text = segments[position]
            if is_text and excess > 0:
                segments[position] = (ids[: max(len(ids) - excess, 0)], True)
                excess -= min(len(ids), excess)
        return [token for ids, _ in segments for token in ids], num_cut

    def row_ids(self, text, image_sizes=(), max_length=None):
        """Return the ids of one row from the sizes of its images alone: nothing is decoded.

        Args:
            text (`str`): as when calling the processor.
            image_sizes (`Sequence[tuple[int, int]]`, defaults to none): height and width, in pixels, of each image as
                it is seen, that is after turning it as its EXIF data says.
            max_length (`int`, *optional*): the processor's own when omitted.

        Returns:
            `tuple`: ids (`list[int]`), and how many text tokens were cut from the end.

        Raises:
            ValueError: placeholders and sizes differ in number, an image is refused by the image processor, or images
                alone exceed `max_length`.
        """
        pieces = text.split(PLACEHOLDER)
        if len(pieces) - 1 != len(image_sizes):
            raise ValueError(
                f"The text has {len(pieces) - 1} image placeholders, but there are {len(image_sizes)} images."
            )
        parts = [pieces[0]]
        for size, piece in zip(image_sizes, pieces[1:]):
            parts += [(size,), piece]
        image_ids = iter([self._sized_image_ids(*size) for size in image_sizes])
        return self._row_ids([part for part in parts if part != ""], image_ids, max_length or self.max_length)


__all__ = ["MoCaProcessor"]
