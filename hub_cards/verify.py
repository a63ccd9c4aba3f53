"""Check that an export is what it says: its files, its code, and what it makes of a few fixed inputs.

    python -m hub_cards.verify DIR_OR_REPO [--revision REVISION] [--trust-remote-code]

First the files are looked at, without running or unpickling anything; then, if nothing is wrong, the export is loaded
as its users do, in a process of its own that knows nothing of this package, with an empty cache and without a network.
Code of another version than the installed one is not run unless `--trust-remote-code` is given. Exit status 0 or 1.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download

from . import load_check
from .verify_files import check_files, check_own_code, read_record

logger = logging.getLogger(__name__)

# Largest distance of two unit vectors that stand for the same, over versions and machines.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
# Where a process would find caches, credentials and code other than the export's.
OWN_PLACES = ("HF_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "HUGGING", "XDG_CACHE_HOME", "PYTHONPATH")


def verify(name, *, revision=None, trust_remote_code=False):
    """Check an export, in a folder or on the Hub.

    Args:
        name (`str` or `os.PathLike`): a folder, or else a Hub id, which is downloaded into the usual cache
            (`HF_ENDPOINT` says from where).
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        trust_remote_code (`bool`, defaults to `False`): run the export's code although it is that of another version.
            Code that is not what the export itself says, or that may not be there at all, is never run.

    Returns:
        `dict[str, float]`: largest distance from the recorded vectors, by door.

    Raises:
        ValueError: lists everything that is wrong, by file.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision))
    elif revision is not None:
        raise ValueError(f"{name} is a folder, which has no revision {revision!r}.")
    problems = check_files(folder)
    if not problems and not trust_remote_code:
        problems = check_own_code(folder)
    if problems:
        raise ValueError(_listed(name, [*problems, "its code was not run"]))
    problems, distances = _check_loading(folder)
    if problems:
        raise ValueError(_listed(name, problems))
    return distances


def _listed(name, problems):
    return "\n".join([f"{name} is not a sound export:", *(f"- {problem}" for problem in problems)])


def _check_loading(folder):
    """Run the check in a clean process; return problems and the largest distance by door."""
    record = read_record(folder)
    with tempfile.TemporaryDirectory() as home:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OWN_PLACES)}
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = Path(home) / "result.json"
        # -P: neither the script's folder nor the current one is searched for modules.
        command = [sys.executable, "-P", load_check.__file__, str(folder.resolve()), str(result)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        if done.returncode or not result.is_file():
            last = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
            return [f"it does not load: {last[0]}"], {}
        found = json.loads(result.read_text(encoding="utf-8"))
    problems, most = found["problems"], TOLERANCE[record["dtype"]]
    for door, distances in found["distances"].items():
        problems += [
            f"{load_check.EXPORT_RECORD}: {door} gives another vector of the input {name!r} than was recorded: they "
            f"are {distance:.2g} apart, at most {most:.2g} is allowed in {record['dtype']}"
            for name, distance in distances.items()
            if not distance <= most
        ]
    return problems, {door: max(distances.values()) for door, distances in found["distances"].items()}


def main(arguments=None):
    """Check what the command line names, and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(
        "python -m hub_cards.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="DIR_OR_REPO", help="a folder, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the export's code although it is of another version"
    )
    args = parser.parse_args(arguments)
    try:
        distances = verify(args.name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError) as error:  # the latter: a repository that cannot be downloaded
        logger.error("%s", error)
        return 1
    for door, distance in distances.items():
        logger.info("%s: vectors as recorded, at most %.2g apart", door, distance)
    logger.info("%s is a sound export.", args.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
