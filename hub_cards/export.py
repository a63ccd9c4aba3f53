"""Write a MoCa model as one folder that transformers and sentence-transformers load by name, ready to publish."""

import copy
import json
import logging
import shutil
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor

from .card import write_card
from .card_record import read_record
from .checkpoint import load_checkpoint
from .hub_metadata import check_metadata
from .layouts import embedding_model, multi_vector_model, new_projection, trained_projection
from .record import write_record
from .remote_code import write_code_hash
from .results import read_results

logger = logging.getLogger(__name__)

LAYOUTS = ("embedding", "multi_vector", "pretraining")
DTYPES = ("float32", "bfloat16", "float16")
# Other versions of these may lack what the folder's code relies on; the range is the one that setup.cfg declares.
REQUIRED = ("transformers", "sentence-transformers")
ST_CONFIG = "config_sentence_transformers.json"


def export(
    model_dir, out_dir=None, *, layout="embedding", projection_dim=None, dtype=None, overwrite=False, **settings
):
    """Write the model of a training folder as one publishable folder.

    It holds the weights (safetensors, without the pre-training heads unless asked for), configuration, processor,
    tokenizer, the code that loads them with its hash, the files of sentence-transformers (modules, prompts, required
    versions), a model card, and the vectors of a few fixed inputs, which [`hub_cards.verify`] compares.

    Args:
        model_dir (`str` or `os.PathLike`): folder with model and processor, as either stage, the training of a
            `MultiVectorEncoder`, or `save_pretrained` of model and processor writes it; also a checkpoint that holds
            adapters alone (LoRA, DoRA), which are merged into the model that they were trained on.
        out_dir (`str` or `os.PathLike`, *optional*): new or empty folder; named like the model in `model_id` when
            omitted.
        layout (`str`, defaults to `"embedding"`): `"embedding"`, one vector an input, loaded by `SentenceTransformer`;
            `"multi_vector"`, one vector a token for late interaction, loaded by `MultiVectorEncoder`, of the same
            weights; or `"pretraining"`, `"embedding"` with the pre-training heads, loaded by
            `AutoModelForPreTraining` too, for those who train on.
        projection_dim (`int`, *optional*): width of the token vectors of the `"multi_vector"` layout, by a new linear
            map that is yet to be trained. When omitted, the map that `model_dir` brings, or none.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; that of the checkpoint when omitted.
        overwrite (`bool`, defaults to `False`): replace `out_dir` if it is an earlier export.
        settings: see [`export_model`].

    Returns:
        `pathlib.Path`: `out_dir`.

    Raises:
        ValueError: `model_dir` is no MoCa model or lacks files or weights, `out_dir` is not empty, or settings do not
            fit the layout or the Hub.

    Example:

    ```python
    >>> export("output/stage2", "moca-3b", base_model="Qwen/Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
    ```
    """
    model_dir = Path(model_dir)
    _check_settings(layout, dtype)
    out_dir = _out_dir(out_dir, settings.get("model_id"))
    projection = trained_projection(model_dir) if layout == "multi_vector" else None
    if projection is not None and projection_dim is not None:
        raise ValueError(
            f"{model_dir} brings a trained projection to {projection.out_features} values a token; a new one of "
            f"projection_dim={projection_dim} would throw it away."
        )
    model = load_checkpoint(model_dir, MoCaForPreTraining if layout == "pretraining" else MoCaModel, dtype or "auto")
    processor = MoCaProcessor.from_pretrained(model_dir)
    if projection_dim is not None:
        projection = new_projection(model.config.hidden_size, projection_dim)
    # Before anything is removed or written.
    read_results(settings.get("results", ()))
    settings.setdefault("stages", read_record(model_dir))
    _clear(out_dir, model_dir, overwrite)
    return export_model(model, processor, out_dir, layout=layout, projection=projection, dtype=dtype, **settings)


def export_model(
    model,
    processor,
    out_dir,
    *,
    layout="embedding",
    projection=None,
    prompts=None,
    dtype=None,
    max_shard_size="4GB",
    verify=False,
    model_id=None,
    base_model=None,
    license=None,
    license_name=None,
    license_link=None,
    language=None,
    datasets=None,
    stages=None,
    results=(),
):
    """Write a model that is in memory; see [`export`].

    Args:
        model ([`modeling_moca.MoCaModel`] or [`modeling_moca.MoCaForPreTraining`]): what to publish; the latter for the
            `"pretraining"` layout.
        processor ([`modeling_moca.MoCaProcessor`]): what goes with it.
        out_dir (`str` or `os.PathLike`): new or empty folder.
        layout (`str`, defaults to `"embedding"`): `"embedding"`, `"multi_vector"` or `"pretraining"`.
        projection (`Dense`, *optional*): linear map of token states, for the `"multi_vector"` layout.
        prompts (`dict[str, str]`, *optional*): texts to put before an input's text (after its leading images), by name.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; the model's own when omitted.
        max_shard_size (`str` or `int`, defaults to `"4GB"`): a larger file of weights becomes several.
        verify (`bool`, defaults to `False`): end with [`hub_cards.verify.verify`], which loads the folder in another
            process.
        model_id (`str`, *optional*): name that the card's snippets load; `out_dir` when omitted.
        base_model (`str`, *optional*): Hub id of the backbone, for the card.
        license (`str`, *optional*): licence id of the weights, for the card, as the Hub lists them.
        license_name, license_link (`str`, *optional*): of a licence `"other"`.
        language (`str` or `list[str]`, *optional*): language codes, for the card.
        datasets (`list[str]`, *optional*): Hub ids of training data, for the card.
        stages (`list[dict]`, *optional*): record of training, for the card.
        results (iterable of `str` or `os.PathLike`): files of results, for the card, see [`hub_cards.results`].

    Returns:
        `pathlib.Path`: `out_dir`.

    Raises:
        ValueError: `out_dir` is not empty; the layout, dtype, licence or language is unknown; a projection or model
            goes with another layout; the model carries adapters or code of another version; weights or vectors are
            not finite in the dtype; verification fails.
    """
    out_dir = Path(out_dir)
    _check_settings(layout, dtype)
    check_metadata(
        base_model=base_model,
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=language,
        datasets=datasets,
    )
    if projection is not None and layout != "multi_vector":
        raise ValueError(f"A projection of token vectors needs layout='multi_vector', got {layout!r}.")
    read_results(results)
    model = _published_model(model, layout, dtype)
    _clear(out_dir, None, overwrite=False)
    model.save_pretrained(out_dir, max_shard_size=max_shard_size)
    processor.save_pretrained(out_dir)
    if layout == "multi_vector":
        published = multi_vector_model(out_dir, model.config, projection, prompts)
    else:
        published = embedding_model(out_dir, model.config, prompts)
    # The weights are there already, in shards and with the heads that were asked for.
    published[0].model.save_pretrained = lambda *args, **kwargs: None
    published.save_pretrained(str(out_dir), create_model_card=False)
    versions = {name: _required_version(name) for name in REQUIRED}
    config = json.loads((out_dir / ST_CONFIG).read_text(encoding="utf-8"))
    (out_dir / ST_CONFIG).write_text(json.dumps({**config, "requirements": versions}, indent=2), encoding="utf-8")
    write_code_hash(out_dir)
    write_card(
        out_dir,
        layout,
        model_id=model_id,
        stages=stages or [],
        results=results,
        base_model=base_model,
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=language,
        datasets=datasets,
    )
    write_record(out_dir, layout, model, published)
    logger.info("Exported %s to %s", layout, out_dir)
    if verify:
        # Here, or `python -m hub_cards.verify` would find itself imported already.
        from .verify import verify as verify_export

        verify_export(out_dir)
    return out_dir


def _check_settings(layout, dtype):
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}.")


def _out_dir(out_dir, model_id):
    if out_dir is None and model_id is None:
        raise ValueError("Say where the export goes: give out_dir, or a model_id, of which the last part names it.")
    return Path(model_id.rpartition("/")[2] if out_dir is None else out_dir)


def _published_model(model, layout, dtype):
    """Return the part of a model that the layout publishes, in the dtype, without changing the model itself."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model carries adapters: merge them first, or export the folder that training wrote.")
    has_heads = hasattr(model, "mae_head")
    if layout == "pretraining" and not has_heads:
        raise ValueError(f"layout='pretraining' needs a MoCaForPreTraining, got {type(model).__name__}.")
    if layout != "pretraining" and has_heads:
        model = model.moca
    found = {parameter.dtype for parameter in model.parameters()}
    if dtype is not None and found != {getattr(torch, dtype)}:
        model = copy.deepcopy(model).to(getattr(torch, dtype))
    elif len(found) > 1 or str(model.dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"The weights are of {sorted(map(str, found))}: give one dtype of {list(DTYPES)}.")
    infinite = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"{len(infinite)} weights are not finite in {model.dtype}, {infinite[0]} for one.")
    return model


def _clear(out_dir, model_dir, overwrite):
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out_dir} is not empty: give a new folder, or overwrite=True to replace an earlier export.")
    if not (out_dir / ST_CONFIG).is_file() or out_dir.resolve() == model_dir.resolve():
        raise ValueError(f"{out_dir} is not an earlier export, so overwrite=True does not replace it.")
    shutil.rmtree(out_dir)


def _required_version(package):
    """Return the versions of a package that this project declares to work with."""
    requirements = map(Requirement, metadata.requires("moca"))
    return str(next(entry.specifier for entry in requirements if entry.name == package))
