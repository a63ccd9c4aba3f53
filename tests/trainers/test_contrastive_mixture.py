"""Training on declared data sets: what reaches the loss, bad rows, reports, and the end of an epoch."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.contrastive_cases import build, save_checkpoint
from tests.trainers.contrastive_run import BAD_ROWS, make_trainer, sources, write_mixture
from tests.trainers.pair_sources import write_texts
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_info_nce import info_nce
from trainers.contrastive_loader import COUNTS, PairBatches, PlannedPairs
from trainers.contrastive_loss import InfoNCELoss
from trainers.contrastive_mixture import PairMixture
from trainers.contrastive_rows import open_pair
from trainers.contrastive_sampler import TaskPlan, TaskRows
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.row_images import BadRowError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive_mixture")
    save_checkpoint(folder / "start")
    write_mixture(folder)
    return folder


class Recorder(ContrastiveTrainer):
    """Keep the task and the queries of every batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        texts = self.model.tokenizer.batch_decode(inputs["query_input_ids"], skip_special_tokens=True)
        documents = self.model.tokenizer.batch_decode(inputs["positive_input_ids"], skip_special_tokens=True)
        self.seen = [*getattr(self, "seen", []), (inputs["dataset_name"], texts, documents, inputs["label"])]
        return super().compute_loss(model, inputs, *args, **kwargs)


def record(folder, output, **settings):
    settings = {"save_strategy": "no", "gradient_accumulation_steps": 1, "max_steps": -1, **settings}
    trainer = make_trainer(folder, output, trainer_class=Recorder, mini_batch_size=None, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_uses_every_row_once_and_takes_another_for_a_bad_one(folder, tmp_path, workers):
    trainer = record(folder, tmp_path, num_train_epochs=2, dataloader_num_workers=workers)
    # 20 pages by 2, 34 texts and 23 published rows by 4.
    assert trainer.state.global_step == 2 * (10 + 8 + 5) and trainer.state.epoch == 2
    for epoch in (trainer.seen[:23], trainer.seen[23:]):
        rows = Counter((task, text) for task, texts, _, _ in epoch for text in texts)
        assert set(rows.values()) == {1}
        assert Counter(task for task, _ in rows) == {"pages": 20, "texts": 32, "published": 20}
        assert not {("published", f"find {row}") for row in BAD_ROWS} & set(rows)
    for task, texts, documents, labels in trainer.seen:
        assert len(texts) == {"pages": 2}.get(task, 4)
        # Instructions of single data sets, on the side that they are for.
        assert all(text.startswith("Find: ") == (task == "texts") for text in texts)
        assert all(text.startswith("A page: ") == (task == "pages") for text in documents)
        assert set(labels) >= {"positive_hash"} and ("negatives_mask" in labels) == (task != "pages")
        assert len(labels["positive_hash"].unique()) == len(texts)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert (lines[0]["row"], lines[0]["reason"], lines[0]["step"]) == ("row 17", "empty_query", 0)
    # The truncated image is met whenever its row is drawn; the query that is empty was found before.
    assert {(row["row"], row["reason"]) for row in lines[1:]} <= {("row 14", "undecodable_image")} and len(lines) > 1
    report = json.loads((tmp_path / "data_report.json").read_text())
    used = {task: entry["used"] for task, entry in report["datasets"].items()}
    assert used["published"]["num_rejected_rows"] == len(lines) - 1 and used["published"]["num_repeated_rows"] == 0
    assert [used[task]["num_rows"] for task in ("pages", "texts", "published")] == [40, 64, 40]
    assert report["datasets"]["published"]["rejected_rows"] == {"empty_query": 1}
    assert report["plan_per_epoch"][1]["last_partial_batch"] == 2
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["skipped_rows"] == len(lines) - 1 and last["masked_negatives"] == sum(
        used[task]["num_missing_negatives"] + used[task]["num_negatives_equal_to_positive"] for task in used
    )
    assert any("loss_of_kind/long_form" in entry for entry in trainer.state.log_history)


def test_rows_come_a_second_time_only_when_no_others_are_left(folder, tmp_path):
    # 23 usable rows in one batch of 22: one row is left, and the bad one is dealt in some epochs.
    trainer = make_trainer(folder, tmp_path, per_device_train_batch_size=22, task_alpha=0.0)
    reader = trainer._schedule.reader(0, 1)
    for number in range(30):
        _, pairs, _ = reader.batch(number)
        assert len({pair.row for pair in pairs}) == len(pairs)
    counts = dict(zip(COUNTS, reader.counts[2].tolist()))
    assert counts["num_rejected_rows"] > 0 and counts["num_repeated_rows"] == 0
    # All 23 rows, of which one is bad: none is left to take its place.
    trainer = make_trainer(folder, tmp_path, per_device_train_batch_size=23, task_alpha=0.0)
    reader = trainer._schedule.reader(0, 1)
    with pytest.raises(ValueError, match="'published' has too few good rows to fill a batch"):
        [reader.batch(number) for number in range(30)]
    # Two batches of 11 and one row left over, which is the first reader's: the second takes rows of the other batch.
    trainer = make_trainer(folder, tmp_path, per_device_train_batch_size=11)
    reader = trainer._schedule.reader(1, 2)
    for number in range(4 * trainer._schedule.plan.num_batches):
        _, pairs, _ = reader.batch(number)
        assert len({pair.row for pair in pairs}) == len(pairs)
    counts = dict(zip(COUNTS, reader.counts[2].tolist()))
    assert counts["num_repeated_rows"] == counts["num_rejected_rows"] > 0


@pytest.mark.parametrize("num_spares", [1, 6])
def test_rows_in_the_place_of_bad_ones_have_other_positives_and_come_once(tmp_path, num_spares):
    """Two bad rows a batch of four; of the rows left over every second one has a positive of the batch."""
    good = [{"query": f"q {index}", "positive": f"p {index}"} for index in range(4 + num_spares)]
    for index in range(4, 4 + num_spares, 2):
        good[index]["positive"] = "p 0"
    mixture = PairMixture.from_datasets({"answers": datasets.Dataset.from_list(good)})
    bad = (2, 3)
    plan = TaskPlan([TaskRows("answers", len(good), 4, keys=mixture.checked[0].keys)])
    plan.num_batches = 100
    plan.batch = lambda number: (0, np.arange(4))
    plan.unused = lambda task, epoch: np.arange(4, len(good))
    read = mixture.read

    def fail(source, index, epoch=0):
        if index in bad:
            raise BadRowError("undecodable_image", f"row {index}")
        return read(source, index, epoch)

    mixture.read = fail
    reader = PlannedPairs(mixture, plan, 0, 0, 1)
    if num_spares == 1:
        # The only one has the positive of row 0.
        with pytest.raises(ValueError, match="'answers' has too few good rows"):
            reader.batch(0)
        return
    assert [pair.row for pair in reader.batch(0)[1]] == ["row 0", "row 1", "row 5", "row 7"]
    # The next batch of this epoch takes what is left, and then has to repeat a row.
    resumed = PlannedPairs(mixture, plan, 0, 0, 1)
    resumed.load_state_dict(json.loads(json.dumps(reader.state_dict())))
    for again in (reader, resumed):
        again.counts[:] = 0
        rows = [pair.row for pair in again.batch(1)[1]]
        assert rows[:3] == ["row 0", "row 1", "row 9"] and rows[3] in ("row 5", "row 7")
        assert again.counts[0, COUNTS.index("num_repeated_rows")] == 1


def test_the_loss_sees_each_row_with_its_own_negatives(folder):
    """Rows with 0, 1, 2 and more negatives, against a loss computed row by row from their texts alone."""
    mixture = PairMixture(sources(folder))
    model = build(folder / "start").eval()
    pairs = [mixture.read(2, index) for index in (0, 1, 12, 13, 2, 3)]
    assert sorted({sum(pair.negatives_mask) for pair in pairs}) == [0, 1, 2]
    trainer = make_trainer(folder, folder / "unused")
    batch = trainer.data_collator.encode(pairs, [open_pair(pair) for pair in pairs], "published")
    features, labels = trainer.collect_features(dict(batch))
    assert len(features) == 4

    def embed(side):
        # Of these rows queries and some negatives have an image.
        images = [Image.open(folder / "images" / image["path"]).convert("RGB") for image in side["images"]]
        return torch.as_tensor(model.encode({"image": images[0], "text": side["text"]} if images else side["text"]))

    with torch.no_grad():
        query, positive = (torch.stack([embed(pair.sides[column]) for pair in pairs]) for column in (0, 1))
        own = [[embed(side) for side in pair.sides[2:] if side is not None] for pair in pairs]
        for all_negatives in (True, False):
            # At this temperature every candidate tells in the loss.
            loss = InfoNCELoss(model, temperature=1.0, all_negatives=all_negatives)(features, labels)
            losses = []
            for row, negatives in enumerate(own):
                candidates = [*positive, *(sum(own, []) if all_negatives else negatives)]
                cosines = torch.stack([torch.cosine_similarity(query[row], other, dim=0) for other in candidates])
                losses.append(torch.nn.functional.cross_entropy(cosines[None], torch.tensor([row])))
            torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_equal_positives_are_no_negatives_unless_asked_for(folder, tmp_path):
    rows = [{"query": f"q {index}", "positive": "yes" if index < 2 else f"p {index}"} for index in range(4)]
    data = datasets.Dataset.from_list(rows)
    mixture = PairMixture.from_datasets({"answers": data}, distinct_positives=False)
    model = build(folder / "start")
    losses = []
    for masked in (True, False):
        config = ContrastiveConfig(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=1,
            per_device_train_batch_size=4,
            mask_equal_positives=masked,
            learning_rate=0.0,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = ContrastiveTrainer(model, config, mixture)
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    query, positive = (torch.as_tensor(model.encode([row[side] for row in rows])) for side in ("query", "positive"))
    keys = torch.tensor([0, 0, 1, 2])
    expected = [info_nce(query, positive, positive_hash=key).item() for key in (keys, None)]
    assert losses == pytest.approx(expected, abs=1e-4) and losses[1] - losses[0] > 0.05


@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (True, 1)])
def test_bad_rows_stop_a_run_that_wants_it_so(folder, tmp_path, streaming, workers):
    with pytest.raises(ValueError, match="Data set 'published', row .*(query holds neither|cannot be decoded)"):
        make_trainer(folder, tmp_path, streaming, on_bad_row="raise", dataloader_num_workers=workers).train()


def test_an_image_that_does_not_open_stops_such_a_run_too(folder, tmp_path):
    rows = PairMixture(sources(folder)[2:]).loaded[0].with_format(None)
    rows.select([index for index in range(24) if index != 17]).to_parquet(tmp_path / "rows.parquet")
    (source,) = sources(folder)[2:]
    source.data_files = str(tmp_path / "rows.parquet")
    trainer = make_trainer(folder, tmp_path / "run", max_steps=8)
    trainer.args.on_bad_row = "raise"
    trainer = ContrastiveTrainer(trainer.model, trainer.args, PairMixture([source]))
    with pytest.raises(BadRowError, match="row 14, query: image 0 cannot be decoded"):
        trainer.train()


def test_too_many_bad_rows_stop_always(folder, tmp_path):
    with pytest.raises(ValueError, match="1 of 78 rows are bad, more than max_bad_row_share=0.005 allows"):
        make_trainer(folder, tmp_path, max_bad_row_share=0.005)
    trainer = make_trainer(folder, tmp_path, streaming=True, max_bad_row_share=0.005, max_steps=50)
    with pytest.raises(ValueError, match=r"\d of \d+ rows are bad, more than max_bad_row_share=0.005 allows"):
        trainer.train()
    assert trainer.state.global_step < 50 and (tmp_path / "rejected.jsonl").read_text()


def test_an_image_that_does_not_fit_is_a_bad_row(folder):
    processor = build(folder / "start", max_length=2)[0].processor
    pair = PairMixture(sources(folder)).read(0, 0)
    assert open_pair(pair, None)[1]["image"].size == (28, 28)
    with pytest.raises(BadRowError, match="row 0, positive: ") as error:
        open_pair(pair, processor)
    assert error.value.reason == "does_not_fit"


def test_what_is_asked_for_after_an_epoch_is_done(folder, tmp_path):
    trainer = record(folder, tmp_path, num_train_epochs=2, save_strategy="epoch", logging_strategy="epoch")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-23", "checkpoint-46"}
    assert [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_batches_of_all_data_sets(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    plain = sources(folder)
    plain[0].batch_size = plain[0].document_instruction = plain[1].query_instruction = None
    args = ContrastiveConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        task_batches=False,
        per_device_train_batch_size=7,
        max_bad_row_share=0.5,
        num_train_epochs=1,
    )
    trainer = ContrastiveTrainer(trainer.model, args, PairMixture(plain))
    batches = iter(PairBatches(trainer._schedule.reader, trainer.data_collator, args))
    tasks = set()
    for _ in range(trainer._schedule.plan.num_batches):
        batch = next(batches)
        tasks.add(tuple(row[0] for row in batch["data"]["counts"]))
        assert batch["inputs"]["label"]["negatives_mask"].shape == (7, 2) and "dataset_name" not in batch["inputs"]
    assert trainer._schedule.plan.num_batches == 11 and any(min(counts) > 0 for counts in tasks)
    for name, value, message in (
        ("batch_size", 2, "'pages' has a batch_size or weight of its own, which needs task_batches=True"),
        ("query_instruction", "Find: ", "Instructions of data sets need task_batches=True, got {'pages'"),
    ):
        setattr(plain[0], name, value)
        with pytest.raises(ValueError, match=message):
            ContrastiveTrainer(trainer.model, args, PairMixture(plain))
        setattr(plain[0], name, None)
    with pytest.raises(ValueError, match="Streamed data sets need task_batches=True"):
        ContrastiveTrainer(trainer.model, args, PairMixture(plain, streaming=True))


def test_instructions_and_prompts_must_agree(folder, tmp_path):
    with pytest.raises(ValueError, match="Data sets have instructions of their own, .* and prompts say something else"):
        make_trainer(folder, tmp_path, prompts={"texts": {"query": "Other: "}})
    trainer = make_trainer(folder, tmp_path, prompts={"published": {"query": "Ask: "}})
    assert trainer.data_collator.prompts["published"] == {"query": "Ask: "}
    assert trainer.data_collator.prompts["texts"] == {"query": "Find: "}


def test_streams_need_max_steps(folder, tmp_path):
    with pytest.raises(ValueError, match="A streamed mixture has no end: set max_steps"):
        make_trainer(folder, tmp_path, streaming=True, max_steps=-1)
    mixture = PairMixture([write_texts(tmp_path / "texts", 4)], streaming=True)
    with pytest.raises(TypeError, match="no length"):
        len(mixture)
