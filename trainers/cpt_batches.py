"""Batching by cost: rows of like length fill micro-batches of nearly equal cost, and none is dropped (paper 4.1)."""

from .row_window import RowWindow

# A micro-batch is full at this share of the largest cost, so that the batches of two ranks differ by less than 5 %.
FULL = 0.975
ENOUGH = 0.9525


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
        self._measure, self._max_cost = measure, max_cost
        self._window = RowWindow(rows, self._measured, window, seed)

    @property
    def num_read(self):
        """Rows read so far (`int`), bad ones included."""
        return self._window.num_read

    @property
    def rejected(self):
        """Bad rows since they were last taken, a `list` of (row, `BadRowError`)."""
        return self._window.rejected

    @rejected.setter
    def rejected(self, rows):
        self._window.rejected = rows

    def next_batch(self):
        """Return the next micro-batch, a `list` of measured rows, or None when the rows have come to an end.

        Rows that are bad are added to `rejected`, for the caller to take.
        """
        self._window.fill()
        if not self._window.waiting:
            return None
        return self._window.take(self._fill(min(self._window.waiting, key=lambda waiting: waiting.turn)))

    def _measured(self, row):
        measured = self._measure(row)
        if measured.cost > self._max_cost:
            raise ValueError(
                f"{row.row} of {row.dataset} costs {measured.cost}, more than a whole micro-batch (max_cost="
                f"{self._max_cost})."
            )
        return measured

    def _fill(self, anchor):
        """Return waiting rows near the anchor's length whose cost comes close to `max_cost`, the anchor among them."""
        near = sorted(self._window.waiting, key=lambda w: (abs(w.row.num_tokens - anchor.row.num_tokens), w.number))
        near.remove(anchor)
        chosen, left_out, cost = [anchor], [], anchor.row.cost
        for waiting in near:
            if cost + waiting.row.cost <= self._max_cost:
                chosen.append(waiting)
                cost += waiting.row.cost
            else:
                left_out.append(waiting)
            if cost >= FULL * self._max_cost or len(left_out) > self._window.size // 8:
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
                    gain = new.row.cost - (old.row.cost if old else 0)
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
        return self._window.state_dict()

    def load_state_dict(self, state):
        """Go on from `state`; see [`trainers.row_window.RowWindow`]."""
        self._window.load_state_dict(state)


__all__ = ["CostBatches"]
