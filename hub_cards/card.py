"""The model card of a folder, filled from what lies in it, from the record of its training, and from result files."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_moca import MoCaConfig, MoCaProcessor

from .card_record import evaluation_section, hub_base_model, hub_datasets, read_record, training_section
from .hub_metadata import LANGUAGE
from .results import as_model_index, read_results, write_eval_results

POOLING_WORDS = {"mean": "mean of the last hidden states over all tokens", "last": "last token's hidden state"}
TAGS = {
    "embedding": ["sentence-transformers", "feature-extraction"],
    "multi_vector": ["sentence-transformers", "multi-vector", "late-interaction"],
    "pretraining": ["masked-language-modeling", "masked-image-modeling", "continual-pre-training"],
}
LIBRARIES = {"pretraining": "transformers"}
ST_CONFIG = "config_sentence_transformers.json"


def write_card(
    folder,
    layout,
    *,
    model_id=None,
    stages=None,
    results=(),
    versions=None,
    base_model=None,
    datasets=None,
    tags=None,
    **card_data,
):
    """Write `README.md` from the template of a layout, and `.eval_results` if there are results for it.

    Nothing is asked of the network. What is not known is left out.

    Args:
        folder (`str` or `os.PathLike`): holds model and processor, and for the layouts of sentence-transformers its
            files, from which prompts, required versions and the projection are read.
        layout (`str`): `"embedding"`, `"multi_vector"` or `"pretraining"`.
        model_id (`str`, *optional*): name that the snippets load; `folder` when omitted.
        stages (`list[dict]`, *optional*): record of training ([`hub_cards.card_record.read_record`]); the one in the
            folder when omitted.
        results (iterable of `str` or `os.PathLike`): files of results, see [`hub_cards.results`].
        versions (`dict[str, str]`, *optional*): required versions by package; those that the folder's files require
            when omitted.
        base_model (`str`, *optional*): Hub id of the backbone; where training started, if that was on the Hub, when
            omitted.
        datasets (`str` or `list[str]`, *optional*): Hub ids of training data; those of the record when omitted.
        tags (`str` or `list[str]`, *optional*): more tags.
        card_data: `license`, `language` and other entries of the card's head.

    Returns:
        `pathlib.Path`: the card.

    Raises:
        ValueError: the layout is unknown, a file is no result or record, or the head is not as the Hub wants it.
    """
    if layout not in TAGS:
        raise ValueError(f"layout must be one of {list(TAGS)}, got {layout!r}.")
    folder = Path(folder)
    stages = read_record(folder) if stages is None else stages
    results = read_results(results)
    base_model = base_model or hub_base_model(stages)
    model_name = Path(model_id or folder).name
    more_tags = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        library_name=LIBRARIES.get(layout, "sentence-transformers"),
        pipeline_tag="feature-extraction",
        tags=[*TAGS[layout], "multimodal", "visual-document-retrieval", "moca", *more_tags],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets or hub_datasets(stages) or None,
        model_name=model_name,
        eval_results=as_model_index(results) or None,
        **card_data,
    )
    if data.eval_results is None:
        # Of use beside results only.
        data.model_name = None
    config, processor = MoCaConfig.from_pretrained(folder), MoCaProcessor.from_pretrained(folder)
    settings = _read_json(folder / ST_CONFIG)
    versions = versions or settings.get("requirements", {})
    projection = _projection_width(folder) if layout == "multi_vector" else None
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / f"{layout}_card.md"),
        model_name=model_name,
        model_id=model_id or str(folder),
        dim=projection or config.hidden_size,
        projected=projection is not None,
        attention="bidirectional" if config.bidirectional else "causal",
        base=f" (base: {base_model})" if base_model else "",
        pooling=POOLING_WORDS[config.pooling],
        max_length=processor.max_length,
        images=describe_images(processor),
        rows_of_patches=config.pixel_layout == "rows",
        shift_labels=config.shift_labels,
        requirements=" and ".join(f"{name} {versions[name]}" for name in sorted(versions, reverse=True)),
        prompts={name: prompt for name, prompt in (settings.get("prompts") or {}).items() if prompt},
        training=training_section(stages),
        evaluation=evaluation_section(stages, results),
        license=card_data.get("license"),
    )
    path = folder / "README.md"
    card.save(path)
    write_eval_results(folder, results)
    check_card(path)
    return path


def write_training_card(folder, **settings):
    """Write the card of a folder that a trainer wrote: what its `card_writer` is for.

    Args:
        folder (`str` or `os.PathLike`): output folder or checkpoint of either stage.
        settings: see [`write_card`].

    Returns:
        `pathlib.Path`: the card.

    Example:

    ```python
    >>> trainer = ContrastiveTrainer(model, args, pairs, card_writer=write_training_card)
    ```
    """
    architectures = MoCaConfig.from_pretrained(folder).architectures or []
    layout = "pretraining" if "MoCaForPreTraining" in architectures else "embedding"
    return write_card(folder, layout, **settings)


def check_card(path):
    """Check the head of a card without the network, as far as that goes.

    That it can be read and comes out the same, results included; that names of models and data sets are such; that
    languages are codes; and that a licence of one's own has a name and a link. The Hub's own check is
    [`validate_card`].

    Args:
        path (`str` or `os.PathLike`): the card.

    Raises:
        ValueError: it is not as the Hub wants it; the message names entry and file.
    """
    head = metadata_load(path)
    if head is None:
        raise ValueError(f"{path} has no head of metadata.")
    again = ModelCardData(**head).to_dict()
    if again != head:
        raise ValueError(f"{path} changes when it is read: {sorted(set(again) ^ set(head)) or 'model-index'}.")
    for entry in ("base_model", "datasets"):
        for name in _listed(head.get(entry)):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"{path}: {entry} {name!r} is no name on the Hub: {error}") from error
    for code in _listed(head.get("language")):
        if not LANGUAGE.fullmatch(code):
            raise ValueError(
                f"{path}: language {code!r} is no ISO 639 code such as 'en', nor 'multilingual' or 'code'."
            )
    if head.get("license") == "other" and not {"license_name", "license_link"} <= set(head):
        raise ValueError(f"{path}: license 'other' needs license_name and license_link.")


def validate_card(path):
    """Have the Hub check a card: this posts it to `/api/validate-yaml` of `HF_ENDPOINT`, and needs the network.

    Args:
        path (`str` or `os.PathLike`): the card.

    Raises:
        ValueError: the Hub refuses it; the message is the Hub's.
    """
    ModelCard.load(path).validate()


def describe_images(processor):
    """Return one sentence on how images become tokens.

    Args:
        processor ([`modeling_moca.MoCaProcessor`]): gives patch size, merge size and limits.
    """
    side, size = processor.patch_size * processor.merge_size, processor.image_processor.size
    token = f"One image token stands for {side} x {side} pixels"
    if "shortest_edge" in size:
        fewest, most = max(size["shortest_edge"] // side**2, 1), size["longest_edge"] // side**2
        return f"{token}, and images are resized to {fewest} to {most} tokens."
    tile = processor.image_processor.max_image_size["longest_edge"]
    return (
        f"{token}; the longer side of an image is resized to {size['longest_edge']} pixels, and the image is cut into "
        f"tiles of {tile} x {tile}."
    )


def _projection_width(folder):
    for module in _read_json(folder / "modules.json", []):
        if module["type"].rsplit(".", 1)[-1] == "Dense":
            return _read_json(folder / module["path"] / "config.json")["out_features"]
    return None


def _read_json(path, default=None):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default or {}


def _listed(value):
    return [value] if isinstance(value, str) else value or []


__all__ = ["check_card", "describe_images", "validate_card", "write_card", "write_training_card"]
