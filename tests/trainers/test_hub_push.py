"""`push_to_hub=True` in both stages, against the Hub on loopback."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from hub_cards import write_training_card
from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from tests.hub_cards.check_hub import inputs
from tests.hub_cards.hub_server import Hub
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers import push_sharded
from tests.trainers.contrastive_cases import save_checkpoint
from tests.two_ranks import start_two_ranks
from trainers.adapters import add_embedding_adapters
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer

CHECK = Path(__file__).resolve().parents[1] / "hub_cards" / "check_hub.py"
STATE = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "run_state_0.json", "COMPLETE", "rng_state.pth"}
SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "push_to_hub": True,
    # Every save, however slow the machine is.
    "hub_always_push": True,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub") / "blobs", part_size=10**6) as hub:
        yield hub


@pytest.fixture
def client(hub, monkeypatch):
    hub.connect(monkeypatch)
    hub.refused_uploads, hub.upload_seconds = set(), 0
    return hub


def rows(number=8):
    return [{"text": f"a page about tides, number {i}", "images": []} for i in range(number)]


def cpt_trainer(output, **settings):
    config = CPTConfig(output_dir=str(output), **{**SETTINGS, **settings})
    model = MoCaForPreTraining.from_backbone(tiny_backbone(), mask_token_id=6)
    return CPTTrainer(
        model,
        config,
        train_dataset=rows(),
        processing_class=tiny_processor(max_length=128),
        card_writer=write_training_card,
    )


def contrastive_trainer(folder, output, adapters=False, **settings):
    from datasets import Dataset

    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "start")
    tiny_processor(max_length=128).save_pretrained(folder / "start")
    model = build_sentence_transformer(folder / "start", device="cpu")
    if adapters:
        add_embedding_adapters(model, LoraConfig(r=4, init_lora_weights=False))
    config = ContrastiveConfig(output_dir=str(output), **{**SETTINGS, **settings})
    pairs = {"query": [f"query {i}" for i in range(8)], "positive": [f"answer {i}" for i in range(8)]}
    return ContrastiveTrainer(model, config, {"pairs": Dataset.from_dict(pairs)}, card_writer=write_training_card)


def at_message(hub, name, message):
    """Return the files of the commit with this message."""
    repository = hub.repository(name)
    commits = dict(zip([told for _, told in repository.messages], repository.commits))
    return hub.files(name, commits[message])


def check_content(files, needed):
    names = set(files)
    assert needed <= names, needed - names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    assert not names & (STATE | {"rejected.jsonl", "data_report.json"})
    assert not any(name.startswith(("_", "checkpoint-", "runs/")) for name in names)
    assert "hf_" not in files["training_args.json"].decode()


NEEDED = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
NEEDED |= {"chat_template.jinja", "modeling_moca.py", "processing_moca.py", "training_args.json"}
OF_SENTENCE_TRANSFORMERS = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"}


def test_both_stages_push_what_loads_by_name(client, tmp_path):
    # Slower than training, which has to wait for it.
    client.upload_seconds = 1
    stage1 = cpt_trainer(tmp_path / "stage1", hub_model_id="org/stage1", hub_strategy="checkpoint")
    stage1.train()
    repository = client.repository("org/stage1")
    pushed = ["Training in progress, step 2", "Training in progress, step 2, checkpoint"]
    pushed += ["Training in progress, step 4", "Training in progress, step 4, checkpoint"]
    assert [message for _, message in repository.messages] == ["initial commit", *pushed]
    stage1.save_model()
    assert repository.messages[-1] == ("main", "Model save") and repository.private
    client.upload_seconds = 0

    stage2 = contrastive_trainer(tmp_path, tmp_path / "stage2", hub_model_id="org/stage2", hub_revision="run-1")
    stage2.train()
    stage2.save_model()
    # The branch was made for it.
    assert client.repository("org/stage2").branches.keys() == {"main", "run-1"}
    messages = [message for _, message in client.repository("org/stage2").messages]
    # What is saved in the end may be what was pushed last: then there is nothing to commit.
    assert messages[:3] == ["initial commit", *pushed[::2]] and messages[3:] in ([], ["Model save"])
    for name, branch, needed, output in (
        ("org/stage1", "main", NEEDED, stage1.args.output_dir),
        ("org/stage2", "run-1", NEEDED | OF_SENTENCE_TRANSFORMERS, stage2.args.output_dir),
    ):
        for files, folder in (
            (at_message(client, name, "Training in progress, step 2"), "checkpoint-2"),
            (client.files(name, branch), "."),
        ):
            top = {path: data for path, data in files.items() if not path.startswith("last-checkpoint/")}
            check_content(top, needed)
            assert files["model.safetensors"] == (Path(output) / folder / "model.safetensors").read_bytes()
        assert not list(Path(output).glob("_push-*")), "what was sent is still there"

    # The training state is that of a whole checkpoint.
    last = {path for path in client.files("org/stage1") if path.startswith("last-checkpoint/")}
    assert {path.removeprefix("last-checkpoint/") for path in last} >= STATE | {"model.safetensors"}

    (tmp_path / "elsewhere").mkdir()
    wanted = {"stage1": {"name": "org/stage1"}, "stage2": {"name": "org/stage2", "revision": "run-1"}}
    done = subprocess.run(
        [sys.executable, str(CHECK), str(tmp_path / "found.json"), json.dumps(wanted)],
        cwd=tmp_path / "elsewhere",
        env=client.environment(tmp_path / "home"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())["loaded"]
    expected = {
        "stage1": build_sentence_transformer(stage1.args.output_dir, device="cpu").encode(
            inputs(), convert_to_tensor=True
        ),
        "stage2": stage2.model.eval().encode(inputs(), convert_to_tensor=True),
    }
    for stage, vectors in expected.items():
        for door in ("transformers", "sentence_transformers"):
            # A folder of stage 1 is no folder of sentence-transformers, which then normalises nothing.
            given = torch.nn.functional.normalize(torch.tensor(found[stage][door]), dim=-1)
            torch.testing.assert_close(given, vectors, atol=1e-5, rtol=0)


def test_adapters_are_pushed_merged(client, tmp_path):
    trainer = contrastive_trainer(tmp_path, tmp_path / "out", adapters=True, hub_model_id="org/adapters", max_steps=2)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    files = at_message(client, "org/adapters", "Training in progress, step 2")
    check_content(files, NEEDED | OF_SENTENCE_TRANSFORMERS)
    assert "adapter_config.json" not in files
    (tmp_path / "pushed").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "pushed" / name).write_bytes(files[name])
    batch = tiny_processor(max_length=128)(text=["a page about tides"])
    with torch.no_grad():
        expected = trainer.model[0].model.eval()(**batch).pooler_output
        given = MoCaModel.from_pretrained(tmp_path / "pushed")(**batch).pooler_output
        start = MoCaModel.from_pretrained(tmp_path / "start")(**batch).pooler_output
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert (given - start).abs().max() > 1e-3


def test_ranks_that_share_weights_push_whole_models_once(client, tmp_path):
    save_checkpoint(tmp_path / "start")
    names = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_TOKEN", "no_proxy")
    environment = client.environment(tmp_path / "home")
    variables = {"HF_HUB_OFFLINE": "0", **{name: environment[name] for name in names}}
    start_two_ranks(push_sharded.__file__, tmp_path, config="fsdp2", variables=variables)
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    start = load_file(tmp_path / "start" / "model.safetensors")
    for stage, needed, model_class in (
        ("1", NEEDED, MoCaForPreTraining),
        ("2", NEEDED | OF_SENTENCE_TRANSFORMERS, MoCaModel),
    ):
        name, output = f"org/sharded{stage}", tmp_path / f"stage{stage}"
        messages = [message for _, message in client.repository(name).messages]
        # State and model of a step are sent at the same time; what is saved in the end is there already.
        sent = sorted(message for message in messages if message != "Model save")
        assert sent == sorted(["initial commit", *steps, *(f"{step}, checkpoint" for step in steps)])
        assert messages.count("Model save") <= 1
        embeddings = []
        for message in steps:
            files = at_message(client, name, message)
            files = {path: data for path, data in files.items() if not path.startswith("last-checkpoint/")}
            check_content(files, needed)
            assert all(path.endswith("_moca.py") for path in files if path.endswith(".py"))
            pushed = tmp_path / "pushed" / stage / message[-1]
            for path, data in files.items():
                (pushed / path).parent.mkdir(parents=True, exist_ok=True)
                (pushed / path).write_bytes(data)
            weights = load_file(pushed / "model.safetensors")
            assert all(tensor.shape == start["moca." * (stage == "2") + key].shape for key, tensor in weights.items())
            model_class.from_pretrained(pushed)
            config = json.loads(files["config.json"])
            assert config["architectures"] == [model_class.__name__]
            assert config["auto_map"]["AutoModel"] == "modeling_moca.MoCaModel"
            model = SentenceTransformer(str(pushed), device="cpu")
            embeddings.append(model.encode(inputs(), convert_to_tensor=True))
        assert not torch.allclose(*embeddings, atol=1e-4)
        final = SentenceTransformer(str(output), device="cpu").encode(inputs(), convert_to_tensor=True)
        assert torch.equal(embeddings[-1], final)
        assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
        # Checkpoints are in parts, one a rank, and state of both ranks is sent.
        state = {path.removeprefix("last-checkpoint/") for path in client.files(name)}
        assert {"COMPLETE", "run_state_0.json", "run_state_1.json", "rng_state_0.pth", "rng_state_1.pth"} <= state
        assert sum(path.startswith("pytorch_model_fsdp_0/") and path.endswith(".distcp") for path in state) == 2
        assert not list(output.glob("_push-*"))


def test_a_failed_push_is_logged_and_ends_nothing(client, tmp_path, monkeypatch, caplog):
    trainer = cpt_trainer(tmp_path / "out", hub_model_id="org/failing", max_steps=2)
    upload = HfApi.upload_folder

    def refuse(*args, **kwargs):
        raise ConnectionError("the Hub is away")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert "Pushing to org/failing failed: Training in progress, step 2." in caplog.text
    assert "the Hub is away" in caplog.text and trainer.state.global_step == 2
    # What the user asks for raises.
    with pytest.raises(ConnectionError, match="the Hub is away"):
        trainer.push_to_hub()
    assert not list((tmp_path / "out").glob("_push-*"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    (tmp_path / "out" / "_push-1").mkdir()
    job = trainer.push_to_hub(commit_message="At last", blocking=False)
    assert job.result().oid == client.repository("org/failing").branches["main"]
    trainer.init_hf_repo()
    assert not (tmp_path / "out" / "_push-1").exists(), "what a killed run left"


def test_a_push_is_skipped_while_the_last_one_runs(client, tmp_path, caplog):
    client.upload_seconds = 4
    trainer = cpt_trainer(
        tmp_path / "out", hub_model_id="org/busy", save_steps=1, max_steps=2, hub_always_push=False, save_total_limit=1
    )
    with caplog.at_level(logging.INFO, logger="trainers.hub_push"):
        trainer.train()
    assert "Step 2 is not pushed: the push before it still runs." in caplog.messages
    messages = [message for _, message in client.repository("org/busy").messages]
    # The checkpoint of step 1 was deleted while its model was sent.
    assert messages == ["initial commit", "Training in progress, step 1"]
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_the_strategy_end_pushes_once_and_public_is_asked_for(client, tmp_path):
    trainer = cpt_trainer(
        tmp_path / "out", hub_model_id="org/end", hub_strategy="end", hub_private_repo=False, max_steps=2
    )
    trainer.train()
    assert len(client.repository("org/end").messages) == 1
    trainer.save_model(str(tmp_path / "final"))
    assert [message for _, message in client.repository("org/end").messages][1:] == ["Model save"]
    assert not client.repository("org/end").private
    assert load_file(tmp_path / "final" / "model.safetensors").keys()
    assert MoCaProcessor.from_pretrained(tmp_path / "final").tokenizer.mask_token_id == 6
