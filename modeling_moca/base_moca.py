"""What both MoCa models share: loading that loses nothing, and the choice of the attention path.

This file travels to the Hub as remote code: it imports torch and transformers only.
"""

import importlib
import re

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel

from .configuration_moca import MoCaConfig


def refuse_misfit(name, model_class, info, optional=()):
    """Raise if a checkpoint did not fill a model exactly.

    Args:
        name (`str` or `os.PathLike`): the checkpoint, for the message.
        model_class (`type`): the class it was loaded into, for the message.
        info (`dict`): the stock loading report (`missing_keys`, `unexpected_keys`, `mismatched_keys`).
        optional (`tuple` of `str`): prefixes of tensors that may be missing or unexpected.

    Raises:
        ValueError: lists every missing, unexpected and mis-shaped tensor.
    """
    optional = tuple(optional)
    problems = {
        "missing": sorted(key for key in info["missing_keys"] if not key.startswith(optional)),
        "unexpected": sorted(key for key in info["unexpected_keys"] if not key.startswith(optional)),
        "of another shape": [
            f"{key} {tuple(found)}, expected {tuple(expected)}"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    listed = "; ".join(f"{len(keys)} {kind}: {keys}" for kind, keys in problems.items() if keys)
    if listed:
        raise ValueError(f"The checkpoint {name} does not fit {model_class.__name__}: {listed}.")


class MoCaPreTrainedModel(PreTrainedModel):
    """What both MoCa models share: configuration class, checkpoint prefix and supported attention paths."""

    config_class = MoCaConfig
    base_model_prefix = "moca"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # First parts of the names of tensors that a checkpoint may bring for more than this model.
    _optional_tensors = ()
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load a MoCa checkpoint as the stock method does, but refuse one that does not hold every weight.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder.
            output_loading_info (`bool`, defaults to `False`): also return the stock loading report.
            args, kwargs: see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: tensors are missing (they would be random), unexpected or mis-shaped; the message lists them.
        """
        # Tensors of another shape reach our own error, which lists them, instead of the stock one, which does not.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        # Adapters of the other class are reported unfiltered.
        refuse_misfit(pretrained_model_name_or_path, cls, info, cls._optional_tensors)
        return (model, info) if output_loading_info else model

    def load_adapter(self, peft_model_id=None, adapter_name=None, *args, load_config=None, **kwargs):
        """Load adapters as the stock method does, and also the magnitudes of DoRA.

        Args:
            peft_model_id (`str`, *optional*): Hub id or folder of the adapters.
            adapter_name (`str`, *optional*): `"default"` when omitted.
            load_config (`LoadStateDictConfig`, *optional*): what `from_pretrained` was told.
            args, kwargs: see `PreTrainedModel.load_adapter`.
        """
        given = kwargs.get("weight_mapping") or getattr(load_config, "weight_mapping", None)
        # peft saves the magnitudes without the `.weight` of the module that holds them, which the stock method expects.
        magnitude = rf"lora_magnitude_vector\.{re.escape(adapter_name or 'default')}"
        renaming = WeightRenaming(rf"({magnitude})$", r"\1.weight")
        kwargs["weight_mapping"] = [*(given or get_model_conversion_mapping(self)), renaming]
        return super().load_adapter(peft_model_id, adapter_name, *args, load_config=load_config, **kwargs)

    def set_attn_implementation(self, attn_implementation, **kwargs):
        """Choose the attention path, as the stock method does.

        Args:
            attn_implementation (`str` or `dict`): `"eager"`, `"sdpa"`, `"flash_attention_2"` or `"flex_attention"`. The
                last is for the language model and the MAE decoder; the vision tower then runs `"sdpa"`, since
                transformers refuses flex attention for the Qwen-VL classes as a whole.
            kwargs: see `PreTrainedModel.set_attn_implementation`.
        """
        flex = attn_implementation == "flex_attention"
        super().set_attn_implementation("sdpa" if flex else attn_implementation, **kwargs)
        moca = getattr(self, "moca", self)
        if isinstance(attn_implementation, str):
            # Older versions of transformers reach configurations one level down, and the language model's is two.
            moca.backbone.set_attn_implementation("sdpa" if flex else attn_implementation, **kwargs)
        if flex:
            moca.language_model.config._attn_implementation = "flex_attention"

    @classmethod
    def from_backbone(cls, backbone, **kwargs):
        """Build this model from a stock vision-language model or checkpoint, taking over all of its weights.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or loaded model. A loaded model's
                modules are moved, not copied: do not go on training it.
            kwargs: see [`modeling_moca.conversion.convert`].

        Returns:
            [`MoCaModel`] or [`MoCaForPreTraining`], the class this was called on, in evaluation mode.

        Raises:
            ImportError: the `moca` package is not installed (the copy on the Hub does not carry the conversion).
            ValueError: weights are missing, unexpected or of another shape; the message lists them.

        Example:

        ```python
        >>> model = MoCaForPreTraining.from_backbone("Qwen/Qwen2.5-VL-3B-Instruct", mask_token_id=151665)
        ```
        """
        try:
            # By name, at run time: the remote-code loader refuses a file that imports the package.
            conversion = importlib.import_module("modeling_moca.conversion")
        except ModuleNotFoundError as error:
            raise ImportError(
                "from_backbone needs the installed `moca` package; a model loaded from the Hub cannot convert."
            ) from error
        return conversion.convert(cls, backbone, **kwargs)


__all__ = ["MoCaPreTrainedModel", "refuse_misfit"]
