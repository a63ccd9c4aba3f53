"""Batching by cost: rows of like length fill micro-batches of nearly equal cost, and none is dropped (paper 4.1)."""

from collections import deque
from dataclasses import dataclass

from .cpt_mixture import unit_hash
from .cpt_rows import BadRowError

# A micro-batch is full at this share of the largest cost, so that the batches of two ranks differ by less than 5 %.
FULL = 0.975
ENOUGH = 0.9525
SNAPSHOT_EVERY = 64


@dataclass
class _Waiting:
    number: int
    turn: float
    num_tokens: int
    cost: int
    row: object


class CostBatches:
    """Micro-batches of one reader's rows.

    The reader holds a window of rows. Each micro-batch is built around the row whose turn it is, of rows nearest to it
    in length, until its cost reaches `max_cost`. A row's turn is its number plus a random part of the window: rows are
    shuffled within the window, and none waits for more batches than the window has rows.

    The state is exact: after `load_state_dict` the same batches follow, from rows that are read again.

    Args:
        rows (iterator with `state_dict` and `load_state_dict`): see [`trainers.CPTMixture.read`].
        measure (`Callable`): returns a row with `num_tokens` and `cost`, or raises `BadRowError`.
        max_cost (`int`): most that a micro-batch costs. A row that costs more by itself is an error.
        window (`int`, defaults to 512): rows held.
        seed (`int`, defaults to 0): seed of the shuffling.

    Example:

    ```python
    >>> batches = CostBatches(mixture.read(), lambda row: collator.prepare(row.content, row.row), max_cost=12800)
    >>> rows = batches.next_batch()
    ```
    """

    def __init__(self, rows, measure, max_cost, window=512, seed=0):
        self._rows, self._measure = rows, measure
        self._max_cost, self._window, self._seed = max_cost, window, seed
        self._waiting = []
        self._num_read, self._exhausted = 0, False
        # States of the rows before a number: some are older than any row that waits.
        self._snapshots = deque([(0, rows.state_dict())])
        self.rejected = []

    @property
    def num_read(self):
        """Rows read so far (`int`), bad ones included."""
        return self._num_read

    def next_batch(self):
        """Return the next micro-batch, a `list` of measured rows, or None when the rows have come to an end.

        Rows that are bad are added to `rejected`, a `list` of (row, `BadRowError`), for the caller to take.
        """
        while len(self._waiting) < self._window and not self._exhausted:
            self._read()
        if not self._waiting:
            return None
        anchor = min(self._waiting, key=lambda waiting: waiting.turn)
        chosen = self._fill(anchor)
        taken = {waiting.number for waiting in chosen}
        self._waiting = [waiting for waiting in self._waiting if waiting.number not in taken]
        return [waiting.row for waiting in chosen]

    def _read(self, wanted=None):
        if wanted is None and self._num_read - self._snapshots[-1][0] >= SNAPSHOT_EVERY:
            self._snapshots.append((self._num_read, self._rows.state_dict()))
        row = next(self._rows, None)
        if row is None:
            self._exhausted = True
            return
        number = self._num_read
        self._num_read += 1
        if wanted is not None and number not in wanted:
            return
        try:
            measured = self._measure(row)
        except BadRowError as error:
            self.rejected.append((row, error))
            return
        if measured.cost > self._max_cost:
            raise ValueError(
                f"{row.row} of {row.dataset} costs {measured.cost}, more than a whole micro-batch (max_cost="
                f"{self._max_cost})."
            )
        turn = number + unit_hash(self._seed, "turn", number) * self._window
        self._waiting.append(_Waiting(number, turn, measured.num_tokens, measured.cost, measured))

    def _fill(self, anchor):
        """Return waiting rows near the anchor's length whose cost comes close to `max_cost`, the anchor among them."""
        near = sorted(self._waiting, key=lambda w: (abs(w.num_tokens - anchor.num_tokens), w.number))
        near.remove(anchor)
        chosen, left_out, cost = [anchor], [], anchor.cost
        for waiting in near:
            if cost + waiting.cost <= self._max_cost:
                chosen.append(waiting)
                cost += waiting.cost
            else:
                left_out.append(waiting)
            if cost >= FULL * self._max_cost or len(left_out) > self._window // 8:
                break
        # Rows of like length are of like cost, too large for the gap that remains: exchange one for a costlier one.
        others = near[len(chosen) - 1 + len(left_out) :]
        cost = self._exchange(chosen, left_out, cost, FULL)
        # Padding costs less than ranks that wait for each other: take any length before a batch is much too small.
        self._exchange(chosen, left_out + others, cost, ENOUGH)
        return chosen

    def _exchange(self, chosen, others, cost, share):
        """Exchange rows, or add one, in place, until `cost` reaches this share of the largest; return the new cost.

        `others` stand in the order in which they are liked. The first step that is enough is taken, else the largest.
        """
        while cost < share * self._max_cost:
            gap, missing = self._max_cost - cost, share * self._max_cost - cost
            largest = (0, None, None)
            for there, new in enumerate(others):
                # The anchor stays.
                for here, old in [*enumerate(chosen[1:], start=1), (len(chosen), None)]:
                    gain = new.cost - (old.cost if old else 0)
                    if largest[0] < gain <= gap:
                        largest = gain, here, there
                if largest[0] >= missing:
                    break
            gain, here, there = largest
            if not gain:
                break
            returned = chosen[here : here + 1]
            chosen[here : here + 1] = [others[there]]
            others[there : there + 1] = returned
            cost += gain
        return cost

    def state_dict(self):
        """Return what to go on from, as plain numbers, strings and lists."""
        waiting = [row.number for row in self._waiting]
        oldest = min(waiting, default=self._num_read)
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= oldest:
            self._snapshots.popleft()
        number, rows = self._snapshots[0]
        return {"num_read": self._num_read, "waiting": waiting, "number": number, "rows": rows}

    def load_state_dict(self, state):
        """Go on from `state`: read the rows that wait again; bad ones among those in between are not reported again."""
        self._rows.load_state_dict(state["rows"])
        self._snapshots = deque([(state["number"], state["rows"])])
        self._num_read, self._waiting, self._exhausted = state["number"], [], False
        wanted = set(state["waiting"])
        while self._num_read < state["num_read"] and not self._exhausted:
            self._read(wanted)
        if {row.number for row in self._waiting} != wanted:
            raise ValueError("The rows that waited when the state was saved are not there any more: the data changed.")
        order = {number: place for place, number in enumerate(state["waiting"])}
        self._waiting.sort(key=lambda waiting: order[waiting.number])
        self.rejected = []


__all__ = ["CostBatches"]
