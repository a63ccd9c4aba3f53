"""Small sources of a mixture, written to a folder: Parquet, Arrow and WebDataset files with images inside."""

import io
import json
import tarfile

import datasets

from tests.trainers.cpt_rows import encoded_image, make_row
from trainers.cpt_mixture import DataSource

FEATURES = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})


def numbered_rows(number, images=(1, 0, 2, 1)):
    """Return rows whose text begins with `n<number> `, so that they can be told from each other."""
    rows = [make_row(seed, 6 + 5 * (seed % 4), images[seed % len(images)]) for seed in range(number)]
    return [{**row, "text": f"n{index} {row['text']}"} for index, row in enumerate(rows)]


def number_of(text):
    """Return the number that a text of `numbered_rows` begins with."""
    return int(text.split()[0][1:])


def write_parquet(folder, rows, num_files=1):
    """Write rows to `num_files` Parquet files with an image column, and return the source."""
    for part in range(num_files):
        chosen = [
            {"text": row["text"], "images": [{"bytes": image, "path": None} for image in row["images"]]}
            for row in rows[part::num_files]
        ]
        datasets.Dataset.from_list(chosen, features=FEATURES).to_parquet(folder / f"{part}.parquet")
    return DataSource("parquet", data_files=str(folder / "*.parquet"))


def write_tars(folder, number, num_files=1):
    """Write captioned images as WebDataset tars, and return the source; row k has the key `k<k>`."""
    folder.mkdir(parents=True)
    for part in range(num_files):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for row in range(part, number, num_files):
                meta = json.dumps({"caption": f"n{row} a quiet harbour"}).encode()
                for extension, data in (("png", encoded_image(56, 28, seed=row)), ("json", meta)):
                    info = tarfile.TarInfo(f"k{row}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return DataSource(
        "webdataset", data_files=str(folder / "*.tar"), column_map={"text": "json.caption", "images": "png"}
    )
