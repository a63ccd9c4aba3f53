"""Small interleaved rows for the tests of continual pre-training."""

import io
import random

from PIL import Image

from tests.tiny import IMAGE

WORDS = "the page shows a picture of the sea and the sky over quiet hills near an old town".split()


def encoded_image(width, height, seed=0, format="PNG"):
    """Return the bytes of a picture of four coloured fields: something a small model can learn."""
    colours = random.Random(seed)
    image = Image.new("RGB", (width, height))
    for x in range(2):
        for y in range(2):
            colour = tuple(colours.randrange(256) for _ in range(3))
            image.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def make_row(seed=0, num_words=12, num_images=1):
    """Return one row; its images, 28 to 84 pixels a side, are spread through the text."""
    chance = random.Random(seed)
    words = [chance.choice(WORDS) for _ in range(num_words)]
    for number in range(num_images):
        words.insert(number * 3, IMAGE)
    sides = (28, 56, 84)
    images = [
        encoded_image(chance.choice(sides), chance.choice(sides), seed=seed + number) for number in range(num_images)
    ]
    return {"text": " ".join(words), "images": images}


def make_rows(number, images=(1, 0, 2, 1)):
    """Return rows of differing lengths with 1, 0, 2, 1, 1, 0, ... images."""
    return [make_row(seed, 6 + 5 * (seed % 4), images[seed % len(images)]) for seed in range(number)]
