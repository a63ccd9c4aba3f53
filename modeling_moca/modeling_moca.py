"""MoCa models: a stock vision-language backbone with bidirectional attention, pooling and reconstruction heads.

Source: MoCa, arXiv 2506.23115. This file travels to the Hub as remote code: it imports torch and transformers only.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .attention_moca import PackedRows
from .base_moca import MoCaPreTrainedModel
from .heads_moca import MoCaMAEHead, MoCaMLMHead, VocabularyProjection, masked_patch_loss
from .images_moca import real_tiles


@dataclass
class MoCaPreTrainingOutput(ModelOutput):
    """Output of [`MoCaForPreTraining`].

    Args:
        loss (`torch.Tensor`, *optional*): `mlm_loss + config.mae_loss_weight * mae_loss`.
        mlm_loss (`torch.Tensor`, *optional*): cross-entropy per chosen token.
        mae_loss (`torch.Tensor`, *optional*): mean squared error per chosen patch.
        mlm_logits (`torch.Tensor` of shape `(num_chosen_tokens, vocab_size)`, *optional*): at chosen positions only; in
            evaluation mode or with `return_logits=True`.
        patch_predictions (`torch.Tensor` of shape `(num_chosen, num_patches_per_token, patch_dim)`, *optional*).
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`, `(num_rows, hidden_size)` of packed rows).
    """

    loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    mae_loss: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    patch_predictions: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None


def pool(hidden_states, attention_mask, pooling, rows=None):
    """Pool token states into one vector a row, the mean in float32 or better (paper section 3.2).

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): final-normed states.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 at padding.
        pooling (`str`): `"mean"` over non-padding tokens, image tokens included, or `"last"` non-padding token.
        rows ([`PackedRows`], *optional*): the rows of a packed sequence, each of which gets its own vector.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, `(num_rows, hidden_size)` of packed rows, in the dtype of
        `hidden_states`.
    """
    if rows is not None:
        if pooling == "last":
            return hidden_states[0, rows.ends]  # [R, d]
        precise = hidden_states[0].to(torch.promote_types(hidden_states.dtype, torch.float32))  # [T, d]
        return torch.stack([row.mean(0) for row in precise.split(rows.lengths)]).to(hidden_states.dtype)
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.long)
    if pooling == "mean":
        # In bf16 a long row's token count itself would be rounded.
        precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))  # [B, T, d]
        weights = attention_mask.unsqueeze(-1).to(precise.dtype)  # [B, T, 1]
        pooled = (precise * weights).sum(1) / weights.sum(1).clamp(min=1.0)  # [B, d]
        return pooled.to(hidden_states.dtype)
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)  # [T]
    last = (attention_mask.long() * (positions + 1)).argmax(-1)  # [B], right for either padding side
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


class MoCaModel(MoCaPreTrainedModel):
    """Embed text, images and interleaved input with one bidirectional vision-language model.

    Args:
        config ([`MoCaConfig`]): architecture.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("org/moca-3b", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("org/moca-3b", trust_remote_code=True)
    >>> embedding = model(**processor(text=["a page about tides"], return_tensors="pt")).pooler_output
    ```
    """

    # The heads of a pre-training checkpoint are left out on purpose, not by accident.
    _optional_tensors = ("mlm_head.", "mae_head.")
    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\.", r"^mae_head\."]

    def __init__(self, config):
        super().__init__(config)
        attn_implementation = config.get_text_config()._attn_implementation
        if attn_implementation == "flex_attention":
            config.backbone_config._attn_implementation = "sdpa"
        self.backbone = AutoModel.from_config(config.backbone_config)
        if attn_implementation == "flex_attention":
            self.language_model.config._attn_implementation = "flex_attention"
        # Whole layers of both sides; the stock classes of tiles name the attention inside them only.
        tower = self.backbone.get_encoder(modality="image")
        blocks = tower.encoder.layers if hasattr(tower, "encoder") else tower.blocks
        self._no_split_modules = [type(layers[0]).__name__ for layers in (self.language_model.layers, blocks)]
        # Set by trainers whose ranks share weights or gradients: every forward pass then uses every weight.
        self.always_use_vision = False
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embeddings (`nn.Embedding` of `vocab_size` rows)."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Put other token embeddings, `value` (`nn.Embedding`), in their place."""
        self.backbone.set_input_embeddings(value)

    @property
    def language_model(self):
        """The text transformer inside the backbone."""
        return self.backbone.get_decoder()

    def get_position_ids(self, input_ids, attention_mask=None, image_grid_thw=None, cu_seq_lens=None):
        """Return rotary positions, as the backbone counts them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 at padding.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*): patches in time, height, width.
            cu_seq_lens (`torch.IntTensor` of shape `(num_rows + 1,)`, *optional*): bounds of packed rows, in each of
                which positions start again.

        Returns:
            `torch.LongTensor` of shape `(3, batch_size, sequence_length)`: temporal, height and width for image tokens,
            the same number thrice for text (Qwen-VL); or `(batch_size, sequence_length)`, one after the other
            (Idefics3, SmolVLM).

        Raises:
            ValueError: `cu_seq_lens` does not fit the input, see [`MoCaModel.forward`].
        """
        rows = PackedRows.of(cu_seq_lens, input_ids, attention_mask)
        if rows is not None:
            batch, mask = rows.unpack(input_ids)  # [R, L], [R, L]
            positions = self.get_position_ids(batch, mask.long(), image_grid_thw)  # [3, R, L] or [R, L]
            return positions[..., mask].unsqueeze(-2)  # [3, 1, T] or [1, T]
        if self.config.pixel_layout == "tiles":
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
            return positions.expand(input_ids.shape)
        # Left to itself the backbone falls back to 1-D positions unless it is told where the image tokens are.
        image_tokens = (input_ids == self.config.image_token_id).int()  # [B, T]
        position_ids, _ = self.backbone.get_rope_index(
            input_ids, mm_token_type_ids=image_tokens, image_grid_thw=image_grid_thw, attention_mask=attention_mask
        )
        return position_ids

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        position_ids=None,
        pixel_attention_mask=None,
        cu_seq_lens=None,
        **kwargs,
    ):
        """Return token states and one pooled, not yet normalised vector a row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): one image token for every
                `config.num_patches_per_token` patches of the images, in their order.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for real tokens, 0
                for padding on either side; all 1 when omitted.
            pixel_values (`torch.Tensor`, *optional*): patches of all images of the batch, one after another,
                `(num_patches, patch_dim)`; for backbones that take tiles `(batch_size, num_tiles, channels, side,
                side)`, all zero where a row has fewer tiles.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*): patches in time, height, width;
                needed with `pixel_values` of patches.
            position_ids (`torch.LongTensor`, *optional*): see [`MoCaModel.get_position_ids`], which computes them from
                the input when omitted.
            pixel_attention_mask (`torch.Tensor` of shape `(batch_size, num_tiles, side, side)`, *optional*): 0 where a
                tile is padded; for backbones that take tiles.
            cu_seq_lens (`torch.IntTensor` of shape `(num_rows + 1,)`, *optional*): 0, then the end of every row, where
                `input_ids` of shape `(1, sequence_length)` hold several rows one after another, without padding and
                `attention_mask`. Rows never see each other, and positions start again in each. Images come in the
                order of the rows; tiles may be in one row or in as many as there are.
            kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch_size, sequence_length, hidden_size)`,
            `pooler_output` of shape `(batch_size, hidden_size)`, or `(num_rows, hidden_size)` of packed rows.

        Raises:
            ValueError: image tokens and images do not belong together; `cu_seq_lens` does not rise from 0 to the
                sequence length, cuts an image, or comes with an attention mask or a batch size other than 1.
        """
        rows = PackedRows.of(cu_seq_lens, input_ids, attention_mask)
        has_images = self._check_images(input_ids, pixel_values, image_grid_thw)
        if has_images and rows is not None:
            self._check_rows_of_images(rows, input_ids, pixel_values, image_grid_thw)
        if position_ids is None:
            position_ids = self.get_position_ids(input_ids, attention_mask, image_grid_thw, cu_seq_lens)
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if self.config.pixel_layout == "tiles":
            # Padding alone is left out: a stock model takes one blank tile for an image where no row has any.
            images = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask} if has_images else {}
        # config.bidirectional is the one truth; the layers read the copy in the text configuration.
        self.language_model.config.is_causal = not self.config.bidirectional
        kwargs = {name: value for name, value in kwargs.items() if name.startswith("output_")}
        with (
            self._vision_in_use() if self.always_use_vision and not has_images else nullcontext(),
            self._within_rows(rows) if rows is not None else nullcontext(),
        ):
            outputs = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **images,
                **kwargs,
            )
        hidden_states = outputs.last_hidden_state  # [B, T, d]
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pool(hidden_states, attention_mask, self.config.pooling, rows),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def vision_anchor(self):
        """Return 0, made from one blank image by every weight of the vision side.

        Added to the embeddings of a batch without images it changes nothing, adds no token, and lets every rank of a
        sharded or data-parallel run use the same weights in every forward pass; otherwise such runs hang or abort.

        Returns:
            `torch.Tensor`: scalar.
        """
        config, device = self.config, self.device
        if config.pixel_layout == "rows":
            pixels = torch.zeros(config.num_patches_per_token, config.patch_dim, device=device)  # [m*m, P]
            grid = torch.tensor([[1, config.merge_size, config.merge_size]], device=device)  # [1, 3]
            features = self.backbone.get_image_features(pixels, grid)
        else:
            vision = config.backbone_config.vision_config
            shape = (1, 1, vision.num_channels, vision.image_size, vision.image_size)
            # Not zeros: those mean padding.
            features = self.backbone.get_image_features(torch.ones(shape, device=device))
        # Qwen3-VL feeds features of several depths to the language model.
        depths = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
        return sum(image.sum() for images in depths for image in images) * 0

    @contextmanager
    def _vision_in_use(self):
        """Add the vision anchor to the embeddings, where image features go.

        Inside the backbone, after its embedding and before its layers: ranks that share weights fetch them, and hand in
        their gradients, in the order of use, so that it must be the same with images and without.
        """
        embedding = self.get_input_embeddings()
        handle = embedding.register_forward_hook(
            lambda module, args, embedded: embedded + self.vision_anchor().to(embedded.dtype)
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _within_rows(self, rows):
        """Hand the rows of a packed sequence to the language model.

        Past the backbone's own forward, which would give the same arguments to the vision tower.
        """

        def add(module, args, kwargs):
            embeddings = kwargs["inputs_embeds"]  # [1, T, d]
            mask, packing = rows.attention_inputs(module.config, embeddings)
            if mask is None:
                # No mask at all would let some models look for rows in the positions and build one after all.
                mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)  # [1, T]
            return args, {**kwargs, "attention_mask": mask, **packing}

        handle = self.language_model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _check_rows_of_images(self, rows, input_ids, pixel_values, image_grid_thw):
        """Raise if an image goes over the bounds of a packed row."""
        if self.config.pixel_layout == "tiles":
            size = (pixel_values.shape[-1] // self.config.patch_size) ** 2 // self.config.num_patches_per_token
            sizes = torch.full((int(real_tiles(pixel_values).sum()),), size)  # [tiles]
        else:
            sizes = image_grid_thw.prod(-1).cpu() // self.config.num_patches_per_token  # [images]
        ends = {0, *sizes.cumsum(0).tolist()}
        before = (input_ids[0] == self.config.image_token_id).cumsum(0)  # [T]
        for row, num_tokens in enumerate(before[rows.ends].tolist()):
            if num_tokens not in ends:
                raise ValueError(
                    f"cu_seq_lens cut an image: up to the end of row {row} input_ids hold {num_tokens} image tokens, "
                    f"and the images have {sizes.tolist()}."
                )

    def _check_images(self, input_ids, pixel_values, image_grid_thw):
        """Tell whether the batch has images; raise if image tokens and pixels do not belong together."""
        num_image_tokens = int((input_ids == self.config.image_token_id).sum())
        if pixel_values is None:
            if num_image_tokens:
                raise ValueError(f"input_ids hold {num_image_tokens} image tokens, but pixel_values is None.")
            return False
        expected = num_image_tokens * self.config.num_patches_per_token
        if self.config.pixel_layout == "tiles":
            if pixel_values.ndim != 5:
                raise ValueError(
                    "pixel_values must have the shape (batch_size, num_tiles, channels, side, side), got "
                    f"{tuple(pixel_values.shape)}."
                )
            num_tiles = int(real_tiles(pixel_values).sum())
            num_patches = num_tiles * (pixel_values.shape[-1] // self.config.patch_size) ** 2
            if num_patches != expected:
                raise ValueError(
                    f"input_ids hold {num_image_tokens} image tokens, which own {expected} patches; got {num_patches} "
                    f"in {num_tiles} tiles of {pixel_values.shape[-1]} x {pixel_values.shape[-1]} pixels."
                )
            return num_tiles > 0
        if image_grid_thw is None:
            raise ValueError("pixel_values need image_grid_thw of shape (num_images, 3), got None.")
        num_grid_patches = int(image_grid_thw.prod(-1).sum())
        num_patches = pixel_values.shape[0]
        if num_grid_patches != num_patches or num_patches != expected:
            raise ValueError(
                f"input_ids hold {num_image_tokens} image tokens, which own {expected} rows of pixel_values; got "
                f"{num_patches} rows, and image_grid_thw counts {num_grid_patches}."
            )
        return num_patches > 0


class MoCaForPreTraining(MoCaPreTrainedModel):
    """Reconstruct masked tokens and masked patches in one forward pass (paper section 3.1).

    Args:
        config ([`MoCaConfig`]): architecture, label shift and loss weight.
    """

    # The loss divides by the counts it is given, so Trainer must not scale it again.
    accepts_loss_kwargs = True

    def __init__(self, config):
        super().__init__(config)
        self.moca = MoCaModel(config)
        self._no_split_modules = self.moca._no_split_modules
        self.mlm_head = MoCaMLMHead(config.hidden_size, config.vocab_size)
        self.mae_head = MoCaMAEHead(config, type(self.moca.language_model.layers[0]))
        embeddings = self.get_input_embeddings()
        embeddings_name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"mlm_head.lm_head.weight": f"{embeddings_name}.weight"}
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embeddings (`nn.Embedding` of `vocab_size` rows)."""
        return self.moca.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Put other token embeddings, `value` (`nn.Embedding`), in their place."""
        self.moca.set_input_embeddings(value)

    def get_output_embeddings(self):
        """Return the vocabulary projection (`nn.Linear` to `vocab_size`)."""
        return self.mlm_head.lm_head

    def set_output_embeddings(self, value):
        """Put another vocabulary projection, `value` (`nn.Linear`), in its place."""
        self.mlm_head.lm_head = VocabularyProjection.of(value)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        labels=None,
        patch_mask=None,
        patch_labels=None,
        num_items_in_batch=None,
        pixel_attention_mask=None,
        cu_seq_lens=None,
        return_logits=None,
        **kwargs,
    ):
        """Return both reconstruction losses of one masked batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): chosen tokens already replaced by
                the mask token.
            attention_mask, pixel_values, image_grid_thw, pixel_attention_mask, cu_seq_lens: as in
                [`MoCaModel.forward`]; chosen patches already replaced by noise.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): original ids at chosen
                tokens, -100 elsewhere, at the tokens' own positions (`config.shift_labels` moves the states).
            patch_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): chosen image tokens.
            patch_labels (`torch.Tensor` of shape `(num_chosen, num_patches_per_token, patch_dim)`, *optional*):
                original pixel rows of the chosen image tokens, in the order of `patch_mask`.
            num_items_in_batch (`torch.Tensor` of shape `(2,)`, *optional*): chosen tokens and chosen patches of the
                whole optimisation step, over accumulation and ranks; this batch's own when omitted.
            return_logits (`bool`, *optional*): return `mlm_logits`; by default in evaluation mode only, since training
                needs less memory without.
            kwargs: taken and left aside, since generic code passes more than this model needs.

        Returns:
            [`MoCaPreTrainingOutput`]

        Raises:
            ValueError: only one of `patch_mask` and `patch_labels` is given, or their sizes do not agree; the first
                token of a row is chosen though labels are shifted; see also [`MoCaModel.forward`].
        """
        if (patch_mask is None) != (patch_labels is None):
            missing = "patch_mask" if patch_mask is None else "patch_labels"
            raise ValueError(f"patch_mask and patch_labels belong together, but {missing} is None.")
        rows = PackedRows.of(cu_seq_lens, input_ids, attention_mask)
        position_ids = self.moca.get_position_ids(input_ids, attention_mask, image_grid_thw, cu_seq_lens)
        outputs = self.moca(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            position_ids,
            pixel_attention_mask,
            cu_seq_lens=cu_seq_lens,
        )
        hidden_states = outputs.last_hidden_state  # [B, T, d]
        num_tokens, num_patches = (None, None) if num_items_in_batch is None else num_items_in_batch

        mlm_loss = mae_loss = mlm_logits = patch_predictions = None
        if labels is not None:
            return_logits = not self.training if return_logits is None else return_logits
            mlm_loss, mlm_logits = self.mlm_head(
                hidden_states, labels, self.config.shift_labels, num_tokens, rows, return_logits
            )
        if patch_mask is None and self.moca.always_use_vision:
            patch_mask = torch.zeros_like(input_ids, dtype=torch.bool)
            patch_labels = hidden_states.new_zeros(0, self.config.num_patches_per_token, self.config.patch_dim)
        if patch_mask is not None:
            position_embeddings = self.moca.language_model.rotary_emb(hidden_states, position_ids)
            patch_predictions = self.mae_head(hidden_states, attention_mask, position_embeddings, patch_mask, rows)
            mae_loss = masked_patch_loss(patch_predictions, patch_labels, num_patches)
        loss = mlm_loss
        if mae_loss is not None:
            weighted = self.config.mae_loss_weight * mae_loss
            loss = weighted if loss is None else loss + weighted
        return MoCaPreTrainingOutput(
            loss=loss,
            mlm_loss=mlm_loss,
            mae_loss=mae_loss,
            mlm_logits=mlm_logits,
            patch_predictions=patch_predictions,
            last_hidden_state=hidden_states,
            pooler_output=outputs.pooler_output,
        )

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.mae_head.proj:
            # N(0, 0.02) and bias 0 whatever the backbone's own range is (paper appendix).
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


__all__ = ["MoCaForPreTraining", "MoCaModel", "MoCaPreTrainedModel", "MoCaPreTrainingOutput", "pool"]
