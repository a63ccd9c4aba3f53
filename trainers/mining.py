"""Hard negatives for stage 2: the documents that a model takes for a query's positive, and that are none."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .contrastive_mixture import PairMixture
from .contrastive_rows import open_side
from .mining_config import MiningConfig
from .mining_corpus import Corpus, find, positive_scores, unique
from .mining_embeddings import EmbeddingStore, model_fingerprint, processor_of
from .mining_rows import hash_rows, read_side, rejection, write_rows
from .mining_search import REFUSALS, blocks, search_negatives

logger = logging.getLogger(__name__)


class NegativeMiner:
    """Mine hard negatives for data sets of pairs, of text, images, or both.

    `sentence_transformers.util.mine_hard_negatives` does the same for texts, and its results are these wherever its
    candidates suffice; but it finds equal inputs by their Python hash, which images and dicts do not have, holds all
    texts and embeddings in memory, caches them only when all are encoded, filters a fixed number of candidates, and
    drops rows with fewer negatives. So rows, embeddings and search are this package's, and its rules are kept: unique
    queries, the least similar positive of a query counts for the margins, `range_min` counts what they leave.

    Contents are equal when texts (without surrounding white space) and encoded images are. Nothing that is a positive
    of an equal query in any of the data sets becomes its negative, nor what equals the query itself, and no document is
    a candidate twice.

    Args:
        config: what to mine.
        model: a `SentenceTransformer` for the kinds of inputs that the data sets have; see
            [`trainers.mining_embeddings.load_encoder`].

    Raises:
        ValueError: see `PairMixture`; a row is bad and `on_bad_row="raise"`; two data sets would share a file.

    Example:
        >>> source = PairSource("parquet", data_files="pages/*.parquet", layout="pages")
        >>> config = MiningConfig([source], output_dir="mined", model_name_or_path="output/stage2")
        >>> report = NegativeMiner(config, load_encoder(config)).mine()
    """

    def __init__(self, config: MiningConfig, model: Any) -> None:
        self.config, self.model = config, model
        self.output = Path(config.output_dir)
        self.pairs = PairMixture(config.datasets, seed=config.seed, num_proc=config.num_proc)
        self.documents = (
            PairMixture(config.corpus, seed=config.seed, num_proc=config.num_proc) if config.corpus else None
        )
        self.files = [re.sub(r"[^\w.-]+", "_", source.task).strip("_.") + ".parquet" for source in config.datasets]
        twice = [file for file, count in Counter(self.files).items() if count > 1]
        if twice:
            raise ValueError(f"Two data sets would be written to {twice[0]!r}: give them different names with `task`.")

    def mine(self) -> dict[str, Any]:
        """Encode what is not encoded yet, search, write the files, and return the report."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._fingerprint = model_fingerprint(self.model)
        self.hashed = [self._hash(self.pairs, index) for index in range(len(self.pairs.sources))]
        self._hashed_documents = [
            self._hash(self.documents, index) for index in range(len(self.documents.sources) if self.documents else 0)
        ]
        self._rejected = [row for hashed in self._hashed_documents for row in hashed.rejected]
        names = ("num_negatives", "range_min", "absolute_margin", "relative_margin")
        report = {name: getattr(self.config, name) for name in names}
        report |= {"model": self.config.model_name_or_path, "datasets": {}}
        for index, source in enumerate(self.pairs.sources):
            report["datasets"][source.task] = entry = self._mine_source(index)
            logger.info("data set %s: %s", source.task, entry)
        _write_text(self.output / "mining_report.json", json.dumps(report, indent=2) + "\n")
        # A document of `corpus` is met once a data set.
        lines = dict.fromkeys(json.dumps(row) + "\n" for row in self._rejected)
        _write_text(self.output / "rejected.jsonl", "".join(lines))
        _write_text(self.output / "datasets.yaml", yaml.safe_dump({"datasets": self._entries()}, sort_keys=False))
        return report

    def _hash(self, mixture, index):
        hashed = hash_rows(mixture.loaded[index], mixture.sources[index], self.config.num_proc)
        if hashed.rejected and self.config.on_bad_row == "raise":
            raise ValueError(hashed.rejected[0]["message"])
        return hashed

    def _mine_source(self, index):
        hashed, source = self.hashed[index], self.pairs.sources[index]
        entry = {"file": self.files[index], "rows": len(self.pairs.loaded[index])}
        if not len(hashed.rows):
            raise ValueError(f"Data set {source.task!r} has no row that can be used: see {hashed.rejected[:1]}.")
        query_keys, first_rows, query_of_row = unique(hashed.query_keys)
        queries = self._store(self.pairs, index, hashed.rows[first_rows], query_keys, 0, source)
        corpus = self._corpus(index)
        # What was found broken only when it was opened.
        positives = corpus.find(hashed.positive_keys)
        unusable = np.isin(query_of_row, list(queries.rejected)) | ~corpus.readable[positives]
        rejected = list(hashed.rejected)
        for row, query, positive in zip(
            *(array[unusable].tolist() for array in (hashed.rows, query_of_row, positives))
        ):
            reason, message = queries.rejected.get(query) or corpus.reason(positive)
            rejected.append(rejection(source, row, reason, message))
        self._rejected += rejected + corpus.rejected()
        entry["rejected_rows"] = dict(sorted(Counter(row["reason"] for row in rejected).items()))
        rows, query_of_row = hashed.rows[~unusable], query_of_row[~unusable]
        own = self._own_pairs(query_keys, corpus)
        found = self._search(queries, query_keys, own, corpus, np.unique(query_of_row))
        chosen = found["positions"][query_of_row]  # [R, K]
        write_rows(
            self.output / self.files[index],
            (
                [
                    read_side(self.pairs, index, int(row), 0),
                    read_side(self.pairs, index, int(row), 1),
                    *(None if position < 0 else corpus.side(position) for position in positions.tolist()),
                ]
                for row, positions in zip(rows, chosen)
            ),
            self.config.num_negatives,
        )
        return entry | self._count(index, rows, query_of_row, chosen, found, corpus)

    def _count(self, index, rows, query_of_row, chosen, found, corpus):
        num_rows, missing, _, cut = self.pairs.checked[index].tally
        per_row = (chosen >= 0).sum(1)
        scores = found["scores"][query_of_row]
        return {
            "written_rows": len(rows),
            "given_negatives_left_out": num_rows * self.pairs.sources[index].num_negatives - missing + cut,
            "different_queries": len(np.unique(query_of_row)),
            "documents": len(corpus.keys),
            "documents_unreadable": int((~corpus.readable).sum()),
            "negatives": int(per_row.sum()),
            "rows_with_fewer": int((per_row < self.config.num_negatives).sum()),
            "rows_with_none": int((per_row == 0).sum()),
            "refused": found["refused"],
            "skipped_by_range_min": found["skipped"],
            "mean_positive_score": _mean(found["positive_scores"][query_of_row]),
            "mean_negative_score": _mean(scores[chosen >= 0]),
        }

    def _store(self, mixture, index, rows, keys, column, source):
        """Encode one side of rows of a data set, with the instruction of the data set that is mined."""
        of, processor = mixture.sources[index], processor_of(self.model)
        name = ("query", "document")[column]

        def read(number):
            row = int(rows[number])
            place = f"Data set {of.task!r}, row {row}, {('query', 'positive')[column]}"
            opened = open_side(read_side(mixture, index, row, column), of, place, processor)
            # A text alone as a string: models for text take nothing else.
            return opened if "image" in opened else opened["text"]

        store = EmbeddingStore(
            self.config.embeddings_dir or self.output / "embeddings",
            self.model,
            self._fingerprint,
            name,
            (source.query_instruction, source.document_instruction)[column],
            keys,
            read,
            self.config.batch_size,
            self.config.shard_size,
        )
        num_encoded = store.encode()
        logger.info("%s: %d inputs of %s encoded, %d were there", of.task, num_encoded, name, len(keys) - num_encoded)
        if store.rejected and self.config.on_bad_row == "raise":
            raise ValueError(next(iter(store.rejected.values()))[1])
        return store

    def _corpus(self, index):
        source = self.pairs.sources[index]
        corpus = Corpus()
        groups = [(self.pairs, index, self.hashed[index])]
        groups += [(self.documents, number, hashed) for number, hashed in enumerate(self._hashed_documents)]
        for mixture, number, hashed in groups:
            if len(hashed.rows):
                keys, first_rows, _ = unique(hashed.positive_keys)
                rows = hashed.rows[first_rows]
                corpus.add(self._store(mixture, number, rows, keys, 1, source), mixture, number, rows, keys)
        corpus.finish()
        return corpus

    def _own_pairs(self, query_keys, corpus):
        """Return pairs of query and document, int64 of shape [2, P], ordered by query, from all data sets."""
        queries = find(query_keys, np.concatenate([hashed.query_keys for hashed in self.hashed]))
        documents = corpus.find(np.concatenate([hashed.positive_keys for hashed in self.hashed]))
        both = (queries >= 0) & (documents >= 0)
        return np.unique(np.stack([queries[both], documents[both]]), axis=1)

    def _search(self, queries, query_keys, own, corpus, wanted):
        """Search for the queries `wanted`; entries of the others are empty."""
        config, device = self.config, self.model.device
        shape = (queries.length, config.num_negatives)
        result = {"positions": np.full(shape, -1), "scores": np.full(shape, -np.inf, dtype=np.float32)}
        result |= {"positive_scores": np.zeros(queries.length, dtype=np.float32)}
        result |= {"refused": dict.fromkeys(REFUSALS, 0), "skipped": 0}
        equal_documents = corpus.find(query_keys)
        for start in range(0, len(wanted), config.query_block_size):
            block = wanted[start : start + config.query_block_size]
            vectors = queries.take(block).to(device)  # [Q, d]
            mine = own[:, np.isin(own[0], block)]
            pairs = (torch.from_numpy(np.searchsorted(block, mine[0])), torch.from_numpy(mine[1]))
            least_scores = positive_scores(vectors, *pairs, corpus)
            (with_equal,) = np.nonzero(equal_documents[block] >= 0)
            equal = (torch.from_numpy(with_equal), torch.from_numpy(equal_documents[block][with_equal]))
            found = search_negatives(
                vectors,
                blocks(corpus.read, len(corpus.keys), config.corpus_block_size),
                torch.from_numpy(corpus.readable),
                pairs,
                equal,
                least_scores,
                config.num_negatives,
                config.range_min,
                config.absolute_margin,
                config.relative_margin,
            )
            result["positions"][block], result["scores"][block] = found.positions.numpy(), found.scores.numpy()
            result["positive_scores"][block] = least_scores.cpu().numpy()
            for reason, number in found.num_refused.items():
                result["refused"][reason] += number
            result["skipped"] += found.num_skipped
        return result

    def _entries(self):
        """Return the written files as entries of stage 2's `datasets`."""
        negatives = [f"negative_{number + 1}" for number in range(self.config.num_negatives)]
        kept = ("query_instruction", "document_instruction", "kind", "weight", "batch_size")
        entries = []
        for source, file in zip(self.pairs.sources, self.files):
            entry = {"task": source.task, "path": "parquet", "data_files": str(self.output / file)}
            entry |= {"query": "query", "positive": "positive", "negatives": negatives, "num_negatives": len(negatives)}
            entry |= {name: getattr(source, name) for name in kept if getattr(source, name) is not None}
            entries.append(entry if source.distinct_positives else entry | {"distinct_positives": False})
        return entries


def _mean(values):
    return float(values.astype(np.float64).mean()) if values.size else None


def _write_text(path, text):
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


__all__ = ["NegativeMiner"]
