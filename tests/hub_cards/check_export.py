"""Run by a test in a process that knows nothing of this project: an export through both doors.

python check_export.py EXPORT_FOLDER
"""

import sys


class Refuse:
    """An import hook that makes this project's packages impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_moca", "trainers", "hub_cards", "tests"):
            raise ModuleNotFoundError(f"{name} must not be needed here")


sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def main(folder):
    first, second = picture(56, 84, 0), picture(84, 56, 1)
    # (what sentence-transformers is given, the same as plain text, its images)
    cases = [
        ("a page about tides", "a page about tides", []),
        (first, PLACEHOLDER, [first]),
        ({"text": "what is it?", "image": second}, f"{PLACEHOLDER}what is it?", [second]),
        ([first, second], PLACEHOLDER * 2, [first, second]),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": first},
                        {"type": "text", "text": "then"},
                        {"type": "image", "image": second},
                    ],
                }
            ],
            f"{PLACEHOLDER}then{PLACEHOLDER}",
            [first, second],
        ),
        ("short", "short", []),
    ]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    sentence_transformer = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    for loaded in (model, processor, sentence_transformer[0].model):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__

    def embed(indices):
        texts, images = [cases[i][1] for i in indices], [cases[i][2] for i in indices]
        inputs = processor(text=texts, images=images, return_tensors="pt")
        with torch.no_grad():
            return torch.nn.functional.normalize(model(**inputs).pooler_output, dim=-1)

    everything = range(len(cases))
    expected = torch.cat([embed([i]) for i in everything])
    results = {
        "transformers, batch": embed(everything),
        "sentence-transformers, mixed batch": sentence_transformer.encode(
            [cases[i][0] for i in everything], convert_to_tensor=True
        ),
        "sentence-transformers, one at a time": torch.cat(
            [sentence_transformer.encode([cases[i][0]], convert_to_tensor=True) for i in everything]
        ),
        "sentence-transformers, not in a list": torch.stack(
            [sentence_transformer.encode(cases[i][0], convert_to_tensor=True) for i in (0, 1, 2)]
        ),
    }
    for name, embeddings in results.items():
        error = (embeddings - expected[: len(embeddings)]).abs().max().item()
        assert error < 1e-5, f"{name}: {error}"
    distances = torch.cdist(expected, expected) + torch.eye(len(cases))
    assert distances.min() > 1e-3, "different inputs, the same embedding"

    # Bidirectional in fact, with and without padding, on both attention paths.
    bidirectional = model.config.bidirectional
    for attention in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
        for text in (["first words last"], ["first words last", "a longer row of words beside it"]):
            inputs = processor(text=text, return_tensors="pt")
            last = int(inputs["attention_mask"][0].sum()) - 1
            changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
            changed["input_ids"][0, last] = inputs["input_ids"][0, 0]
            padding = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)}
            with torch.no_grad():
                states, moved, same = (model(**batch).last_hidden_state for batch in (inputs, changed, padding))
            assert ((states[0, 0] - moved[0, 0]).abs().max().item() > 1e-4) == bidirectional, attention
            real = inputs["attention_mask"].bool()
            assert (states - same)[real].abs().max().item() == 0, attention

    # Conversion stays at home, and says so.
    try:
        type(model).from_backbone("anything")
    except ImportError as error:
        assert "from_backbone needs the installed `moca` package" in str(error)
    else:
        raise AssertionError("from_backbone must not work without the package")

    # User text never becomes a control token, whichever door; an empty text has an embedding.
    odd = [f"{PLACEHOLDER} <|image_pad|>", "", "<|mask|> <|endoftext|>"]
    assert sentence_transformer.encode(odd, convert_to_tensor=True).isfinite().all()


if __name__ == "__main__":
    main(sys.argv[1])
