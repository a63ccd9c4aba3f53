"""Streams of pairs: all ranks draw one task, windows are bounded, nothing is lost, and the state is exact."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest

from tests.trainers.pair_sources import write_pages, write_texts
from trainers.contrastive_mixture import PairMixture
from trainers.contrastive_stream import StreamedPairs, batch_shares


@pytest.fixture(autouse=True)
def no_pause(monkeypatch, tmp_path):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def mixture(tmp_path):
    sources = [write_pages(tmp_path / "pages", 9, num_files=2), write_texts(tmp_path / "texts", 40, num_files=2)]
    return PairMixture(sources, streaming=True, seed=3)


def reader(mixture, number=0, num_readers=1, batch_sizes=(2, 4), window=6, **settings):
    return StreamedPairs(mixture, list(batch_sizes), 3, number, num_readers, window=window, **settings)


def queries(pairs):
    return [pair.sides[0]["text"] for pair in pairs]


def batches(stream, numbers):
    dealt = [stream.batch(number) for number in numbers]
    return [(task, queries(pairs)) for task, pairs, _ in dealt]


def test_ranks_draw_the_same_tasks_and_rows_of_their_own(mixture):
    streams = [reader(mixture, number, 2) for number in range(2)]
    seen = [[stream.batch(number) for number in range(12)] for stream in streams]
    tasks = [[task for task, _, _ in dealt] for dealt in seen]
    assert tasks[0] == tasks[1] and set(tasks[0]) == {"pages", "texts"}
    # In the first pass; ranks come to the second one at different times.
    rows = [{pair.sides[0]["text"] for _, pairs, _ in dealt for pair in pairs if pair.epoch == 0} for dealt in seen]
    assert rows[0].isdisjoint(rows[1]) and len(rows[0] | rows[1]) > 30
    assert all(len(pairs) == {"pages": 2, "texts": 4}[task] for task, pairs, _ in seen[0])
    # The task depends on the seed and the number alone: asked in another order, and by other readers, it is the same.
    other = reader(mixture, 5, 7)
    assert [mixture.tasks[other.task(number)] for number in reversed(range(12))] == tasks[0][::-1]


def test_every_row_comes_once_before_any_comes_again(tmp_path):
    mixture = PairMixture([write_texts(tmp_path / "texts", 40, num_files=4)], streaming=True)
    stream = reader(mixture, batch_sizes=[4])
    passes = Counter()
    first, order = [], []
    for number in range(20):
        for pair in stream.batch(number)[1]:
            passes[pair.epoch] += 1
            (first if pair.epoch == 0 else order).append(pair.sides[0]["text"])
        assert len(stream._windows[0].waiting) <= 6
    assert len(first) == len(set(first)) == 40 and passes[0] == 40
    # Another order in the next pass, of shards and within the window.
    assert first != sorted(first, key=lambda text: int(text.split()[1])) and order[:30] != first[:30]


def test_a_reader_whose_shards_end_begins_again_and_none_waits(tmp_path):
    # One shard of 9 and one of 3 rows: their readers take equally many.
    for part, number in (("0", 9), ("1", 3)):
        write_texts(tmp_path / part, number)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / part / "0.parquet").rename(tmp_path / "texts" / f"{part}.parquet")
    source = write_texts(tmp_path / "unused", 1)
    source.data_files = str(tmp_path / "texts" / "*.parquet")
    mixture = PairMixture([source], streaming=True)
    epochs = []
    for number in range(2):
        stream = reader(mixture, number, 2, batch_sizes=[3], window=3)
        dealt = [stream.batch(step)[1] for step in range(3)]
        assert all(len(pairs) == 3 and len(set(queries(pairs))) == 3 for pairs in dealt)
        epochs.append([[pair.epoch for pair in pairs] for pairs in dealt])
    assert sorted(max(map(max, dealt)) for dealt in epochs) == [0, 2]


def write_answers(folder, answers, **settings):
    rows = [{"query": f"q{index}", "positive": answer, "negatives": []} for index, answer in enumerate(answers)]
    source = write_texts(folder, 1, **settings)
    datasets.Dataset.from_list(rows).to_parquet(folder / "0.parquet")
    return source


def test_equal_positives_wait_for_another_batch(tmp_path):
    # Two answers stand four times in a row.
    answers = ["yes"] * 4 + ["no"] * 4 + [f"answer {index}" for index in range(16)]
    mixture = PairMixture([write_answers(tmp_path / "texts", answers)], streaming=True)
    stream, seen = reader(mixture, batch_sizes=[3], window=12), []
    for number in range(8):
        pairs = stream.batch(number)[1]
        assert len({pair.positive_hash for pair in pairs}) == 3
        seen += [pair.sides[0]["text"] for pair in pairs if pair.epoch == 0]
    assert len(seen) == len(set(seen)) >= 20


def test_too_few_different_positives_are_told(tmp_path):
    answers = ["yes", "no"] * 20
    stream = reader(PairMixture([write_answers(tmp_path / "texts", answers)], streaming=True), batch_sizes=[4])
    message = "'texts': 6 rows wait, but too few .* different positives to fill a batch of 4.*shuffle_window=6"
    with pytest.raises(ValueError, match=message):
        stream.batch(0)
    source = write_answers(tmp_path / "allowed", answers, distinct_positives=False)
    assert len(reader(PairMixture([source], streaming=True), batch_sizes=[4]).batch(0)[1]) == 4


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_the_state_is_exact(mixture, stop):
    whole = reader(mixture)
    batches(whole, range(stop))
    state = json.loads(json.dumps(whole.state_dict()))
    expected = batches(whole, range(stop, stop + 12))
    resumed = reader(mixture)
    resumed.load_state_dict(state)
    assert batches(resumed, range(stop, stop + 12)) == expected


def test_shares_of_batches(tmp_path):
    def shares(first, second, alpha=1.0):
        sources = [write_texts(tmp_path / name, 4, task=name, **own) for name, own in (("a", first), ("b", second))]
        return batch_shares(PairMixture(sources, streaming=True), [2, 4], alpha).tolist()

    assert shares({"weight": 3}, {"weight": 1}) == [1.5, 0.25]
    assert shares({"max_rows": 4}, {"max_rows": 16}, alpha=0.5) == [1.0, 1.0]
    assert shares({}, {"max_rows": 16}) == [1.0, 1.0]


def test_draws_follow_the_shares(mixture):
    for source, weight in zip(mixture.sources, (1.0, 6.0)):
        source.weight = weight
    stream = reader(mixture)
    drawn = np.bincount([stream.task(number) for number in range(4000)]) / 4000
    # Rows 1 : 6, and batches of 2 and 4: 1/2 to 6/4 batches.
    assert drawn == pytest.approx([0.25, 0.75], abs=0.03)


def test_more_readers_than_rows_are_told(tmp_path):
    mixture = PairMixture([write_pages(tmp_path / "pages", 9)], streaming=True)
    with pytest.raises(ValueError, match="has no rows for reader 11 of 12"):
        reader(mixture, 11, 12, batch_sizes=[2]).batch(0)
    with pytest.raises(ValueError, match="too few .* different positives to fill a batch of 2.* fewer workers"):
        reader(mixture, 8, 9, batch_sizes=[2]).batch(0)
