"""Write a MoCa model as one folder that transformers and sentence-transformers load by name, ready to publish."""

import json
import logging
import shutil
from importlib import metadata
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from packaging.requirements import Requirement
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

from modeling_moca import MoCaConfig, MoCaModel, MoCaProcessor

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).parent / "embedding_card.md"
POOLING_MODES = {"mean": "mean", "last": "lasttoken"}
POOLING_WORDS = {"mean": "mean of the last hidden states over all tokens", "last": "last token's hidden state"}
# Other versions of these may lack what the folder's code relies on; the range is the one that setup.cfg declares.
REQUIRED = ("transformers", "sentence-transformers")
ST_CONFIG = "config_sentence_transformers.json"


def export(
    model_dir,
    out_dir,
    *,
    prompts=None,
    model_id=None,
    base_model=None,
    license=None,
    language=None,
    datasets=None,
    overwrite=False,
):
    """Write the embedding model of a training folder as one publishable folder.

    It holds the weights without the pre-training heads (safetensors), configuration, processor, tokenizer, the code
    that loads them, the files of sentence-transformers (Transformer, Pooling, Normalize, prompts, required versions)
    and a model card.

    Args:
        model_dir (`str` or `os.PathLike`): folder with model and processor, as either stage or `save_pretrained` of
            model and processor writes it.
        out_dir (`str` or `os.PathLike`): new or empty folder.
        prompts (`dict[str, str]`, *optional*): texts to put before an input's text (after its leading images), by name.
        model_id (`str`, *optional*): name that the card's snippets load; `out_dir` when omitted.
        base_model (`str`, *optional*): Hub id of the backbone, for the card.
        license (`str`, *optional*): licence id of the weights, for the card.
        language (`str` or `list[str]`, *optional*): language codes, for the card.
        datasets (`list[str]`, *optional*): Hub ids of training data, for the card.
        overwrite (`bool`, defaults to `False`): replace `out_dir` if it is an earlier export.

    Returns:
        `pathlib.Path`: `out_dir`.

    Raises:
        ValueError: `model_dir` is no MoCa model or lacks files or weights, or `out_dir` is not empty.

    Example:

    ```python
    >>> export("output/stage2", "moca-3b", base_model="Qwen/Qwen2.5-VL-3B-Instruct")
    ```
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    _check_model_dir(model_dir)
    _clear(out_dir, model_dir, overwrite)
    model = MoCaModel.from_pretrained(model_dir)
    processor = MoCaProcessor.from_pretrained(model_dir)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)

    # The backbone's image positions need padded rows.
    transformer = Transformer(str(out_dir), unpad_inputs=False)
    pooling = Pooling(model.config.hidden_size, pooling_mode=POOLING_MODES[model.config.pooling])
    modules = [transformer, pooling, Normalize()]
    published = SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name="cosine", device="cpu")
    published.save_pretrained(str(out_dir), create_model_card=False)
    versions = {name: _required_version(name) for name in REQUIRED}
    config = json.loads((out_dir / ST_CONFIG).read_text(encoding="utf-8"))
    (out_dir / ST_CONFIG).write_text(json.dumps({**config, "requirements": versions}, indent=2), encoding="utf-8")

    card_data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "feature-extraction", "multimodal", "visual-document-retrieval", "moca"],
        base_model=base_model,
        license=license,
        language=language,
        datasets=datasets,
    )
    images = processor.image_processor
    token_side = images.patch_size * images.merge_size
    card = ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        model_name=Path(model_id or out_dir).name,
        model_id=model_id or str(out_dir),
        hidden_size=model.config.hidden_size,
        attention="bidirectional" if model.config.bidirectional else "causal",
        base=f" (base: {base_model})" if base_model else "",
        pooling=POOLING_WORDS[model.config.pooling],
        max_length=processor.max_length,
        token_size=token_side,
        min_tokens=max(images.size["shortest_edge"] // token_side**2, 1),
        max_tokens=images.size["longest_edge"] // token_side**2,
        transformers=versions["transformers"],
        sentence_transformers=versions["sentence-transformers"],
        prompts=prompts,
    )
    card.save(out_dir / "README.md")
    logger.info("Exported %s to %s", model_dir, out_dir)
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
            "MoCaModel.from_backbone first."
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
