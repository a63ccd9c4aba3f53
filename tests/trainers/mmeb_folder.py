"""A folder in the layout of TIGER-Lab/MMEB-eval, and an encoder whose embeddings can be read off its inputs.

python -m tests.trainers.mmeb_folder DATASET OUTPUT DIE_AT   evaluates, and dies by SIGKILL at that batch
"""

import json
import math
import os
import signal
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from trainers.mmeb import MMEBEvaluator
from trainers.mmeb_config import MMEBConfig

MARK = "<|image_1|>\n"


def at(degrees, name=""):
    """A text whose embedding points into a direction."""
    return f"{name} @ {degrees}"


def row(query, *targets, query_image="", images=None):
    """A row of the benchmark: the first target is right."""
    return {
        "qry_text": query,
        "qry_img_path": query_image,
        "tgt_text": list(targets),
        "tgt_img_path": images or [""] * len(targets),
    }


def write_task(root, name, rows, kind="parquet", num_files=1):
    """Write a task's rows, in one or several files."""
    folder = root / name
    folder.mkdir(parents=True)
    for number in range(num_files):
        part = rows[number::num_files]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), folder / f"test-{number:05d}-of-{num_files:05d}.parquet")
        else:
            (folder / "test.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in part))


def write_image(path, degrees, size=(56, 56)):
    """Write an image whose embedding points into a direction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = [round(127.5 + 127 * part(math.radians(degrees))) for part in (math.cos, math.sin)]
    Image.new("RGB", size, (*channels, 0)).save(path)


def zip_folder(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            file.write(image, image.relative_to(folder))


class FakeEncoder:
    """Embeds a text as the direction that it names, an image as the one that its colour spells, both as their sum."""

    prompts, default_prompt_name = {}, None

    def __init__(self, name="fake", die_at=None):
        self.name, self.die_at = name, die_at
        self.inputs, self.batches = [], []

    def __str__(self):
        return self.name

    def __getitem__(self, index):
        return self

    def __iter__(self):
        return iter([])

    def state_dict(self):
        return {}

    def encode(self, inputs, prompt, **kwargs):
        assert prompt == "" and kwargs["convert_to_tensor"]
        if len(self.batches) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches.append(len(inputs))
        self.inputs += inputs
        return torch.stack([self._embed(one) for one in inputs])

    def _embed(self, given):
        image = given.get("image") if isinstance(given, dict) else None if isinstance(given, str) else given
        text = given.get("text", "") if isinstance(given, dict) else given if isinstance(given, str) else ""
        vector = torch.zeros(2)
        if image is not None:
            vector += (torch.tensor(image.getpixel((0, 0))[:2]) - 127.5) / 127
        if "@" in text:
            word = text.split("@")[1]
            angle = math.radians(float(word))
            vector += torch.tensor([math.cos(angle), math.sin(angle)])
        return vector if "zero" not in text else torch.zeros(2)


def main(settings, die_at=None):
    config = MMEBConfig("fake", batch_size=2, **json.loads(settings))
    MMEBEvaluator(config, FakeEncoder(die_at=die_at and int(die_at))).evaluate()


if __name__ == "__main__":
    main(*sys.argv[1:])
