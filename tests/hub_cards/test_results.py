"""Result files: what is read, what is refused, and what the Hub gets."""

import copy
import json

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from hub_cards.results import as_model_index, read_results, write_eval_results
from tests.hub_cards.test_card import RESULT

MTEB = {
    "dataset_revision": "b" * 40,
    "task_name": "NFCorpus",
    "mteb_version": "2.26.24",
    "scores": {
        "test": [
            {"main_score": 0.31234, "ndcg_at_10": 0.31234, "hf_subset": "default", "languages": ["eng-Latn"]},
        ]
    },
    "evaluation_time": 1.5,
    "kg_co2_emissions": None,
    "date": 1769817600.0,
}


def write(path, content, **changes):
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_own_results(tmp_path):
    other = {"task": "mine", "dataset": {"name": "mine", "split": "test"}, "metrics": {"p_at_1": 1}}
    own = copy.deepcopy(RESULT)
    own.pop("task_id")
    paths = [write(tmp_path / "a.json", RESULT), write(tmp_path / "b.json", own, **other)]
    first, second = read_results(paths)
    assert first.metrics == RESULT["metrics"] and first.model == "org/moca-tiny"
    index = as_model_index([first, second])
    assert [(entry.dataset_type, entry.metric_type, entry.metric_value) for entry in index] == [
        ("org/pages", "ndcg_at_5", 0.8125),
        ("org/pages", "p_at_1", 0.5),
        ("mine", "p_at_1", 1),
    ]
    # The second has no place on the Hub.
    (path,) = write_eval_results(tmp_path, [first, second])
    assert path == tmp_path / ".eval_results" / "pages.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("org/pages", "default", 0.8125, "2026-01-31")
    assert entry.dataset_revision == "a" * 40 and entry.notes == "ndcg_at_5, transformers 5.23.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no result of an evaluation: allowed are"),
        ({"metrics": {}}, "has no metrics"),
        ({"metrics": {"p": "0.5"}}, "p must be a finite number, got '0.5'"),
        ({"metrics": {"p": True}}, "p must be a finite number, got True"),
        ({"metrics": {"p": float("nan")}}, "p must be a finite number, got nan"),
        ({"date": "yesterday"}, "date must be a day such as 2026-01-31, got 'yesterday'"),
        ({"dataset": {"name": "a"}}, r"dataset lacks \['split'\]"),
        ({"dataset": {"name": "a", "split": "b", "id": "no name"}}, "dataset id 'no name' is no name on the Hub"),
        ({"dataset": {"name": "a", "split": "b", "sha": "c"}}, r"dataset has unknown entries \['sha'\]"),
        ({"dataset": "a"}, "dataset must be a mapping of names to texts, got 'a'"),
        ({"model": 3}, "model must be a text, got 3"),
        ({"versions": None}, "versions must be a mapping"),
        ({"score": 1}, r"has unknown entries \['score'\]"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path / "typed.json", RESULT, **changes)
    with pytest.raises(ValueError, match=f"typed.json:? ?{message}"):
        read_results([path])


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "notes.json").write_text("nDCG 0.9")
    for path in (tmp_path / "notes.json", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match=f"{path.name} is no result of an evaluation: it cannot be read as JSON"):
            read_results([path])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="list.json is no result of an evaluation: allowed are"):
        read_results([tmp_path / "list.json"])
    lacking = {name: value for name, value in RESULT.items() if name != "task"}
    with pytest.raises(ValueError, match=r"lacking.json lacks \['task'\]"):
        read_results([write(tmp_path / "lacking.json", lacking)])
    paths = [write(tmp_path / f"{name}.json", RESULT) for name in ("a", "b")]
    with pytest.raises(ValueError, match="b.json and .*a.json hold results of the same task and data set: pages"):
        read_results(paths)


def test_results_of_mteb(tmp_path):
    pytest.importorskip("mteb")
    (result,) = read_results([write(tmp_path / "NFCorpus.json", MTEB)])
    assert result.dataset == {
        "name": "NFCorpus",
        "id": "mteb/nfcorpus",
        "config": "default",
        "split": "test",
        "revision": "b" * 40,
    }
    assert result.metrics == {"ndcg_at_10": 0.31234} and result.date == "2026-01-31"
    (path,) = write_eval_results(tmp_path, [result])
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.task_id, entry.value) == ("NFCorpus_default_test", 31.234)
    with pytest.raises(ValueError, match="other.json: mteb knows no task 'NoSuchTask'"):
        read_results([write(tmp_path / "other.json", MTEB, task_name="NoSuchTask")])


def test_results_of_mteb_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    with pytest.raises(ValueError, match="NFCorpus.json is a result of mteb.*install mteb"):
        read_results([write(tmp_path / "NFCorpus.json", MTEB)])
