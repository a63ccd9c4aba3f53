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
        """Append those documents of a data set that are not there yet."""
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
        """Return the positions of documents, -1 where there is none."""
        return find(self.keys, keys)

    def _place(self, position):
        start, *part, new = self._parts[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return (*part, int(new[position - start]))

    def reason(self, position):
        """Return why a document is unreadable."""
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
        """Return a document, {"text", "images"}."""
        _, mixture, index, rows, number = self._place(position)
        return read_side(mixture, index, int(rows[number]), 1)

    def take(self, positions):
        """Return unit vectors, float32 of shape [len(positions), d]; positions ascend."""
        vectors = []
        for start, store, *_, new in self._parts:
            here = positions[(positions >= start) & (positions < start + len(new))]
            if len(here):
                vectors.append(store.take(new[here - start]))
        return torch.cat(vectors)

    def read(self, start, stop):
        """Return unit vectors of a block."""
        return self.take(np.arange(start, stop))


def positive_scores(vectors, rows, documents, corpus):
    """Return the cosine of each query's least similar readable positive, float32 of shape [Q]."""
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
    """Return different keys in the order in which they first appear, where that is, and which of them each key is."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return keys[first[order]], first[order], rank[inverse]


def find(keys, wanted):
    """Return where each wanted key is among different keys, -1 where it is not."""
    order = np.argsort(keys)
    places = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    positions = order[places]
    return np.where(keys[positions] == wanted, positions, -1)


__all__ = ["Corpus", "find", "positive_scores", "unique"]
