"""What an export says of itself, for `hub_cards.verify`: its files' hashes, and what it makes of a few fixed inputs."""

import base64
import io
import json
import logging
from fnmatch import fnmatch
from importlib import metadata

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from PIL import Image

from .load_check import EXPORT_RECORD, sentence_vectors, summarise
from .remote_code import hash_file

logger = logging.getLogger(__name__)

# May be edited after an export: none of them changes what a model makes of an input.
EDITABLE = ("README.md", "LICENSE", "LICENSE.*", "NOTICE", ".gitattributes", ".eval_results/*.yaml", "assets/*.png")

FIXED_INPUTS = {
    "text": [{"text": "a page about tides"}],
    "long text": [{"text": "The moon draws the sea towards it, and the shore sees two high waters a day. " * 3}],
    "image": [{"image": "upright"}],
    "image and text": [{"image": "wide"}, {"text": "Which part is the darkest?"}],
    "interleaved": [{"text": "First"}, {"image": "wide"}, {"text": "and then"}, {"image": "upright"}],
}


def fixed_images():
    """Return the pictures of the fixed inputs as PNG, in base64, by name.

    They are drawn from gradients, so that every patch differs from the next, and are kept in the record: another
    version of Pillow could draw them differently.
    """
    across, around = Image.linear_gradient("L"), Image.radial_gradient("L")
    channels = {"upright": (across, around, across.transpose(Image.Transpose.ROTATE_90))}
    channels["wide"] = (around, across.transpose(Image.Transpose.ROTATE_180), across)
    images = {}
    for name, size in (("upright", (56, 84)), ("wide", (84, 56))):
        file = io.BytesIO()
        Image.merge("RGB", channels[name]).resize(size).save(file, "PNG")
        images[name] = base64.b64encode(file.getvalue()).decode()
    return images


def write_record(out_dir, layout, model, published):
    """Write `moca_export.json`, which must be the last file of an export that is not [`EDITABLE`].

    Args:
        out_dir (`pathlib.Path`): the export.
        layout (`str`): of the export.
        model ([`modeling_moca.MoCaModel`]): the one in the export.
        published (`SentenceTransformer` or `MultiVectorEncoder`): the export, loaded from its own weights.

    Raises:
        ValueError: a vector is not finite in the model's dtype.
    """
    images, inputs = fixed_images(), []
    published.eval()
    for name, content in FIXED_INPUTS.items():
        entry = {"name": name, "content": content}
        try:
            vectors = sentence_vectors(published, {"images": images, "inputs": [entry]})[name]
        except ValueError as error:  # images that the processor's limits leave no room for
            logger.warning("The fixed input %r is not recorded: %s", name, error)
            continue
        if not vectors.isfinite().all():
            raise ValueError(
                f"The model's vector of the fixed input {name!r} is not finite in {model.dtype}: its activations leave "
                "the range of this dtype. Export it in another."
            )
        inputs.append({**entry, "embedding": summarise(vectors)})
    versions = {
        package: metadata.version(package) for package in ("moca", "torch", "transformers", "sentence-transformers")
    }
    record = {
        "layout": layout,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bidirectional": model.config.bidirectional,
        "versions": versions,
        "files": {name: hash_file(out_dir / name) for name in published_files(out_dir) if not is_editable(name)},
        "images": images,
        "inputs": inputs,
    }
    (out_dir / EXPORT_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def published_files(folder):
    """Return the names of the files in a folder that an upload would take, in order.

    Args:
        folder (`pathlib.Path`): an export; the Hub client's own `.git` and `.cache/huggingface` are left out.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return list(filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS))


def is_editable(name):
    """Tell whether a file may differ from what was exported (`name`: relative to the folder)."""
    return any(fnmatch(name, pattern) for pattern in EDITABLE)
