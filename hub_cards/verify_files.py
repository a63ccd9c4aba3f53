"""Look at the files of an export without running or unpickling anything."""

import json
import re
from fnmatch import fnmatch
from importlib import metadata

from safetensors import SafetensorError, safe_open

from .load_check import EXPORT_RECORD
from .record import EDITABLE, is_editable, published_files
from .remote_code import CONFIG_KEY, describe, folder_code, hash_file, package_code

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Everything that an export may hold, beside the code that its configuration lists and what may be edited.
ALLOWED = (
    EXPORT_RECORD,
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
    "[0-9]_Dense/model.safetensors",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    WEIGHTS,
    INDEX,
    "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
)
NEEDED = (
    EXPORT_RECORD,
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "processor_config.json",
    "tokenizer_config.json",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill")
# A pickle by any other name: protocol 2 to 5, a zip archive as torch.save writes it, an array of numpy.
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_record(folder):
    """Return what an export recorded of itself (`dict`), from `folder` (`pathlib.Path`)."""
    return json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))


def check_files(folder):
    """Return what is wrong with the files of an export, each with the file's name (`list[str]`).

    Args:
        folder (`pathlib.Path`): the export.
    """
    names = published_files(folder)
    missing = [f"{name}: is missing" for name in NEEDED if name not in names]
    broken = _check_json(folder, names)
    if missing or broken:
        return missing + broken + _check_stray(folder, names, {})
    config, record = _read(folder / "config.json"), read_record(folder)
    problems = []
    # Each with the file that it takes to be of the right shape.
    for source, check in (
        ("config.json", lambda: _check_stray(folder, names, (config.get(CONFIG_KEY) or {}).get("files", {}))),
        ("config.json", lambda: _check_code(folder, config)),
        (EXPORT_RECORD, lambda: _check_hashes(folder, names, record)),
        ("modules.json", lambda: _check_modules(folder)),
        (INDEX, lambda: _check_weights(folder, record["dtype"])),
    ):
        try:
            problems += check()
        except (AttributeError, KeyError, TypeError) as error:
            problems.append(f"{source}: is not as an export writes it: {error!r}")
    return problems


def check_own_code(folder):
    """Return the files of code that are not those of the installed version (`list[str]`).

    Args:
        folder (`pathlib.Path`): an export in which [`check_files`] found nothing.
    """
    theirs, own = folder_code(folder), package_code()
    version = _read(folder / "config.json")[CONFIG_KEY]["version"]
    return [
        f"{name}: is the code of version {version}, not that of the installed {metadata.version('moca')}; "
        "--trust-remote-code runs it all the same"
        for name in sorted({*theirs, *own})
        if theirs.get(name) != own.get(name)
    ]


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _check_json(folder, names):
    problems = []
    for name in names:
        if name.endswith(".json"):
            try:
                _read(folder / name)
            except ValueError as error:
                problems.append(f"{name}: is not JSON: {error}")
    return problems


def _check_stray(folder, names, code):
    problems = []
    for name in names:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is neither a file nor a folder")
        elif name.endswith(PICKLES):
            problems.append(f"{name}: may hold a pickle; weights are kept in safetensors files only")
        elif not name.endswith(".safetensors") and path.open("rb").read(8).startswith(PICKLE_STARTS):
            problems.append(f"{name}: is a pickle or an archive")
        elif name not in code and not any(fnmatch(name, pattern) for pattern in (*ALLOWED, *EDITABLE)):
            problems.append(f"{name}: does not belong into an export")
    return problems


def _check_code(folder, config):
    """Check the code against the hashes in the configuration, and that no door leads elsewhere."""
    said = config.get(CONFIG_KEY)
    if not said:
        return [f"config.json: does not say of which version the code is ({CONFIG_KEY})"]
    found = folder_code(folder)
    problems = [
        f"{name}: {'is missing' if name not in found else 'is not the code that config.json lists'}"
        for name in sorted({*found, *said["files"]})
        if found.get(name) != said["files"].get(name)
    ]
    if describe(said["files"])["sha256"] != said["sha256"]:
        problems.append("config.json: the hash over all files of code is not that of the listed hashes")
    for path in sorted(folder.glob("*.json")):
        for target in _doors(_read(path)):
            module, _, rest = target.partition(".")
            if f"{module}.py" not in said["files"] or not rest.isidentifier():
                problems.append(f"{path.name}: auto_map leads to {target!r}, which is no code of this export")
    return problems


def _doors(content):
    """Yield the classes that `auto_map`, at any depth of a JSON file, leads to."""
    if isinstance(content, list):
        for value in content:
            yield from _doors(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key != "auto_map":
                yield from _doors(value)
                continue
            for target in value.values() if isinstance(value, dict) else [value]:
                yield from (str(name) for name in (target if isinstance(target, list) else [target]) if name)


def _check_hashes(folder, names, record):
    said = record.get("files", {})
    problems = [f"{name}: is missing" for name in sorted(said) if name not in names]
    for name in names:
        if is_editable(name) or name == EXPORT_RECORD:
            continue
        if name not in said:
            problems.append(f"{name}: was not there when the model was exported")
        elif hash_file(folder / name) != said[name]:
            problems.append(f"{name}: is not what was exported (SHA-256 in {EXPORT_RECORD})")
    return problems


def _check_modules(folder):
    """Refuse modules that are not sentence-transformers' own: it would import them."""
    return [
        f"modules.json: {module.get('type')!r} is no module of sentence-transformers"
        for module in _read(folder / "modules.json")
        if not re.match(r"sentence_transformers\.", str(module.get("type")))
    ]


def _check_weights(folder, dtype):
    """Check that weights are whole, of one dtype, and those that the index lists."""
    problems, tensors = [], {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                dtypes = {DTYPES.get(found, found) for found in (file.get_slice(name).get_dtype() for name in names)}
        except SafetensorError as error:
            problems.append(f"{path.name}: is no whole safetensors file: {error}")
            continue
        tensors[path.name] = set(names)
        if dtypes - {dtype}:
            problems.append(f"{path.name}: holds {sorted(dtypes)}, exported was {dtype}")
    if not (folder / INDEX).is_file():
        if not problems and set(tensors) != {WEIGHTS}:
            problems.append(f"{WEIGHTS}: without {INDEX} it must be the only file of weights, found {sorted(tensors)}")
        return problems
    listed = {}
    for name, shard in _read(folder / INDEX)["weight_map"].items():
        listed.setdefault(shard, set()).add(name)
    for shard in sorted({*listed, *tensors}):
        if shard not in tensors:
            problems.append(f"{shard}: {INDEX} lists it, and it is missing or broken")
        elif differing := sorted(listed.get(shard, set()) ^ tensors[shard]):
            problems.append(f"{shard}: holds other tensors than {INDEX} lists, {differing[0]} for one")
    return problems
