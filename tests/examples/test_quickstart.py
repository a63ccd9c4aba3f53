"""The demo's main flow with very few steps: everything it promises to write is there and true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import forked

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", "demo", "--cpt-steps", "4"]
    run = subprocess.run(
        [*command, "--cl-epochs", "0.1"], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "demo", run.stdout


def test_table_has_every_row_and_chance(demo):
    folder, printed = demo
    lines = (folder / "results.md").read_text().strip().splitlines()
    assert "\n".join(lines) in printed
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    assert list(rows) == ["chance", "untouched backbone", "causal + CL", "bidirectional + CL", "MoCa: CPT + CL"]
    numbers = [[float(number) for number in re.findall(r"\d\.\d+", " ".join(cells))] for cells in rows.values()]
    assert all(len(row) == 8 and all(0 <= number <= 1 for number in row) for row in numbers)
    assert len({tuple(row) for row in numbers}) == 5, "two rows are the same"


def test_export_and_search_of_the_fresh_process(demo):
    folder, _ = demo
    assert (folder / "export" / "modeling_moca.py").is_file() and (folder / "export" / "model.safetensors").is_file()
    searched = json.loads((folder / "search.json").read_text())
    assert searched.pop("module").startswith("transformers_modules")
    moca = (folder / "results.md").read_text().strip().splitlines()[-1]
    for result in searched.values():
        assert f"{result['P@1']:.3f} / {result['nDCG@5']:.3f}" in moca
        assert len(result["top5"]) == result["num_candidates"] > 40


def test_report_and_pictures(demo):
    folder, _ = demo
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 and "MoCa: CPT + CL" in report
    for name in ("losses", "contact_sheet", "reconstruction"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 800 and len(set(picture.convert("L").resize((64, 64)).getdata())) > 10


@pytest.mark.parametrize("script", ["train_cpt", "train_contrastive"])
def test_small_yaml_files_run_on_the_demo_rows(demo, script, tmp_path):
    folder, _ = demo
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "demo_output").symlink_to(folder)
    config = {"train_cpt": "cpt_tiny", "train_contrastive": "contrastive_tiny"}[script]
    command = [
        "-m",
        "accelerate.commands.launch",
        f"examples/{script}.py",
        "--config",
        f"examples/configs/{config}.yaml",
    ]
    flags = ["--max_steps", "2", "--output_dir", "out"]
    if script == "train_contrastive":
        flags += ["--model_name_or_path", "demo_output/seed-0/cpt"]
    run = subprocess.run([sys.executable, *command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bad_arguments_are_refused(tmp_path):
    run = forked.run(EXAMPLES / "quickstart.py", "--seeds", "0", folder=tmp_path)
    assert run.returncode == 2 and "--seeds must be at least 1, got 0" in run.stderr
