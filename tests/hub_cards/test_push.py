"""Pushes to a real HTTP server, and what clean processes load from it by name."""

import hashlib
import json
import logging
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from hub_cards import export
from hub_cards.push import check_folder, main, push
from modeling_moca import MoCaModel
from tests.hub_cards.check_hub import inputs
from tests.hub_cards.hub_server import Hub
from tests.tiny import tiny_backbone, tiny_processor

ROOT = Path(__file__).resolve().parents[2]
CHECK = Path(__file__).with_name("check_hub.py")
NAME = "org/moca-tiny"


def run(hub, folder, *command, path=None):
    """Run Python as a client of the Hub with an empty cache, in an empty folder, and return what it printed."""
    (folder / "elsewhere").mkdir()
    environment = hub.environment(folder / "home") | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder / "elsewhere",
        env=environment,
        # Nobody is there to be asked.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_export(folder, name, seed=0):
    model = MoCaModel.from_backbone(tiny_backbone(seed), mask_token_id=6)
    model.save_pretrained(folder / f"model{seed}")
    tiny_processor(max_length=128).save_pretrained(folder / f"model{seed}")
    return export(folder / f"model{seed}", folder / name)


def vectors(folder):
    return SentenceTransformer(str(folder), device="cpu").encode(inputs(), convert_to_tensor=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two exports of other weights, whose code differs as well, and a data set."""
    folder = tmp_path_factory.mktemp("published")
    first, second = write_export(folder, "moca-tiny"), write_export(folder, "second", seed=1)
    with open(second / "modeling_moca.py", "a", encoding="utf-8") as file:
        file.write("\nCODE_VERSION = 2\n")
    data = folder / "pages"
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text("---\nlicense: mit\n---\n# Pages\n")
    (data / "rejected.jsonl").write_text("")
    (data / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1" * 10)
    return first, second, data


@pytest.fixture(scope="module")
def hub(published, tmp_path_factory):
    """A Hub with the first export, tagged, which the command line pushed, and the second one on top of it."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "blobs") as hub:
        hub.told = run(hub, folder, "-m", "hub_cards.push", published[0], NAME, "--tag", "v1", path=ROOT)
        hub.first = hub.repository(NAME).branches["main"]
        with pytest.MonkeyPatch.context() as patch:
            hub.connect(patch)
            hub.second = push(published[1], NAME, commit_message="Another seed").sha
        yield hub


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """The same Hub, of which this process is a client."""
    hub.connect(monkeypatch)
    return hub


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_attributes(files):
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def test_the_hub_has_what_the_folders_had(hub, published):
    assert f"Pushed to {hub.url}/{NAME}/commit/{hub.first}" in hub.told and "model.safetensors" in hub.told
    assert without_attributes(hub.files(NAME, hub.first)) == content(published[0])
    assert without_attributes(hub.files(NAME)) == content(published[1])
    repository = hub.repository(NAME)
    assert repository.private and repository.tags == {"v1": hub.first}
    assert repository.branches["main"] == hub.second != hub.first
    messages = [message for _, message in repository.messages]
    assert messages[:3] == ["initial commit", "Upload moca-tiny", "Another seed"]


def test_branches_data_sets_and_what_the_hub_refuses(client, published):
    num_commits = len(client.repository(NAME).messages)
    assert push(published[1], NAME).sha == client.second
    assert len(client.repository(NAME).messages) == num_commits, "an unchanged folder makes no commit"
    beside = push(published[0], NAME, revision="dev")
    assert client.repository(NAME).branches == {"main": client.second, "dev": beside.sha}
    assert without_attributes(client.files(NAME, "dev")) == content(published[0])

    data = push(published[2], "org/pages", repo_type="dataset", private=False)
    repository = client.repository("org/pages", "dataset")
    assert not repository.private
    assert data.commit_url == f"{client.url}/datasets/org/pages/commit/{repository.branches['main']}"
    assert without_attributes(client.files("org/pages", repo_type="dataset")) == content(published[2])

    with pytest.raises(ValueError, match=f"{NAME} has a tag 'v1' already: give another one"):
        push(published[1], NAME, tag="v1")
    with pytest.raises(HfHubHTTPError, match="don't have the rights to create a model under nobody"):
        push(published[1], "nobody/moca-tiny")


def test_clean_processes_load_by_name_at_every_revision(hub, published, tmp_path):
    wanted = {
        "main": {},
        "commit": {"revision": hub.first},
        "tag": {"revision": "v1"},
        "code": {"revision": hub.first, "code_revision": hub.second},
    }
    wanted = {key: {"name": NAME, **settings} for key, settings in wanted.items()}
    run(hub, tmp_path, CHECK, tmp_path / "found.json", json.dumps(wanted))
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{NAME} is not a local folder and is not a valid model identifier" in found["private"]
    for message in found["untrusted"]:
        # That of transformers, whichever library is asked.
        assert message.startswith(f"ValueError: The repository {NAME} contains custom code which must be executed")
        assert "Please pass the argument `trust_remote_code=True`" in message
    expected = {False: vectors(published[0]), True: vectors(published[1])}
    assert (expected[False] - expected[True]).abs().max() > 0.01
    for key, result in found["loaded"].items():
        for door in ("transformers", "sentence_transformers"):
            torch.testing.assert_close(torch.tensor(result[door]), expected[key == "main"], atol=1e-5, rtol=0)
        assert result["code"] == {"main": [2, 2], "code": [2, None]}.get(key, [None, None]), key


def test_a_cut_download_goes_on_by_range(client, published, tmp_path, monkeypatch):
    # What a client keeps of a cut download is whole chunks, of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    client.cut_download, client.ranges[:] = True, []
    path = hf_hub_download(NAME, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == (published[1] / "model.safetensors").read_bytes()
    assert [start > 0 for _, start in client.ranges] == [True], "the rest was not asked for by range"


def test_the_server_answers_as_the_hub_does(client, tmp_path):
    api, name, path = HfApi(), "org/calls", "folder/two.safetensors"
    api.create_repo(name, private=True)
    head = api.repo_info(name).sha

    def commit(path, **kwargs):
        api.create_commit(name, [CommitOperationAdd(path, path.encode() * 9)], commit_message=path, **kwargs)

    def download(path, **kwargs):
        return hf_hub_download(name, path, cache_dir=tmp_path, **kwargs)

    commit("one.txt", parent_commit=head)
    commit(path)
    api.delete_file("one.txt", name)
    assert api.whoami()["name"] == "someone"
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit("three.txt", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(name)
    with pytest.raises(RemoteEntryNotFoundError):
        download("one.txt")
    with pytest.raises(RevisionNotFoundError):
        download(path, revision="v9")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.repo_info("org/none")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        HfApi(token=False).repo_info(name)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").repo_info(name)
    # In pages of four.
    client.page_size, page_size = 2, client.page_size
    listed = [entry.path for entry in api.list_repo_tree(name, recursive=True)]
    client.page_size = page_size
    assert listed == [".gitattributes", "folder", path]
    assert [entry.path for entry in api.list_repo_tree(name)] == [".gitattributes", "folder"]
    (info,) = api.get_paths_info(name, [path, "one.txt"])
    assert (info.path, info.size, info.lfs.size) == (path, 198, 198)
    snapshot = snapshot_download(name, cache_dir=tmp_path)
    assert (Path(snapshot) / path).read_text() == path * 9


def test_a_push_that_failed_goes_on_where_it_was(published, tmp_path, monkeypatch):
    folder = shutil.copytree(published[0], tmp_path / "sharded")
    for i in range(4):
        save_file({"weight": torch.full((1000,), float(i))}, folder / f"model-{i}.safetensors")
    refused = hashlib.sha256((folder / "model-2.safetensors").read_bytes()).hexdigest()
    with Hub(tmp_path / "blobs", part_size=200_000) as hub:
        hub.connect(monkeypatch)
        hub.refused_uploads = {refused}
        with pytest.raises(RuntimeError, match="Error while uploading 'model-2.safetensors'"):
            push(folder, NAME)
        arrived = {oid for oid, _ in hub.uploads}
        assert len(arrived) == 4 and refused not in arrived
        assert len(hub.repository(NAME).messages) == 1, "half a push is no commit"
        hub.refused_uploads, hub.uploads[:] = set(), []
        push(folder, NAME)
        assert [oid for oid, _ in hub.uploads] == [refused], "what the Hub has was sent again"
        assert without_attributes(hub.files(NAME)) == content(folder)


def test_dry_run_lists_and_asks_nobody(client, published, caplog):
    num_requests = len(client.requests)
    with caplog.at_level(logging.INFO):
        main([str(published[0]), NAME, "--dry-run"])
    files = content(published[0])
    lines = {line.split()[-1]: line.split()[:2] for line in caplog.messages}
    for name, data in files.items():
        assert lines[name] == [f"{len(data):,}", "LFS" if name == "model.safetensors" else "regular"]
    total = sum(map(len, files.values()))
    assert f"{total:14,}  bytes in {len(files)} files" in caplog.messages
    assert f"Dry run: nothing was sent to model {NAME}." in caplog.messages
    plan = push(published[2], "org/pages", repo_type="dataset", dry_run=True)
    assert (plan.total_size, plan.sha, plan.commit_url) == (len(b"PAR1" * 10) + 29, None, None)
    assert len(client.requests) == num_requests
    # What the rules say is what was uploaded as LFS.
    lfs = {name for name, entry in client.repository(NAME).commits[client.first].items() if entry.sha256}
    assert lfs == {file.path for file in check_folder(published[0]) if file.lfs}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("training_args.bin", "pickle"),
        ("optimizer.pt", "pickle"),
        ("1_Pooling/state.pkl", "pickle"),
        ("trainer_state.json", "leftover of training"),
        ("run_state_0.json", "leftover of training"),
        ("rejected.jsonl", "leftover of training"),
        ("checkpoint-5/model.safetensors", "leftover of training"),
        ("converted/model.safetensors", "leftover of training"),
        ("runs/today/events.out.tfevents.1", "leftover of training"),
        (".git/config", "stray file"),
        (".env", "stray file"),
        ("__pycache__/modeling_moca.cpython-311.pyc", "stray file"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(name, reason, published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=rf"copy holds 1 files that do not belong on the Hub: {name} \({reason}\)"):
        push(folder, NAME, dry_run=True)


def test_links_to_elsewhere_and_missing_files_are_refused(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    (folder / "key.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"key.txt \(link to a file elsewhere\)"):
        push(folder, NAME, dry_run=True)
    (folder / "key.txt").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"copy lacks \['README.md'\]: this is no model to push"):
        push(folder, NAME, dry_run=True)
    with pytest.raises(ValueError, match=r"lacks \['\*.parquet'\]: this is no dataset"):
        push(published[0], NAME, repo_type="dataset", dry_run=True)
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere to push"):
        push(tmp_path / "nowhere", NAME, dry_run=True)


def test_bad_names_are_refused(published, capsys):
    for repo_id in ("moca tiny", "org/moca/tiny", "org/moca--tiny"):
        with pytest.raises(ValueError, match=f"'{repo_id}' is no repository id"):
            push(published[0], repo_id, dry_run=True)
    with pytest.raises(ValueError, match="repo_id must be 'owner/name', got 'moca-tiny'"):
        push(published[0], "moca-tiny", dry_run=True)
    with pytest.raises(ValueError, match=r"repo_type must be one of \['model', 'dataset'\], got 'space'"):
        push(published[0], NAME, repo_type="space", dry_run=True)
    for settings in ({"tag": "refs/pr/1"}, {"revision": "a b"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a plain name"):
            push(published[0], NAME, dry_run=True, **settings)
    with pytest.raises(SystemExit):
        main([str(published[0]), "moca-tiny", "--dry-run"])
    assert "repo_id must be 'owner/name'" in capsys.readouterr().err


def test_export_pushes_what_it_wrote(client, published, tmp_path, monkeypatch, capsys):
    script = str(ROOT / "examples" / "export.py")

    def run_script(*flags):
        monkeypatch.setattr(sys, "argv", [script, "--model", str(published[0].parent / "model0"), *flags])
        runpy.run_path(script, run_name="__main__")

    name, num_requests = "org/other", len(client.requests)
    run_script("--output", str(tmp_path / "dry"), "--repo", name, "--push", "--dry-run")
    assert len(client.requests) == num_requests
    run_script("--output", str(tmp_path / "out"), "--repo", name, "--push", "--public")
    assert not client.repository(name).private
    assert without_attributes(client.files(name)) == content(tmp_path / "out")
    for flags, message in ((["--push"], "--push needs --repo"), (["--public"], "go with --push")):
        with pytest.raises(SystemExit):
            run_script("--output", str(tmp_path / "none"), *flags)
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
