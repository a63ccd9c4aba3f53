"""Exports, checked by processes in which this project cannot be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from hub_cards import export
from modeling_moca import MoCaForPreTraining, MoCaModel
from tests import forked
from tests.tiny import tiny_backbone, tiny_processor

CHECK = Path(__file__).with_name("check_export.py")
CODE = [
    "attention_moca.py",
    "base_moca.py",
    "chat_moca.py",
    "configuration_moca.py",
    "heads_moca.py",
    "image_inputs_moca.py",
    "images_moca.py",
    "modeling_moca.py",
    "processing_moca.py",
]


def save(folder, model_class=MoCaModel, **kwargs):
    model_class.from_backbone(tiny_backbone(), mask_token_id=6, **kwargs).save_pretrained(folder)
    tiny_processor(max_length=128).save_pretrained(folder)
    return folder


def run(command, folder):
    """Run Python in an empty folder with an empty cache and no network."""
    home = folder / "elsewhere"
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_each(snippets, folder):
    """Run snippets in processes of their own, otherwise as above; return exit status, output and errors of each."""
    files = [folder / f"snippet {number}.py" for number in range(len(snippets))]
    for file, snippet in zip(files, snippets):
        file.write_text(snippet)
    done = run([str(CHECK.with_name("check_snippets.py")), *map(str, files)], folder)
    texts = [[Path(f"{file}.{ending}").read_text() for ending in ("out", "err")] for file in files]
    return [(status, *both) for status, both in zip(json.loads(done.splitlines()[-1]), texts, strict=True)]


def run_snippets(snippets, folder):
    """Run snippets, which must not fail, and return what each of them printed."""
    results = run_each(snippets, folder)
    for snippet, (status, _, errors) in zip(snippets, results):
        assert status == 0, f"{snippet}\n{errors[-3000:]}"
    return [output for _, output, _ in results]


def check_each(check, folders, folder):
    """Run the program `check` on folders, each in a process of its own; return exit status and errors of each."""
    start = f"import runpy, sys\nsys.path[0] = {str(check.parent)!r}\nsys.argv = ['check', {{0!r}}]\n"
    start += f"runpy.run_path({str(check)!r}, run_name='__main__')\n"
    results = run_each([start.format(str(given)) for given in folders], folder)
    return [(status, errors[-3000:]) for status, _, errors in results]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return export(save(folder / "model"), folder / "published", prompts={"query": "Find: "}, license="apache-2.0")


def test_folder_holds_what_it_needs_and_nothing_else(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "moca_export.json",
        "modules.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *CODE,
    }
    root = Path(sys.modules["modeling_moca"].__file__).parent
    for name in CODE:
        assert (exported / name).read_text() == (root / name).read_text()
    config = json.loads((exported / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoProcessor"}
    assert config["architectures"] == ["MoCaModel"]
    sentence_config = json.loads((exported / "config_sentence_transformers.json").read_text())
    assert sentence_config["prompts"]["query"] == "Find: "
    assert set(sentence_config["requirements"]) == {"transformers", "sentence-transformers"}
    assert json.loads((exported / "sentence_bert_config.json").read_text())["unpad_inputs"] is False
    assert not any(name.startswith(("mlm_head", "mae_head")) for name in load_file(exported / "model.safetensors"))


KINDS = {
    "embedding": (MoCaModel, {}),
    "pretraining": (MoCaForPreTraining, {}),
    "causal": (MoCaModel, {"bidirectional": False, "pooling": "last"}),
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Exit status and errors of a check of each kind of model."""
    folder = tmp_path_factory.mktemp("checked")
    published = []
    for kind, (model_class, kwargs) in KINDS.items():
        published.append(export(save(folder / "model", model_class, **kwargs), folder / kind / "published"))
        shutil.rmtree(folder / "model")
    return dict(zip(KINDS, check_each(CHECK, published, folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_doors_agree_where_the_package_is_unknown(kind, checked):
    status, errors = checked[kind]
    assert status == 0, errors


def test_embeddings_are_those_of_the_trained_model(exported):
    model = MoCaModel.from_pretrained(exported.parent / "model")
    inputs = tiny_processor()(text=["a page about tides"])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**inputs).pooler_output, dim=-1)
    ours = SentenceTransformer(str(exported), device="cpu").encode(["a page about tides"], convert_to_tensor=True)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_prompt_stands_between_leading_images_and_text(exported):
    model = SentenceTransformer(str(exported), device="cpu")
    picture = tiny_picture()
    cases = [("tides", "Find: tides"), ({"text": "tides", "image": picture}, {"text": "Find: tides", "image": picture})]
    for given, written_out in cases:
        prompted = model.encode([given], prompt_name="query", convert_to_tensor=True)
        torch.testing.assert_close(prompted, model.encode([written_out], convert_to_tensor=True), atol=1e-6, rtol=0)
        assert not torch.allclose(prompted, model.encode([given], convert_to_tensor=True), atol=1e-3)
    alone = model.encode([picture], prompt_name="query", convert_to_tensor=True)
    expected = model.encode([{"text": "Find: ", "image": picture}], convert_to_tensor=True)
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)


def tiny_picture():
    from PIL import Image

    return Image.effect_noise((56, 56), 80).convert("RGB")


def test_card_is_filled_and_every_snippet_runs(exported, tmp_path):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "sentence-transformers" and card.data.license == "apache-2.0"
    assert "{{" not in card.text and "bidirectional attention" in card.text and '"Find: "' in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 3 and all(str(exported) in block for block in blocks)
    run_snippets(blocks, tmp_path)


def test_truncated_embeddings_are_unit_length_when_asked(exported):
    model = SentenceTransformer(str(exported), device="cpu", truncate_dim=8)
    embedding = model.encode(["tides"], normalize_embeddings=True, convert_to_tensor=True)
    assert embedding.shape == (1, 8) and embedding.norm().item() == pytest.approx(1, abs=1e-5)


def test_version_gate_refuses(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    path = folder / "config_sentence_transformers.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "requirements": {"transformers": ">=99"}}))
    with pytest.raises(ImportError, match="transformers"):
        SentenceTransformer(str(folder), device="cpu")


def test_script(exported, tmp_path):
    script = Path(__file__).resolve().parents[2] / "examples" / "export.py"
    command = [sys.executable, str(script), "--model", str(exported.parent / "model"), "--repo", "org/moca-tiny"]
    command += ["--base-model", "org/base", "--license", "mit", "--language", "en", "de", "--datasets", "org/pairs"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    card = ModelCard.load(tmp_path / "moca-tiny" / "README.md")
    assert card.data.base_model == "org/base" and card.data.license == "mit"
    assert card.data.language == ["en", "de"] and card.data.datasets == ["org/pairs"]
    assert 'SentenceTransformer("org/moca-tiny", trust_remote_code=True)' in card.text
    refused = forked.run(*command[1:], "--repo", "moca", folder=tmp_path)
    assert refused.returncode != 0
    assert "The repository must be named owner/name, got 'moca'" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, r"dtype must be one of \['float32', 'bfloat16', 'float16'\], got 'int8'"),
        ({"license": "Apache 2"}, "The licence 'Apache 2' is none that the Hub knows; allowed are"),
        ({"license": "other"}, "belong together, got 'other', None and None"),
        ({"license": "other", "license_name": "mine"}, "belong together, got 'other', 'mine' and None"),
        ({"license": "mit", "license_link": "LICENSE"}, "belong together, got 'mit', None and 'LICENSE'"),
        ({"language": "English"}, "The language 'English' is no ISO 639 code"),
        ({"datasets": ["a/b/c"]}, "The data set 'a/b/c' is no Hub id"),
        ({"base_model": "a b"}, "The base_model 'a b' is no Hub id"),
    ],
)
def test_settings_are_checked_before_anything_is_written(settings, message, exported, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(exported.parent / "model", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_dtype_cannot_hold_are_named(tmp_path):
    model = MoCaModel.from_backbone(tiny_backbone(), mask_token_id=6)
    name, weight = next(iter(model.named_parameters()))
    weight.data.view(-1)[0] = 1e6  # more than float16 holds
    model.save_pretrained(tmp_path / "model")
    tiny_processor(max_length=128).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"1 weights are not finite in torch.float16, {re.escape(name)} for one"):
        export(tmp_path / "model", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_named(exported, tmp_path):
    with pytest.raises(ValueError, match=r"lacks \['config.json', 'processor_config.json'.*safetensors"):
        export(tmp_path, tmp_path / "out")
    folder = save(tmp_path / "model")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks \['processor_config.json'\]"):
        export(folder, tmp_path / "out")

    save(folder)
    with pytest.raises(ValueError, match="is not empty"):
        export(folder, exported)
    with pytest.raises(ValueError, match="is not an earlier export"):
        export(folder, folder, overwrite=True)
    again = export(folder, shutil.copytree(exported, tmp_path / "again"), overwrite=True)
    assert "apache" not in (again / "README.md").read_text()

    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.language_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: \['backbone.language_model.norm.weight'\]"):
        export(folder, tmp_path / "out")

    stock = tmp_path / "stock"
    tiny_backbone().save_pretrained(stock)
    tiny_processor().save_pretrained(stock)
    with pytest.raises(ValueError, match="holds a model of type 'qwen2_5_vl', allowed is 'moca'"):
        export(stock, tmp_path / "out")
