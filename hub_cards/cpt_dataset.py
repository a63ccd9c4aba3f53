"""Data sets for continual pre-training from documents or captioned images, as a folder that is ready for the Hub."""

import hashlib
import logging
import os
import time
from itertools import islice
from pathlib import Path

from .cpt_documents import kind_of, list_documents, read_document
from .cpt_images import LEFT_OUT, Refusal, RefusedError
from .cpt_pdf import import_pypdfium2
from .cpt_progress import DIGEST_BYTES, REJECTED, Progress
from .cpt_shards import ShardWriter, row_bytes, shard_name
from .cpt_tables import FORMATS, check_table, read_table
from .dataset_card import write_dataset_card

logger = logging.getLogger(__name__)

# Fewer rows and images than this say nothing about the share of bad ones.
FEWEST_ITEMS = 100


def build_cpt_dataset(config):
    """Make a data set: Parquet files of `text` and `images`, a data set card, and a list of what was refused.

    Rows are made one at a time. A run that was killed goes on behind its last finished file when it is started again,
    and ends with the same bytes as if it had not been killed. A data set that is whole only gets its card anew.

    Args:
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): the settings.

    Returns:
        `pathlib.Path`: the folder: `data/*.parquet`, `README.md`, `rejected.jsonl`, `build_report.json`.

    Raises:
        ValueError: settings or files do not fit, nothing usable was found, or too much was refused.
        RefusedError: something cannot be used, with `on_bad_row="raise"`.
        ImportError: there are PDF files, and `pypdfium2` is not installed.

    Example:

    ```python
    >>> build_cpt_dataset(CPTDatasetConfig("pages-dataset", documents="pages", license="cc-by-4.0", language=["en"]))
    ```
    """
    output_dir = Path(config.output_dir)
    files = _list_files(config)
    settings = config.row_settings() | {"files": _fingerprint(config, files)}
    progress = Progress(output_dir, settings)
    if progress.report is not None:
        logger.info("%s is whole already; only its card is written.", output_dir)
    else:
        _Builder(config, files, progress).run()
    progress.clear()
    write_dataset_card(output_dir, progress.report, config)
    return output_dir


class _Builder:
    def __init__(self, config, files, progress):
        self.config, self.files, self.progress = config, files, progress
        self.position, self.shard = progress.position, None
        self.split, self.file = None, None

    def run(self):
        progress, position = self.progress, self.position
        if progress.is_resumed:
            num_shards = sum(map(len, position.shards.values()))
            logger.info("Going on behind %d finished files, at file %d.", num_shards, position.document)
        progress.open()
        start = time.perf_counter()
        try:
            while position.split < len(self.config.splits):
                self._make_split()
            self._check_share()
        except BaseException:
            if self.shard is not None:
                self.shard.abandon()
            raise
        finally:
            progress.close()
        if not any(position.shards.values()):
            raise ValueError(f"Nothing that can be used is in {len(self.files)} files; see {REJECTED}.")
        self._name_shards()
        progress.finish(self._report())
        seconds = time.perf_counter() - start
        logger.info(
            "%d rows and %d images from %d files in %.0f s; refused: %s; left out: %s.",
            position.counts.get("rows", 0),
            position.counts.get("images", 0),
            len(self.files),
            seconds,
            progress.counted("refused/") or "nothing",
            progress.counted("left_out/") or "nothing",
        )

    def _make_split(self):
        self.split = self.config.splits[self.position.split]
        while self.position.document < len(self.files):
            self.file = self.files[self.position.document]
            for outcome in self._outcomes():
                if isinstance(outcome, Refusal):
                    self._refuse(outcome)
                elif outcome is not None:
                    self._take(outcome)
                self.position.outcome += 1
            self.position.document += 1
            self.position.outcome = 0
        self._close_shard()
        self.position.split += 1
        self.position.document = 0
        # One write for both: a run that is killed before it makes the last file again, and it is the same.
        self.progress.save()

    def _outcomes(self):
        """Return rows and refusals of the file, from where reading goes on."""
        start = self.position.outcome
        if self.config.tables:
            return read_table(self.file, self.config, start, self._is_in_split)
        if not self._is_in_split(self.file):
            return ()
        return islice(read_document(self.file, self.config), start, None)

    def _is_in_split(self, key):
        """Tell whether what has this path or content (`str` or `bytes`) is in the split that is being made."""
        if not self.config.validation_share:
            return True
        key = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
        digest = hashlib.blake2b(key, digest_size=8, salt=str(self.config.seed % 10**16).encode()).digest()
        is_held_out = int.from_bytes(digest, "big") < self.config.validation_share * 2**64
        return is_held_out == (self.split == "validation")

    def _refuse(self, refusal):
        self.progress.reject(self.split, os.path.basename(self.file) if self.config.tables else self.file, refusal)
        if refusal.reason in LEFT_OUT:
            self.progress.count(f"left_out/{refusal.reason}")
            return
        self.progress.count(f"refused/{refusal.reason}")
        if self.config.on_bad_row == "raise":
            raise RefusedError(refusal.reason, refusal.message)
        counts = self.position.counts
        if counts.get("rows", 0) + counts.get("images", 0) + self._num_refused() >= FEWEST_ITEMS:
            self._check_share()

    def _num_refused(self):
        return sum(self.progress.counted("refused/").values())

    def _check_share(self):
        counts, most, num_refused = self.position.counts, self.config.max_bad_row_share, self._num_refused()
        number = counts.get("rows", 0) + counts.get("images", 0) + num_refused
        if num_refused > most * max(number, FEWEST_ITEMS):
            raise ValueError(
                f"{num_refused} of {number} rows and images cannot be used "
                f"({self.progress.counted('refused/')}), more than max_bad_row_share={most} allows; {REJECTED} names "
                "them."
            )

    def _take(self, row):
        digest = _digest(row) if self.config.dedupe else None
        if digest is not None and self.progress.has(digest):
            self._refuse(Refusal("duplicate", f"{row.source}, row {row.part}: the same text and images came before."))
            return
        if self.shard is not None and self.shard.num_bytes + row_bytes(row) > self.config.max_shard_bytes:
            self._close_shard()
            # Before anything of this row is remembered: it is the first one that a resumed run makes.
            self.progress.save()
        if digest is not None:
            self.progress.remember(digest)
        if self.shard is None:
            index = len(self.position.shards.setdefault(self.split, []))
            self.shard = ShardWriter(self.progress.build / f"{self.split}-{index:05d}.parquet")
        self.shard.add(row)
        for name, number in (
            ("rows", 1),
            ("images", len(row.images)),
            (f"rows/{_kind(self.file)}", 1),
            ("escaped_placeholders", row.num_escaped),
            ("cut_paragraphs", row.num_cut),
        ):
            self.progress.count(name, number)

    def _close_shard(self):
        if self.shard is not None:
            shard, self.shard = self.shard, None
            shards = self.position.shards[self.split]
            shards.append(shard.close())
            logger.info(
                "%s: file %d is finished, with %d rows and %d bytes; %d of %d sources read.",
                self.split,
                len(shards) - 1,
                shards[-1]["rows"],
                shards[-1]["file_bytes"],
                self.position.document,
                len(self.files),
            )

    def _name_shards(self):
        """Give the files the names that tell their number."""
        for split, shards in self.position.shards.items():
            for index in range(len(shards)):
                made = self.progress.build / f"{split}-{index:05d}.parquet"
                named = self.progress.output_dir / "data" / shard_name(split, index, len(shards))
                # It was named already if the run was killed while naming.
                if made.is_file() or not named.is_file():
                    os.replace(made, named)

    def _report(self):
        totals = {}
        for split, shards in self.position.shards.items():
            totals[split] = {name: sum(shard[name] for shard in shards) for name in shards[0]} | {"files": len(shards)}
        counts = self.position.counts
        return {
            "splits": totals,
            "num_sources": len(self.files),
            "rows_by_kind": self.progress.counted("rows/"),
            "refused": self.progress.counted("refused/"),
            "left_out": self.progress.counted("left_out/"),
            "escaped_placeholders": counts["escaped_placeholders"],
            "cut_paragraphs": counts["cut_paragraphs"],
        }


def _list_files(config):
    """Return what is read, in order: documents relative to their folder, or tables."""
    if config.tables:
        for path in config.tables:
            check_table(path, config)
        names = [os.path.basename(path) for path in config.tables]
        if len(set(names)) < len(names):
            raise ValueError(f"Tables need different names, for rows to tell where they are from: got {names}.")
        return list(config.tables)
    files = list_documents(config.documents)
    if not files:
        raise ValueError(f"documents={config.documents!r} holds no Markdown, HTML or PDF file.")
    if any(kind_of(name) == "pdf" for name in files):
        import_pypdfium2()
    return files


def _fingerprint(config, files):
    """Return a digest of names, sizes and times of the files that are read; images are not among them."""
    digest = hashlib.sha256()
    for name in files:
        path, shown = (name, os.path.basename(name)) if config.tables else (os.path.join(config.documents, name), name)
        status = os.lstat(path)
        digest.update(f"{shown}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return f"{len(files)} files, {digest.hexdigest()[:32]}"


def _digest(row):
    digest = hashlib.blake2b(row.text.encode(), digest_size=DIGEST_BYTES)
    for image in row.images:
        digest.update(hashlib.blake2b(image).digest())
    return digest.digest()


def _kind(name):
    return kind_of(name) or FORMATS[os.path.splitext(name)[1].lower()]


__all__ = ["build_cpt_dataset"]
