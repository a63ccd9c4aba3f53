"""Write a MoCa model as one folder that transformers and sentence-transformers load by name, ready to publish."""

import json
import logging
import shutil
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from modeling_moca import MoCaConfig, MoCaModel, MoCaProcessor

from .card import write_card
from .card_record import read_record
from .layouts import embedding_model, multi_vector_model, new_projection, trained_projection
from .results import read_results

logger = logging.getLogger(__name__)

LAYOUTS = ("embedding", "multi_vector")
# Other versions of these may lack what the folder's code relies on; the range is the one that setup.cfg declares.
REQUIRED = ("transformers", "sentence-transformers")
ST_CONFIG = "config_sentence_transformers.json"


def export(model_dir, out_dir, *, layout="embedding", projection_dim=None, overwrite=False, **settings):
    """Write the embedding model of a training folder as one publishable folder.

    It holds the weights without the pre-training heads (safetensors), configuration, processor, tokenizer, the code
    that loads them, the files of sentence-transformers (modules, prompts, required versions) and a model card.

    Args:
        model_dir (`str` or `os.PathLike`): folder with model and processor, as either stage, the training of a
            `MultiVectorEncoder`, or `save_pretrained` of model and processor writes it.
        out_dir (`str` or `os.PathLike`): new or empty folder.
        layout (`str`, defaults to `"embedding"`): `"embedding"`, one vector an input, loaded by `SentenceTransformer`;
            or `"multi_vector"`, one vector a token for late interaction, loaded by `MultiVectorEncoder`. The weights
            are the same.
        projection_dim (`int`, *optional*): width of the token vectors of the `"multi_vector"` layout, by a new linear
            map that is yet to be trained. When omitted, the map that `model_dir` brings, or none.
        overwrite (`bool`, defaults to `False`): replace `out_dir` if it is an earlier export.
        settings: see [`export_model`].

    Returns:
        `pathlib.Path`: `out_dir`.

    Raises:
        ValueError: `model_dir` is no MoCa model or lacks files or weights, `out_dir` is not empty, or settings do not
            fit the layout.

    Example:

    ```python
    >>> export("output/stage2", "moca-3b", base_model="Qwen/Qwen2.5-VL-3B-Instruct")
    ```
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    _check_model_dir(model_dir)
    projection = trained_projection(model_dir) if layout == "multi_vector" else None
    if projection is not None and projection_dim is not None:
        raise ValueError(
            f"{model_dir} brings a trained projection to {projection.out_features} values a token; a new one of "
            f"projection_dim={projection_dim} would throw it away."
        )
    model = MoCaModel.from_pretrained(model_dir)
    processor = MoCaProcessor.from_pretrained(model_dir)
    if projection_dim is not None:
        projection = new_projection(model.config.hidden_size, projection_dim)
    # Before anything is removed or written.
    read_results(settings.get("results", ()))
    settings.setdefault("stages", read_record(model_dir))
    _clear(out_dir, model_dir, overwrite)
    return export_model(model, processor, out_dir, layout=layout, projection=projection, **settings)


def export_model(
    model,
    processor,
    out_dir,
    *,
    layout="embedding",
    projection=None,
    prompts=None,
    model_id=None,
    base_model=None,
    license=None,
    language=None,
    datasets=None,
    stages=None,
    results=(),
):
    """Write a model that is in memory; see [`export`].

    Args:
        model ([`modeling_moca.MoCaModel`]), processor ([`modeling_moca.MoCaProcessor`]): what to publish.
        out_dir (`str` or `os.PathLike`): new or empty folder.
        layout (`str`, defaults to `"embedding"`): `"embedding"` or `"multi_vector"`.
        projection (`Dense`, *optional*): linear map of token states, for the `"multi_vector"` layout.
        prompts (`dict[str, str]`, *optional*): texts to put before an input's text (after its leading images), by name.
        model_id (`str`, *optional*): name that the card's snippets load; `out_dir` when omitted.
        base_model (`str`, *optional*): Hub id of the backbone, for the card.
        license (`str`, *optional*): licence id of the weights, for the card.
        language (`str` or `list[str]`, *optional*): language codes, for the card.
        datasets (`list[str]`, *optional*): Hub ids of training data, for the card.
        stages (`list[dict]`, *optional*): record of training, for the card.
        results (iterable of `str` or `os.PathLike`): files of results, for the card, see [`hub_cards.results`].

    Returns:
        `pathlib.Path`: `out_dir`.

    Raises:
        ValueError: `out_dir` is not empty, the layout is unknown, or a projection goes with another layout.
    """
    out_dir = Path(out_dir)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}.")
    if projection is not None and layout != "multi_vector":
        raise ValueError(f"A projection of token vectors needs layout='multi_vector', got {layout!r}.")
    read_results(results)
    _clear(out_dir, None, overwrite=False)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    if layout == "embedding":
        published = embedding_model(out_dir, model.config, prompts)
    else:
        published = multi_vector_model(out_dir, model.config, projection, prompts)
    published.save_pretrained(str(out_dir), create_model_card=False)
    versions = {name: _required_version(name) for name in REQUIRED}
    config = json.loads((out_dir / ST_CONFIG).read_text(encoding="utf-8"))
    (out_dir / ST_CONFIG).write_text(json.dumps({**config, "requirements": versions}, indent=2), encoding="utf-8")
    write_card(
        out_dir,
        layout,
        model_id=model_id,
        stages=stages or [],
        results=results,
        base_model=base_model,
        license=license,
        language=language,
        datasets=datasets,
    )
    logger.info("Exported %s to %s", layout, out_dir)
    return out_dir


def _check_model_dir(model_dir):
    needed = ("config.json", "processor_config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (model_dir / name).is_file()]
    if not list(model_dir.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(
            f"{model_dir} lacks {missing}: give a folder with both model and processor, as the trainers write it."
        )
    model_type = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != MoCaConfig.model_type:
        raise ValueError(
            f"{model_dir} holds a model of type {model_type!r}, allowed is {MoCaConfig.model_type!r}: convert it with "
            "examples/convert.py or MoCaModel.from_backbone."
        )


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
