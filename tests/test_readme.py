"""The README's Python blocks run, its commands exist, its file tree is the repository's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub_cards.export import export
from modeling_moca import MoCaModel
from tests.hub_cards.test_export import run_snippets
from tests.tiny import tiny_backbone, tiny_processor

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    multi_vector = export(folder / "model", folder / "multi_vector", layout="multi_vector")
    return {"org/moca-3b-multi-vector": multi_vector, "org/moca-3b": export(folder / "model", folder / "published")}


def test_python_blocks_run(published, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4 and all("org/moca-3b" in block for block in blocks)
    for name, folder in published.items():
        blocks = [block.replace(name, str(folder)) for block in blocks]
    # Elsewhere, so that the folder's own code is what runs.
    run_snippets(blocks, tmp_path)


def test_stock_checkpoint_block_runs(tmp_path):
    (block,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    tiny_backbone().save_pretrained(tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    tiny_processor().image_processor.save_pretrained(tmp_path)
    names = {}
    exec(block.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tmp_path)), names)
    assert names["model"].config.mask_token_id == names["processor"].mask_token_id == 6


@pytest.mark.parametrize("script", ["mine_negatives", "build_cpt_dataset", "study"])
def test_scripts_start_in_a_fresh_interpreter(script, tmp_path):
    # Their other tests run them in processes that have imported most of what they need.
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_commands_and_files_exist():
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"examples/[\w/.]+\.(?:py|yaml)", README):
        assert (ROOT / path).is_file(), path
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        entries = re.split(r"  +", line.strip())[0].split(", ")
        folder = ROOT if not line.startswith(" ") else folder
        for entry in entries:
            assert list(folder.glob(entry)), entry
        if not line.startswith(" "):
            folder = ROOT / entries[0]
