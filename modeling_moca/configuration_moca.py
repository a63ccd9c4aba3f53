"""Configuration of MoCa models: a stock vision-language backbone plus what bidirectional pre-training adds."""

import re

import torch
import transformers
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

# What this code was tested with; the same ranges as the package declares.
REQUIRED_VERSIONS = {"torch": ">=2.6,<3", "transformers": ">=5.18,<6"}


def check_versions():
    """Refuse versions of torch and transformers that this code was not tested with.

    It runs when this file is imported, which every way of loading a model does first: another version could load
    weights or read the attention flag differently without a word.

    Raises:
        ImportError: names what is needed and what is installed.
    """
    for module in (torch, transformers):
        needed = REQUIRED_VERSIONS[module.__name__]
        least, below = (_release(bound) for bound in needed.split(","))
        if not least <= _release(module.__version__) < below:
            raise ImportError(f"This MoCa model needs {module.__name__} {needed}; {module.__version__} is installed.")


def _release(version):
    """Return the numbers of a version: (5, 23) for ">=5.23" and "5.23.dev0"."""
    return tuple(map(int, re.search(r"\d+(\.\d+)*", version)[0].split(".")))


check_versions()

POOLING_MODES = ("mean", "last")

# How the backbone takes images: "rows", the patches of all images one below the other (Qwen-VL), or "tiles", square
# images of one size in a batch dimension of their own (Idefics3, SmolVLM).
PIXEL_LAYOUTS = {
    "qwen2_vl": "rows",
    "qwen2_5_vl": "rows",
    "qwen3_vl": "rows",
    "idefics3": "tiles",
    "smolvlm": "tiles",
}


class MoCaConfig(PretrainedConfig):
    """Architecture of a [`MoCaModel`] or [`MoCaForPreTraining`].

    Args:
        backbone_config (`dict` or `PretrainedConfig`, *optional*): configuration of the stock vision-language model;
            a default Qwen2.5-VL configuration when omitted.
        bidirectional (`bool`, defaults to `True`): every token attends to every token that is not padding; `False`
            keeps the backbone's causal mask (paper section 3.1). The vision tower is the same either way.
        pooling (`str`, defaults to `"mean"`): `"mean"` over all non-padding tokens, or `"last"`, the last
            non-padding token (the causal baseline).
        mask_token_id (`int`, *optional*): id of the tokenizer's mask token.
        shift_labels (`bool`, defaults to `True`): the prediction for token i is read from the state at i - 1 (paper);
            `False` reads it from the state at i (the authors' released code).
        mae_loss_weight (`float`, defaults to 0.5): w in `loss = mlm_loss + w * mae_loss` (paper section 3.1).
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.

    Raises:
        ValueError: the backbone's `model_type` is not a supported one, `pooling` is not a known mode, or
            `mae_loss_weight` is negative.

    Example:

    ```python
    >>> from modeling_moca import MoCaConfig

    >>> MoCaConfig(bidirectional=True).backbone_config.get_text_config().is_causal
    False
    ```
    """

    model_type = "moca"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        bidirectional=True,
        pooling="mean",
        mask_token_id=None,
        shift_labels=True,
        mae_loss_weight=0.5,
        initializer_range=0.02,
        **kwargs,
    ):
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling must be one of {list(POOLING_MODES)}, got {pooling!r}.")
        if mae_loss_weight < 0:
            raise ValueError(f"mae_loss_weight must be at least 0, got {mae_loss_weight}.")
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("qwen2_5_vl")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if backbone_config.model_type not in PIXEL_LAYOUTS:
            raise ValueError(
                f"The backbone is of type {backbone_config.model_type!r}; supported are {sorted(PIXEL_LAYOUTS)}."
            )
        # A published folder must name every door, whichever class was saved last.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_moca.MoCaConfig",
                "AutoModel": "modeling_moca.MoCaModel",
                "AutoModelForPreTraining": "modeling_moca.MoCaForPreTraining",
                "AutoProcessor": "processing_moca.MoCaProcessor",
            },
        )
        kwargs.pop("tie_word_embeddings", None)
        # True of the folder that it was written for; another save may carry other code.
        kwargs.pop("remote_code", None)
        self.backbone_config = backbone_config
        self.bidirectional = bidirectional
        self.pooling = pooling
        self.mask_token_id = mask_token_id
        self.shift_labels = shift_labels
        self.mae_loss_weight = mae_loss_weight
        self.initializer_range = initializer_range
        # Last, because it validates what was set.
        super().__init__(tie_word_embeddings=getattr(backbone_config, "tie_word_embeddings", False), **kwargs)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        # transformers reads causality from the text configuration alone: keep it true to the one public flag, also
        # when from_pretrained(..., bidirectional=False) sets the attribute after construction.
        if (
            name in ("bidirectional", "backbone_config")
            and {"bidirectional", "backbone_config"} <= self.__dict__.keys()
        ):
            text_config = self.backbone_config.get_text_config()
            text_config.is_causal = not self.bidirectional
            text_config.use_cache = False

    @classmethod
    def of_backbone(cls, backbone, **kwargs):
        """Return the configuration of a bidirectional model on a checkpoint, of which it reads `config.json` alone.

        Args:
            backbone (`str` or `os.PathLike`): Hub id or folder.
            kwargs: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

        Raises:
            ValueError: the checkpoint is not of a supported family.
        """
        return cls(backbone_config=AutoConfig.from_pretrained(backbone, **kwargs))

    def get_text_config(self, *args, **kwargs):
        """Return the language model's configuration, which generic code of transformers and trl asks for.

        Args:
            args, kwargs: see `PretrainedConfig.get_text_config`.
        """
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def hidden_size(self):
        """Width d of the hidden states and of the embedding."""
        return self.get_text_config().hidden_size

    @property
    def vocab_size(self):
        """Number of rows of the embedding matrix, spare rows included."""
        return self.get_text_config().vocab_size

    @property
    def image_token_id(self):
        """Id of the token that stands for one merged group of image patches."""
        return self.backbone_config.image_token_id

    @property
    def pixel_layout(self):
        """`"rows"` or `"tiles"`: how the backbone takes images."""
        return PIXEL_LAYOUTS[self.backbone_config.model_type]

    @property
    def patch_size(self):
        """Side of a patch in pixels."""
        return self.backbone_config.vision_config.patch_size

    @property
    def merge_size(self):
        """Side, in patches, of the square that becomes one image token."""
        if self.pixel_layout == "rows":
            return self.backbone_config.vision_config.spatial_merge_size
        return self.backbone_config.scale_factor

    @property
    def num_patches_per_token(self):
        """Patches that one image token owns (merge size squared)."""
        return self.merge_size**2

    @property
    def patch_dim(self):
        """Values in one patch (channels x patch height x patch width, and for rows x temporal patch size)."""
        vision = self.backbone_config.vision_config
        if self.pixel_layout == "rows":
            return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return vision.num_channels * vision.patch_size**2


__all__ = ["MoCaConfig"]
