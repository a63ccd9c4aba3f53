"""Push a published folder, or a data set, to the Hub.

python -m hub_cards.push moca-3b org/moca-3b --dry-run
python -m hub_cards.push moca-3b org/moca-3b --tag v1
python -m hub_cards.push pages org/pages --repo-type dataset --public

A repository that does not exist yet is private unless `--public` is given. A push that was cut off goes on where it was
when it is started again.
"""

import argparse
import logging
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

# What a folder of this type holds at least.
NEEDED = {
    "model": ("README.md", "config.json", "*.safetensors"),
    "dataset": ("README.md", "*.parquet"),
}
# Formats that are, or may hold, pickles: a load of them runs what they say.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz", "*.dill")
TRAINING_LEFTOVERS = (
    "checkpoint-*/*",
    "converted/*",
    "global_step*/*",
    "runs/*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "run_state_*",
    "trainer_state.json",
    "rejected.jsonl",
    "COMPLETE",
)
# Hidden files and folders (.git, .env, .cache), what an editor or Python leaves, and what was begun and not finished.
STRAY = (".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "*.pyc", "*~", "*.tmp", "*.incomplete", "*.lock")
REFUSED = {
    "model": {"pickle": PICKLES, "leftover of training": TRAINING_LEFTOVERS, "stray file": STRAY},
    "dataset": {"pickle": PICKLES, "stray file": STRAY},
}
ALLOWED_ANYWAY = (".gitattributes",)
# The Hub decides what it stores as LFS: files of these types and large ones.
LFS_SUFFIXES = frozenset(
    ".7z .arrow .bz2 .gz .h5 .jpeg .jpg .model .mp4 .msgpack .onnx .parquet .pb .pdf .png .rar .safetensors .tar "
    ".tflite .tgz .wasm .wav .webp .xz .zip .zst".split()
)
LFS_SIZE = 10 * 1024 * 1024


@dataclass(frozen=True)
class PushedFile:
    """A file that is pushed.

    Args:
        path (`str`): relative to the folder, with forward slashes.
        size (`int`): bytes.
        lfs (`bool`): whether the Hub's usual rules store it as LFS.
    """

    path: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Push:
    """What was pushed, or would be.

    Args:
        repo_id (`str`), repo_type (`str`): the repository.
        files (`list[PushedFile]`): all files of the folder.
        commit_url, sha (`str` or None): the commit; None of a dry run.
    """

    repo_id: str
    repo_type: str
    files: list
    commit_url: str | None = None
    sha: str | None = None

    @property
    def total_size(self):
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def push(
    folder,
    repo_id,
    *,
    repo_type="model",
    private=True,
    revision=None,
    tag=None,
    commit_message=None,
    dry_run=False,
    token=None,
):
    """Upload a folder as it is, after a check that everything in it belongs on the Hub.

    When it is cut off, the same call goes on: files that the Hub has are not sent again (with `hf_xet` installed, parts
    of files either, and many files become several commits).

    Args:
        folder (`str` or `os.PathLike`): an export ([`export`]), or a data set in Parquet files with its card.
        repo_id (`str`): `"owner/name"`. Created if it does not exist.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.
        private (`bool`, defaults to `True`): whether a new repository is private; one that exists stays as it is.
        revision (`str`, *optional*): branch, which is created from `main` if it does not exist; `main` when omitted.
        tag (`str`, *optional*): a name for the commit, which must be new.
        commit_message (`str`, *optional*): by default names the folder.
        dry_run (`bool`, defaults to `False`): only check and list; nothing is sent or asked.
        token (`str`, *optional*): with the right to write; the one of `hf auth login` or `HF_TOKEN` when omitted.

    Returns:
        [`Push`]

    Raises:
        ValueError: the id, type, branch or tag is none, the folder lacks files, or holds some that do not belong:
            pickles, leftovers of training, hidden files. Before anything is sent.

    Example:

    ```python
    >>> push("moca-3b", "org/moca-3b", dry_run=True).total_size
    >>> push("moca-3b", "org/moca-3b", tag="v1").sha
    ```
    """
    _check_names(repo_id, repo_type, revision=revision, tag=tag)
    found = Push(repo_id, repo_type, check_folder(folder, repo_type))
    if dry_run:
        return found
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}:
        raise ValueError(f"{repo_id} has a tag {tag!r} already: give another one, or delete it on the Hub.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type=repo_type,
        revision=revision,
        commit_message=commit_message or f"Upload {Path(folder).resolve().name}",
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=repo_type)
    return Push(repo_id, repo_type, found.files, commit.commit_url, commit.oid)


def check_folder(folder, repo_type="model"):
    """Return the files of a folder that is fit to be pushed.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.

    Returns:
        `list[PushedFile]`, by path.

    Raises:
        ValueError: it is no folder, lacks what it needs, or holds what does not belong; all of it is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to push.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    refused = {}
    for name, path in paths.items():
        if name in ALLOWED_ANYWAY:
            continue
        reasons = [reason for reason, patterns in REFUSED[repo_type].items() if _matches(name, patterns)]
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            reasons.append("link to a file elsewhere")
        if reasons:
            refused[name] = reasons[0]
    if refused:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(refused.items())[:20])
        more = f", and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(
            f"{folder} holds {len(refused)} files that do not belong on the Hub: {named}{more}. Push what "
            "examples/export.py writes, or remove them."
        )
    missing = [pattern for pattern in NEEDED[repo_type] if not any(_matches(name, (pattern,)) for name in paths)]
    if missing:
        raise ValueError(f"{folder} lacks {missing}: this is no {repo_type} to push.")
    return [_described(name, path.stat().st_size) for name, path in paths.items()]


def _matches(name, patterns):
    """Tell whether a path or its last part fits one of the patterns."""
    return any(fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)


def _described(name, size):
    return PushedFile(name, size, size > 0 and (size > LFS_SIZE or Path(name).suffix.lower() in LFS_SUFFIXES))


def _check_names(repo_id, repo_type, **refs):
    if repo_type not in NEEDED:
        raise ValueError(f"repo_type must be one of {list(NEEDED)}, got {repo_type!r}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be 'owner/name', got {repo_id!r}: say whose repository it is.")
    for name, value in refs.items():
        # A part of what git forbids, and what the Hub would take for a commit.
        if value is not None and (not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", value) or value.startswith(("refs/", "-"))):
            raise ValueError(f"{name} must be a plain name such as 'v1', got {value!r}.")


def report(pushed):
    """Log what was pushed, or would be: a line a file, the total, the address.

    Args:
        pushed ([`Push`]): what [`push`] returned.
    """
    for file in pushed.files:
        logger.info("%14s  %-7s  %s", f"{file.size:,}", "LFS" if file.lfs else "regular", file.path)
    logger.info("%14s  bytes in %d files", f"{pushed.total_size:,}", len(pushed.files))
    if pushed.sha is None:
        logger.info("Dry run: nothing was sent to %s %s.", pushed.repo_type, pushed.repo_id)
    else:
        logger.info("Pushed to %s, revision %s.", pushed.commit_url, pushed.sha)


def main(arguments=None):
    """Run the command line.

    Args:
        arguments (`list[str]`, *optional*): those of the process when omitted.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    # Only what this command says: HTTP clients log every request.
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        prog="python -m hub_cards.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what examples/export.py wrote, or a data set")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--repo-type", default="model", choices=list(NEEDED))
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=True, help="a new repository is private; default")
    visibility.add_argument("--public", dest="private", action="store_false", help="a new repository is public")
    parser.add_argument("--revision", help="branch, created if it does not exist; main when omitted")
    parser.add_argument("--tag", help="a new name for the commit, for example v1")
    parser.add_argument("--message", dest="commit_message", help="commit message")
    parser.add_argument("--dry-run", action="store_true", help="check and list only, without the network")
    args = vars(parser.parse_args(arguments))
    try:
        pushed = push(args.pop("folder"), args.pop("repo_id"), **args)
    except ValueError as error:
        parser.error(str(error))
    report(pushed)


if __name__ == "__main__":
    main()
