"""Results of evaluation for model cards, from files alone: the Hub's `model-index` and its `.eval_results` files.

A result file is JSON, one data set a file:

    {
      "format": "moca-evaluation",
      "task": "pages",                                  what was done, as people call it
      "task_type": "visual-document-retrieval",         the Hub's name for such tasks
      "task_id": "default",                             optional: the benchmark's own name, in eval.yaml of its data set
      "dataset": {"name": "Pages", "id": "org/pages", "config": "en", "split": "test", "revision": "<commit>"},
      "metrics": {"ndcg_at_5": 0.81, "p_at_1": 0.7},    the first one is the main one
      "model": "org/moca-3b",
      "versions": {"transformers": "5.23.0"},
      "date": "2026-01-31"
    }

Of the data set `id`, `config` and `revision` may be missing. The files that mteb writes, one a task, are read as well.
"""

import datetime
import importlib
import json
import math
import numbers
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump

RESULT_FORMAT = "moca-evaluation"
EVAL_RESULTS_FOLDER = ".eval_results"
_TEXTS = ("task", "task_type", "model", "date")
_MTEB_KEYS = {"task_name", "mteb_version", "dataset_revision", "scores"}
_MTEB_URL = "https://github.com/embeddings-benchmark/mteb/"


@dataclass(frozen=True)
class EvaluationResult:
    """What one file says of one data set and split.

    Args:
        task, task_type (`str`): what was done, and the Hub's name for such tasks.
        dataset (`dict[str, str]`): `name` and `split`, perhaps `id`, `config` and `revision`.
        metrics (`dict[str, float]`): by name; the first one is the main one.
        model (`str`, *optional*): which model it was, as the file calls it.
        task_id (`str`, *optional*): the benchmark's own name of the task.
        versions (`dict[str, str]`): libraries that it was made with.
        date (`str`, *optional*): day, as `2026-01-31`.
        source (`dict[str, str]`): `source_name` and `source_url` of who defines the task.
        scale (`float`): what a value is multiplied by in `.eval_results`, whose benchmarks count in percent or not.
    """

    task: str
    task_type: str
    dataset: dict
    metrics: dict
    model: str | None = None
    task_id: str | None = None
    versions: dict = field(default_factory=dict)
    date: str | None = None
    source: dict = field(default_factory=dict)
    scale: float = 1.0


def read_results(paths):
    """Read result files.

    Args:
        paths (iterable of `str` or `os.PathLike`): JSON files, of this project or of mteb, for which mteb must be
            installed: its files do not tell which data set a task is of.

    Returns:
        `list[EvaluationResult]`: in the order of the files.

    Raises:
        ValueError: a file is no result, lacks something, holds a number that is none, or repeats another file's result;
            the message names it.
    """
    results, found = [], {}
    for path in map(Path, paths):
        for result in _read(path):
            key = (result.task, *sorted(result.dataset.items()))
            if key in found:
                raise ValueError(f"{path} and {found[key]} hold results of the same task and data set: {result.task}.")
            found[key] = path
            results.append(result)
    return results


def as_model_index(results):
    """Return results as the head of a card takes them.

    Args:
        results (`list[EvaluationResult]`): what was measured.

    Returns:
        `list[huggingface_hub.EvalResult]`: one a metric; a data set that is not on the Hub goes by its name.
    """
    return [
        EvalResult(
            task_type=result.task_type,
            task_name=result.task,
            dataset_type=result.dataset.get("id", result.dataset["name"]),
            dataset_name=result.dataset["name"],
            dataset_config=result.dataset.get("config"),
            dataset_split=result.dataset["split"],
            dataset_revision=result.dataset.get("revision"),
            metric_type=name,
            metric_name=name,
            metric_value=value,
            **result.source,
        )
        for result in results
        for name, value in result.metrics.items()
    ]


def write_eval_results(folder, results):
    """Write the files from which the Hub shows results on a model's page and on leaderboards of benchmarks.

    Only results of a data set on the Hub with a `task_id` have a place there: the main metric of each.

    Args:
        folder (`str` or `os.PathLike`): the published folder; files are `.eval_results/<task>.yaml`.
        results (`list[EvaluationResult]`): what was measured.

    Returns:
        `list[pathlib.Path]`: the files.
    """
    by_task = {}
    for result in results:
        if result.task_id is not None and "id" in result.dataset:
            by_task.setdefault(result.task, []).append(result)
    paths = []
    for task, entries in by_task.items():
        path = Path(folder) / EVAL_RESULTS_FOLDER / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', task)}.yaml"
        path.parent.mkdir(exist_ok=True)
        content = eval_result_entries_to_yaml([_as_entry(result) for result in entries])
        path.write_text(yaml_dump(content), encoding="utf-8")
        paths.append(path)
    return paths


def _as_entry(result):
    name, value = next(iter(result.metrics.items()))
    return EvalResultEntry(
        dataset_id=result.dataset["id"],
        task_id=result.task_id,
        value=round(value * result.scale, 5),
        dataset_revision=result.dataset.get("revision"),
        date=result.date,
        notes=", ".join([name, *(f"{package} {version}" for package, version in result.versions.items())]),
        **{key: value for key, value in result.source.items() if key == "source_url"},
    )


def _read(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result of an evaluation: it cannot be read as JSON ({error}).") from error
    if isinstance(content, dict) and content.get("format") == RESULT_FORMAT:
        return [_read_own(path, content)]
    if isinstance(content, dict) and set(content) >= _MTEB_KEYS:
        return _read_mteb(path, content)
    raise ValueError(
        f'{path} is no result of an evaluation: allowed are files with "format": "{RESULT_FORMAT}" and mteb\'s, with '
        f"{sorted(_MTEB_KEYS)}."
    )


def _read_own(path, content):
    allowed = {"format", *_TEXTS, "task_id", "dataset", "metrics", "versions"}
    if unknown := sorted(set(content) - allowed):
        raise ValueError(f"{path} has unknown entries {unknown}; allowed are {sorted(allowed)}.")
    dataset, metrics, versions = (content.get(name) for name in ("dataset", "metrics", "versions"))
    for name, value, needed, optional in (
        ("", {key: content.get(key) for key in (*_TEXTS, "task_id") if key in content}, _TEXTS, ("task_id",)),
        ("dataset", dataset, ("name", "split"), ("id", "config", "revision")),
        ("versions", versions, (), None),
    ):
        _check_texts(path, name, value, needed, optional)
    _check_date(path, content["date"])
    if "id" in dataset:
        try:
            validate_repo_id(dataset["id"])
        except HFValidationError as error:
            raise ValueError(f"{path}: dataset id {dataset['id']!r} is no name on the Hub ({error}).") from error
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"{path} has no metrics: allowed is a mapping of names to numbers, got {metrics!r}.")
    for name, value in metrics.items():
        _check_number(path, name, value)
    return EvaluationResult(
        dataset=dataset,
        metrics=metrics,
        versions=versions,
        task_id=content.get("task_id"),
        **{name: content[name] for name in _TEXTS},
    )


def _read_mteb(path, content):
    try:
        mteb = importlib.import_module("mteb")
    except ImportError as error:
        raise ValueError(f"{path} is a result of mteb, which tells its data set: install mteb to read it.") from error
    try:
        metadata = mteb.get_task(content["task_name"]).metadata
    except KeyError as error:
        raise ValueError(f"{path}: mteb knows no task {content['task_name']!r}.") from error
    date = content.get("date")
    # A time in newer versions of mteb, a text in others.
    if isinstance(date, numbers.Real):
        date = datetime.datetime.fromtimestamp(date, datetime.UTC).date().isoformat()
    results = []
    for split, entries in content["scores"].items():
        for entry in entries:
            subset = entry["hf_subset"]
            _check_number(path, "main_score", entry.get("main_score"))
            results.append(
                EvaluationResult(
                    task=content["task_name"],
                    task_type=metadata.type,
                    dataset={
                        "name": content["task_name"] if subset == "default" else f"{content['task_name']} ({subset})",
                        "id": metadata.dataset["path"],
                        "config": subset,
                        "split": split,
                        "revision": content["dataset_revision"],
                    },
                    metrics={metadata.main_score: entry["main_score"]},
                    # As mteb itself names them there, and in percent.
                    task_id=f"{content['task_name']}_{subset}_{split}",
                    scale=100.0,
                    versions={"mteb": content["mteb_version"]} if content["mteb_version"] else {},
                    date=None if date is None else str(date)[:10],
                    source={"source_name": "MTEB", "source_url": _MTEB_URL},
                )
            )
    return results


def _check_texts(path, name, value, needed, optional):
    start = f"{path}: {name}" if name else str(path)
    if not isinstance(value, dict):
        raise ValueError(f"{start} must be a mapping of names to texts, got {value!r}.")
    if missing := [key for key in needed if key not in value]:
        raise ValueError(f"{start} lacks {missing}.")
    if optional is not None and (unknown := sorted(set(value) - {*needed, *optional})):
        raise ValueError(f"{start} has unknown entries {unknown}; allowed are {sorted([*needed, *optional])}.")
    for key, text in value.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{start}: {key} must be a text, got {text!r}.")


def _check_number(path, name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{path}: {name} must be a finite number, got {value!r}.")


def _check_date(path, date):
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"{path}: date must be a day such as 2026-01-31, got {date!r}.") from error


__all__ = ["EvaluationResult", "as_model_index", "read_results", "write_eval_results"]
