"""Batching by cost: full, alike on all ranks, little padding, nothing dropped, and an exact state."""

import json
import random
from types import SimpleNamespace

import pytest

from trainers.cpt_batches import CostBatches
from trainers.cpt_rows import BadRowError, row_cost

MAX_COST = 12_800


class Rows:
    """Lengths of a mixture of captions, long texts, pages and several images a row; every tenth row may be bad."""

    def __init__(self, seed, end=None, bad=False):
        self.seed, self.end, self.bad, self.number = seed, end, bad, 0

    def __next__(self):
        if self.number == self.end:
            raise StopIteration
        chance = random.Random(f"{self.seed}/{self.number}")
        kind, text = chance.randrange(4), int(chance.lognormvariate(5, 1))
        num_images = (1, 0, 1, 2)[kind]
        image_tokens = (chance.randint(256, 1024), 0, 1024, 2 * chance.randint(256, 900))[kind]
        num_tokens = min(image_tokens + 2 * num_images + (4 * text if kind == 1 else text) + 1, 2048)
        cost = row_cost(num_tokens, image_tokens, num_images, 2048)
        row = SimpleNamespace(dataset="lengths", row=self.number, num_tokens=num_tokens, cost=cost)
        row.bad = self.bad and self.number % 10 == 3
        self.number += 1
        return row

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def measure(row):
    if row.bad:
        raise BadRowError("empty_text", "bad")
    return row


def take(batches, number):
    return [batches.next_batch() for _ in range(number)]


def numbers(batches):
    return [[row.row for row in batch] for batch in batches]


def test_cost_of_a_row():
    assert row_cost(100, 0, 0, 2048) == 100
    assert row_cost(100, 60, 2, 2048) == 40 + 4 * 60 + 2 * 2
    assert row_cost(1500, 1000, 1, 2048) == 2048


def test_ranks_have_the_same_cost_in_every_step():
    ranks = [take(CostBatches(Rows(rank), measure, MAX_COST, seed=rank), 200) for rank in range(4)]
    for step in zip(*ranks):
        costs = [sum(row.cost for row in batch) for batch in step]
        assert max(costs) <= MAX_COST and min(costs) >= 0.95 * max(costs)


def test_little_padding():
    batches = take(CostBatches(Rows(0), measure, MAX_COST), 400)
    real = sum(row.num_tokens for batch in batches for row in batch)
    padded = sum(len(batch) * max(row.num_tokens for row in batch) for batch in batches)
    rows = Rows(0)
    in_order = [[next(rows) for _ in range(8)] for _ in range(400)]
    plain = sum(8 * max(row.num_tokens for row in batch) for batch in in_order)
    plain_real = sum(row.num_tokens for batch in in_order for row in batch)
    assert 1 - real / padded < 0.05
    assert 1 - plain_real / plain > 0.25


@pytest.mark.parametrize("number", [1, 7, 1000])
def test_no_row_is_dropped_and_none_comes_twice(number):
    batches = CostBatches(Rows(0, end=number, bad=True), measure, MAX_COST)
    seen = []
    while (batch := batches.next_batch()) is not None:
        assert batch and sum(row.cost for row in batch) <= MAX_COST
        seen += [row.row for row in batch]
    bad = [row.row for row, error in batches.rejected]
    assert bad == list(range(3, number, 10))
    assert sorted(seen + bad) == list(range(number)) and batches.num_read == number
    assert batches.next_batch() is None


def test_rows_are_shuffled_within_the_window_and_none_waits_long():
    batches = CostBatches(Rows(0), measure, MAX_COST, window=64)
    order, came, waited = [], {}, []
    for number in range(300):
        batch = batches.next_batch()
        came |= dict.fromkeys(range(len(came), batches.num_read), number)
        order += [row.row for row in batch]
        waited += [number - came[row.row] for row in batch]
    assert order != sorted(order) and max(waited) <= 64
    other = numbers(take(CostBatches(Rows(0), measure, MAX_COST, window=64, seed=1), 20))
    assert other != numbers(take(CostBatches(Rows(0), measure, MAX_COST, window=64), 20))


@pytest.mark.parametrize("at", [0, 1, 13, 60])
@pytest.mark.parametrize("end", [None, 500])
def test_the_state_is_exact(at, end):
    batches = CostBatches(Rows(0, end, bad=True), measure, MAX_COST, window=100)
    take(batches, at)
    batches.rejected = []
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [(batch and numbers([batch]), [row.row for row, _ in batches.rejected]) for batch in take(batches, 40)]
    again = CostBatches(Rows(0, end, bad=True), measure, MAX_COST, window=100)
    again.load_state_dict(state)
    got = [(batch and numbers([batch]), [row.row for row, _ in again.rejected]) for batch in take(again, 40)]
    assert got == expected


def test_refusals():
    with pytest.raises(ValueError, match=r"0 of lengths costs \d+, more than a whole micro-batch \(max_cost=10\)"):
        CostBatches(Rows(0), measure, 10).next_batch()
    batches = CostBatches(Rows(0), measure, MAX_COST)
    batches.next_batch()
    fewer = CostBatches(Rows(0, end=3), measure, MAX_COST)
    with pytest.raises(ValueError, match="are not there any more: the data changed"):
        fewer.load_state_dict(batches.state_dict())
