"""Exports in mteb: mteb's own wrappers load them and embed; here is what mteb cannot find out about a folder."""

import hashlib
import json
import math
from pathlib import Path

from huggingface_hub import ModelCard, get_safetensors_metadata, snapshot_download
from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts
from mteb.models import ModelMeta, MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ScoringFunction
from mteb.types import OutputDType
from safetensors import safe_open

from modeling_moca import MoCaConfig

ST_CONFIG = "config_sentence_transformers.json"
WRAPPERS = {"SentenceTransformer": SentenceTransformerEncoderWrapper, "MultiVectorEncoder": MultiVectorWrapper}


class MoCaModelMeta(ModelMeta):
    """Metadata of a MoCa model, which needs no extra of mteb.

    Args:
        kwargs: see `mteb.models.ModelMeta`.
    """

    def _resolve_extras_groups(self):
        # mteb asks every model that takes images for torchvision, which MoCa does without.
        return list(self.extra_requirements_groups or [])


def load_export(name, revision=None, *, folder=None, **kwargs):
    """Load an export into the mteb wrapper of its layout; the `loader` of [`model_meta`].

    Args:
        name (`str`): Hub id.
        revision (`str`, *optional*): commit, branch or tag; of a Hub id only.
        folder (`str`, *optional*): where the export is, instead of on the Hub.
        kwargs: see `mteb.models.SentenceTransformerEncoderWrapper`.

    Returns:
        `SentenceTransformerEncoderWrapper` or `MultiVectorWrapper`.
    """
    files = Path(folder) if folder is not None else _small_files(name, revision)
    wrapper = WRAPPERS[_read_json(files / ST_CONFIG)["model_type"]]
    if folder is not None:
        return wrapper(folder, trust_remote_code=True, **kwargs)
    return wrapper(name, revision=revision, trust_remote_code=True, **kwargs)


def model_meta(model, *, name=None, revision=None, **facts):
    """Describe an export for mteb, from its configuration, model card and weights.

    Prompts are those of the export, by the names that mteb looks for: `query`, `document`, a task, a task type, or
    either with `-query` or `-document` behind it.

    Args:
        model (`str` or `os.PathLike`): folder that [`hub_cards.export`] wrote, or Hub id.
        name (`str`, *optional*): name in results, with a slash; the Hub id, or `local/` and the folder's name.
        revision (`str`, *optional*): commit, branch or tag; of a Hub id only. A folder's revision is a hash of its
            weights and settings, so that mteb never takes cached results of another model for this one's.
        facts: further fields of `mteb.models.ModelMeta`, or other values for those found (`training_datasets`,
            `release_date`, `languages`, ...).

    Returns:
        [`MoCaModelMeta`]: what `mteb.evaluate` takes, and whose `load_model` loads.

    Raises:
        ValueError: `model` is no export of a MoCa model, or a revision is given for a folder.

    Example:

    ```python
    >>> mteb.evaluate(model_meta("moca-3b", name="org/moca-3b"), mteb.get_tasks(["SciFact"]))
    ```
    """
    is_folder = Path(model).is_dir()
    if is_folder and revision is not None:
        raise ValueError(f"revision={revision!r} belongs to a Hub id, but {model} is a folder.")
    files = Path(model).resolve() if is_folder else _small_files(str(model), revision)
    _check_export(files, model)
    config = MoCaConfig.from_pretrained(files)
    published = _read_json(files / ST_CONFIG)
    card = ModelCard.load(files / "README.md").data.to_dict() if (files / "README.md").is_file() else {}
    late_interaction = published["model_type"] == "MultiVectorEncoder"
    num_parameters, num_bytes = _weights(files) if list(files.glob("*.safetensors")) else _remote_weights(model, files)
    base_model = card.get("base_model")
    found = {
        "loader": load_export,
        "loader_kwargs": {"folder": str(files)} if is_folder else {},
        "name": name or (f"local/{files.name}" if is_folder else str(model)),
        "revision": _fingerprint(files) if is_folder else files.name,
        "release_date": None,
        "languages": _hf_langs_to_iso_lang_scripts(card.get("language")),
        "n_parameters": num_parameters,
        "n_embedding_parameters": config.vocab_size * config.hidden_size,
        "memory_usage_mb": round(num_bytes / 2**20),
        "max_tokens": _read_json(files / "processor_config.json")["max_length"],
        "embed_dim": _embedding_width(files, config),
        "license": None if card.get("license") == "other" else card.get("license"),
        "open_weights": True,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "reference": None if is_folder else f"https://huggingface.co/{model}",
        "similarity_fn_name": ScoringFunction.MAX_SIM if late_interaction else ScoringFunction.COSINE,
        "use_instructions": any(published["prompts"].values()),
        "training_datasets": None,
        "adapted_from": base_model[0] if isinstance(base_model, list) else base_model,
        "modalities": ["image", "text"],
        "model_type": ["late-interaction" if late_interaction else "dense"],
        "output_dtypes": OutputDType.from_str(str(config.dtype).removeprefix("torch.")),
    }
    return MoCaModelMeta(**{**found, **facts})


def register(model, **kwargs):
    """Make `mteb.get_model` know an export, by its name and by the folder or Hub id given here.

    Args:
        model (`str` or `os.PathLike`): folder or Hub id.
        kwargs: see [`model_meta`].

    Returns:
        [`MoCaModelMeta`]

    Example:

    ```python
    >>> register("demo_output/export")
    >>> mteb.evaluate(mteb.get_model("demo_output/export"), tasks)
    ```
    """
    meta = model_meta(model, **kwargs)
    MODEL_REGISTRY[meta.name] = MODEL_REGISTRY[str(model)] = meta
    return meta


def _small_files(model, revision):
    """Return a folder of everything on the Hub but weights and code; its name is the commit."""
    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.md"]))


def _check_export(files, model):
    needed = ("config.json", ST_CONFIG, "modules.json", "processor_config.json")
    missing = [name for name in needed if not (files / name).is_file()]
    if missing:
        raise ValueError(f"{model} lacks {missing}: give a folder or Hub id that examples/export.py wrote.")
    found = _read_json(files / "config.json").get("model_type")
    if found != MoCaConfig.model_type:
        raise ValueError(f"{model} holds a model of type {found!r}, allowed is {MoCaConfig.model_type!r}.")
    layout = _read_json(files / ST_CONFIG).get("model_type")
    if layout not in WRAPPERS:
        raise ValueError(f"{model} is a {layout!r} of sentence-transformers, allowed are {list(WRAPPERS)}.")


def _embedding_width(files, config):
    """Return the width of what comes out: a projection's, if there is one."""
    dense = [module for module in _read_json(files / "modules.json") if module["type"].endswith(".Dense")]
    return _read_json(files / dense[0]["path"] / "config.json")["out_features"] if dense else config.hidden_size


def _weights(files):
    """Return parameters and bytes of the weights in a folder; tied weights are stored once."""
    shapes = []
    for path in files.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            shapes += [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118 (no dictionary)
    return sum(map(math.prod, shapes)), sum(path.stat().st_size for path in files.glob("*.safetensors"))


def _remote_weights(model, files):
    metadata = get_safetensors_metadata(str(model), revision=files.name)
    sizes = [
        tensor.data_offsets[1] - tensor.data_offsets[0]
        for file in metadata.files_metadata.values()
        for tensor in file.tensors.values()
    ]
    return sum(metadata.parameter_count.values()), sum(sizes)


def _fingerprint(files):
    """Return a hash of what an embedding depends on: weights, settings and tokenizer, not the model card."""
    digest = hashlib.sha256()
    for path in sorted(files.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(str(path.relative_to(files)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:40]


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
