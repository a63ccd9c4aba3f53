"""examples/train_cpt.py from YAML to a folder that loads; and the loading of its data."""

import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor
from trl import TrlParser

from examples import train_cpt
from hub_cards.export import export
from modeling_moca import MoCaForPreTraining
from tests.forked import run
from tests.tiny import tiny_backbone, tiny_processor
from tests.trainers.cpt_rows import make_row, make_rows
from trainers.contrastive_trainer import build_sentence_transformer
from trainers.cpt_collator import CPTCollator
from trainers.cpt_config import CPTConfig
from trainers.cpt_mixture import CPTMixtureConfig

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Streams of `datasets` wait for seconds when they end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock backbone with its tokenizer and image processor, and two Parquet sources, one without images."""
    folder = tmp_path_factory.mktemp("cpt_script")
    tiny_backbone().save_pretrained(folder / "backbone")
    processor = tiny_processor()
    processor.tokenizer.save_pretrained(folder / "backbone")
    processor.image_processor.save_pretrained(folder / "backbone")
    datasets.Dataset.from_list(make_rows(8)).to_parquet(folder / "rows" / "mixed.parquet")
    text = [{"text": make_row(seed, 8, 0)["text"], "source": "text"} for seed in range(4)]
    datasets.Dataset.from_list(text).to_parquet(folder / "rows" / "text.parquet")
    settings = {
        "model_name_or_path": "backbone",
        "min_pixels": 784,
        "max_pixels": 12544,
        "max_length": 256,
        "datasets": [
            {"path": "parquet", "data_files": "rows/mixed.parquet"},
            {"path": "parquet", "data_files": "rows/text.parquet"},
        ],
        "learning_rate": 1.0e-3,
        "max_cost": 256,
        "max_steps": 50,
        "logging_steps": 1,
        "save_strategy": "no",
        "test_split_size": 0.25,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": "output",
    }
    (folder / "cpt.yaml").write_text(yaml.safe_dump(settings))
    return folder


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_cpt.py", *arguments])
    train_cpt.main()


def run_script(folder, *arguments):
    return run(REPOSITORY / "examples" / "train_cpt.py", *arguments, folder=folder)


def test_script_trains_from_yaml_and_leaves_a_folder_that_loads(folder):
    done = run_script(folder, "--config", "cpt.yaml", "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    history = yaml.safe_load((folder / "output" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "mlm_loss" in entry]
    assert len(losses) == 2, "--max_steps on the command line must win over the file"
    assert any("eval_mlm_loss" in entry and "eval_mae_loss" in entry for entry in history)

    model, processor = AutoModel.from_pretrained(folder / "output"), AutoProcessor.from_pretrained(folder / "output")
    assert model.config.mask_token_id == processor.tokenizer.mask_token_id
    assert processor.image_processor.size["longest_edge"] == 12544
    batch = CPTCollator(processor)(make_rows(2))
    assert MoCaForPreTraining.from_pretrained(folder / "output")(**batch).loss > 0


def test_a_trained_folder_is_a_start_of_its_own(folder, monkeypatch):
    # In this process: the one above has shown that the script starts.
    monkeypatch.chdir(folder)
    for name in ("first", "second"):
        start = "backbone" if name == "first" else "first"
        arguments = [
            "--model_name_or_path",
            start,
            "--output_dir",
            name,
            "--max_pixels",
            "6272",
            "--seed",
            str(len(name)),
        ]
        main(monkeypatch, "--config", "cpt.yaml", "--max_steps", "1", "--learning_rate", "0", *arguments)
        assert AutoProcessor.from_pretrained(name).image_processor.size["longest_edge"] == 6272
    # Nothing is learned at rate 0, so a MAE head that is initialised anew would show.
    first, second = (MoCaForPreTraining.from_pretrained(name).state_dict() for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="first brings its own processor: leave processor_name unset, got backbone"):
        main(monkeypatch, "--config", "cpt.yaml", "--model_name_or_path", "first", "--processor_name", "backbone")


def test_a_checkpoint_without_a_processor_takes_another_ones(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "bare").mkdir()
    for file in (folder / "backbone").iterdir():
        if file.name in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / "bare")
    arguments = ["--config", "cpt.yaml", "--max_steps", "1", "--model_name_or_path", "bare", "--output_dir", "third"]
    with pytest.raises(ValueError, match="bare brings no tokenizer or image processor of its own"):
        main(monkeypatch, *arguments)
    main(monkeypatch, *arguments, "--processor_name", "backbone")
    assert AutoProcessor.from_pretrained("third").mask_token_id is not None


def test_script_refuses_what_it_does_not_know(folder, monkeypatch):
    settings = yaml.safe_load((folder / "cpt.yaml").read_text())
    (folder / "typo.yaml").write_text(yaml.safe_dump({**settings, "mlm_rate": 0.4}))
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="Unknown arguments from config file: .*mlm_rate"):
        main(monkeypatch, "--config", "typo.yaml")
    with pytest.raises(ValueError, match="test_split_size needs the whole data set"):
        main(monkeypatch, "--config", "cpt.yaml", "--streaming", "true")


def test_adapters_from_the_command_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "cpt.yaml").read_text())
    config |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "lora_task_type": None, "save_strategy": "steps"}
    (folder / "lora.yaml").write_text(yaml.safe_dump({**config, "save_steps": 1, "output_dir": "adapted"}))
    main(monkeypatch, "--config", "lora.yaml", "--max_steps", "2")
    start = MoCaForPreTraining.from_backbone("backbone", mask_token_id=6).state_dict()
    trained = MoCaForPreTraining.from_pretrained("adapted").state_dict()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    adapted = {name for name in start if ".layers." in name and name.endswith("_proj.weight") and "visual" not in name}
    assert moved - {name for name in start if name.startswith("mae_head")} == adapted and len(adapted) == 4 * 7
    assert "mae_head.proj.weight" in moved

    # A checkpoint names the backbone that was converted in the run, from wherever it is opened.
    monkeypatch.chdir(folder / "rows")
    checkpoint = folder / "adapted" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    inputs = AutoProcessor.from_pretrained(checkpoint)(text=["a page about tides"])
    whole = AutoModel.from_pretrained(folder / "adapted")
    exported = AutoModel.from_pretrained(export(checkpoint, folder / "exported_checkpoint"))
    doors = [door.from_pretrained(checkpoint) for door in (AutoModel, AutoModelForPreTraining)]
    with torch.no_grad():
        expected, *found = (model.eval()(**inputs).pooler_output for model in (whole, exported, *doors))
        untrained = AutoModel.from_pretrained(folder / "adapted" / "converted")(**inputs).pooler_output
    assert all(torch.allclose(embedding, expected, atol=1e-6) for embedding in found)
    assert not torch.allclose(untrained, expected, atol=1e-4)
    assert torch.equal(
        doors[1].state_dict()["mae_head.modules_to_save.default.proj.weight"], trained["mae_head.proj.weight"]
    )
    monkeypatch.chdir(folder)

    # Goes on, and the folder starts stage 2 and is exported.
    main(monkeypatch, "--config", "lora.yaml", "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert yaml.safe_load((folder / "adapted" / "trainer_state.json").read_text())["global_step"] == 3
    assert len(build_sentence_transformer("adapted", max_length=64).encode("a text")) == 32
    export("adapted", folder / "exported")
    with pytest.raises(ValueError, match="need a MoCa folder .*, got backbone"):
        main(monkeypatch, "--config", "lora.yaml", "--load_in_4bit", "true")
    with pytest.raises(ValueError, match=r"\['lora_dropout', 'lora_r'\] have no effect without adapters"):
        main(monkeypatch, "--config", "lora.yaml", "--use_peft", "false")
    with pytest.raises(ValueError, match="task_type must be None, got 'CAUSAL_LM'"):
        main(monkeypatch, "--config", "lora.yaml", "--lora_task_type", "CAUSAL_LM")


@pytest.mark.parametrize("name", ["cpt_qwen2_5_vl_3b.yaml", "cpt_reference_3b.yaml", "cpt_tiny.yaml"])
def test_shipped_configurations_parse(name):
    parser = TrlParser((train_cpt.ScriptArguments, CPTMixtureConfig, CPTConfig))
    path = str(REPOSITORY / "examples" / "configs" / name)
    script, mixture, config = parser.parse_args_and_config(["--config", path, "--use_cpu", "true"])
    assert mixture.datasets and config.max_steps > 0 and script.dtype == "float32"
    if name == "cpt_qwen2_5_vl_3b.yaml":
        assert mixture.streaming and config.max_cost == 12_800
        assert len(mixture.datasets) == 10 and all(source.max_rows == 500_000 for source in mixture.datasets)
        assert (config.learning_rate, config.max_grad_norm, config.warmup_steps) == (2e-6, 5.0, 0.1)
        assert (config.mlm_ratio, config.mae_ratio, config.mae_loss_weight) == (0.4, 0.5, 0.5)
        assert (script.min_pixels, script.max_pixels) == (256 * 28 * 28, 1024 * 28 * 28)
