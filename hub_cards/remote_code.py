"""The code that an export carries, and the hashes that say of which version it is."""

import hashlib
import json
from importlib import metadata
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import modeling_moca
from modeling_moca import MoCaConfig

# In config.json, since every door reads this file first, and a change of it is a change of the model.
CONFIG_KEY = "remote_code"


def hash_file(path):
    """Return the SHA-256 of a file, in hexadecimal.

    Args:
        path (`str` or `os.PathLike`): read in parts, so that weights need no memory.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_code():
    """Return the files of this package's version that travel with a model, as transformers chooses them.

    Returns:
        `dict[str, str]`: SHA-256 by file name.
    """
    root = Path(modeling_moca.__file__).parent
    doors = {root / f"{target.split('.')[0]}.py" for target in MoCaConfig().auto_map.values()}
    files = {*doors, *(Path(name) for door in doors for name in get_relative_import_files(door))}
    return {path.name: hash_file(path) for path in sorted(files)}


def folder_code(folder):
    """Return the Python files in a folder.

    Args:
        folder (`pathlib.Path`): an export.

    Returns:
        `dict[str, str]`: SHA-256 by file name.
    """
    return {path.name: hash_file(path) for path in sorted(folder.glob("*.py"))}


def describe(files):
    """Return what `config.json` says of the code.

    Args:
        files (`dict[str, str]`): SHA-256 by file name.

    Returns:
        `dict`: `package`, `version`, `sha256` over all (what `sha256sum *.py | sha256sum` prints), and by file.
    """
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return {
        "package": "moca",
        "version": metadata.version("moca"),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "files": files,
    }


def write_code_hash(folder):
    """Write into `config.json` of which version the code in the folder is.

    Args:
        folder (`pathlib.Path`): holds the configuration and the code.

    Raises:
        ValueError: the code is not that of this package, as after `AutoModel.from_pretrained(...,
            trust_remote_code=True)` from another folder.
    """
    files, own = folder_code(folder), package_code()
    differing = sorted(name for name in {*files, *own} if files.get(name) != own.get(name))
    if differing:
        raise ValueError(
            f"The model brings code that is not that of the installed version {metadata.version('moca')}: {differing}. "
            "Load it with modeling_moca.MoCaModel.from_pretrained before the export."
        )
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, CONFIG_KEY: describe(files)}, indent=2) + "\n", encoding="utf-8")
