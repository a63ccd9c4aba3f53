"""The documents that hard negatives are chosen from, and their contents' hashes."""

from __future__ import annotations

import numpy as np
import torch

from .mining_rows import read_side, rejection


class Corpus:
    """Different documents of several data sets, one after another: `add` each, then `finish`, then ask."""

    def __init__(self):
        self._parts, self.keys = [], np.empty(0, dtype=np.int64)

    def add(self, store, mixture, index, rows, keys):
        """Append those documents of a data set that are not there yet.

        Args:
            store ([`trainers.mining_embeddings.EmbeddingStore`]): their embeddings, all encoded.
            mixture ([`trainers.PairMixture`]), index (`int`): the data set they are of.
            rows (`np.ndarray`): the row of each document, int64 of shape [M].
            keys (`np.ndarray`): hashes of their contents, all different, int64 of shape [M].
        """
        new = np.flatnonzero(~np.isin(keys, self.keys))
        self._parts.append((len(self.keys), store, mixture, index, rows, new))
        self.keys = np.concatenate([self.keys, keys[new]])

    def finish(self):
        """Prepare for questions."""
        self._starts = np.array([start for start, *_ in self._parts])
        self.readable = np.ones(len(self.keys), dtype=bool)
        for start, store, _, _, _, new in self._parts:
            self.readable[start : start + len(new)] = ~np.isin(new, list(store.rejected))

    def find(self, keys):
        """Return the positions of documents, -1 where there is none.

        Args:
            keys (`np.ndarray`): hashes of contents, int64 of shape [M].
        """
        return find(self.keys, keys)

    def _place(self, position):
        start, *part, new = self._parts[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return (*part, int(new[position - start]))

    def reason(self, position):
        """Return why a document is unreadable, a word and a message.

        Args:
            position (`int`): which document.
        """
        store, *_, number = self._place(position)
        return store.rejected[number]

    def rejected(self):
        """Return unreadable documents of other data sets than the first, as lines of `rejected.jsonl`."""
        return [
            rejection(mixture.sources[index], int(rows[number]), *store.rejected[number])
            for _, store, mixture, index, rows, new in self._parts[1:]
            for number in sorted(set(store.rejected) & set(new.tolist()))
        ]

    def side(self, position):
        """Return a document, {"text", "images"}, its images encoded.

        Args:
            position (`int`): which document.
        """
        _, mixture, index, rows, number = self._place(position)
        return read_side(mixture, index, int(rows[number]), 1)

    def take(self, positions):
        """Return unit vectors, float32 of shape [M, d].

        Args:
            positions (`np.ndarray`): which documents, ascending, int64 of shape [M], at least one.
        """
        assert (np.diff(positions) > 0).all()
        vectors = []
        for start, store, *_, new in self._parts:
            here = positions[(positions >= start) & (positions < start + len(new))]
            if len(here):
                vectors.append(store.take(new[here - start]))
        return torch.cat(vectors)

    def read(self, start, stop):
        """Return unit vectors of a block, float32 of shape [stop - start, d].

        Args:
            start, stop (`int`): which documents.
        """
        return self.take(np.arange(start, stop))


def positive_scores(vectors, rows, documents, corpus):
    """Return the cosine of each query's least similar readable positive, float32 of shape [Q].

    Args:
        vectors (`torch.Tensor`): unit vectors of the queries, float32 of shape [Q, d].
        rows, documents (`torch.Tensor`): pairs of a query and a positive's position, int64 of shape [P] each.
        corpus ([`Corpus`]): the documents.
    """
    readable = torch.from_numpy(corpus.readable)[documents]
    rows, documents = rows[readable].to(vectors.device), documents[readable]
    different, inverse = documents.unique(return_inverse=True)
    scores = vectors.new_full((len(vectors),), torch.inf)
    # A part at a time: queries with very many positives.
    for part in torch.arange(len(different)).split(4096):
        positives = corpus.take(different[part].numpy()).to(vectors.device)
        here = (inverse >= part[0]) & (inverse <= part[-1])
        chosen = (vectors[rows[here.to(rows.device)]] * positives[(inverse[here] - part[0]).to(rows.device)]).sum(-1)
        scores.scatter_reduce_(0, rows[here.to(rows.device)], chosen, "amin")
    return scores


def unique(keys):
    """Return different keys in the order in which they first appear, where that is, and which of them each key is.

    Args:
        keys (`np.ndarray`): hashes, int64 of shape [N].
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return keys[first[order]], first[order], rank[inverse]


def find(keys, wanted):
    """Return where each wanted key is among different keys, -1 where it is not.

    Args:
        keys (`np.ndarray`): different hashes, int64 of shape [N], at least one.
        wanted (`np.ndarray`): hashes, int64 of shape [M].
    """
    order = np.argsort(keys)
    places = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    positions = order[places]
    return np.where(keys[positions] == wanted, positions, -1)


__all__ = ["Corpus", "find", "positive_scores", "unique"]
