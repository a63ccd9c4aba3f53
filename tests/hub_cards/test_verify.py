"""Verification of exports: what is sound passes, and whatever was done to an export is named by its file."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_cards import export, remote_code, verify
from hub_cards.load_check import EXPORT_RECORD
from hub_cards.record import fixed_images
from modeling_moca import MoCaForPreTraining, MoCaModel
from tests.hub_cards.test_export import save

SHARDS = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export in bfloat16 and several files."""
    folder = tmp_path_factory.mktemp("verify")
    save(folder / "model", MoCaForPreTraining)
    return export(folder / "model", folder / "published", dtype="bfloat16", max_shard_size="60KB")


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def edit(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def record_again(folder):
    """Make the hashes of an export those of its files, as whoever changes it on purpose would."""
    code = remote_code.describe(remote_code.folder_code(folder))
    edit(folder / "config.json", remote_code=code)
    files = json.loads((folder / EXPORT_RECORD).read_text())["files"]
    files = {name: remote_code.hash_file(folder / name) for name in files}
    edit(folder / EXPORT_RECORD, files=files)


def edit_code(folder):
    path = folder / "base_moca.py"
    path.write_text(path.read_text() + "\n# changed\n")


def change_weights(folder):
    path = sorted(folder.glob("model-*"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def add_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def add_pickle_by_another_name(folder):
    (folder / "LICENSE").write_bytes(pickle.dumps({}))


def add_array(folder):
    (folder / "1_Pooling" / "mean.npy").write_bytes(b"")


def add_file(folder):
    (folder / "notes.txt").write_text("private")


def add_code(folder):
    (folder / "extra_moca.py").write_text("print('hello')")


def change_flag(folder):
    edit(folder / "config.json", bidirectional=False)


def change_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|mask|>"', '"<|musk|>"'))


def remove_shard(folder):
    sorted(folder.glob("model-*"))[1].unlink()


def remove_module(folder):
    (folder / "2_Normalize" / "config.json").unlink()


def remove_processor(folder):
    (folder / "processor_config.json").unlink()


def cut_weights(folder):
    path = sorted(folder.glob("model-*"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def move_tensor(folder):
    index = json.loads((folder / SHARDS).read_text())["weight_map"]
    name = next(iter(index))
    other = next(shard for shard in index.values() if shard != index[name])
    edit(folder / SHARDS, weight_map={**index, name: other})
    record_again(folder)


def mix_dtypes(folder):
    path = sorted(folder.glob("model-*"))[0]
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    record_again(folder)


def lead_elsewhere(folder):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    edit(folder / "config.json", auto_map={**auto_map, "AutoModel": "other/repo--modeling_moca.MoCaModel"})
    record_again(folder)


def foreign_module(folder):
    path = folder / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.base.modules.normalize", "os"))
    record_again(folder)


def forget_code(folder):
    edit(folder / "config.json", remote_code=None)


def change_shape_of_index(folder):
    edit(folder / SHARDS, weight_map=None)
    record_again(folder)


def break_json(folder):
    (folder / "config.json").write_text("{")


TAMPERED = {
    edit_code: r"base_moca\.py: is not the code that config\.json lists",
    change_weights: r"model-00001-of-\d+\.safetensors: is not what was exported",
    add_pickle: r"pytorch_model\.bin: may hold a pickle",
    add_pickle_by_another_name: r"LICENSE: is a pickle",
    add_array: r"1_Pooling/mean\.npy: may hold a pickle",
    add_file: r"notes\.txt: does not belong into an export",
    add_code: r"extra_moca\.py: does not belong into an export",
    change_flag: r"config\.json: is not what was exported",
    change_tokenizer: r"tokenizer\.json: is not what was exported",
    remove_shard: r"model-00002-of-\d+\.safetensors: is missing",
    remove_module: r"2_Normalize/config\.json: is missing",
    remove_processor: r"processor_config\.json: is missing",
    cut_weights: r"model-00001-of-\d+\.safetensors: is no whole safetensors file",
    move_tensor: r"model-0000\d-of-\d+\.safetensors: holds other tensors than model\.safetensors\.index\.json lists",
    mix_dtypes: r"model-00001-of-\d+\.safetensors: holds \['float32'\], exported was bfloat16",
    lead_elsewhere: r"config\.json: auto_map leads to 'other/repo--modeling_moca\.MoCaModel'",
    foreign_module: r"modules\.json: 'os\.Normalize' is no module of sentence-transformers",
    forget_code: r"config\.json: does not say of which version the code is",
    change_shape_of_index: r"model\.safetensors\.index\.json: is not as an export writes it",
    break_json: r"config\.json: is not JSON",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_what_was_done_is_named_and_nothing_is_run(tamper, copy, monkeypatch):
    monkeypatch.setattr(verify, "_check_loading", lambda folder: pytest.fail("the code was run"))
    tamper(copy)
    # Trusting code of another version does not mean trusting code that is not what the export says.
    for trust in (False, True):
        with pytest.raises(ValueError, match=TAMPERED[tamper]):
            verify.verify(copy, trust_remote_code=trust)


def test_a_sound_export_passes_with_another_card(copy, caplog):
    assert len(list(copy.glob("model-*"))) > 2
    assert {tensor.dtype for tensor in load_file(sorted(copy.glob("model-*"))[0]).values()} == {torch.bfloat16}
    (copy / "README.md").write_text("another card")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("")
    caplog.set_level("INFO")
    assert verify.main([str(copy)]) == 0
    assert "AutoModel: vectors as recorded" in caplog.text and "is a sound export" in caplog.text


def test_changes_that_hide_their_hashes_are_found_by_what_the_model_does(exported, copy, monkeypatch):
    name = "backbone.language_model.layers.0.mlp.down_proj.weight"
    path = copy / json.loads((copy / SHARDS).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = -tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    edit(copy / "config.json", bidirectional=False)
    record_again(copy)
    with pytest.raises(ValueError) as error:
        verify.verify(copy)
    said = str(error.value)
    assert "moca_export.json: AutoModel gives another vector of the input 'interleaved'" in said
    assert "moca_export.json: SentenceTransformer gives another vector of the input 'text'" in said
    assert "config.json: the model was exported as bidirectional, but the first token's state does not move" in said


def test_code_of_another_version_is_run_only_if_it_is_trusted(copy, monkeypatch):
    edit_code(copy)
    record_again(copy)
    ran = []
    monkeypatch.setattr(verify, "_check_loading", lambda folder: (ran.append(folder), ([], {"AutoModel": 0.0}))[1])
    with pytest.raises(ValueError, match=r"(?s)base_moca\.py: is the code of version .* its code was not run"):
        verify.verify(copy)
    assert not ran
    assert verify.verify(copy, trust_remote_code=True) == {"AutoModel": 0.0} and ran == [copy]


def test_the_other_layouts_and_a_causal_model(tmp_path):
    save(tmp_path / "model", MoCaForPreTraining, bidirectional=False)
    published = export(tmp_path / "model", tmp_path / "pretraining", layout="pretraining", verify=True)
    assert any(name.startswith("mae_head.") for name in load_file(published / "model.safetensors"))
    assert json.loads((published / "config.json").read_text())["architectures"] == ["MoCaForPreTraining"]
    distances = verify.verify(published)
    assert set(distances) == {"AutoModel", "AutoModelForPreTraining", "SentenceTransformer"}
    assert max(distances.values()) < 1e-5
    published = export(
        tmp_path / "model", tmp_path / "late", layout="multi_vector", projection_dim=8, dtype="float16", verify=True
    )
    recorded = json.loads((published / EXPORT_RECORD).read_text())["inputs"]
    assert all(len(vector) == 8 for entry in recorded for vector in entry["embedding"]["vectors"])
    assert load_file(published / "1_Dense" / "model.safetensors")["linear.weight"].dtype == torch.float16


def test_a_repository_is_downloaded_at_its_revision(exported, monkeypatch):
    asked = []

    def download(name, revision):
        asked.append((name, revision))
        return exported

    monkeypatch.setattr(verify, "snapshot_download", download)
    monkeypatch.setattr(verify, "_check_loading", lambda folder: ([], {"folder": str(folder)}))
    assert verify.verify("org/moca-tiny", revision="v1") == {"folder": str(exported)}
    assert asked == [("org/moca-tiny", "v1")]
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        verify.verify(exported, revision="v1")


def test_code_hash_is_what_the_shell_says(exported):
    said = json.loads((exported / "config.json").read_text())["remote_code"]
    shell = "LC_ALL=C sha256sum *.py | sha256sum"
    done = subprocess.run(["bash", "-c", shell], cwd=exported, capture_output=True, text=True, check=True)
    assert said["sha256"] == done.stdout.split()[0] and said["package"] == "moca"
    # A folder that training writes later must not go on saying so.
    assert not hasattr(MoCaModel.from_pretrained(exported).config, "remote_code")


def test_command_fails_and_says_why(copy):
    add_file(copy)
    command = [sys.executable, "-m", "hub_cards.verify", str(copy)]
    done = subprocess.run(command, cwd=Path(verify.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and "notes.txt: does not belong into an export" in done.stdout
    assert "RuntimeWarning" not in done.stderr


def test_fixed_images_differ_and_stay():
    images = fixed_images()
    assert len(set(images.values())) == 2 and images == fixed_images()
    assert sum(map(len, images.values())) < 20_000
