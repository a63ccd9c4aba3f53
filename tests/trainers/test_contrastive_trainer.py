"""Training on tiny mixed data: it learns, moves every weight and saves a clean folder."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from trl import ModelConfig, TrlParser

from modeling_moca import MoCaModel, MoCaProcessor
from tests import forked
from tests.conftest import REPOSITORY
from tests.tiny import tiny_backbone
from tests.trainers.contrastive_cases import (
    GradientRecorder,
    arguments,
    build,
    mixed_task,
    picture,
    save_checkpoint,
    texts_task,
)
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_data import ContrastiveDataCollator
from trainers.contrastive_info_nce import info_nce
from trainers.contrastive_loss import InfoNCELoss
from trainers.contrastive_sampler import OrderedBatches
from trainers.contrastive_sources import KINDS, PairMixtureConfig
from trainers.contrastive_trainer import ContrastiveTrainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def train(checkpoint, output_folder, train_dataset=None, **kwargs):
    torch.manual_seed(0)
    eval_dataset = kwargs.pop("eval_dataset", None)
    model = build(checkpoint)
    trainer = ContrastiveTrainer(
        model,
        arguments(output_folder, **kwargs),
        train_dataset or {"texts": texts_task(), "mixed": mixed_task()},
        eval_dataset,
    )
    return model, trainer


def test_training_lowers_loss_and_moves_every_parameter(checkpoint, tmp_path):
    model, trainer = train(checkpoint, tmp_path, num_train_epochs=8, learning_rate=5e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for task in ("texts", "mixed"):
        losses = [entry[f"loss_{task}"] for entry in history if f"loss_{task}" in entry]
        assert len(losses) == 8 and sum(losses[-2:]) < 0.6 * sum(losses[:2])
    assert any("visual" in name for name in before)
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_stock_modules_pool_as_the_model_does(checkpoint, tmp_path, pooling):
    model = MoCaModel.from_pretrained(checkpoint, pooling=pooling)
    processor = MoCaProcessor.from_pretrained(checkpoint)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    texts = ["the sea", "a picture of the sky at night"]
    with torch.no_grad():
        expected = model.eval()(**processor(text=texts, return_tensors="pt", padding=True)).pooler_output
    embeddings = build(tmp_path).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(expected), atol=1e-5, rtol=1e-5)


def test_prompts_by_task_and_max_length(checkpoint, tmp_path):
    settings = arguments(tmp_path, prompts={"texts": {"query": "find: "}}, max_length=12)
    data = {"texts": texts_task(), "mixed": mixed_task()}
    trainer = ContrastiveTrainer(build(checkpoint, max_length=12), settings, data)
    tokenizer = trainer.model.tokenizer
    for task in ("texts", "mixed"):
        batch = trainer.data_collator([{"dataset_name": task, **data[task][index]} for index in range(4)])
        queries = tokenizer.batch_decode(batch["query_input_ids"], skip_special_tokens=True)
        assert [query.startswith("find: ") for query in queries] == [task == "texts"] * 4
        assert all(value.shape[1] <= 12 for key, value in batch.items() if key.endswith("input_ids"))
        assert batch["positive_input_ids"].shape[1] > 6
    trainer.save_model()
    assert SentenceTransformer(str(tmp_path), device="cpu")[0].processor.max_length == 12


def test_activation_checkpointing_keeps_the_gradients(checkpoint, tmp_path):
    gradients = []
    for enabled in (False, True):
        recorder = GradientRecorder()
        model = build(checkpoint)
        settings = arguments(tmp_path, max_steps=1, gradient_checkpointing=enabled, mini_batch_size=4)
        ContrastiveTrainer(model, settings, {"mixed": mixed_task()}, callbacks=[recorder]).train()
        assert model[0].model.backbone.is_gradient_checkpointing is enabled
        gradients.append(recorder.steps[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("all_negatives", [True, False])
def test_features_reach_the_loss_as_rows_say(checkpoint, all_negatives):
    """The loss of a batch equals info_nce on embeddings of its rows made one by one."""
    model = build(checkpoint).eval()
    rows = [mixed_task()[index] for index in range(8)]
    batch = ContrastiveDataCollator(model.preprocess)(rows)
    mask = batch["label"]["negatives_mask"]
    assert mask[:, 0].tolist() == [False, True, False, False, False, True, False, False]
    features = [
        {key[len(column) + 1 :]: value for key, value in batch.items() if key.startswith(column + "_")}
        for column in ("query", "positive", "negative_1")
    ]

    def embed(side):
        side = side if isinstance(side, dict) else {"image": side}
        return model.encode({key: value for key, value in sorted(side.items()) if value is not None})

    with torch.no_grad():
        loss = InfoNCELoss(model, all_negatives=all_negatives)(features, batch["label"])
        query, positive = (
            torch.stack([torch.as_tensor(embed(row[name])) for row in rows]) for name in ("query", "positive")
        )
        present = [row["negative_1"] for row in rows if row["negative_1"] is not None]
        negatives = torch.zeros(8, 1, query.shape[1])
        negatives[mask[:, 0], 0] = torch.stack([torch.as_tensor(embed(image)) for image in present])
        expected = info_nce(query, positive, negatives, mask, all_negatives=all_negatives)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_settings_reach_the_loss(checkpoint, tmp_path):
    settings = {
        "temperature": 0.5,
        "all_negatives": False,
        "symmetric": True,
        "false_negative_margin": 0.2,
        "matryoshka_dims": [32, 16],
        "matryoshka_weights": [1.0, 0.5],
        "mini_batch_size": 3,
        "mini_batch_tokens": 500,
    }
    _, trainer = train(checkpoint, tmp_path, **settings)
    assert trainer.loss.get_config_dict() == settings


@pytest.mark.parametrize("settings", [{"mini_batch_tokens": 60}, {"mini_batch_size": 2}, {}])
def test_features_stay_on_the_host_with_cached_gradients(checkpoint, tmp_path, monkeypatch, settings):
    _, trainer = train(checkpoint, tmp_path, {"mixed": mixed_task()}, **settings)
    inputs = next(iter(trainer.get_train_dataloader()))["inputs"]
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    prepared = trainer._prepare_inputs(inputs)
    assert list(prepared) == list(inputs) and "positive_pixel_values" in prepared
    places = {name: value.device.type for name, value in prepared.items() if isinstance(value, torch.Tensor)}
    assert {value.device.type for value in prepared["label"].values()} == {"meta"}
    assert set(places.values()) == {"cpu" if settings else "meta"}


class HashingCollator(ContrastiveDataCollator):
    """Tell the loss that all positives are the same."""

    def encode(self, pairs, sides, task):
        batch = super().encode(pairs, sides, task)
        batch["label"]["positive_hash"] = torch.zeros(len(pairs)).long()
        return batch


def test_labels_by_name_pass_through_the_trainer(checkpoint, tmp_path):
    model = build(checkpoint)
    collator = HashingCollator(model.preprocess)
    settings = arguments(tmp_path, max_steps=1, mini_batch_tokens=60, all_negatives=False)
    # Without hard negatives every candidate is a duplicate of the positive, and nothing is left to learn.
    data = {"texts": texts_task().map(lambda row: {"negative_1": None, "negative_2": None})}
    trainer = ContrastiveTrainer(model, settings, data, data_collator=collator)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0]


def test_both_passes_of_cached_gradients_run_under_autocast(checkpoint, tmp_path):
    """The second pass runs inside the backward pass, where Trainer's own autocast has ended."""
    model, trainer = train(checkpoint, tmp_path, {"mixed": mixed_task()}, max_steps=1, bf16=True, mini_batch_size=4)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))))
    trainer.train()
    assert set(seen) == {(False, True), (True, True)} and len(seen) == 12


def test_masked_negatives(checkpoint):
    model = build(checkpoint)
    batch = ContrastiveDataCollator(model.preprocess)([texts_task()[index] for index in range(4)])
    # Row 0: missing and blank; row 1: equal to its positive; row 3: missing.
    assert batch["label"]["negatives_mask"].tolist() == [[False, False], [False, True], [True, True], [False, True]]


@pytest.mark.parametrize("empty", [None, "", {"text": " ", "image": None}])
def test_rows_without_query_are_refused(checkpoint, empty):
    rows = [{"query": empty, "positive": "the sea", "dataset_name": "texts"}]
    with pytest.raises(ValueError, match="'texts', row 0 of the batch: its query holds neither text nor image"):
        ContrastiveDataCollator(build(checkpoint).preprocess)(rows)


def test_saved_folder_loads_anywhere_and_holds_no_training_data(checkpoint, tmp_path):
    model, trainer = train(checkpoint, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        names = {path.name for path in folder.iterdir()}
        assert {"modules.json", "config.json", "model.safetensors", "training_args.json"} <= names
        assert not {"assets", "README.md", "training_args.bin"} & names
        for path in folder.rglob("*.json"):
            assert "a picture of the harbour" not in path.read_text()
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    inputs = ["the sea", picture(1), {"image": picture(2), "text": "the sky"}]
    torch.testing.assert_close(
        loaded.encode(inputs, convert_to_tensor=True), model.encode(inputs, convert_to_tensor=True)
    )
    assert loaded[0].unpad_inputs is False


def test_only_the_first_rank_writes(checkpoint, tmp_path, monkeypatch):
    _, trainer = train(checkpoint, tmp_path)
    # With DeepSpeed, Trainer calls this on every rank.
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer._save(str(tmp_path / "second_rank"))
    assert not (tmp_path / "second_rank").exists()


def test_evaluation_reports_each_task(checkpoint, tmp_path):
    data = {"texts": texts_task(11), "mixed": mixed_task(8)}
    model, trainer = train(checkpoint, tmp_path, eval_dataset=data, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert {"eval_texts_loss", "eval_mixed_loss"} <= set(metrics)
    batches = list(OrderedBatches(11, 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    losses = []
    for batch in batches:
        features = ContrastiveDataCollator(model.preprocess)([data["texts"][index] for index in batch])
        columns, mask = trainer.collect_features(features)
        with torch.no_grad():
            losses.append(InfoNCELoss(model)(columns, mask).item())
    assert metrics["eval_texts_loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)


def test_mixed_batches_hold_rows_of_all_tasks_and_their_own_negatives(checkpoint, tmp_path):
    data = {"texts": texts_task(16), "mixed": mixed_task(16)}  # two hard negatives, and one
    _, trainer = train(checkpoint, tmp_path, data, task_batches=False, all_negatives=False)
    loader = trainer.get_train_dataloader()
    plan = trainer._schedule.plan
    batches = [plan.batch(number)[1].tolist() for number in range(plan.num_batches)]
    assert sorted(row for batch in batches for row in batch) == list(range(32))
    assert all(min(batch) < 16 <= max(batch) for batch in batches), "a batch of one task"
    for rows, batch in zip(batches, loader):
        mask = batch["inputs"]["label"]["negatives_mask"]
        assert mask.shape == (8, 2)
        for row, exists in zip(rows, mask.tolist()):
            source = data["texts"][row] if row < 16 else data["mixed"][row - 16]
            for number, there in enumerate(exists, start=1):
                negative = source.get(f"negative_{number}")
                is_text = isinstance(negative, str)
                given = negative is not None and not (is_text and not negative.strip())
                assert there == (given and negative != source["positive"])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("loss_all_tasks" in entry for entry in logged)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"texts": texts_task().rename_column("negative_1", "negative")}, r"'texts' .*unknown \['negative'\]"),
        ({"texts": texts_task().add_column("id", list(range(8)))}, r"'texts' .*unknown \['id'\]"),
        ({"texts": texts_task().to_iterable_dataset()}, "must be a datasets.Dataset, .* got IterableDataset"),
    ],
)
def test_data_is_checked(checkpoint, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        train(checkpoint, tmp_path, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"task_alpha": 2.0}, r"task_alpha must lie in \[0, 1\], got 2.0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
        ({"mini_batch_tokens": 0}, "mini_batch_tokens must be at least 1, got 0"),
        ({"matryoshka_dims": []}, r"matryoshka_dims must be distinct numbers of at least 1, got \[\]"),
        ({"matryoshka_dims": [8, 8]}, r"matryoshka_dims must be distinct .* got \[8, 8\] \(ContrastiveConfig\)"),
        ({"matryoshka_weights": [1.0]}, r"one for each of matryoshka_dims None, got \[1.0\]"),
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1.0]}, r"one for each of matryoshka_dims \[8, 4\]"),
        ({"batch_sampler": "no_duplicates"}, "leave batch_sampler"),
        ({"task_batches": False, "task_alpha": 0.5}, "task_alpha=0.5 .* needs task_batches=True"),
        ({"task_batches": False, "prompts": {"texts": {"query": "a"}}}, "prompts by task need task_batches=True"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_cached_gradients_and_deepspeed_exclude_each_other(checkpoint, tmp_path, monkeypatch):
    stock = SentenceTransformerTrainer.create_accelerator_and_postprocess

    def with_deepspeed(trainer):
        stock(trainer)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(ContrastiveTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(ValueError, match="mini_batch_size=2, mini_batch_tokens=None: .* several backward passes"):
        train(checkpoint, tmp_path, mini_batch_size=2)
    with pytest.raises(ValueError, match="mini_batch_size=None, mini_batch_tokens=64"):
        train(checkpoint, tmp_path, mini_batch_tokens=64)


def test_unconverted_backbone_is_refused(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'qwen2_5_vl', allowed is 'moca'"):
        build(tmp_path)


def test_example_script(checkpoint, tmp_path):
    for task, rows in (("texts", texts_task()), ("mixed", mixed_task())):
        rows.to_parquet(tmp_path / f"{task}.parquet")
    config = yaml.safe_load((REPOSITORY / "examples/configs/contrastive_tiny.yaml").read_text())
    entry = {"path": "parquet", "query": "query", "positive": "positive"}
    config["datasets"] = [
        {**entry, "task": "texts", "data_files": "texts.parquet", "negatives": ["negative_1", "negative_2"]},
        {**entry, "task": "mixed", "data_files": "mixed.parquet", "query_instruction": "find: "},
    ]
    config["eval_datasets"] = [{**config["datasets"][0], "document_instruction": "read: ", "task": "held_out"}]
    config |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**config, "temprature": 0.05}))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    command = [REPOSITORY / "examples/train_contrastive.py", "--model_name_or_path", checkpoint, "--max_steps", "2"]
    command += ["--output_dir", tmp_path / "output", "--per_device_train_batch_size", "4", "--config"]
    good = subprocess.run(
        [sys.executable, *command, tmp_path / "good.yaml"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert good.returncode == 0, good.stderr[-4000:]
    assert SentenceTransformer(str(tmp_path / "output"), device="cpu").encode("the sea").shape == (32,)
    report = json.loads((tmp_path / "output" / "data_report.json").read_text())["datasets"]
    assert report["texts"]["num_negatives_equal_to_positive"] == 1 and report["mixed"]["used"]["num_rows"] >= 4
    settings = json.loads((tmp_path / "output" / "training_args.json").read_text())
    assert settings["prompts"]["held_out"]["negative_2"] == "read: " and settings["prompts"]["mixed"] == {
        "query": "find: "
    }
    history = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_held_out_loss" in entry for entry in history)
    assert any(0 < entry.get("eval_held_out_ndcg_at_10", 0) <= entry["eval_ndcg_at_10"] for entry in history)
    bad = forked.run(*command, tmp_path / "bad.yaml", folder=tmp_path)
    assert bad.returncode != 0
    assert "Unknown arguments from config file" in bad.stderr and "temprature" in bad.stderr


@pytest.mark.parametrize("name", ["moca_3b", "reference_3b", "tiny"])
def test_shipped_configurations_parse(name):
    parser = TrlParser((PairMixtureConfig, ModelConfig, ContrastiveConfig))
    path = str(REPOSITORY / "examples" / "configs" / f"contrastive_{name}.yaml")
    flags = ["--config", path, "--use_cpu", "true", "--bf16", "false"]
    mixture, model, config = parser.parse_args_and_config(flags)
    assert model.dtype == "float32" and config.warmup_steps == 0.1
    tasks = [source.task for source in mixture.datasets]
    assert len(set(tasks)) == len(tasks)
    if name != "tiny":
        assert len(tasks) == 47 and {source.kind for source in mixture.datasets} == set(KINDS)
        assert all(source.max_rows == 50_000 and source.num_negatives == 2 for source in mixture.datasets)
        assert config.temperature == 0.03 and config.per_device_train_batch_size * 32 == 2048
        follows_paper = (config.learning_rate, config.all_negatives, config.task_batches) == (1e-5, True, True)
        assert follows_paper == (name == "moca_3b")
