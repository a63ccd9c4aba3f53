"""The tasks of MMEB (arXiv 2410.05160), its averages, and their tables."""

from __future__ import annotations

import csv
import io

# Name: meta-task, and whether the benchmark's training set has a part of the same data set (IND) or not (OOD).
TASKS = {
    "ImageNet-1K": ("classification", "IND"),
    "N24News": ("classification", "IND"),
    "HatefulMemes": ("classification", "IND"),
    "VOC2007": ("classification", "IND"),
    "SUN397": ("classification", "IND"),
    "Place365": ("classification", "OOD"),
    "ImageNet-A": ("classification", "OOD"),
    "ImageNet-R": ("classification", "OOD"),
    "ObjectNet": ("classification", "OOD"),
    "Country211": ("classification", "OOD"),
    "OK-VQA": ("vqa", "IND"),
    "A-OKVQA": ("vqa", "IND"),
    "DocVQA": ("vqa", "IND"),
    "InfographicsVQA": ("vqa", "IND"),
    "ChartQA": ("vqa", "IND"),
    "Visual7W": ("vqa", "IND"),
    "ScienceQA": ("vqa", "OOD"),
    "VizWiz": ("vqa", "OOD"),
    "GQA": ("vqa", "OOD"),
    "TextVQA": ("vqa", "OOD"),
    "VisDial": ("retrieval", "IND"),
    "CIRR": ("retrieval", "IND"),
    "VisualNews_t2i": ("retrieval", "IND"),
    "VisualNews_i2t": ("retrieval", "IND"),
    "MSCOCO_t2i": ("retrieval", "IND"),
    "MSCOCO_i2t": ("retrieval", "IND"),
    "NIGHTS": ("retrieval", "IND"),
    "WebQA": ("retrieval", "IND"),
    "FashionIQ": ("retrieval", "OOD"),
    "Wiki-SS-NQ": ("retrieval", "OOD"),
    "OVEN": ("retrieval", "OOD"),
    "EDIS": ("retrieval", "OOD"),
    "MSCOCO": ("grounding", "IND"),
    "RefCOCO": ("grounding", "OOD"),
    "RefCOCO-Matching": ("grounding", "OOD"),
    "Visual7W-Pointing": ("grounding", "OOD"),
}
# As the benchmark's tables order them; the last one is over all tasks.
AVERAGES = ("classification", "vqa", "retrieval", "grounding", "IND", "OOD", "overall")
# The Hub's names for such tasks, for model cards.
TASK_TYPES = {
    "classification": "zero-shot-image-classification",
    "vqa": "visual-question-answering",
    "retrieval": "image-text-retrieval",
    "grounding": "visual-grounding",
}
_COLUMNS = ("name", "kind", "meta_task", "distribution", "p_at_1", "num_queries", "num_missing_tasks")


def tasks_of(average):
    """Return the tasks that an average is over.

    Args:
        average (`str`): one of `AVERAGES`.
    """
    return [name for name, groups in TASKS.items() if average == "overall" or average in groups]


def mmeb_averages(scores):
    """Average the tasks' Precision@1: every task counts as much as any other, however many queries it has.

    Args:
        scores (`dict[str, float]`): Precision@1 by task, of some tasks or all 36.

    Returns:
        `dict[str, tuple[float | None, int]]`: for each of `AVERAGES` the mean, and how many of its tasks are missing.
        Where one is missing there is no mean: a mean over others would not compare with anybody's.

    Raises:
        ValueError: a task that MMEB does not have.

    Example:

    ```python
    >>> mmeb_averages({"MSCOCO": 1.0, "RefCOCO": 0.5, "RefCOCO-Matching": 0.5, "Visual7W-Pointing": 1.0})["grounding"]
    (0.75, 0)
    ```
    """
    check_tasks(scores)
    averages = {}
    for average in AVERAGES:
        names = tasks_of(average)
        given = [scores[name] for name in names if name in scores]
        num_missing = len(names) - len(given)
        averages[average] = (None if num_missing else sum(given) / len(given), num_missing)
    return averages


def check_tasks(names):
    """Refuse names that are no tasks.

    Args:
        names (`Iterable[str]`): names.

    Raises:
        ValueError: a task that MMEB does not have.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"MMEB has no tasks {unknown}; allowed are {list(TASKS)}.")


def as_markdown(model, results):
    """Return a table of the averages, and one of the tasks, in percent as the benchmark's papers have them.

    Args:
        model (`str`): what the model is called.
        results (`dict[str, dict]`): for each finished task `p_at_1` and `num_queries`.
    """
    averages = mmeb_averages({name: result["p_at_1"] for name, result in results.items()})
    lines = [f"MMEB, Precision@1 in percent, of {model}.", ""]
    lines += [f"| model | {' | '.join(AVERAGES)} |", "|" + "---|" * (1 + len(AVERAGES))]
    cells = [_percent(mean, missing, len(tasks_of(name))) for name, (mean, missing) in averages.items()]
    lines += [f"| {model} | {' | '.join(cells)} |", ""]
    lines += ["| task | meta-task | IND/OOD | P@1 | queries |", "|---|---|---|---|---|"]
    for name, (meta_task, distribution) in TASKS.items():
        if name in results:
            score, num_queries = results[name]["p_at_1"], results[name]["num_queries"]
            lines.append(f"| {name} | {meta_task} | {distribution} | {100 * score:.1f} | {num_queries} |")
    if missing := [name for name in TASKS if name not in results]:
        lines += ["", f"Missing tasks ({len(missing)} of {len(TASKS)}): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def as_csv(results):
    """Return the same numbers as CSV, as fractions: a line a task, and a line an average, empty where it has none.

    Args:
        results (`dict[str, dict]`): for each finished task `p_at_1` and `num_queries`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, groups in TASKS.items():
        if name in results:
            writer.writerow([name, "task", *groups, results[name]["p_at_1"], results[name]["num_queries"], 0])
    for name, (mean, num_missing) in mmeb_averages({n: r["p_at_1"] for n, r in results.items()}).items():
        writer.writerow([name, "average", "", "", "" if mean is None else mean, "", num_missing])
    return text.getvalue()


def _percent(mean, num_missing, num_tasks):
    return f"{num_missing} of {num_tasks} missing" if mean is None else f"{100 * mean:.1f}"


__all__ = ["AVERAGES", "TASKS", "TASK_TYPES", "as_csv", "as_markdown", "check_tasks", "mmeb_averages", "tasks_of"]
