"""A window of rows that a reader holds and chooses from: shuffling within bounds, with an exact state."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from .row_images import BadRowError
from .row_sources import unit_hash

SNAPSHOT_EVERY = 64


@dataclass
class WaitingRow:
    """A row of the window.

    Args:
        number (`int`): how many rows were read before it.
        turn (`float`): its number plus a random part of the window. Who takes rows by their turn shuffles them within
            the window.
        row (`Any`): what `measure` made of it.
    """

    number: int
    turn: float
    row: Any


class RowWindow:
    """Rows that wait to be taken.

    The state is exact: after `load_state_dict` the same rows wait, which are read again.

    Args:
        rows (iterator with `state_dict` and `load_state_dict`): where rows come from.
        measure (`Callable`): makes of a row what is held, or raises `BadRowError`.
        size (`int`): rows held.
        seed (`int` or `str`): seed of the turns.
    """

    def __init__(self, rows, measure, size, seed=0):
        self._rows, self._measure, self._seed = rows, measure, seed
        self.size = size
        self.waiting = []
        self.num_read, self.rejected = 0, []
        self._exhausted = False
        # States of the rows before a number: some are older than any row that waits.
        self._snapshots = deque([(0, rows.state_dict())])

    def fill(self):
        """Read rows until the window is full or they have come to an end.

        Rows that are bad are added to `rejected`, a `list` of (row, `BadRowError`), for the caller to take.
        """
        while len(self.waiting) < self.size and not self._exhausted:
            self._read()

    def take(self, chosen):
        """Take rows out, and return what is held of them.

        Args:
            chosen (`list[WaitingRow]`): rows of `waiting`.
        """
        numbers = {waiting.number for waiting in chosen}
        self.waiting = [waiting for waiting in self.waiting if waiting.number not in numbers]
        return [waiting.row for waiting in chosen]

    def _read(self, wanted=None):
        if wanted is None and self.num_read - self._snapshots[-1][0] >= SNAPSHOT_EVERY:
            self._snapshots.append((self.num_read, self._rows.state_dict()))
        row = next(self._rows, None)
        if row is None:
            self._exhausted = True
            return
        number = self.num_read
        self.num_read += 1
        if wanted is not None and number not in wanted:
            return
        try:
            measured = self._measure(row)
        except BadRowError as error:
            self.rejected.append((row, error))
            return
        turn = number + unit_hash(self._seed, "turn", number) * self.size
        self.waiting.append(WaitingRow(number, turn, measured))

    def state_dict(self):
        """Return what to go on from, as plain numbers, strings and lists."""
        waiting = [row.number for row in self.waiting]
        oldest = min(waiting, default=self.num_read)
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= oldest:
            self._snapshots.popleft()
        number, rows = self._snapshots[0]
        return {"num_read": self.num_read, "waiting": waiting, "number": number, "rows": rows}

    def load_state_dict(self, state):
        """Go on from `state`: read the rows that wait again; bad ones among those in between are not reported again.

        Raises:
            ValueError: the data changed.
        """
        self._rows.load_state_dict(state["rows"])
        self._snapshots = deque([(state["number"], state["rows"])])
        self.num_read, self.waiting, self._exhausted = state["number"], [], False
        wanted = set(state["waiting"])
        while self.num_read < state["num_read"] and not self._exhausted:
            self._read(wanted)
        if {row.number for row in self.waiting} != wanted:
            raise ValueError("The rows that waited when the state was saved are not there any more: the data changed.")
        order = {number: place for place, number in enumerate(state["waiting"])}
        self.waiting.sort(key=lambda waiting: order[waiting.number])
        self.rejected = []


__all__ = ["RowWindow", "WaitingRow"]
