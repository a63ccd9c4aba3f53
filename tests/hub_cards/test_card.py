"""Model cards: filled from records and result files alone, as the Hub wants them, with snippets that run."""

import ast
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, metadata_load

from hub_cards import export, validate_card, write_card, write_training_card
from hub_cards.card import check_card
from modeling_moca import MoCaForPreTraining
from tests import forked
from tests.families import family_backbone, family_processor
from tests.hub_cards.test_export import run, run_snippets, save
from tests.trainers import contrastive_run, cpt_run
from tests.trainers.cpt_sources import numbered_rows, write_parquet, write_tars
from trainers.training_record import RECORD

RESULT = {
    "format": "moca-evaluation",
    "task": "pages",
    "task_type": "visual-document-retrieval",
    "task_id": "default",
    "dataset": {"name": "Pages", "id": "org/pages", "config": "en", "split": "test", "revision": "a" * 40},
    "metrics": {"ndcg_at_5": 0.8125, "p_at_1": 0.5},
    "model": "org/moca-tiny",
    "versions": {"transformers": "5.23.0"},
    "date": "2026-01-31",
}


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both stages of a tiny run, each folder as its trainer left it."""
    folder = tmp_path_factory.mktemp("card")
    rows = numbered_rows(40)
    rows[7]["text"] = " "
    write_parquet(folder / "p", rows, num_files=4)
    write_tars(folder / "w", 12, num_files=2)
    trainer = cpt_run.make_trainer(folder, folder / "stage1", max_steps=3, logging_steps=1)
    trainer.train()
    trainer.save_model()
    contrastive_run.write_mixture(folder)
    (folder / "start").symlink_to(folder / "stage1")
    trainer = contrastive_run.make_trainer(
        folder, folder / "stage2", max_steps=3, logging_steps=1, hub_model_id="org/moca-tiny"
    )
    trainer.card_writer = write_training_card
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0")
    return folder


def test_card_says_what_happened(trained, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    published = export(
        trained / "stage2",
        tmp_path / "moca-tiny",
        model_id="org/moca-tiny",
        results=[tmp_path / "result.json"],
        base_model="org/base",
        license="apache-2.0",
        language=["en"],
        prompts={"query": "Find: "},
    )
    card = ModelCard.load(published / "README.md")
    head = metadata_load(published / "README.md")
    assert head["library_name"] == "sentence-transformers" and head["pipeline_tag"] == "feature-extraction"
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "finetune")
    assert (head["license"], head["language"]) == ("apache-2.0", ["en"]) and "datasets" not in head
    (index,) = head["model-index"]
    assert index["name"] == "moca-tiny"
    assert index["results"] == [
        {
            "task": {"type": "visual-document-retrieval", "name": "pages"},
            "dataset": {"type": "org/pages", **{k: v for k, v in RESULT["dataset"].items() if k != "id"}},
            "metrics": [{"type": name, "value": value, "name": name} for name, value in RESULT["metrics"].items()],
        }
    ]
    stages = json.loads((trained / "stage2" / RECORD).read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["continual pre-training", "contrastive fine-tuning"]
    for stage in stages:
        assert f"{stage['steps']:,} steps" in card.text and f"{stage['tokens']:,} tokens" in card.text
        final = stage["losses"]["loss"]["final"]
        assert f"| `loss` | {stage['losses']['loss']['first']:.4g} | {final:.4g} |" in card.text
        assert f"| {final:.4g} |" in card.text.split("| step |")[-1 if stage is stages[-1] else 1]
        for entry in stage["datasets"]:
            assert re.search(
                rf"\| {re.escape(entry['name'])} \|.*\| {entry['rows']} \| {entry['used_rows']} \|", card.text
            )
    assert "1 empty_query" in card.text and "learning_rate: 0.001" in card.text and "torch 2." in card.text
    row = "| pages | [org/pages](https://huggingface.co/datasets/org/pages) (en) | test | ndcg_at_5 | 0.8125 |"
    assert row in card.text and "{{" not in card.text and "None" not in card.text and str(trained) not in card.text
    sections = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert sections == ["Use", "Training", "Evaluation", "Limits", "Licence", "Citation"]


def test_card_of_a_trainer(trained, tmp_path):
    card = ModelCard.load(trained / "stage2" / "README.md")
    assert card.data.license == "apache-2.0" and "3 steps" in card.text and "Contrastive fine-tuning" in card.text
    blocks = snippets(card.text)
    assert len(blocks) == 3 and all('"org/moca-tiny"' in block for block in blocks)
    # One process: those of an export run each by itself.
    run(["-c", "\n".join(blocks).replace("org/moca-tiny", str(trained / "stage2"))], tmp_path)


def test_every_snippet_of_pretraining_runs(trained, tmp_path):
    text = write_training_card(trained / "stage1").read_text()
    assert metadata_load(trained / "stage1" / "README.md")["library_name"] == "transformers"
    blocks = snippets(text)
    assert len(blocks) == 3 and all(str(trained / "stage1") in block for block in blocks)
    filled, reconstructed, embedded = run_snippets(blocks, tmp_path)
    assert filled.startswith("[") and len(ast.literal_eval(filled)) == 5
    # An image of 224 x 224 is 16 tokens here, half of them hidden, of four patches of 1176 values.
    assert "torch.Size([8, 4, 1176])" in reconstructed and "tensor(" in reconstructed
    assert "torch.Size([1, 32])" in embedded
    assert "Continual pre-training" in text and "masked tokens" in text


def test_backbones_that_take_tiles_have_no_rows_of_patches(tmp_path):
    model = MoCaForPreTraining.from_backbone(family_backbone("smolvlm"), mask_token_id=6)
    model.save_pretrained(tmp_path / "model")
    family_processor("smolvlm", max_length=512).save_pretrained(tmp_path / "model")
    blocks = snippets(write_card(tmp_path / "model", "pretraining").read_text())
    assert len(blocks) == 2
    run(["-c", "\n".join(blocks)], tmp_path)


def test_what_is_unknown_is_left_out(tmp_path):
    folder = save(tmp_path / "model", MoCaForPreTraining)
    text = write_card(folder, "pretraining").read_text()
    head = metadata_load(folder / "README.md")
    assert set(head) == {"library_name", "pipeline_tag", "tags"}
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Use", "Limits", "Citation"]
    assert "None" not in re.sub(r"```python.*?```", "", text, flags=re.DOTALL)


def test_data_sets_and_base_model_of_the_hub_come_from_the_record(tmp_path):
    folder = save(tmp_path / "model", MoCaForPreTraining)
    stage = {
        "stage": "continual pre-training",
        "model": {"start": "org/base", "start_commit": "c" * 40},
        "arguments": {"seed": 42},
        "datasets": [
            {"name": "org/pages:en", "hub_id": "org/pages", "config": "en", "revision": "v1", "split": "train"}
            | {"weight": 2.0, "max_rows": 5000, "used_rows": 12345, "skipped_rows": {"empty_text": 2}},
            {"name": "a|b", "split": "train", "weight": 1.0, "used_rows": 7, "skipped_rows": {}},
        ],
        "steps": 10,
        "max_steps": 12,
        "epochs": 0.5,
        "kept_step": 6,
        "seconds": 7500.0,
        "tokens": 1234567,
        "tokens_per_second": 164.6,
        "losses": {"loss": {"first": 3.0, "final": None, "smoothed": None, "curve": [[4, 3.0], [8, None]]}},
        "evaluations": [
            {"step": 6, "after_training": False, "metrics": {"loss": 2.5}},
            {"step": 10, "after_training": False, "metrics": {"loss": 9.5}},
        ],
        "resumes": 2,
        "environments": [
            {
                "devices": {"GPU": 2},
                "num_processes": 2,
                "distributed": "FSDP",
                "mixed_precision": "bf16",
                "versions": {},
            }
        ],
    }
    (folder / RECORD).write_text(json.dumps({"format": 1, "stages": [stage]}))
    text = write_card(folder, "pretraining").read_text()
    head = metadata_load(folder / "README.md")
    assert (head["base_model"], head["datasets"]) == ("org/base", ["org/pages"])
    link = "[org/pages](https://huggingface.co/datasets/org/pages) (en)"
    assert f"| {link} | train | v1 | 2 | 5,000 | 12,345 | 2 empty_text |\n| a\\|b | train |  | 1 |  | 7 |  |" in text
    for said in (
        "10 steps of 12",
        "It took 2.1 hours",
        f"from `org/base` at commit `{'c' * 40}`",
        "those of step 6, the best one",
        "| `loss` | 3 | not finite | not finite |",
        "2 x GPU, 2 processes (FSDP), mixed precision: bf16",
        "at step 6:\n\n| metric | value |\n|---|---|\n| `loss` | 2.5 |",
        "resumed 2 times",
    ):
        assert said in text, said

    (folder / RECORD).write_text(json.dumps({"stages": []}))
    with pytest.raises(ValueError, match="training_record.json is no training record of format 1"):
        write_card(folder, "pretraining")
    (folder / RECORD).write_text("{")
    with pytest.raises(ValueError, match="training_record.json is no training record: it cannot be read as JSON"):
        write_card(folder, "pretraining")


def test_heads_that_the_hub_would_refuse(tmp_path):
    folder = save(tmp_path / "model")
    for settings, message in (
        ({"base_model": "a/b/c"}, "base_model 'a/b/c' is no name on the Hub"),
        ({"datasets": ["org/pages", "not a name"]}, "datasets 'not a name' is no name on the Hub"),
        ({"language": "english"}, "language 'english' is no ISO 639 code"),
        ({"license": "other"}, "license 'other' needs license_name and license_link"),
    ):
        with pytest.raises(ValueError, match=f"README.md: {message}"):
            write_card(folder, "pretraining", **settings)
    write_card(folder, "pretraining", license="other", license_name="mine", license_link="LICENSE")
    with pytest.raises(ValueError, match=r"layout must be one of \['embedding', .*got 'other'"):
        write_card(folder, "other")
    (tmp_path / "README.md").write_text("# no head\n")
    with pytest.raises(ValueError, match="README.md has no head of metadata"):
        check_card(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("---\nmodel-index:\n- name: a\n  results: [{task: {type: b}}]\n---\n")
    with pytest.raises(ValueError, match="model-index|model_index|dataset"):
        check_card(tmp_path / "README.md")


class Validation(BaseHTTPRequestHandler):
    """What the Hub answers to a card: a refusal of one whose licence is `wrong`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        refused = "license: wrong" in body["content"]
        self.send_response(400 if refused else 200)
        self.end_headers()
        self.wfile.write(b'"license" must be one of ...' if refused else b"{}")

    def log_message(self, *args):
        pass


def test_the_hub_is_asked_when_told_to(tmp_path, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Validation) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        folder = save(tmp_path / "model")
        path = write_card(folder, "pretraining", license="mit")
        assert not server.requests, "asked without being told to"
        validate_card(path)
        ((url, body),) = server.requests
        assert url == "/api/validate-yaml" and body == {"repoType": "model", "content": path.read_text()}
        write_card(folder, "pretraining", license="wrong")
        with pytest.raises(ValueError, match='"license" must be one of'):
            validate_card(path)
        server.shutdown()


def test_bad_results_stop_an_export_before_it_removes_anything(tmp_path):
    folder = save(tmp_path / "model")
    published = export(folder, tmp_path / "out")
    before = (published / "README.md").read_text()
    (tmp_path / "typed.json").write_text(json.dumps({"ndcg": 0.9}))
    with pytest.raises(ValueError, match="typed.json is no result of an evaluation"):
        export(folder, tmp_path / "out", overwrite=True, results=[tmp_path / "typed.json"])
    assert (published / "README.md").read_text() == before


def test_script_takes_results(tmp_path):
    folder = save(tmp_path / "model")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    script = Path(__file__).resolve().parents[2] / "examples" / "export.py"
    arguments = ["--model", str(folder), "--output", str(tmp_path / "out"), "--results", str(tmp_path / "result.json")]
    done = forked.run(script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        metadata_load(tmp_path / "out" / "README.md")["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.8125
    )
    assert (tmp_path / "out" / ".eval_results" / "pages.yaml").is_file()
