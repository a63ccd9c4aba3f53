"""Rows of text and images to masked model inputs: the collator of continual pre-training."""

import hashlib
import io
import logging
from collections import Counter

import torch
from PIL import Image

from modeling_moca.chat_moca import PLACEHOLDER
from modeling_moca.images_moca import from_patch_rows, to_patch_rows

from .cpt_config import ON_BAD_ROW
from .masking import PATCH_NOISES, mask_patches, mask_tokens, row_generator

logger = logging.getLogger(__name__)

COLUMNS = ("text", "images")
BAD_ROW_REASONS = ("empty_text", "undecodable_image", "placeholder_mismatch", "does_not_fit")


class BadRowError(ValueError):
    """A row that cannot be used, and why: `reason` is one of `BAD_ROW_REASONS`."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class CPTCollator:
    """Turn interleaved rows into the inputs and targets of [`MoCaForPreTraining`] (paper section 3.1).

    A row is `{"text": str, "images": list}`. In the text, `<|vision_start|><|image_pad|><|vision_end|>` stands where
    each image stands; an image is encoded bytes, `{"bytes": bytes, "path": ...}` as in an undecoded image column, or a
    Pillow image. A row without images may leave the column out, or hold an empty list or None. Other control tokens in
    the text are taken as the characters they are written with.

    The masks of a row are drawn from (seed, epoch, content of the row): they do not depend on rank, worker, batch or
    padding, change with every epoch, and are the same again after a resume.

    Args:
        processor ([`MoCaProcessor`]): tokenizer and image processor; its tokenizer must have a mask token.
        mlm_ratio (`float`, defaults to 0.4): probability that an ordinary text token is hidden.
        mae_ratio (`float`, defaults to 0.5): probability that an image token's patches are hidden.
        patch_noise (`str`, defaults to `"per_patch"`): see [`trainers.masking.mask_patches`].
        shift_labels (`bool`, defaults to `True`): the model predicts token i from the state at i - 1, so a token
            without a state before it (position 0, or after padding) is never hidden.
        max_length (`int`, defaults to 2048): most tokens a row keeps, image tokens included.
        seed (`int`, defaults to 0): seed of the masks.
        on_bad_row (`str`, defaults to `"raise"`): `"raise"` a `ValueError` naming the row, or `"skip"` it and report
            the number skipped for each of `BAD_ROW_REASONS` as `skipped_rows`.
        ignored_columns (`tuple`, defaults to `("length",)`): columns that a row may have and that play no part here,
            such as the one that Trainer groups rows by.

    Raises:
        ValueError: the tokenizer has no mask token, a setting is unknown, a row has missing or unknown columns, a row
            is bad and `on_bad_row="raise"`, or every row of a batch is bad.

    Example:

    ```python
    >>> collator = CPTCollator(processor, mlm_ratio=0.4, mae_ratio=0.5)
    >>> outputs = model(**collator([{"text": "a page about tides", "images": []}]))
    ```
    """

    def __init__(
        self,
        processor,
        *,
        mlm_ratio=0.4,
        mae_ratio=0.5,
        patch_noise="per_patch",
        shift_labels=True,
        max_length=2048,
        seed=0,
        on_bad_row="raise",
        ignored_columns=("length",),
    ):
        tokenizer = processor.tokenizer
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token. MoCaProcessor.from_backbone adds one, or set "
                'tokenizer.add_special_tokens({"mask_token": "<|mask|>"}).'
            )
        if patch_noise not in PATCH_NOISES:
            raise ValueError(f"patch_noise must be one of {list(PATCH_NOISES)}, got {patch_noise!r}.")
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row must be one of {list(ON_BAD_ROW)}, got {on_bad_row!r}.")
        self.processor = processor
        self.tokenizer = tokenizer
        self.mlm_ratio = mlm_ratio
        self.mae_ratio = mae_ratio
        self.patch_noise = patch_noise
        self.shift_labels = shift_labels
        self.max_length = max_length
        self.seed = seed
        self.on_bad_row = on_bad_row
        self.ignored_columns = tuple(ignored_columns)
        self.image_token_id = processor.image_token_id
        self.patch_layout = {"patch_size": processor.patch_size, "merge_size": processor.merge_size}
        special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special_ids.update(tokenizer.all_special_ids, [self.image_token_id])
        self.special_ids = torch.tensor(sorted(special_ids))
        # In shared memory, so that loader workers that live through several epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self):
        """The epoch whose masks are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch):
        """Draw the masks of this epoch (`int`) from now on, in running loader workers too."""
        self._epoch.fill_(epoch)

    def __call__(self, rows):
        """Return one masked batch.

        Args:
            rows (`list[dict]`): rows with the columns `text` and `images`.

        Returns:
            `dict` of tensors: `input_ids`, `attention_mask`, `labels` of shape `(batch_size, sequence_length)`; if any
            row has an image also `pixel_values`, `patch_mask`, `patch_labels` and `image_grid_thw` or
            `pixel_attention_mask`, whichever the backbone takes; with `on_bad_row="skip"` also `skipped_rows` of shape
            `(len(BAD_ROW_REASONS),)`.
        """
        for index, row in enumerate(rows):
            self._check_columns(row, index)
        readable, skipped = self._keep_good(rows, self._read_row)
        inputs, good, skipped_by_processor = self._process(readable)
        batch = self._mask(inputs, [key for _, _, key in good])
        if self.on_bad_row == "skip":
            skipped += skipped_by_processor
            batch["skipped_rows"] = torch.tensor([skipped[reason] for reason in BAD_ROW_REASONS])
        return batch

    def _mask(self, inputs, row_keys):
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]  # [B, T]
        generators = [row_generator(self.seed, self.epoch, key) for key in row_keys]
        maskable = attention_mask.bool() & ~torch.isin(input_ids, self.special_ids)  # [B, T]
        if self.shift_labels:
            # With padding on the left, the first real token has no state before it either.
            maskable[:, 1:] &= attention_mask[:, :-1].bool()
        masked_input_ids, labels = mask_tokens(
            input_ids,
            mask_token_id=self.tokenizer.mask_token_id,
            maskable=maskable,
            ratio=self.mlm_ratio,
            generators=generators,
            shift_labels=self.shift_labels,
        )
        batch = {"input_ids": masked_input_ids, "attention_mask": attention_mask, "labels": labels}
        if inputs.get("pixel_values") is not None:
            pixel_values = inputs["pixel_values"]
            masked_rows, batch["patch_mask"], batch["patch_labels"] = mask_patches(
                to_patch_rows(pixel_values, **self.patch_layout),
                image_tokens=input_ids == self.image_token_id,
                num_patches_per_token=self.patch_layout["merge_size"] ** 2,
                ratio=self.mae_ratio,
                generators=generators,
                noise=self.patch_noise,
            )
            batch["pixel_values"] = from_patch_rows(masked_rows, pixel_values, **self.patch_layout)
            # What else tells the backbone about its images.
            batch |= {name: inputs[name] for name in ("image_grid_thw", "pixel_attention_mask") if name in inputs}
        return batch

    def _check_columns(self, row, index):
        allowed = [*COLUMNS, *self.ignored_columns]
        if "text" not in row or not set(row) <= set(allowed):
            raise ValueError(
                f"Row {index} of the batch has the columns {sorted(row)}; allowed are {allowed}, of which 'text' must "
                "be there. Rename columns with dataset.rename_column, drop others with dataset.select_columns."
            )

    def _read_row(self, row, index):
        """Return text, decoded images and the key that tells this row from others."""
        text, encoded = row["text"], row.get("images") or []
        start = f"Row {index} of the batch ({(text or '')[:60]!r})"
        if not text or not text.strip():
            raise BadRowError("empty_text", f"{start} has no text.")
        num_placeholders = text.count(PLACEHOLDER)
        if num_placeholders != len(encoded):
            raise BadRowError(
                "placeholder_mismatch",
                f"{start} has {num_placeholders} image placeholders {PLACEHOLDER!r}, but {len(encoded)} images.",
            )
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
        images = []
        for position, image in enumerate(encoded):
            try:
                image, content = _decode(image)
            # What Pillow raises depends on the format and on where the bytes are damaged.
            except Exception as error:
                raise BadRowError(
                    "undecodable_image", f"{start}: image {position} cannot be decoded ({error})."
                ) from error
            images.append(image)
            key.update(content)
        return text, images, key.digest()

    def _process(self, readable):
        """Return the processor's tensors, the rows they stand for, and how many rows it refused."""
        try:
            return self._run_processor(readable), readable, Counter()
        except ValueError:
            if self.on_bad_row == "raise":
                raise
        # Some row does not fit: find out which ones, one at a time. This is the slow path of a rare case.
        good, skipped = self._keep_good(readable, self._try_row)
        return self._run_processor(good), good, skipped

    def _try_row(self, row, index):
        try:
            self._run_processor([row])
        except ValueError as error:
            raise BadRowError("does_not_fit", f"Row {index} of the batch ({row[0][:60]!r}): {error}") from error
        return row

    def _run_processor(self, readable):
        images = [images for _, images, _ in readable]
        return self.processor(
            text=[text for text, _, _ in readable],
            images=images if any(images) else None,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )

    def _keep_good(self, rows, read):
        """Return what `read` makes of the good rows, and a count of the bad ones by reason."""
        good, skipped, message = [], Counter(), ""
        for index, row in enumerate(rows):
            try:
                good.append(read(row, index))
            except BadRowError as error:
                if self.on_bad_row == "raise":
                    raise
                skipped[error.reason] += 1
                message = str(error)
                logger.warning("Skipped: %s", message)
        if not good:
            raise ValueError(
                f"All {len(rows)} rows of a batch are bad, by reason: {dict(skipped)}. The last: {message}"
            )
        return good, skipped


def _decode(image):
    """Return a fully loaded Pillow image and the bytes it was made from."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str):
        with open(image, "rb") as file:
            image = file.read()
    if isinstance(image, Image.Image):
        return image, image.tobytes()
    decoded = Image.open(io.BytesIO(image))
    # Every pixel, now: a truncated file must fail here.
    decoded.load()
    return decoded, image


__all__ = ["BAD_ROW_REASONS", "BadRowError", "CPTCollator"]
