"""Tokens, padding and FLOPs of a contrastive run, the progress bar, and what trackers are given."""

import re

import pytest
from transformers import TrainerCallback

from tests.tiny import tiny_processor
from tests.trainers.contrastive_cases import arguments, build, mixed_task, save_checkpoint, texts_task
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.flops import step_flops
from trainers.progress import TokenMeter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("progress") / "start")


class Recorder(TrainerCallback):
    """Stands where a tracker would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def logs_of(checkpoint, output, **settings):
    recorder = Recorder()
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 4, **settings}
    config = arguments(output, **settings)
    data = {"org/my texts": texts_task(8), "mixed": mixed_task(8)}
    trainer = ContrastiveTrainer(build(checkpoint), config, data, data, callbacks=[recorder])
    trainer.train()
    return recorder.logs


@pytest.mark.parametrize("limits", [(None, None), (1, None)])
def test_meter_counts(checkpoint, limits):
    model = build(checkpoint)
    processor = tiny_processor()
    texts = ["the sea", "the sea and the sky and the tide"]
    columns = [model.preprocess([{"text": text} for text in texts]), model.preprocess([mixed_task(4)[0]["positive"]])]
    lengths = [column["attention_mask"].sum(-1).tolist() for column in columns]
    assert lengths[0] == [len(processor(text=[text])["input_ids"][0]) for text in texts]
    assert lengths[0][0] < lengths[0][1] and "image_grid_thw" in columns[1]
    meter = TokenMeter(model[0].model, "cpu", *limits)
    for _ in range(2):
        meter.add(columns)
    num_tokens = 2 * (sum(lengths[0]) + lengths[1][0])
    num_positions = num_tokens if limits[0] else 2 * (2 * lengths[0][1] + lengths[1][0])
    config = model[0].model.config
    flops = 2 * (step_flops(config, lengths[0]) + step_flops(config, lengths[1], columns[1]["image_grid_thw"].tolist()))
    assert meter.totals == [num_tokens, num_positions, flops]
    logs = meter.logs(meter.totals, 2.0, 4)
    assert logs["tokens_per_second"] == pytest.approx(num_tokens / 2)
    assert logs["padding"] == pytest.approx(1 - num_tokens / num_positions, abs=1e-6)
    assert logs["tflops_per_device"] == pytest.approx(flops / 8 / 1e12)


def test_rates_leave_out_evaluation(checkpoint, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("trainers.contrastive_trainer.time.perf_counter", lambda: clock[0])
    loss = ContrastiveTrainer.compute_loss

    def timed(self, model, *args, **kwargs):
        clock[0] += 1 if model.training else 1000
        return loss(self, model, *args, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "compute_loss", timed)
    logs = logs_of(checkpoint, tmp_path, logging_steps=4)
    rates = [entry["rows_per_second"] for entry in logs if "rows_per_second" in entry]
    assert rates == [4.0]


def test_trackers_get_numbers_under_names_they_take(checkpoint, tmp_path):
    logs = logs_of(checkpoint, tmp_path)
    names = {name for entry in logs for name in entry}
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in names), names
    assert all(type(value) in (int, float) for entry in logs for value in entry.values())
    wanted = {"loss", "loss_mixed", "loss_org/my_texts", "rows_per_second", "tokens_per_second", "padding"}
    wanted |= {"tflops_per_device", "eval_mixed_loss", "eval_org/my_texts_loss", "eval_ndcg_at_10", "eval_p_at_1"}
    assert wanted | {"eval_org/my_texts_ndcg_at_10", "eval_mixed_p_at_1"} <= names
    assert all(0 <= entry["padding"] < 1 for entry in logs if "padding" in entry)


def test_progress_bar_shows_rates(checkpoint, tmp_path, capfd):
    logs_of(checkpoint, tmp_path, disable_tqdm=False)
    bar = capfd.readouterr().err
    for shown in (r"rows/s=\d", r"tokens/s=\d", r"nDCG@10=0\.\d", r"loss=\d"):
        assert re.search(shown, bar), shown
