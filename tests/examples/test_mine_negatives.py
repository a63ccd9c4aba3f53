"""examples/mine_negatives.py: from YAML to what stage 2 takes, also when it is killed in between."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from trl import TrlParser

from examples import mine_negatives
from tests.forked import Forked
from tests.tiny import tiny_backbone
from tests.trainers.contrastive_cases import WORDS, save_checkpoint
from tests.trainers.pair_sources import write_pages
from trainers.mining_config import MiningConfig
from trainers.mining_embeddings import load_encoder

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pages to find, texts as further documents, a model, and a YAML file."""
    folder = tmp_path_factory.mktemp("mine_negatives")
    save_checkpoint(folder / "model")
    write_pages(folder / "pages", NUM_ROWS)
    documents = [{"text": f"{WORDS[index % 12]} {index}"} for index in range(NUM_ROWS)]
    datasets.Dataset.from_list(documents).to_parquet(folder / "documents.parquet")
    settings = {
        "model_name_or_path": "model",
        "datasets": [
            {
                "path": "parquet",
                "data_files": "pages/*.parquet",
                "task": "pages",
                "layout": "pages",
                "query_instruction": "Find: ",
            }
        ],
        "corpus": [{"path": "parquet", "data_files": "documents.parquet", "positive": "text"}],
        "device": "cpu",
        "shard_size": 2,
        "batch_size": 2,
        "relative_margin": None,
        "absolute_margin": 0.01,
        "output_dir": "unset",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return folder


def start(folder, *arguments):
    program = REPOSITORY / "examples" / "mine_negatives.py"
    return Forked(program, "--config", "mine.yaml", *arguments, folder=folder)


def finish(process):
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-4000:]
    return sum(map(int, re.findall(r"(\d+) inputs of \w+ encoded", said)))


def shards(output):
    return sorted((output / "embeddings").glob("*/*.safetensors"))


def results(output):
    names = ("pages.parquet", "mining_report.json", "rejected.jsonl")
    return [(output / name).read_bytes() for name in names]


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(folder, monkeypatch, caplog):
    uninterrupted = start(folder, "--output_dir", "whole")
    process = start(folder, "--output_dir", "killed")
    deadline = time.monotonic() + 90
    while len(shards(folder / "killed")) < 40 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # Queries, pages and texts.
    assert finish(uninterrupted) == 3 * NUM_ROWS
    finished = {path: path.stat() for path in shards(folder / "killed")}
    # In the midst of the pages.
    assert 40 <= len(finished) < 3 * NUM_ROWS // 2 and not (folder / "killed" / "pages.parquet").exists()
    assert finish(start(folder, "--output_dir", "killed")) == 3 * NUM_ROWS - 2 * len(finished)
    for path, before in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert results(folder / "killed") == results(folder / "whole")
    assert not list((folder / "killed").rglob("*.unfinished"))
    # Other margins need no other embeddings.
    monkeypatch.chdir(folder)
    flags = ["--output_dir", "other", "--embeddings_dir", "whole/embeddings", "--absolute_margin", "0.2"]
    monkeypatch.setattr(sys, "argv", ["mine_negatives.py", "--config", "mine.yaml", *flags])
    with caplog.at_level("INFO"):
        mine_negatives.main()
    assert caplog.text.count(" 0 inputs of ") == 3
    report, other = (json.loads(results(folder / name)[1])["datasets"]["pages"] for name in ("whole", "other"))
    assert other["refused"]["absolute_margin"] > report["refused"]["absolute_margin"]
    assert report["rows"] == report["different_queries"] == NUM_ROWS and report["documents"] == 2 * NUM_ROWS


def test_flags_override_and_unknown_keys_are_errors(folder, tmp_path, monkeypatch):
    parser = TrlParser((MiningConfig,))
    (config,) = parser.parse_args_and_config(["--config", str(folder / "mine.yaml"), "--num_negatives", "5"])
    assert config.num_negatives == 5 and config.shard_size == 2 and config.relative_margin is None
    assert config.corpus[0].positive == "text" and config.datasets[0].query_instruction == "Find: "
    settings = yaml.safe_load((folder / "mine.yaml").read_text())
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**settings, "margin": 0.1}))
    monkeypatch.setattr(sys, "argv", ["mine_negatives.py", "--config", str(tmp_path / "wrong.yaml")])
    with pytest.raises(ValueError, match="margin"):
        mine_negatives.main()
    (tmp_path / "tiny.yaml").write_text((REPOSITORY / "examples" / "configs" / "mine_tiny.yaml").read_text())
    (config,) = TrlParser((MiningConfig,)).parse_args_and_config(
        ["--config", str(tmp_path / "tiny.yaml"), "--model_name_or_path", "m"]
    )
    assert [source.task for source in config.datasets] == ["page", "digits", "text"]


def test_a_causal_backbone_is_refused(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    config = MiningConfig([], output_dir="out", model_name_or_path=str(tmp_path / "backbone"))
    with pytest.raises(ValueError, match="must be converted|convert it"):
        load_encoder(config)
