"""What makes a checkpoint of stage 1 a sentence-transformers folder too, with the pooling of its configuration."""

import json
from pathlib import Path

from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

POOLING_MODES = {"mean": "mean", "last": "lasttoken"}
# Named, since without a configuration sentence-transformers takes a folder for one of text alone.
STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
MODALITIES = {"text": STATES, "image": STATES, "message": {**STATES, "format": "structured"}}


def write_sentence_modules(config, folder):
    """Write the module list of a `SentenceTransformer` beside a model and its processor.

    Without it sentence-transformers takes the mean of the states, not normalised, whatever the model's own pooling is.

    Args:
        config ([`MoCaConfig`]): gives width and pooling.
        folder (`str` or `os.PathLike`): holds the model, or its adapters, and the processor.
    """
    folder = Path(folder)
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": MODALITIES,
        "module_output_name": "token_embeddings",
        # The backbone's image positions need padded rows.
        "unpad_inputs": False,
    }
    _write(folder / Transformer.config_file_name, settings)
    pooling = Pooling(config.hidden_size, pooling_mode=POOLING_MODES[config.pooling])
    modules = [{"idx": 0, "name": "0", "path": "", "type": _name(Transformer)}]
    for index, module in enumerate([pooling, Normalize()], start=1):
        path = f"{index}_{type(module).__name__}"
        (folder / path).mkdir(exist_ok=True)
        module.save(str(folder / path))
        modules.append({"idx": index, "name": str(index), "path": path, "type": _name(type(module))})
    _write(folder / "modules.json", modules)


def _name(module_class):
    return f"{module_class.__module__}.{module_class.__name__}"


def _write(path, content):
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


__all__ = ["POOLING_MODES", "write_sentence_modules"]
