"""Run by a test in a process that knows nothing of this project: checkpoints of training through every door.

python check_checkpoints.py CASES_FILE, a JSON list of {"folder", "is_pretraining", "expected"}
"""

import json
import sys

# A script beside this one; importing it makes this project's packages impossible to import.
import check_export  # noqa: F401

import torch  # isort: skip
from PIL import Image  # isort: skip
from sentence_transformers import SentenceTransformer  # isort: skip
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor  # isort: skip

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def main(cases_file):
    with open(cases_file) as file:
        cases = json.load(file)
    for case in cases:
        folder = case["folder"]
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        inputs = processor(text=["a page about tides"], return_tensors="pt")
        doors = [AutoModel, *([AutoModelForPreTraining] if case["is_pretraining"] else [])]
        models = [door.from_pretrained(folder, trust_remote_code=True).eval() for door in doors]
        with torch.no_grad():
            found = [torch.nn.functional.normalize(model(**inputs).pooler_output[0], dim=-1) for model in models]
        picture = Image.new("RGB", (56, 84), "orange")
        with_image = processor(text=[IMAGE + "its colour?"], images=[[picture]], return_tensors="pt")
        with torch.no_grad():
            pictures = [torch.nn.functional.normalize(model(**with_image).pooler_output, dim=-1) for model in models]
        sentence_model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
        found += sentence_model.encode(["a page about tides"], convert_to_tensor=True)
        pictures.append(sentence_model.encode([{"text": "its colour?", "image": picture}], convert_to_tensor=True))
        for one in pictures[1:]:
            assert torch.allclose(one, pictures[0], atol=1e-5), f"{folder}: images"
        for loaded in (*models, processor, sentence_model[0].model):
            assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
        for embedding in found:
            error = (embedding - torch.tensor(case["expected"])).abs().max().item()
            assert error < 1e-6, f"{folder}: {error}"


if __name__ == "__main__":
    main(sys.argv[1])
