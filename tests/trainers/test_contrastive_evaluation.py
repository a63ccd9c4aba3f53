"""Dev sets by retrieval: which answers are right, plain encoding as reference, nothing disturbed, the best kept."""

import json
import random

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.trainers.contrastive_cases import arguments, build, mixed_task, save_checkpoint, texts_task
from trainers import contrastive_trainer
from trainers.adapters import add_embedding_adapters, load_adapters, merge_adapters
from trainers.checkpoints import MARKER, last_complete
from trainers.contrastive_evaluation import RetrievalSet, check_log_names, log_name
from trainers.contrastive_trainer import ContrastiveTrainer
from trainers.evaluation import retrieval_metrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("evaluation") / "start")


def make_trainer(checkpoint, output, dev_sets=None, dropout=0.0, **settings):
    model = build(checkpoint)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 6, **settings}
    config = arguments(output, learning_rate=1e-3, **settings)
    return ContrastiveTrainer(model, config, {"texts": texts_task(8), "mixed": mixed_task(8)}, dev_sets)


def test_right_answers_by_content():
    rows = [
        ("a", "one", "two"),
        ("b", "two", None),
        # A second answer to the first query.
        ("a", "three", "four"),
        # The same answer as that of the second.
        ("c", "two", "one"),
    ]
    rows = datasets.Dataset.from_list([dict(zip(("query", "positive", "negative_1"), row)) for row in rows])
    dev_set = RetrievalSet(rows, "dev")
    assert [dev_set.read(place)["text"] for place in dev_set.queries] == ["a", "b", "c"]
    candidates = [dev_set.read(place)["text"] for place in dev_set.candidates]
    assert sorted(candidates) == ["four", "one", "three", "two"]
    answers = [{candidates[index] for index in indices} for indices in dev_set.relevant]
    assert answers == [{"one", "three"}, {"two"}, {"two"}]


def test_bad_and_missing_rows_are_refused():
    rows = datasets.Dataset.from_list([{"query": "a", "positive": "b"}, {"query": " ", "positive": "c"}])
    with pytest.raises(ValueError, match="'dev', row 1: its query holds neither"):
        RetrievalSet(rows, "dev")
    with pytest.raises(ValueError, match="'dev' has no rows"):
        RetrievalSet(rows.select([]), "dev")


@pytest.mark.parametrize("limits", [{}, {"mini_batch_tokens": 60}])
def test_equals_plain_encoding(checkpoint, tmp_path, limits):
    prompts = {"mixed": {"query": "the a picture: ", "positive": "page: ", "negative_1": "page: "}}
    data = {"texts": texts_task(12), "mixed": mixed_task(12)}
    trainer = make_trainer(checkpoint, tmp_path, data, prompts=prompts, **limits)
    passes = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0]["input_ids"].shape))
    trainer.args.eval_retrieval = False
    assert not [name for name in trainer.evaluate() if "ndcg" in name]
    trainer.args.eval_retrieval, num_passes = True, len(passes)
    metrics = trainer.evaluate()
    of_retrieval = passes[2 * num_passes :]
    assert max(shape[0] for shape in of_retrieval) <= 3
    if limits:
        assert all(shape[0] == 1 or shape.numel() <= 60 for shape in of_retrieval)
    num_inputs = 0
    for task, rows in data.items():
        instructions = prompts.get(task, {})
        rows = list(rows)

        def side(row, name):
            value = row.get(name)
            if isinstance(value, dict):
                value = {key: part for key, part in value.items() if part is not None}
            return {"text": value} if isinstance(value, str) else value if isinstance(value, dict) else {"image": value}

        positives = [side(row, "positive") for row in rows]
        negatives = [row.get(name) for row in rows for name in ("negative_1", "negative_2")]
        candidates = list(positives)
        for value in negatives:
            if value is not None and not (isinstance(value, str) and not value.strip()):
                value = {"text": value} if isinstance(value, str) else {"image": value}
                if value not in candidates:
                    candidates.append(value)
        queries = [side(row, "query") for row in rows]
        assert len({str(query) for query in queries}) == len(queries), "one answer each"
        embeddings = [
            trainer.model.encode(inputs, prompt=instructions.get(name), batch_size=1, convert_to_tensor=True)
            for name, inputs in (("query", queries), ("positive", candidates))
        ]
        expected = retrieval_metrics(*embeddings, [[index] for index in range(len(queries))], k=10)
        assert metrics[f"eval_{task}_ndcg_at_10"] == pytest.approx(expected["nDCG@10"], abs=1e-9), task
        assert metrics[f"eval_{task}_p_at_1"] == pytest.approx(expected["P@1"], abs=1e-9), task
        assert 0 < expected["nDCG@10"] < 1
        num_inputs += len(queries) + len(candidates)
    assert sum(shape[0] for shape in of_retrieval) == num_inputs, "each input once"
    for name in ("ndcg_at_10", "p_at_1"):
        mean = (metrics[f"eval_texts_{name}"] + metrics[f"eval_mixed_{name}"]) / 2
        assert metrics[f"eval_{name}"] == pytest.approx(mean)
    assert {"eval_texts_loss", "eval_mixed_loss"} <= metrics.keys()
    assert any("eval_ndcg_at_10" in entry for entry in trainer.state.log_history)


def training_of(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("rows_per_second", "tokens_per_second", "tflops_per_device")
    history = [{name: value for name, value in entry.items() if name not in names} for entry in history]
    return history, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_evaluation_changes_nothing_in_training(checkpoint, tmp_path):
    settings = {"dropout": 0.5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    history, weights = training_of(make_trainer(checkpoint, tmp_path / "without", **settings))
    dev_sets = {"texts": texts_task(8), "mixed": mixed_task(8)}
    evaluating = {**settings, "eval_strategy": "steps", "eval_steps": 2}
    for resume in (None, str(tmp_path / "with" / "checkpoint-4")):
        trainer = make_trainer(checkpoint, tmp_path / "with", dev_sets, **evaluating)
        found, found_weights = training_of(trainer, resume)
        assert found == history and len(history) == 2 and "padding" in history[0]
        assert all(torch.equal(*pair) for pair in zip(found_weights, weights)), resume
        assert sum("eval_ndcg_at_10" in entry for entry in trainer.state.log_history) == 3
    # Dropout has drawn.
    other = training_of(make_trainer(checkpoint, tmp_path / "plain", **{**settings, "dropout": 0.0}))[0]
    assert other != history
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer.evaluate({"others": texts_task(8)})
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "ndcg_at_10",
    "load_best_model_at_end": True,
}


def falling(trainer, dev_set):
    """The second evaluation is the best one."""
    value = 0.9 if trainer.state.global_step == 2 else 0.5 - trainer.state.global_step / 100
    return {"ndcg_at_10": value, "p_at_1": value}


def test_best_checkpoint_is_kept_and_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", falling)
    trainer = make_trainer(checkpoint, tmp_path, {"texts": texts_task(8)}, save_total_limit=2, **BEST)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert all((path / MARKER).is_file() for path in tmp_path.glob("checkpoint-*"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.9 and state["best_model_checkpoint"].endswith("checkpoint-2")
    best, last = (build(tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 6))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_a_best_checkpoint_that_does_not_load_is_an_error(checkpoint, tmp_path, monkeypatch):
    def spoil(trainer, dev_set):
        if trainer.state.global_step == 4:
            (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        return falling(trainer, dev_set)

    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", spoil)
    trainer = make_trainer(checkpoint, tmp_path, {"texts": texts_task(8)}, **BEST)
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        trainer.train()


def test_a_stopped_run_keeps_its_last_checkpoint(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", falling)

    def stop(trainer, dev_set):
        # A signal after the third step, which the ranks agree on in the fourth.
        trainer._signal.received = trainer.state.global_step == 3
        return falling(trainer, dev_set)

    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", stop)
    trainer = make_trainer(checkpoint, tmp_path, {"texts": texts_task(8)}, save_total_limit=1, **BEST)
    trainer.train()
    last = trainer.state.global_step
    # The wish is counted with step 4, and the ranks' sum of that step is looked at in the next one.
    assert trainer.stopped and last == 5
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", f"checkpoint-{last}"]
    assert trainer.args.load_best_model_at_end and trainer.args.save_total_limit == 1


def test_a_stopped_run_saves_at_an_evaluation_that_is_not_the_best(checkpoint, tmp_path, monkeypatch):
    def stop(trainer, dev_set):
        trainer._signal.received = trainer.state.global_step == 3
        return falling(trainer, dev_set)

    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", stop)
    settings = {**BEST, "save_strategy": "best"}
    trainer = make_trainer(checkpoint, tmp_path, {"texts": texts_task(8)}, **settings)
    trainer.train()
    last = trainer.state.global_step
    # The wish is counted with step 4, and the ranks' sum of that step is looked at in the next one.
    assert trainer.stopped and last == 5
    # Those of steps 1 and 2 were the best so far; that of step 3 was neither the best nor told to stop.
    assert all((tmp_path / f"checkpoint-{step}").exists() for step in (1, 2))
    assert not (tmp_path / "checkpoint-3").exists()
    assert last_complete(tmp_path) == str(tmp_path / f"checkpoint-{last}")
    assert trainer.state.best_global_step == 2


def test_the_best_adapters_are_merged_in_the_end(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive_trainer, "evaluate_retrieval", falling)
    model = build(checkpoint)
    add_embedding_adapters(model, LoraConfig(r=4))
    config = arguments(tmp_path, learning_rate=1e-2, per_device_train_batch_size=4, max_steps=4, **BEST)
    trainer = ContrastiveTrainer(model, config, {"texts": texts_task(8)}, {"texts": texts_task(8)})
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_global_step == 2
    trainer.save_model()
    merged = load_file(tmp_path / "model.safetensors")
    whole = {}
    for step in (2, 4):
        again = build(checkpoint)
        add_embedding_adapters(again, LoraConfig(r=4))
        load_adapters(again[0].model, str(tmp_path / f"checkpoint-{step}"))
        whole[step] = merge_adapters(again[0].model).state_dict()
    assert all(torch.equal(tensor, whole[2][name]) for name, tensor in merged.items())
    assert any(not torch.equal(tensor, whole[4][name]) for name, tensor in merged.items())


def test_refusals(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="eval_steps must equal save_steps, .* got 1 and 2"):
        arguments(tmp_path, **{**BEST, "save_steps": 2})
    names = ["a b", "a:b", "c"]
    with pytest.raises(ValueError, match=r"\['a b', 'a:b'\] have one name in the logs"):
        check_log_names(names)
    with pytest.raises(ValueError, match="have one name in the logs"):
        make_trainer(checkpoint, tmp_path, {"te xts": texts_task(8), "te_xts": texts_task(8)})
    create = ContrastiveTrainer.create_accelerator_and_postprocess

    def share_weights(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(ContrastiveTrainer, "create_accelerator_and_postprocess", share_weights)
    with pytest.raises(ValueError, match="load_best_model_at_end puts whole weights"):
        make_trainer(checkpoint, tmp_path, {"texts": texts_task(8)}, **BEST)


def test_names_in_the_logs():
    assert log_name("loss_org/my-set v1.0 @ä:b") == "loss_org/my-set_v1.0____b"
    assert log_name("eval_pages_ndcg_at_10") == "eval_pages_ndcg_at_10"
