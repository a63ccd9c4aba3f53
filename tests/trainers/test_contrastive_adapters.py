"""Stage 2 on a part of the weights: what moves, what is saved, and how it goes on."""

import json
import runpy
import sys

import datasets
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.conftest import REPOSITORY
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.contrastive_cases import (
    GradientRecorder,
    arguments,
    build,
    mixed_task,
    picture,
    save_checkpoint,
    texts_task,
)
from trainers import adapters, whole_model
from trainers.adapters import add_adapters, add_embedding_adapters, load_adapters, merge_adapters
from trainers.contrastive_trainer import ContrastiveTrainer

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
INPUTS = ["a boat on the sea", picture(3), {"text": "a page", "image": picture(1)}]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("contrastive_adapters") / "start")


def adapted(start, dropout=0.0, **kind):
    set_seed(0)
    model = build(start)
    add_embedding_adapters(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, **kind))
    return model


def make_trainer(output, model, callbacks=None, **settings):
    settings = {"max_steps": 2, "learning_rate": 1e-2, **settings}
    tasks = {"texts": texts_task(16), "mixed": mixed_task(16)}
    return ContrastiveTrainer(model, arguments(output, **settings), tasks, callbacks=callbacks)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, start):
    """Return the names of the parameters that are not what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}


def embed(model):
    return model.encode(INPUTS, convert_to_tensor=True)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_learn_and_are_merged_in_the_end(kind, start, tmp_path):
    model = adapted(start, **KINDS[kind])
    before = snapshot(model)
    trainer = make_trainer(tmp_path, model, save_strategy="steps", save_steps=1)
    trainer.train()
    learns = {name for name in before if "lora_" in name}
    assert moved(model, before) == learns
    # Seven maps in each of four layers; two matrices each, and with DoRA a magnitude.
    assert len(learns) == 4 * 7 * (3 if kind == "dora" else 2)
    assert all(".language_model.layers." in name for name in learns)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in model.named_parameters() if name in learns}

    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "COMPLETE").is_file() and not (checkpoint / "model.safetensors").exists()
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == len(learns)
    again = adapted(start, **KINDS[kind])
    load_adapters(again[0].model, str(checkpoint))
    assert not moved(again, snapshot(model))

    expected, untrained = embed(model), embed(build(start))
    before = snapshot(model)
    trainer.save_model()
    assert not moved(model, before) and torch.equal(embed(model), expected)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    whole = MoCaModel.from_pretrained(start)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(whole.named_parameters()).keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MoCaModel"] and config["auto_map"]["AutoModel"] == "modeling_moca.MoCaModel"
    torch.testing.assert_close(embed(SentenceTransformer(str(tmp_path), device="cpu")), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, untrained, atol=1e-2)


def test_a_frozen_tower_stays(start, tmp_path):
    model = build(start)
    before = snapshot(model)
    make_trainer(tmp_path, model, freeze_vision=True, num_train_epochs=1, max_steps=-1).train()
    tower = {name for name in before if ".visual." in name and ".merger." not in name}
    assert len(tower) > 10 and moved(model, before) == before.keys() - tower


def test_modules_that_learn_in_full_are_saved_too(start, tmp_path):
    model = adapted(start, modules_to_save=["merger"])
    before = snapshot(model)
    trainer = make_trainer(tmp_path, model, num_train_epochs=1, max_steps=-1, save_strategy="epoch")
    trainer.train()
    learns = {name for name in before if "lora_" in name or ".modules_to_save." in name}
    assert moved(model, before) == learns and any(".merger.modules_to_save." in name for name in learns)
    again = adapted(start, modules_to_save=["merger"])
    load_adapters(again[0].model, str(tmp_path / "checkpoint-4"))
    assert not moved(again, snapshot(model))
    trainer.save_model()
    torch.testing.assert_close(
        embed(SentenceTransformer(str(tmp_path), device="cpu")), embed(model), atol=1e-5, rtol=1e-5
    )


def test_cached_gradients_and_recomputed_layers_change_nothing(start, tmp_path):
    gradients = []
    for settings in ({}, {"mini_batch_size": 2}, {"gradient_checkpointing": True}):
        recorder = GradientRecorder()
        settings = {"optim": "sgd", "max_grad_norm": 0.0, **settings}
        make_trainer(tmp_path, adapted(start), callbacks=[recorder], **settings).train()
        gradients.append(recorder.steps)
    plain, *others = gradients
    # In the second step both matrices have gradients.
    assert max(gradient.abs().max() for name, gradient in plain[1].items() if "lora_A" in name) > 1e-3
    for steps in others:
        for ours, theirs in zip(plain, steps):
            for name, gradient in ours.items():
                torch.testing.assert_close(theirs[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_a_run_with_adapters_resumes_exactly(start, tmp_path):
    def run(output, resume=None):
        # Dropout draws numbers, which must go on as well, and the second pass of cached gradients draws them again.
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "mini_batch_size": 2}
        model = adapted(start, dropout=0.1)
        trainer = make_trainer(output, model, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "rows_per_second" in entry], snapshot(model)

    expected_losses, expected = run(tmp_path / "whole")
    losses, weights = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses == expected_losses and len(losses) == 4
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_adapters_are_refused_where_they_cannot_work(start, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="task_type must be None, got 'FEATURE_EXTRACTION'"):
        add_embedding_adapters(build(start), LoraConfig(task_type="FEATURE_EXTRACTION"))
    monkeypatch.setattr(whole_model, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="Adapters need whole weights on every rank"):
        make_trainer(tmp_path, adapted(start))


def test_adapters_of_another_run_are_refused(start, tmp_path):
    make_trainer(tmp_path, adapted(start), save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match=r"not those of this run: 28 weights .*\.lora_magnitude_vector"):
        make_trainer(tmp_path, adapted(start, use_dora=True)).train(resume_from_checkpoint=True)
    narrow = build(start)
    add_embedding_adapters(narrow, LoraConfig(r=2))
    with pytest.raises(ValueError, match="not those of this run: 56 weights"):
        load_adapters(narrow[0].model, str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantised_weights_are_merged_at_full_precision(kind, start, tmp_path):
    """What peft merges into quantised weights is rounded; the checkpoint that they were made from is not."""
    model = adapted(start, **KINDS[kind])
    make_trainer(tmp_path, model).train()
    transformer = model[0].model
    expected = merge_adapters(transformer).state_dict()
    # Stands for quantisation: the base weights are rounded, the adapters are not.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.half())
    transformer.is_quantized = True
    merged = merge_adapters(transformer).state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)


def run_script(monkeypatch, start, folder, *flags):
    """Run examples/train_contrastive.py on a YAML file of its own with flags."""
    texts_task(16).select_columns(["query", "positive"]).to_parquet(folder / "pairs.parquet")
    (folder / "train.yaml").write_text(
        f"datasets: [{{task: texts, path: parquet, data_files: {folder}/pairs.parquet, query: query, "
        f"positive: positive}}]\noutput_dir: {folder}/output\nuse_cpu: true\nper_device_train_batch_size: 8\n"
        "max_steps: 2\nlearning_rate: 1.0e-2\nsave_strategy: 'no'\nreport_to: none\nwarmup_steps: 0\n"
    )
    script = REPOSITORY / "examples" / "train_contrastive.py"
    command = [str(script), "--config", f"{folder}/train.yaml", *flags]
    command += [] if start is None else ["--model_name_or_path", str(start)]
    monkeypatch.setattr(sys, "argv", command)
    datasets.disable_progress_bars()
    runpy.run_path(str(script), run_name="__main__")
    return folder / "output"


def test_the_script_trains_adapters(start, tmp_path, monkeypatch):
    flags = ["--use_peft", "true", "--use_dora", "true", "--use_rslora", "true", "--lora_r", "4"]
    output = run_script(monkeypatch, start, tmp_path, *flags)
    weights, stock = load_file(output / "model.safetensors"), MoCaModel.from_pretrained(start).state_dict()
    changed = {name for name in stock if not torch.equal(weights[name], stock[name])}
    assert weights.keys() == stock.keys()
    assert len(changed) == 28 and all(".language_model.layers." in name and "_proj" in name for name in changed)
    SentenceTransformer(str(output), device="cpu").encode(["a boat"])


def test_the_script_quantises_what_adapters_leave_alone(start, tmp_path, monkeypatch):
    asked = {}

    def from_pretrained(*args, **kwargs):
        asked.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(MoCaModel, "from_pretrained", from_pretrained)
    with pytest.raises(InterruptedError):
        run_script(monkeypatch, start, tmp_path, "--load_in_4bit", "true", "--use_peft", "true")
    assert asked["quantization_config"].load_in_4bit and asked["quantization_config"].bnb_4bit_quant_type == "nf4"
    assert asked["device_map"] == {"": "cpu"}


def test_the_script_refuses_what_would_have_no_effect(start, tmp_path, monkeypatch):
    for flags, message in (
        (["--load_in_4bit", "true"], r"\['load_in_4bit'\] have no effect without adapters: set use_peft"),
        (["--use_dora", "true", "--lora_r", "4"], r"\['lora_r', 'use_dora'\] have no effect without adapters"),
        (["--use_peft", "true", "--bnb_4bit_quant_type", "fp4"], r"\['bnb_4bit_quant_type'\] have no effect without 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script(monkeypatch, start, tmp_path, *flags)
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        run_script(monkeypatch, None, tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub with two revisions of one model, org/tiny; return the weights of each by name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = {}
    for number, revision in enumerate(["main", "old"]):
        model = MoCaForPreTraining.from_backbone(tiny_backbone(seed=number), mask_token_id=6)
        folder, commit = tmp_path / "hub" / "models--org--tiny", str(number) * 40
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        model.save_pretrained(folder / "snapshots" / commit)
        tiny_processor().save_pretrained(folder / "snapshots" / commit)
        weights[revision] = model.state_dict()
    return weights


def test_a_revision_is_what_is_trained(hub, tmp_path, monkeypatch):
    frozen = ["--learning_rate", "0", "--model_revision", "old"]
    trained = load_file(run_script(monkeypatch, "org/tiny", tmp_path, *frozen) / "model.safetensors")
    old, main = ({name.removeprefix("moca."): tensor for name, tensor in hub[key].items()} for key in ("old", "main"))
    assert all(torch.equal(tensor, old[name]) for name, tensor in trained.items())
    assert any(not torch.equal(tensor, main[name]) for name, tensor in trained.items())

    configs = []
    monkeypatch.setattr(adapters, "add_embedding_adapters", lambda model, config: configs.append(config))
    run_script(monkeypatch, "org/tiny", tmp_path, *frozen, "--use_peft", "true")
    assert configs[0].revision == "old"


def test_quantised_weights_of_a_revision_are_merged_with_that_one(hub):
    """New adapters change nothing, so that what is merged are the weights of the checkpoint."""
    embedding = build("org/tiny", revision="old")
    add_embedding_adapters(embedding, LoraConfig(r=4, revision="old"))
    pretraining = MoCaForPreTraining.from_pretrained("org/tiny", revision="old")
    pretraining = add_adapters(pretraining, LoraConfig(r=4, revision="old"))
    for model, prefix in ((embedding[0].model, "moca."), (pretraining, "")):
        # Stands for quantisation, which leaves no weights to merge with.
        getattr(model, "get_base_model", lambda model=model: model)().is_quantized = True
        merged = merge_adapters(model).state_dict()
        assert len(merged) > 50
        assert all(torch.equal(tensor, hub["old"][prefix + name]) for name, tensor in merged.items())
