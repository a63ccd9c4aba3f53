"""Small data sets of pairs in every layout, written to a folder."""

import io

import datasets
from PIL import Image

from trainers.contrastive_sources import PairSource

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "brown", "pink", "gray", "cyan", "orange")


def encoded(index=0, size=(28, 28)):
    """Return the bytes of a small picture, another one for every index (`int`)."""
    image = Image.new("RGB", size, COLOURS[index % 12])
    image.putpixel((0, 0), (index % 256, index // 256, 7))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(folder, number):
    """Write `number` pictures as files 0.png, 1.png, ... to the folder (`Path`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        (folder / f"{index}.png").write_bytes(encoded(index))


def published_rows(number):
    """Return rows in the authors' layout, whose lists of negatives are 0, 1, 2 and 3 long in turn."""
    return [
        {
            "qry": f"<|image_1|>\nfind {index}",
            "qry_image_path": f"{index}.png",
            "pos_text": f"it's {index}",
            "pos_image_path": "",
            "neg_text": str([f"no, {index}.{k}" for k in range(index % 4)]),
            "neg_image_path": str([f"{k}.png" if k else "" for k in range(index % 4)]),
        }
        for index in range(number)
    ]


def write_pages(folder, number, num_files=1):
    """Write questions with pages as `datasets.Image`, without negatives, and return their source."""
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image()})
    for part in range(num_files):
        rows = [
            {"query": f"page {index}?", "image": {"bytes": encoded(index), "path": None}}
            for index in range(part, number, num_files)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{part}.parquet")
    return PairSource("parquet", data_files=str(folder / "*.parquet"), task="pages", layout="pages", kind="long_form")


def write_texts(folder, number, num_files=1, **settings):
    """Write text pairs with lists of 0, 1, 2 and 3 negatives in turn, and return their source."""
    string = datasets.Value("string")
    features = datasets.Features({"query": string, "positive": string, "negatives": datasets.List(string)})
    for part in range(num_files):
        rows = [
            {
                "query": f"question {index}",
                "positive": f"answer {index}",
                "negatives": [f"wrong {index}.{k}" for k in range(index % 4)],
            }
            for index in range(part, number, num_files)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{part}.parquet")
    settings = {"task": "texts", "layout": "text_pairs", "kind": "text", **settings}
    return PairSource("parquet", data_files=str(folder / "*.parquet"), **settings)
