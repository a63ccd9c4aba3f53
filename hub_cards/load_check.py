"""Load an export as its users do, and say what it makes of the inputs that it recorded.

`hub_cards.verify` runs this file as a script, `python load_check.py FOLDER RESULT_FILE`, in a process in which this
project cannot be imported; hence it imports nothing of it. `hub_cards.export` records with the same functions.
"""

import base64
import io
import json
import sys
from functools import partial
from pathlib import Path

# Where an image stands in a text, whichever backbone reads it.
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
# So many token vectors are recorded of an input that has one a token.
MOST_VECTORS = 8
EXPORT_RECORD = "moca_export.json"


class Refuse:
    """An import hook that makes this project's packages impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_moca", "trainers", "hub_cards"):
            raise ModuleNotFoundError(f"{name} must not be needed to load an export")


def open_images(record):
    """Return the pictures of a record by name (`dict[str, PIL.Image.Image]`)."""
    from PIL import Image

    return {name: Image.open(io.BytesIO(base64.b64decode(png))) for name, png in record["images"].items()}


def as_sentence_input(content, images):
    """Return recorded content as sentence-transformers takes it: a text, an image, a pair of them, or a chat.

    Args:
        content (`list[dict]`): blocks `{"text": ...}` and `{"image": name}`.
        images (`dict[str, PIL.Image.Image]`): by name.
    """
    blocks = [{key: images[value] if key == "image" else value for key, value in block.items()} for block in content]
    kinds = [next(iter(block)) for block in blocks]
    if len(blocks) == 1:
        return blocks[0][kinds[0]]
    if kinds == ["image", "text"]:
        return {**blocks[1], **blocks[0]}
    return [{"role": "user", "content": [{"type": kind, **block} for kind, block in zip(kinds, blocks)]}]


def as_processor_input(content, images):
    """Return recorded content as the processor takes it: a text with placeholders, and its images."""
    text = "".join(block.get("text", PLACEHOLDER) for block in content)
    return {"text": [text], "images": [[images[block["image"]] for block in content if "image" in block]]}


def sentence_vectors(model, record):
    """Embed the inputs of a record one at a time with a model of sentence-transformers.

    Args:
        model (`SentenceTransformer` or `MultiVectorEncoder`): the export.
        record (`dict`): `images` and `inputs` of the export's record.

    Returns:
        `dict[str, torch.Tensor]`: by name of the input, of shape `(d,)`, or `(T, d)` with one vector a token.
    """
    images = open_images(record)
    late = type(model).__name__ == "MultiVectorEncoder"
    encode = model.encode_document if late else partial(model.encode, convert_to_tensor=True)
    found = {}
    for entry in record["inputs"]:
        # The empty prompt stands for none, also where the export has a default.
        (vectors,) = encode([as_sentence_input(entry["content"], images)], prompt="")
        found[entry["name"]] = vectors.float().cpu()  # [d] or [T, d]
    return found


def summarise(vectors):
    """Return vectors as a record keeps them: of one a token, a few evenly spread ones and their number.

    Args:
        vectors (`torch.Tensor` of shape `(d,)` or `(T, d)`).
    """
    if vectors.ndim == 1:
        return {"vector": _rounded(vectors)}
    num_kept = min(MOST_VECTORS, len(vectors))
    kept = [round(index * (len(vectors) - 1) / max(num_kept - 1, 1)) for index in range(num_kept)]
    return {"num_tokens": len(vectors), "positions": kept, "vectors": _rounded(vectors[kept])}


def _rounded(vectors):
    if vectors.ndim == 2:
        return [_rounded(vector) for vector in vectors]
    return [float(f"{value:.7g}") for value in vectors.tolist()]


def distance(recorded, found):
    """Return the largest distance of a vector from the recorded one, or infinity where their numbers differ.

    Args:
        recorded, found (`dict`): what [`summarise`] returns.
    """
    import torch

    if recorded.get("num_tokens") != found.get("num_tokens"):
        return float("inf")
    ours, theirs = (torch.tensor(entry.get("vectors") or [entry["vector"]]) for entry in (recorded, found))
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours - theirs).norm(dim=-1).max().item()
    return difference if difference == difference else float("inf")


def first_state_moves(model, processor):
    """Tell whether the first token's state depends on the last token, which a causal model cannot see.

    Args:
        model (`MoCaModel`), processor (`MoCaProcessor`): of one export.
    """
    import torch

    inputs = processor(text=["first words and then the last"], return_tensors="pt")
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -1] = inputs["input_ids"][0, 0]
    with torch.no_grad():
        states, again, moved = (model(**batch).last_hidden_state[0, 0] for batch in (inputs, inputs, changed))
    # Arithmetic that is not the same twice moves states as well.
    return (moved - states).abs().max().item() > (again - states).abs().max().item()


def check(folder, record):
    """Return problems (`list[str]`) and the largest distances by door (`dict[str, float]`) of an export.

    Args:
        folder (`str`): the export.
        record (`dict`): what it recorded of itself.
    """
    import torch
    from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor

    problems, found = [], {}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    late = record["layout"] == "multi_vector"
    images = open_images(record)

    def embed(model, content, projection=None):
        inputs = processor(**as_processor_input(content, images), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        vectors = outputs.last_hidden_state[0] if late else outputs.pooler_output[0]
        vectors = vectors if projection is None else vectors @ projection.T
        return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()

    moves = first_state_moves(model, processor)
    if moves != model.config.bidirectional or moves != record["bidirectional"]:
        said = "bidirectional" if record["bidirectional"] else "causal"
        problems.append(
            f"config.json: the model was exported as {said}, but the first token's state "
            f"{'moves' if moves else 'does not move'} with the last token (config.bidirectional is "
            f"{model.config.bidirectional})"
        )
    projection = _projection(folder) if late else None
    if projection is not None:
        projection = projection.to(model.dtype)
    contents = {entry["name"]: entry["content"] for entry in record["inputs"]}
    found["AutoModel"] = {name: embed(model, content, projection) for name, content in contents.items()}
    remote = [model, processor]
    del model
    if record["layout"] == "pretraining":
        whole = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
        found["AutoModelForPreTraining"] = {name: embed(whole, content) for name, content in contents.items()}
        remote.append(whole)
        del whole
    import sentence_transformers

    door = "MultiVectorEncoder" if late else "SentenceTransformer"
    sentence_model = getattr(sentence_transformers, door)(folder, trust_remote_code=True, device="cpu")
    found[door] = sentence_vectors(sentence_model, record)
    for loaded in [*remote, sentence_model[0].model]:
        if not type(loaded).__module__.startswith("transformers_modules."):
            problems.append(f"config.json: {type(loaded).__name__} comes from {type(loaded).__module__}, not from here")
    distances = {
        door: {
            entry["name"]: distance(entry["embedding"], summarise(vectors[entry["name"]])) for entry in record["inputs"]
        }
        for door, vectors in found.items()
    }
    return problems, distances


def _projection(folder):
    from safetensors.torch import load_file

    modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
    paths = [module["path"] for module in modules if module["type"].endswith(".Dense")]
    return load_file(Path(folder) / paths[0] / "model.safetensors")["linear.weight"] if paths else None


def main(folder, result_file):
    sys.meta_path.insert(0, Refuse())
    record = json.loads((Path(folder) / EXPORT_RECORD).read_text(encoding="utf-8"))
    problems, distances = check(folder, record)
    Path(result_file).write_text(json.dumps({"problems": problems, "distances": distances}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
