"""What a training record says of settings, data, losses and machines, as plain values without secrets and paths."""

import math
import platform
import re
from collections import Counter
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path, PurePath

import torch
from transformers import TrainingArguments

RECORD = "training_record.json"
# Raised when the meaning of a field changes.
FORMAT = 1
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft", "trl")
MOST_POINTS = 50
# Where a run writes, whom it tells, and how it was started: nothing that shaped the model.
LEFT_OUT = {
    "accelerator_config",
    "batch_sampler",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_broadcast_buffers",
    "ddp_find_unused_parameters",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "do_eval",
    "do_train",
    "fsdp_config",
    "ignore_data_skip",
    "label_names",
    "multi_dataset_batch_sampler",
    "output_dir",
    "parallelism_config",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "remove_unused_columns",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "use_cpu",
}
LEFT_OUT_PREFIXES = ("hub_", "log_", "logging_", "push_to_hub_", "save_", "trackio_")


def public_name(text):
    """Return a name without the folders of the machine it comes from, and without what may open a door.

    Args:
        text (`str`): a name, a path, a URL, or several joined by `:`, as labels of data sets are.

    Returns:
        `str`: of absolute paths the last two parts, and of URLs neither user nor query; else as it is.
    """
    if "://" in text:
        return re.sub(r"://[^/@]*@", "://", text).split("?")[0].split("#")[0]
    parts = text.split(":")
    for index, part in enumerate(parts):
        path = PurePath(part)
        if path.is_absolute() or part.startswith("~"):
            parts[index] = "/".join(path.parts[1:][-2:])
    return ":".join(parts)


def public_values(value):
    """Return plain values with every text in them, keys too, as [`public_name`] has it.

    Args:
        value: dictionaries, lists, texts, numbers, booleans and None; anything else becomes a text.
    """
    if isinstance(value, dict):
        return {public_name(str(name)): public_values(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_values(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else public_name(str(value))


def describe_arguments(args):
    """Return the settings that shaped a run.

    Args:
        args ([`~transformers.TrainingArguments`]): settings.

    Returns:
        `dict`: what differs from the defaults of [`~transformers.TrainingArguments`], and what is set of settings that
        it does not have. Tokens, paths, and where the run wrote and reported to are left out.
    """
    stock = {}
    for field in fields(TrainingArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        stock[field.name] = getattr(default, "value", default)
    described = {}
    for name, value in args.to_dict().items():
        if "token" in name.split("_") or name in LEFT_OUT or name.startswith(LEFT_OUT_PREFIXES):
            continue
        if name in stock:
            is_default = value == stock[name] or (_is_unset(value) and _is_unset(stock[name]))
        else:
            is_default = value in (None, [], {})
        if not is_default:
            described[name] = public_values(value)
    return described


def describe_source(source, num_rows=None):
    """Return one data set of a mixture.

    Args:
        source ([`trainers.row_sources.RowSource`]): the data set.
        num_rows (`int`, *optional*): rows of it that the run draws from, at most `max_rows`; None for streams.

    Returns:
        `dict`: `name`; `hub_id` of what is on the Hub; `files`, `config`, `split`, `revision`, `weight`, `max_rows`,
        `rows` and, in stage 2, `kind`, instructions and number of hard negatives, where they are set.
    """
    files = source.data_files
    is_format = files is not None and "/" not in source.path
    is_given = getattr(source, "trusts_paths", False)
    hub_id = None
    if isinstance(files, str) and files.startswith("hf://datasets/"):
        hub_id = "/".join(files.removeprefix("hf://datasets/").split("/")[:2]).split("@")[0]
    elif not (is_format or is_given or PurePath(source.path).is_absolute() or Path(source.path).expanduser().exists()):
        hub_id = source.path
    entry = {
        "name": public_name(getattr(source, "task", None) or source.label),
        "hub_id": hub_id,
        "files": files and public_values(files),
        "config": source.name,
        "split": None if is_given else source.split,
        "revision": source.revision,
        "weight": source.weight,
        "max_rows": source.max_rows,
        "rows": num_rows,
    }
    for name in ("kind", "query_instruction", "document_instruction", "num_negatives"):
        entry[name] = getattr(source, name, None)
    return {name: value for name, value in entry.items() if value is not None}


def describe_losses(history):
    """Return what became of every training loss.

    Args:
        history (`list[dict]`): what was logged, with the step of each entry.

    Returns:
        `dict`: by name of the loss `first` and `final`, as they were logged; `smoothed`, the mean over the last tenth
        of the logs; and `curve`, at most 50 `[step, loss]`, each the mean of a stretch that ends there. A loss that was
        not finite is None.
    """
    points = {}
    for entry in history:
        # Elsewhere stand results of dev sets and the summary of the run.
        if "loss" in entry:
            for name, value in entry.items():
                if name == "loss" or name.endswith("_loss") or name.startswith("loss_"):
                    points.setdefault(name, []).append((entry["step"], value))
    losses = {}
    for name, values in points.items():
        size = math.ceil(len(values) / MOST_POINTS)
        stretches = [values[start : start + size] for start in range(0, len(values), size)]
        losses[name] = {
            "first": _mean(values[:1]),
            "final": _mean(values[-1:]),
            "smoothed": _mean(values[-math.ceil(len(values) / 10) :]),
            "curve": [[stretch[-1][0], _mean(stretch)] for stretch in stretches],
        }
    return losses


def describe_evaluations(history):
    """Return the results on dev sets that were logged in a run.

    Args:
        history (`list[dict]`): what was logged, with the step of each entry.

    Returns:
        `list[dict]`: in their order, with `step`, `after_training` (of the model that was kept, not of the last step)
        and `metrics`, by name without `eval_`.
    """
    evaluations, is_over = [], False
    for entry in history:
        is_over = is_over or "train_runtime" in entry
        metrics = {
            name.removeprefix("eval_"): public_values(value)
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
        }
        if not metrics:
            continue
        last = evaluations[-1] if evaluations else None
        is_same = last and (last["step"], last["after_training"]) == (entry["step"], is_over)
        if is_same and not set(metrics) & set(last["metrics"]):
            last["metrics"] |= metrics
        else:
            evaluations.append({"step": entry["step"], "after_training": is_over, "metrics": metrics})
    return evaluations


def describe_model(model):
    """Return what is trained, and what it started from.

    Args:
        model ([`MoCaForPreTraining`] or [`MoCaModel`]): before ranks share its weights; with adapters or without.

    Returns:
        `dict`: `start`, the name of the checkpoint, with `start_commit` if it came from the Hub; `num_parameters`,
        `num_trained_parameters` and `dtype`, but not of quantised weights; `bidirectional`; `adapters`.
    """
    config = model.config
    start = config if config._name_or_path else config.backbone_config
    # ZeRO-3 has taken the weights away already.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    entry = {
        # On the Hub a name has two parts; a folder has its own.
        "start": _start_name(start),
        "start_commit": getattr(start, "_commit_hash", None),
        "bidirectional": config.bidirectional,
    }
    if not getattr(model, "is_quantized", False):
        entry["num_parameters"] = sum(size for size, _ in sizes)
        entry["num_trained_parameters"] = sum(size for size, is_trained in sizes if is_trained)
        entry["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    adapters = getattr(model, "peft_config", None)
    if adapters:
        (settings,) = adapters.values()
        names = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
        entry["adapters"] = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return {name: value for name, value in entry.items() if value is not None}


def device_name(device):
    """Return the name of a device.

    Args:
        device (`torch.device`): where a rank computes.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})" if device.type == "cpu" else device.type


def describe_environment(devices, accelerator):
    """Return where a run computes, and with what.

    Args:
        devices (`list[str]`): name of every rank's device.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.

    Returns:
        `dict`: `devices` (how many by name), `num_processes`, `distributed`, `mixed_precision` and `versions`.
    """
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "devices": dict(Counter(devices)),
        "num_processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **installed},
    }


def _is_unset(value):
    # Some defaults are None, and the settings make them False. 0 is a number.
    return value is None or value is False or value in ([], {})


def _start_name(config):
    name = str(config._name_or_path)
    if getattr(config, "_commit_hash", None) is None and name:
        return Path(name).name
    return name or None


def _mean(points):
    mean = sum(value for _, value in points) / len(points)
    return round(mean, 6) if math.isfinite(mean) else None


__all__ = [
    "FORMAT",
    "RECORD",
    "describe_arguments",
    "describe_environment",
    "describe_evaluations",
    "describe_losses",
    "describe_model",
    "describe_source",
    "device_name",
    "public_name",
    "public_values",
]
