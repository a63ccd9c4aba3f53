"""How far the making of a data set has come, kept beside its shards so that a killed run goes on."""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cpt_shards import sync

BUILD, STATE, SEEN = ".build", "state.json", "seen.bin"
REJECTED, REPORT = "rejected.jsonl", "build_report.json"
DIGEST_BYTES = 16


@dataclass
class Position:
    """Where reading goes on, and what was counted until there.

    Args:
        split (`int`): which split is being made.
        document (`int`): which file is being read.
        outcome (`int`): rows and refusals of the file that are done.
        shards (`dict`): for every split, what is in each finished file.
        counts (`dict`): see [`Progress.count`].
        rejected_bytes, seen_bytes (`int`): lengths of the two files that grow.
    """

    split: int = 0
    document: int = 0
    outcome: int = 0
    shards: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)
    rejected_bytes: int = 0
    seen_bytes: int = 0


class Progress:
    """The folder of a data set in the making: its position, `rejected.jsonl`, and digests of rows for deduplication.

    Args:
        output_dir (`pathlib.Path`): folder of the data set.
        settings (`dict`): what decides about the rows; a run goes on with the same only.

    Raises:
        ValueError: the folder holds something else, or was begun with other settings or files.
    """

    def __init__(self, output_dir, settings):
        self.output_dir, self.build = output_dir, output_dir / BUILD
        # As JSON gives them back.
        self._settings = json.loads(json.dumps(settings))
        self.position, self.is_resumed, self.report = Position(), False, None
        if (output_dir / REPORT).is_file():
            self.report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
            self._compare(self.report["settings"])
        elif (self.build / STATE).is_file():
            saved = json.loads((self.build / STATE).read_text(encoding="utf-8"))
            # Without a finished file there is nothing to go on from, and settings may change.
            if saved["position"]["shards"]:
                self._compare(saved["settings"])
                self.position, self.is_resumed = Position(**saved["position"]), True
        elif not self.build.is_dir() and output_dir.exists() and any(output_dir.iterdir()):
            raise ValueError(f"{output_dir} is not empty, and no data set in the making: give a new folder.")

    def open(self):
        """Take the folder back to the position: what was written later is of a run that was killed."""
        self.build.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "data").mkdir(exist_ok=True)
        if not self.is_resumed:
            self.save()
        for path in self.build.glob("*.unfinished"):
            path.unlink()
        self._rejected = _cut(self.output_dir / REJECTED, self.position.rejected_bytes)
        self._seen = _cut(self.build / SEEN, self.position.seen_bytes)
        digests = (self.build / SEEN).read_bytes()
        self._digests = {digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)}

    def has(self, digest):
        """Tell whether the digest of a row (`bytes`) is remembered."""
        return digest in self._digests

    def remember(self, digest):
        """Remember the digest of a row (`bytes`)."""
        self._digests.add(digest)
        self._seen.write(digest)

    def reject(self, split, source, refusal):
        """Add a line to `rejected.jsonl`.

        Args:
            split (`str`): split that is being made.
            source (`str`): file.
            refusal ([`hub_cards.cpt_images.Refusal`]): reason and message.
        """
        line = {"split": split, "file": source, "reason": refusal.reason, "message": refusal.message}
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._rejected.write(text.encode("utf-8", "backslashreplace"))

    def count(self, name, number=1):
        """Count.

        Args:
            name (`str`): what.
            number (`int`, defaults to 1): how many.
        """
        self.position.counts[name] = self.position.counts.get(name, 0) + number

    def counted(self, prefix):
        """Return the counts whose names begin with `prefix` (`str`), without it, the largest first."""
        found = {name[len(prefix) :]: n for name, n in self.position.counts.items() if name.startswith(prefix)}
        return dict(Counter(found).most_common())

    def save(self):
        """Write the position, after everything that it speaks of is on the disk."""
        for name, file in (("rejected_bytes", "_rejected"), ("seen_bytes", "_seen")):
            if hasattr(self, file):
                getattr(self, file).flush()
                os.fsync(getattr(self, file).fileno())
                setattr(self.position, name, getattr(self, file).tell())
        write_json(self.build / STATE, {"settings": self._settings, "position": asdict(self.position)})

    def close(self):
        """Close the files that grow."""
        self._rejected.close()
        self._seen.close()

    def finish(self, report):
        """Say that the data set is whole (`report`: `dict`)."""
        self.report = {"settings": self._settings, **report}
        write_json(self.output_dir / REPORT, self.report)

    def clear(self):
        """Remove what only a run that goes on needs."""
        shutil.rmtree(self.build, ignore_errors=True)

    def _compare(self, saved):
        names = sorted(set(saved) | set(self._settings))
        changed = [name for name in names if saved.get(name) != self._settings.get(name)]
        if changed:
            told = ", ".join(f"{name} (was {saved.get(name)!r}, is {self._settings.get(name)!r})" for name in changed)
            raise ValueError(f"{self.output_dir} was begun with other settings or files: {told}. Give a new folder.")


def write_json(path, content):
    """Write a JSON file that is there as a whole or not at all.

    Args:
        path (`pathlib.Path`): the file.
        content (`dict`): what to write.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _cut(path: Path, length):
    """Open a file that grows, without what is behind `length`."""
    path.touch()
    os.truncate(path, length)
    return path.open("ab")


__all__ = ["BUILD", "DIGEST_BYTES", "REJECTED", "REPORT", "Position", "Progress", "write_json"]
