"""Rate of the input pipeline of stage 1, beside bare decoding and resizing of the same images, in images a second.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --data "rows/*.parquet" --processor Qwen/Qwen2.5-VL-3B-Instruct --workers 1 2 4

"bare" opens, decodes and resizes (with Pillow) every image on one thread, and does nothing else. "pipeline" is all that
a worker of the trainer does with the same rows: reading, checking, tokenising, batching by cost, decoding, resizing
(with torch's filter, or with `--exact_resize` with Pillow too), choosing what is masked. "stock" is bare, with the
stock image processor in the place of the resize. With workers, bare runs in as many processes. Rows are read again and
again for `--seconds`; the best of `--repeats` rounds counts, as others may use the machine.
"""

import argparse
import io
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from PIL import Image, ImageFilter
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_moca import MoCaProcessor
from modeling_moca.chat_moca import PLACEHOLDER
from trainers.batch_loader import make_loader
from trainers.cpt_collator import CPTCollator
from trainers.cpt_config import CPTConfig
from trainers.cpt_loader import MixtureBatches
from trainers.cpt_mixture import CPTMixture, DataSource

TOKEN_AREA = 28 * 28


def make_rows(folder, number, seed=0):
    """Write captioned pictures with the sizes and the detail of photographs (JPEG, about 0.3 megapixels)."""
    chance = random.Random(seed)
    rows = []
    for _ in range(number):
        width, height = chance.randint(400, 800), chance.randint(400, 800)
        coarse = Image.effect_noise((width // 8, height // 8), 90).resize((width, height), Image.BICUBIC)
        fine = Image.effect_noise((width, height), 30).filter(ImageFilter.GaussianBlur(1))
        image = Image.merge("RGB", (coarse, fine, Image.blend(coarse, fine, 0.5)))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        caption = " ".join(chance.choice("a quiet harbour with boats under the evening sky".split()) for _ in range(40))
        rows.append({"text": PLACEHOLDER + caption, "images": [buffer.getvalue()]})
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def bare(images, limits, seconds, processor=None):
    """Return images a second of decoding and resizing, or of decoding and the stock image processor."""
    torch.set_num_threads(1)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        image = Image.open(io.BytesIO(images[number % len(images)]))
        image.load()
        image = image.convert("RGB")
        if processor is None:
            height, width = smart_resize(image.height, image.width, factor=28, **limits)
            image.resize((width, height), Image.BICUBIC)
        else:
            processor(images=[image], return_tensors="pt")
        number += 1
    return number / (time.perf_counter() - start)


def bare_in_processes(images, limits, seconds, number):
    """Return the sum of the rates of several processes."""
    with multiprocessing.get_context("fork").Pool(number) as pool:
        return sum(pool.starmap(bare, [(images, limits, seconds)] * number))


def pipeline(mixture, processor, num_workers, seconds, arguments):
    """Return images a second of the trainer's loader, once it is going."""
    torch.set_num_threads(1)
    config = CPTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        report_to="none",
        max_cost=arguments.max_cost,
        shuffle_window=arguments.window,
        dataloader_num_workers=num_workers,
    )
    collator = CPTCollator(processor, max_length=2048, on_bad_row="raise", exact_resize=arguments.exact_resize)
    batches = MixtureBatches(mixture, collator, config)
    loader = iter(make_loader(batches, config))
    # The window is filled, and workers are started, once in a run.
    for _ in range(1 + 3 * num_workers):
        next(loader)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        inputs = next(loader)["inputs"]
        number += len(inputs.get("image_grid_thw", ()))
    rate = number / (time.perf_counter() - start)
    del loader
    return rate


def main():
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Parquet files with the columns text and images; made up when omitted")
    parser.add_argument("--processor", help="checkpoint of tokenizer and image processor; the demo's when omitted")
    parser.add_argument("--min_tokens", type=int, default=256, help="smallest image")
    parser.add_argument("--max_tokens", type=int, default=1024, help="largest image")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--max_cost", type=int, default=12_800, help="cost of a micro-batch")
    parser.add_argument("--window", type=int, default=64, help="rows a reader holds")
    parser.add_argument("--exact_resize", action="store_true", help="resize with Pillow in the pipeline too")
    arguments = parser.parse_args()

    limits = {"min_pixels": arguments.min_tokens * TOKEN_AREA, "max_pixels": arguments.max_tokens * TOKEN_AREA}
    backbone = arguments.processor or str(Path(__file__).resolve().parents[1] / "examples" / "demo_backbone")
    processor = MoCaProcessor.from_backbone(backbone, **limits)
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.data or make_rows(Path(folder), 200)
        mixture = CPTMixture([DataSource("parquet", data_files=files)])
        images = [
            image["bytes"] if isinstance(image, dict) else image
            for row in mixture.read(num_epochs=1)
            for image in row.content["images"]
        ]
        megapixels = sum(size[0] * size[1] for size in (Image.open(io.BytesIO(image)).size for image in images)) / 1e6
        print(
            f"{len(images)} images of {megapixels / len(images):.2f} megapixels, {limits}, best of {arguments.repeats}"
        )
        rounds = [
            (
                bare(images, limits, arguments.seconds),
                pipeline(mixture, processor, 0, arguments.seconds, arguments),
                bare(images, limits, arguments.seconds, processor.image_processor),
            )
            for _ in range(arguments.repeats)
        ]
        plain, ours, stock = (max(rates) for rates in zip(*rounds))
        print(f"bare     {plain:8.1f}/s")
        print(f"pipeline {ours:8.1f}/s   {ours / plain:.2f} x bare")
        print(f"stock    {stock:8.1f}/s   {stock / plain:.2f} x bare")
        for number in arguments.workers:
            rounds = [
                (
                    bare_in_processes(images, limits, arguments.seconds, number),
                    pipeline(mixture, processor, number, arguments.seconds, arguments),
                )
                for _ in range(arguments.repeats)
            ]
            many, ours_many = (max(rates) for rates in zip(*rounds))
            print(
                f"{number} workers: bare {many:8.1f}/s, pipeline {ours_many:8.1f}/s   {ours_many / many:.2f} x bare, "
                f"{ours_many / ours:.2f} x no worker"
            )


if __name__ == "__main__":
    main()
