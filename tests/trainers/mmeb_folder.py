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


def evaluate(dataset, output, encoder=None, **options):
    encoder = encoder or FakeEncoder()
    config = MMEBConfig("org/fake", dataset_path=str(dataset), output_dir=str(output), **options)
    return MMEBEvaluator(config, encoder).evaluate(), encoder


def write_dataset(root):
    """Three tasks: texts among texts, an image among texts, a text among images; images in a folder beside them."""
    rows = [
        row(at(10), at(12, "a"), at(20), at(300)),
        row(at(10), at(20), at(12, "a"), at(300)),
        # A tie at the top is wrong, one below it is none.
        row(at(0), at(5), at(-5)),
        row(at(50), at(49), at(90, "x"), at(90, "y")),
        # Equal to the right one: no other candidate. Equal in direction only: a tie.
        row(at(10, "q"), at(12, "a"), at(300), at(12, "a")),
        row(at(10, "q"), at(12, "a"), at(300), at(12, "b")),
        # No number: as the right one, as another one, as the query.
        row(at(70), at("nan"), at(80)),
        row(at(70), at(71), at("nan", "other")),
        row(at("nan", "query"), at(71), at(80)),
        row(at(70), at(1, "zero"), at(250)),
    ]
    write_task(root, "ImageNet-1K", rows, num_files=3)
    for degrees in (0, 90, 180):
        write_image(root / "images" / "some" / f"{degrees}.png", degrees)
    rows = [
        row(MARK, at(80), at(150), query_image="some/90.png"),
        row(MARK, at(150), at(80), query_image="some/90.png"),
        # The question turns the image: 90 and 0 are 45 together.
        row(MARK + at(0), at(45), at(89), query_image="some/90.png"),
    ]
    write_task(root, "OK-VQA", rows, kind="json")
    images = ["some/0.png", "some/90.png", "some/180.png"]
    write_task(
        root, "EDIS", [row(at(20), MARK, MARK, MARK, images=images), row(at(20), *[MARK] * 2, images=images[1:])]
    )
    return root


def main(settings, die_at=None):
    config = MMEBConfig("fake", batch_size=2, **json.loads(settings))
    MMEBEvaluator(config, FakeEncoder(die_at=die_at and int(die_at))).evaluate()


if __name__ == "__main__":
    main(*sys.argv[1:])
