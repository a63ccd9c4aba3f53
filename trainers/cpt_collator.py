"""Rows of text and images to masked model inputs: the collator of continual pre-training."""

import logging
from collections import Counter
from functools import partial

import torch

from modeling_moca.images_moca import from_patch_rows, rows_from_bytes, to_patch_rows

from .cpt_config import ON_BAD_ROW
from .cpt_rows import BAD_ROW_REASONS, COLUMNS, BadRowError, decode_images, prepare_row
from .masking import PATCH_NOISES, choose_patches, hide_patches, mask_tokens, row_generator

logger = logging.getLogger(__name__)


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
        on_bad_row (`str`, defaults to `"skip"`): `"skip"` a row that cannot be used and report the number skipped for
            each of `BAD_ROW_REASONS` as `skipped_rows`, or `"raise"` a `ValueError` naming it.
        packing (`bool`, defaults to `False`): put all rows of a batch into one sequence, one after another without
            padding; `cu_seq_lens` tells where each begins, and the model keeps them apart.
        exact_resize (`bool`, defaults to `False`): resize with Pillow, as embedding does, where torch's filter would do
            it several times faster with values that differ by at most a few levels of 255.
        ignored_columns (`tuple`, defaults to `("length",)`): columns that a row may have and that play no part here,
            such as the one that Trainer groups rows by.

    Raises:
        ValueError: the tokenizer has no mask token, a setting is unknown, a row has missing or unknown columns, a row
            is bad and `on_bad_row="raise"`.

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
        on_bad_row="skip",
        packing=False,
        exact_resize=False,
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
        self.packing = packing
        self.exact_resize = exact_resize
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
            `pixel_attention_mask`, whichever the backbone takes; `cut_rows` of shape `(2,)`: rows that lost text to
            `max_length`, and the tokens they lost; with `on_bad_row="skip"` also `skipped_rows` of shape
            `(len(BAD_ROW_REASONS),)`. With `packing` there is one sequence, and `cu_seq_lens` of shape
            `(num_rows + 1,)` instead of `attention_mask`. If every row is bad, the batch is one padding token without
            targets: other ranks may have rows, and expect this one to take part.
        """
        for index, row in enumerate(rows):
            self._check_columns(row, index)
        prepared, rejected = [], []
        for index, row in enumerate(rows):
            try:
                prepared.append(self.prepare(row, f"Row {index} of the batch", self.epoch))
            except BadRowError as error:
                rejected.append(self.reject(error))
        batch, undecodable = self.encode(prepared)
        batch = self.finish(batch)
        cut = [row.num_cut_tokens for row in prepared if row.num_cut_tokens]
        batch["cut_rows"] = torch.tensor([len(cut), sum(cut)])
        if self.on_bad_row == "skip":
            counts = Counter(error.reason for error in rejected + [error for _, error in undecodable])
            batch["skipped_rows"] = torch.tensor([counts[reason] for reason in BAD_ROW_REASONS])
        return batch

    def prepare(self, row, place, epoch=0):
        """Check, tokenise and measure one row: see [`trainers.cpt_rows.prepare_row`].

        Args:
            row (`dict`): columns `text` and `images`.
            place (`str`): where the row stands, for messages.
            epoch (`int`, defaults to 0): epoch whose masks the row gets.
        """
        prepared = prepare_row(row, self.processor, self.max_length, place)
        prepared.epoch = epoch
        return prepared

    def reject(self, error):
        """Raise a [`BadRowError`], or with `on_bad_row="skip"` warn and return it (`error`)."""
        if self.on_bad_row == "raise":
            raise error
        logger.warning("Skipped: %s", error)
        return error

    def encode(self, prepared):
        """Return the batch of prepared rows as a loader's worker hands it over: small, and finished on the device.

        Args:
            prepared (`list[PreparedRow]`): rows of [`CPTCollator.prepare`].

        Returns:
            `tuple`: the batch, in which pixels are not hidden yet and may be bytes, for [`CPTCollator.finish`]; and
            `list` of (index, `BadRowError`) of rows whose images turned out to be damaged.
        """
        # Each image as soon as it is decoded, while its pixels are in the processor's cache.
        resize = partial(self.processor.resize, exact=self.exact_resize) if self.processor.makes_bytes else None
        good, images, rejected = [], [], []
        for index, row in enumerate(prepared):
            try:
                images.append(decode_images(row, resize))
                good.append(row)
            except BadRowError as error:
                rejected.append((index, self.reject(error)))
        batch, generators = self._mask_text(good)
        if any(images):
            image_tokens = batch.pop("image_tokens")
            batch["patch_mask"] = choose_patches(image_tokens, ratio=self.mae_ratio, generators=generators)
            batch |= self.processor.encode_resized(images) if resize else self.processor.encode_images(images)
            keys = [(row.epoch, row.key + b"/noise") for row in good]
            # Numbers, not generators: the noise is drawn where the pixels are then.
            batch["noise_seeds"] = [row_generator(self.seed, *key).initial_seed() for key in keys]
            batch["num_hidden"] = batch["patch_mask"].sum(-1).tolist()
            batch["chosen_image_tokens"] = batch["patch_mask"][image_tokens]  # [N]
        batch.pop("image_tokens", None)
        if self.packing:
            _pack(batch)
        return batch, rejected

    def finish(self, batch):
        """Normalise and hide the pixels of an encoded batch, on the device where they are.

        Args:
            batch (`dict`): from [`CPTCollator.encode`], moved to any device; changed in place.

        Returns:
            `dict`: the arguments of the model.
        """
        if "noise_seeds" not in batch:
            return batch
        pixel_values, device = batch["pixel_values"], batch["pixel_values"].device
        if pixel_values.dtype == torch.uint8:
            pixel_values = rows_from_bytes(pixel_values, batch["image_grid_thw"], self.processor.image_processor)
        masked_rows, batch["patch_labels"] = hide_patches(
            to_patch_rows(pixel_values, **self.patch_layout),
            chosen=batch.pop("chosen_image_tokens"),
            counts=batch.pop("num_hidden"),
            num_patches_per_token=self.patch_layout["merge_size"] ** 2,
            generators=[torch.Generator(device).manual_seed(seed) for seed in batch.pop("noise_seeds")],
            noise=self.patch_noise,
        )
        batch["pixel_values"] = from_patch_rows(masked_rows, pixel_values, **self.patch_layout)
        return batch

    def _mask_text(self, rows):
        """Return ids, masked and padded, with their labels; and one generator a row."""
        generators = [row_generator(self.seed, row.epoch, row.key) for row in rows] or [torch.Generator()]
        sequences = [row.input_ids for row in rows] or [[self.tokenizer.pad_token_id]]
        width = max(map(len, sequences))
        input_ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)  # [B, T]
        attention_mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(sequences):
            left = self.tokenizer.padding_side == "left"
            real = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            input_ids[row, real] = torch.tensor(sequence)
            attention_mask[row, real] = 1
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
        return {
            "input_ids": masked_input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "image_tokens": input_ids == self.image_token_id,
        }, generators

    def _check_columns(self, row, index):
        allowed = [*COLUMNS, *self.ignored_columns]
        if "text" not in row or not set(row) <= set(allowed):
            raise ValueError(
                f"Row {index} of the batch has the columns {sorted(row)}; allowed are {allowed}, of which 'text' must "
                "be there. Rename columns with dataset.rename_column, drop others with dataset.select_columns."
            )


def _pack(batch):
    """Put the rows of a padded batch into one sequence, in place."""
    real = batch.pop("attention_mask").bool()  # [B, T]
    for name in ("input_ids", "labels", "patch_mask"):
        if name in batch:
            batch[name] = batch[name][real].unsqueeze(0)  # [1, sum of lengths]
    lengths = real.sum(-1)
    batch["cu_seq_lens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()  # [B + 1]


__all__ = ["CPTCollator"]
