"""What a prompt is worth: tasks of mteb with it and without it, on the same model, with intervals over queries."""

import contextlib
import importlib.metadata
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.types import PromptType

from .mteb_pages import LocalPages
from .mteb_published import IMAGE_ONLY
from .results import RESULT_FORMAT

logger = logging.getLogger(__name__)

# As the authors' evaluation writes pages and queries: the text stands behind the image, and queries are plain.
REFERENCE_PROMPTS = {"query": "", "document": IMAGE_ONLY}
NO_PROMPTS = {"query": "", "document": ""}
METRICS = ("ndcg_at_5", "ndcg_at_10")


@dataclass(frozen=True)
class PromptWorth:
    """One task, or the mean of all, with and without the prompts.

    Args:
        task (`str`): name.
        num_queries (`int`): over all subsets of the task.
        without, prompted (`dict[str, float]`): scores by metric, as mteb rounds them, averaged over subsets.
        intervals (`dict[str, tuple[float, float]]`): by metric, of the difference: 95 % over queries, paired.
    """

    task: str
    num_queries: int
    without: dict
    prompted: dict
    intervals: dict


def compare_prompts(meta, tasks, output, *, prompts=None, device=None, batch_size=32):
    """Evaluate a model with prompts and without any, and compare it query by query.

    What is done is kept, one task and subset at a time: a run that was killed goes on when it is started again. Results
    of another model, other prompts or other data are never taken for it.

    Args:
        meta ([`hub_cards.mteb_models.MoCaModelMeta`]): the export, see [`hub_cards.mteb_models.model_meta`].
        tasks (iterable of `mteb.abstasks.AbsTaskRetrieval`): for example `mteb.get_benchmark("ViDoRe(v2)").tasks`.
        output (`str` or `os.PathLike`): folder of results, a `mteb.ResultCache`; beside each result lies a folder
            `per_query` with the scores of every query.
        prompts (`dict[str, str]`, *optional*): by mteb's names; the reference's (`REFERENCE_PROMPTS`) when omitted.
            `query` and `document` are empty where they are not given. The export's own prompts play no part.
        device (`str`, *optional*): chosen by sentence-transformers when omitted.
        batch_size (`int`, defaults to 32): inputs of a forward pass.

    Returns:
        `tuple`: `list[PromptWorth]`, a task each and, of several tasks, their mean; and `list[pathlib.Path]`, the
            results with the prompts, for the card, see [`hub_cards.results`].

    Raises:
        ValueError: prompts are no mapping of texts, mteb knows no such name of a prompt, no prompt that is not empty is
            for a task, two tasks are of one name, or no task could be evaluated.

    Example:

    ```python
    >>> rows, files = compare_prompts(model_meta("moca-3b"), [local_pages("my_pages")], "results")
    >>> print(as_table(rows))
    ```
    """
    cache, tasks, results = mteb.ResultCache(Path(output)), list(tasks), {}
    prompts = _checked_prompts(REFERENCE_PROMPTS if prompts is None else prompts, tasks)
    for name, given in (("without", NO_PROMPTS), ("prompted", prompts)):
        # mteb gives these to the loader, and keeps the results of every choice apart.
        variant = meta.model_copy(update={"experiment_kwargs": {"model_prompts": given}})
        results[name] = _evaluate(variant, tasks, cache, {"batch_size": batch_size}, device)
    done = [task for task in tasks if all(task.metadata.name in found for found in results.values())]
    if not done:
        raise ValueError(f"None of {[task.metadata.name for task in tasks]} could be evaluated.")
    rows, samples = [], []
    for seed, task in enumerate(done):
        row, drawn = _compare(task, *(results[name][task.metadata.name] for name in ("without", "prompted")), seed)
        rows.append(row)
        samples.append(drawn)
    if len(rows) > 1:
        rows.append(_mean(rows, samples))
    return rows, [_card_file(task, meta, *results["prompted"][task.metadata.name]) for task in done]


def as_table(rows):
    """Return a comparison as a table in Markdown.

    Args:
        rows (`list[PromptWorth]`): see [`compare_prompts`].
    """
    lines = [
        "| task | queries | metric | without | prompted | difference (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for metric in METRICS:
            without, prompted = row.without[metric], row.prompted[metric]
            low, high = row.intervals[metric]
            lines.append(
                f"| {row.task} | {row.num_queries} | {metric.replace('ndcg_at_', 'nDCG@')} | {without:.4f} "
                f"| {prompted:.4f} | {prompted - without:+.4f} ({low:+.4f} to {high:+.4f}) |"
            )
    return "\n".join(lines)


def as_json(meta, prompts, rows):
    """Return a comparison as a mapping that JSON takes.

    Args:
        meta ([`hub_cards.mteb_models.MoCaModelMeta`]): of the model.
        prompts (`dict[str, str]`): what was compared with none.
        rows (`list[PromptWorth]`): see [`compare_prompts`].
    """
    return {
        "model": meta.name,
        "revision": meta.revision,
        "prompts": NO_PROMPTS | prompts,
        "mteb": importlib.metadata.version("mteb"),
        "tasks": [asdict(row) for row in rows],
    }


def _checked_prompts(prompts, tasks):
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"Prompts are a mapping of names to texts, got {prompts!r}.")
    prompts = NO_PROMPTS | prompts
    names = [task.metadata.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"Results go by the names of tasks, and some are there twice: {names}.")
    try:
        AbsEncoder.validate_task_to_prompt_name(prompts)
    except KeyError as error:
        raise ValueError(f"mteb knows no such names of prompts: {error.args[0]}") from error
    for task in tasks:
        if not any(prompts[get_prompt_name(prompts, task.metadata, side)] for side in PromptType):
            raise ValueError(f"None of the prompts {prompts} is one of {task.metadata.name}: nothing to compare.")
    return prompts


def _evaluate(meta, tasks, cache, encode_kwargs, device):
    """Return by task the result and the file it is in; tasks that are not open to everybody may be missing."""
    model, found = meta, {}
    for task in tasks:
        path = cache.get_task_result_path(task.metadata.name, meta)
        result = cache.load_task_result(task.metadata.name, meta)
        stale = result is not None and not _is_current(task, path, result)
        if stale:
            logger.info("%s is of other data or lacks the scores of its queries: done anew.", path)
        if model is meta and (result is None or stale or result.get_missing_evaluations(task)):
            model = meta.load_model(device=device)
        with _per_query_scores(task, path):
            evaluated = mteb.evaluate(
                model,
                task,
                cache=cache,
                co2_tracker=False,
                encode_kwargs=dict(encode_kwargs),
                overwrite_strategy="always" if stale else "only-missing",
            )
        for error in evaluated.exceptions or []:
            logger.warning("%s is left out: %s", error.task_name, error.exception)
        found.update({result.task_name: (path, result) for result in evaluated.task_results})
    return found


@contextlib.contextmanager
def _per_query_scores(task, path):
    """Within it a task writes the scores of every query, before mteb writes its result."""
    original = task.task_specific_scores

    def write(scores, qrels, results, hf_split, hf_subset):
        rows = {
            query: {metric: values[metric.replace("_at_", "_cut_")] for metric in METRICS}
            for query, values in scores.items()
        }
        file = _per_query_file(path, hf_split, hf_subset)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows), encoding="utf-8")
        return original(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    # mteb's own hook: the one place that is shown what every query scored.
    task.task_specific_scores = write
    try:
        yield
    finally:
        del task.task_specific_scores


def _per_query_file(path, split, subset):
    return path.parent / "per_query" / f"{path.stem}.{split}.{subset}.json"


def _is_current(task, path, result):
    scored = [(split, entry["hf_subset"]) for split, entries in result.scores.items() for entry in entries]
    has_queries = all(_per_query_file(path, *place).is_file() for place in scored)
    return has_queries and result.dataset_revision == task.metadata.dataset["revision"]


def _compare(task, without, prompted, seed):
    """Return a task's row, and for every metric its differences under resampling."""
    (path, result), (prompted_path, prompted_result) = without, prompted
    places = [(split, subset) for split in task.eval_splits for subset in task.hf_subsets]
    differences = []  # by subset: [num_queries, num_metrics]
    for place in places:
        before, after = (
            json.loads(_per_query_file(file, *place).read_text(encoding="utf-8")) for file in (path, prompted_path)
        )
        if before.keys() != after.keys():
            raise ValueError(f"{path} and {prompted_path} are of other queries: remove both to do them anew.")
        values = [[[scores[query][metric] for metric in METRICS] for query in before] for scores in (before, after)]
        differences.append(np.subtract(values[1], values[0]))
    # Subsets of one size are drawn alike, so that translations in one order stay together.
    drawn = np.mean([_resampled_means(rows, seed) for rows in differences], axis=0)
    scores = [
        {metric: float(np.mean([_entry(each, *place)[metric] for place in places])) for metric in METRICS}
        for each in (result, prompted_result)
    ]
    return PromptWorth(task.metadata.name, sum(map(len, differences)), *scores, _intervals(drawn)), drawn


def _entry(result, split, subset):
    return next(entry for entry in result.scores[split] if entry["hf_subset"] == subset)


def _mean(rows, samples):
    scores = [
        {metric: float(np.mean([getattr(row, side)[metric] for row in rows])) for metric in METRICS}
        for side in ("without", "prompted")
    ]
    return PromptWorth("mean", sum(row.num_queries for row in rows), *scores, _intervals(np.mean(samples, axis=0)))


def _resampled_means(differences, seed, num_samples=2000):
    """Return the means of queries drawn with replacement, `[num_samples, num_metrics]`."""
    size = len(differences)
    # How often each query is drawn, all samples at once.
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=num_samples)
    return counts @ differences / size


def _intervals(drawn):
    bounds = np.quantile(drawn, (0.025, 0.975), axis=0).T.tolist()
    return {metric: tuple(pair) for metric, pair in zip(METRICS, bounds)}


def _card_file(task, meta, path, result):
    """Return the file that a card reads: mteb's own, or for a task that only its folder knows one in our format."""
    if not isinstance(task, LocalPages):
        return path
    split = task.eval_splits[0]
    entry = _entry(result, split, "default")
    content = {
        "format": RESULT_FORMAT,
        "task": task.metadata.name,
        "task_type": "visual-document-retrieval",
        "dataset": {
            "name": task.metadata.dataset["path"],
            "split": split,
            "revision": task.metadata.dataset["revision"],
        },
        "metrics": {metric: entry[metric] for metric in METRICS},
        "model": meta.name,
        "versions": {"mteb": result.mteb_version},
        "date": f"{result.date:%Y-%m-%d}",
    }
    file = path.parent / "card" / path.name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return file


__all__ = ["NO_PROMPTS", "REFERENCE_PROMPTS", "PromptWorth", "as_json", "as_table", "compare_prompts"]
