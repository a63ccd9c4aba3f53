"""The sections of a model card that tell of its training and evaluation, from records and result files alone."""

import json
from pathlib import Path

RECORD = "training_record.json"
FORMAT = 1
STAGES = {"continual pre-training": "Continual pre-training", "contrastive fine-tuning": "Contrastive fine-tuning"}
MOST_CURVE_POINTS = 8


def read_record(folder):
    """Read the record that training left in a folder.

    Args:
        folder (`str` or `os.PathLike`): an output folder of either stage, or another one.

    Returns:
        `list[dict]`: the stages, in their order; empty where there is no record.

    Raises:
        ValueError: the file is no training record.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no training record: it cannot be read as JSON ({error}).") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("stages"), list):
        raise ValueError(f"{path} is no training record of format {FORMAT}.")
    return record["stages"]


def hub_datasets(stages):
    """Return the Hub ids of all data sets that stages (`list[dict]`) were trained on, each once."""
    ids = [entry["hub_id"] for stage in stages for entry in stage["datasets"] if entry.get("hub_id")]
    return list(dict.fromkeys(ids))


def hub_base_model(stages):
    """Return the Hub id of the model that the first of the stages (`list[dict]`) started from, or None."""
    start = stages[0]["model"] if stages else {}
    return start.get("start") if start.get("start_commit") else None


def training_section(stages):
    """Return what is said of training, as Markdown; nothing without a record.

    Args:
        stages (`list[dict]`): see [`read_record`].
    """
    if not stages:
        return ""
    parts = ["## Training", "What follows comes from the record that the trainer wrote."]
    for stage in stages:
        parts += [f"### {STAGES.get(stage['stage'], stage['stage'])}", _summary(stage)]
        if stage["datasets"]:
            parts.append(_table(*_mixture(stage["datasets"])))
        if stage["losses"]:
            rows = [
                [f"`{name}`", *(_loss(loss[point]) for point in ("first", "final", "smoothed"))]
                for name, loss in stage["losses"].items()
            ]
            parts.append(_table(["loss", "first", "last", "mean of the last tenth of the logs"], rows))
            parts.append(_curve(stage["losses"]))
        if stage["arguments"]:
            settings = [
                f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in stage["arguments"].items()
            ]
            parts += [
                "Settings where they differ from the defaults of `transformers.TrainingArguments`, and those it lacks:",
                "\n".join(["```yaml", *settings, "```"]),
            ]
    return "\n\n".join(part for part in parts if part) + "\n"


def evaluation_section(stages, results):
    """Return what is said of evaluation, as Markdown; nothing without results and evaluations in training.

    Args:
        stages (`list[dict]`): see [`read_record`].
        results (`list[hub_cards.results.EvaluationResult]`): results from files.
    """
    parts = []
    if results:
        rows = [
            [
                result.task,
                _dataset_link(result.dataset),
                result.dataset["split"],
                name,
                _number(value),
                result.model or "",
                result.date or "",
            ]
            for result in results
            for name, value in result.metrics.items()
        ]
        header = ["task", "data set", "split", "metric", "value", "model", "date"]
        parts.append(_table(*_without_empty(header, rows)))
    if stages and stages[-1]["evaluations"]:
        evaluation = _of_kept_model(stages[-1])
        rows = [[f"`{name}`", _number(value)] for name, value in evaluation["metrics"].items()]
        when = "after training" if evaluation["after_training"] else f"at step {evaluation['step']}"
        parts += [f"On the dev sets of training, {when}:", _table(["metric", "value"], rows)]
    return "\n\n".join(["## Evaluation", *parts]) + "\n" if parts else ""


def _summary(stage):
    model, text = stage["model"], [f"{stage['steps']:,} steps"]
    if stage["max_steps"] > stage["steps"]:
        text[0] += f" of {stage['max_steps']:,}"
    text.append(f"{stage['epochs']:.4g} epochs")
    text += [f"{stage[name]:,} {name.replace('_', ' ')}" for name in ("rows", "tokens") if name in stage]
    text += [
        f"{stage[name]:,} {name.replace('_', ' ')}" for name in ("masked_tokens", "masked_patches") if name in stage
    ]
    sentences = [", ".join(text) + "."]
    if stage["kept_step"] != stage["steps"]:
        sentences.append(f"The weights are those of step {stage['kept_step']:,}, the best one.")
    if "start" in model:
        sentences.append(f"It started from `{model['start']}`{_commit(model)}.")
    if "num_parameters" in model:
        sentences.append(
            f"{model['num_trained_parameters']:,} of {model['num_parameters']:,} parameters were trained, in "
            f"{model['dtype']}."
        )
    if "adapters" in model:
        settings = ", ".join(f"{name} {value}" for name, value in model["adapters"].items())
        sentences.append(f"Adapters: {settings}.")
    rate = f", {stage['tokens_per_second']:,.0f} tokens a second" if stage["tokens_per_second"] else ""
    sentences.append(f"It took {_duration(stage['seconds'])}{rate}, evaluation and saving included.")
    if stage["resumes"]:
        sentences.append(f"The run was resumed {stage['resumes']} times; what it lost in between is not counted.")
    for environment in stage["environments"]:
        devices = ", ".join(f"{count} x {name}" for name, count in environment["devices"].items())
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        ranks = f", {environment['num_processes']} processes ({environment['distributed']})"
        sentences.append(
            f"Hardware: {devices}{ranks if environment['num_processes'] > 1 else ''}, mixed precision: "
            f"{environment['mixed_precision']}. Versions: {versions}."
        )
    return " ".join(sentences)


def _commit(model):
    return f" at commit `{model['start_commit']}`" if "start_commit" in model else ""


def _mixture(datasets):
    header = ["data set", "split", "revision", "weight", "at most", "rows", "used", "skipped"]
    rows = []
    for entry in datasets:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in entry["skipped_rows"].items())
        named = {"id": entry.get("hub_id"), "name": entry["name"], "config": entry.get("config")}
        rows.append(
            [
                _dataset_link({name: value for name, value in named.items() if value}),
                entry.get("split", ""),
                entry.get("revision", ""),
                _number(entry.get("weight")),
                _number(entry.get("max_rows")),
                _number(entry.get("rows")),
                _number(entry["used_rows"]),
                skipped,
            ]
        )
    return _without_empty(header, rows)


def _dataset_link(dataset):
    if "id" not in dataset:
        return dataset["name"]
    config = f" ({dataset['config']})" if dataset.get("config") not in (None, "default") else ""
    return f"[{dataset['id']}](https://huggingface.co/datasets/{dataset['id']}){config}"


def _curve(losses):
    """A few points of the curve of the whole loss."""
    points = losses["loss"]["curve"]
    every = -(-len(points) // MOST_CURVE_POINTS)
    # From the end, so that the last point is there.
    chosen = points[::-1][::every][::-1]
    if len(chosen) < 2:
        return ""
    return _table(["step", *(f"{step:,}" for step, _ in chosen)], [["loss", *(_loss(value) for _, value in chosen)]])


def _of_kept_model(stage):
    """The evaluation of the weights that were kept, or the last one before them."""
    evaluations = stage["evaluations"]
    if evaluations[-1]["after_training"]:
        return evaluations[-1]
    return [entry for entry in evaluations if entry["step"] <= stage["kept_step"]][-1]


def _duration(seconds):
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _loss(value):
    return "not finite" if value is None else _number(value)


def _number(value):
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _without_empty(header, rows):
    """Leave out columns in which no row says anything."""
    kept = [index for index in range(len(header)) if any(row[index] != "" for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _table(header, rows):
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


__all__ = ["evaluation_section", "hub_base_model", "hub_datasets", "read_record", "training_section"]
