"""Run by a test in a process that knows nothing of this project: load a repository by name, and embed.

python check_hub.py OUTPUT.json '{"first": {"name": "org/moca", "revision": "..."}, "main": {"name": "org/moca"}}'

Writes, by key: embeddings of both doors, and the value of CODE_VERSION in the code that ran, or None
(`code_revision` is for transformers alone). And, of the first
one, what it is told without the token, and without trust_remote_code.
"""

import json
import sys


class Refuse:
    """An import hook that makes this project's packages impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_moca", "trainers", "hub_cards", "tests"):
            raise ModuleNotFoundError(f"{name} must not be needed here")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def inputs():
    """Return a text, an image, and both."""
    generator = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (84, 56, 3), generator=generator, dtype=torch.uint8).numpy())
    return ["a page about tides", picture, {"text": "what is it?", "image": picture}]


def embed(name, revision=None, code_revision=None):
    """Return embeddings of the inputs [3, d] by both doors, and CODE_VERSION of both."""
    text, picture, both = inputs()
    texts = [text, PLACEHOLDER, PLACEHOLDER + both["text"]]
    code = {} if code_revision is None else {"code_revision": code_revision}
    model = AutoModel.from_pretrained(name, trust_remote_code=True, revision=revision, **code)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, revision=revision, **code)
    batch = processor(text=texts, images=[[], [picture], [picture]], return_tensors="pt")
    with torch.no_grad():
        by_transformers = torch.nn.functional.normalize(model(**batch).pooler_output, dim=-1)
    sentence_transformer = SentenceTransformer(name, trust_remote_code=True, revision=revision, device="cpu")
    by_sentence_transformers = sentence_transformer.encode(inputs(), convert_to_tensor=True)
    used = [model, sentence_transformer[0].model]
    assert all(type(loaded).__module__.startswith("transformers_modules.") for loaded in used)
    return {
        "transformers": by_transformers.tolist(),
        "sentence_transformers": by_sentence_transformers.tolist(),
        "code": [getattr(sys.modules[type(loaded).__module__], "CODE_VERSION", None) for loaded in used],
    }


def refusal(load):
    """Return what an error says."""
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


def main(output, wanted):
    wanted = json.loads(wanted)
    name = next(iter(wanted.values()))["name"]
    found = {
        # First, while the cache is empty.
        "private": refusal(lambda: AutoModel.from_pretrained(name, trust_remote_code=True, token=False)),
        "untrusted": [
            refusal(lambda: AutoModel.from_pretrained(name)),
            refusal(lambda: SentenceTransformer(name, device="cpu")),
        ],
        "loaded": {key: embed(**settings) for key, settings in wanted.items()},
    }
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
