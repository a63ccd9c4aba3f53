"""MMEB: Precision@1 of an embedding model on the benchmark's 36 tasks, from the Hub or from a local folder."""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch

from .mining_embeddings import model_fingerprint, processor_of
from .mmeb_config import MMEBConfig
from .mmeb_rows import ImageFiles, TaskRows, as_model_input, as_plain_text, read_task, split_text
from .mmeb_tasks import AVERAGES, TASK_TYPES, TASKS, as_csv, as_markdown, mmeb_averages

logger = logging.getLogger(__name__)

# Cosines of equal vectors differ by less when summed in another order in float64, those of others hardly ever.
_TIE = 1e-12
_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets")


class MMEBEvaluator:
    """Score a model as the benchmark does (paper section 4.1; arXiv 2410.05160).

    Each query has candidates of its own, of which the first is right. A query counts where the cosine of the right one
    is strictly above that of every other different candidate: a tie is wrong, and so is a query with a score that is no
    number anywhere in its pool. A candidate equal to the right one (same text, same image path) is not another one, as
    in the benchmark's own code, where the first of equal ones wins.

    Different inputs, pairs of text and image path, are encoded once a task, whether as queries or candidates. The
    instructions are part of the published texts: prompts that the model has are not added.

    Args:
        config ([`trainers.mmeb_config.MMEBConfig`]): what to do.
        model: a `SentenceTransformer`, such as [`trainers.mining_embeddings.load_encoder`] makes of the configuration.

    Raises:
        ValueError: `output_dir` holds results of another model or other settings.

    Example:
        >>> config = MMEBConfig("org/moca-3b", image_folder="images.zip", tasks=["ChartQA"], output_dir="mmeb")
        >>> MMEBEvaluator(config, load_encoder(config)).evaluate()
        {'ChartQA': {'p_at_1': 0.5, 'num_queries': 1000, ...}}
    """

    def __init__(self, config: MMEBConfig, model: Any) -> None:
        self.config, self.model = config, model
        self._folder = Path(config.output_dir)
        self._images = ImageFiles(config.image_folder)
        self._revision = None
        if not Path(config.dataset_path).is_dir():
            info = huggingface_hub.HfApi().dataset_info(config.dataset_path, revision=config.dataset_revision)
            self._revision = info.sha
        self._check_settings()

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Run the tasks that are not finished, and write all tables.

        Returns:
            For each finished task of the folder `p_at_1`, `num_queries`, and what else was counted.

        Raises:
            ValueError: a row or an image cannot be used; the message names it. No row is left out: a score over other
                rows than the benchmark's would be another score.
        """
        for number, name in enumerate(self.config.tasks):
            if self._finished(name) is not None:
                logger.info("%s is finished: not run again", name)
                continue
            logger.info("%s (%d of %d)", name, number + 1, len(self.config.tasks))
            self._run(name)
        results = {name: found for name in TASKS if (found := self._finished(name)) is not None}
        averages = mmeb_averages({name: result["p_at_1"] for name, result in results.items()})
        if averages["overall"][0] is not None:
            scores = {f"p_at_1_{name.lower()}": averages[name][0] for name in AVERAGES[:-1]}
            self._write_result("MMEB", None, "multimodal-retrieval", {"p_at_1": averages["overall"][0], **scores})
        else:
            logger.warning("No overall average: %d of %d tasks are missing.", averages["overall"][1], len(TASKS))
        _write(self._folder / "summary.csv", as_csv(results))
        _write(self._folder / "summary.md", as_markdown(self.config.model_id, results))
        return results

    def _check_settings(self):
        config = self.config
        settings = {
            "model": model_fingerprint(self.model),
            "model_id": config.model_id,
            "dataset": config.dataset_path if self._revision else str(Path(config.dataset_path).resolve()),
            "revision": self._revision,
            "split": "test",
            "strip_text": config.strip_text,
            "attn_implementation": config.attn_implementation,
        }
        path = self._folder / "settings.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key, value in settings.items() if found.get(key) != value]
            if changed:
                told = ", ".join(f"{key} was {found.get(key)!r} and is {settings[key]!r}" for key in changed)
                raise ValueError(
                    f"{self._folder} holds results of other settings: {told}. Give another output_dir, or remove it."
                )
        elif any((self._folder / "results").glob("*.json")):
            raise ValueError(f"{self._folder} holds results, but no {path.name}: give another output_dir.")
        else:
            _write(path, json.dumps(settings, indent=2))

    def _finished(self, name):
        """Return what a finished task's files say; None if one is missing or not whole."""
        try:
            counts = json.loads((self._folder / "counts" / f"{name}.json").read_text(encoding="utf-8"))
            result = json.loads((self._folder / "results" / f"{name}.json").read_text(encoding="utf-8"))
            return {"p_at_1": result["metrics"]["p_at_1"], **counts}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("The result of %s is not whole (%s): it is made again.", name, error)
            return None

    def _run(self, name):
        start = time.monotonic()
        rows = read_task(self.config.dataset_path, name, revision=self._revision)
        embeddings, counts = self._encode(rows)
        num_right, num_ties, num_not_finite = count_right(embeddings, rows.queries, rows.targets)
        if num_ties or num_not_finite:
            logger.warning(
                "%s: %d queries tie, %d have a score that is no number; all count as wrong.",
                name,
                num_ties,
                num_not_finite,
            )
        counts = {
            "num_queries": len(rows.queries),
            "num_right": num_right,
            "num_ties": num_ties,
            "num_not_finite": num_not_finite,
            "num_candidates": sum(map(len, rows.targets)),
            **counts,
            "seconds": round(time.monotonic() - start, 3),
        }
        _write(self._folder / "counts" / f"{name}.json", json.dumps(counts, indent=2))
        self._write_result(name, name, TASK_TYPES[TASKS[name][0]], {"p_at_1": num_right / len(rows.queries)})

    def _write_result(self, name, dataset_config, task_type, metrics):
        dataset = {"name": "MMEB" if dataset_config is None else f"MMEB {name}", "split": "test"}
        if dataset_config is not None:
            dataset["config"] = dataset_config
        if self._revision:
            dataset |= {"id": self.config.dataset_path, "revision": self._revision}
        result = {
            # What hub_cards.results reads.
            "format": "moca-evaluation",
            "task": dataset["name"],
            "task_type": task_type,
            "dataset": dataset,
            "metrics": metrics,
            "model": self.config.model_id,
            "versions": {package: version(package) for package in _PACKAGES},
            "date": datetime.date.today().isoformat(),
        }
        _write(self._folder / "results" / f"{name}.json", json.dumps(result, indent=2))

    def _encode(self, rows: TaskRows):
        """Return unnormalised embeddings of a task's inputs, float32 of shape [N, d], and what was counted."""
        texts = [split_text(*pair, strip=self.config.strip_text) for pair in rows.inputs]
        lengths, num_cut, num_cut_tokens = self._count_tokens(rows, texts)
        max_tokens = None if processor_of(self.model) is None else self.config.max_tokens
        batches = plan_batches(lengths, self.config.batch_size, max_tokens)
        embeddings = None
        for number, batch in enumerate(batches):
            inputs = []
            for index in batch:
                path = rows.inputs[index][1]
                image = self._images.decode(path, rows.places[index]) if path else None
                inputs.append(as_model_input(*texts[index], image))
            encoded = self.model.encode(
                inputs,
                # The model's own prompts stay out.
                prompt="",
                batch_size=len(inputs),
                show_progress_bar=False,
                convert_to_numpy=False,
                convert_to_tensor=True,
            )
            if embeddings is None:
                embeddings = torch.empty(len(rows.inputs), encoded.shape[1])
            embeddings[torch.tensor(batch)] = encoded.float().cpu()
            if number % max(len(batches) // 10, 1) == 0:
                logger.info("batch %d of %d", number + 1, len(batches))
        counts = {
            "num_inputs": len(rows.inputs),
            "num_images": sum(bool(path) for _, path in rows.inputs),
            "num_cut_inputs": num_cut,
            "num_cut_tokens": num_cut_tokens,
            "num_batches": len(batches),
        }
        return embeddings, counts

    def _count_tokens(self, rows, texts):
        """Return the inputs' lengths, from the headers of images alone, how many inputs are cut, and tokens of them."""
        processor = processor_of(self.model)
        if processor is None:
            # Another model does not tell: texts of like length at least stand together.
            return [len(before) + len(behind) for before, behind in texts], None, None
        limit = min(processor.max_length, processor.tokenizer.model_max_length)
        lengths, cut = [], []
        for (_, path), place, around in zip(rows.inputs, rows.places, texts):
            sizes = [self._images.open(path, place)[1]] if path else []
            try:
                ids, num_cut = processor.row_ids(as_plain_text(*around, bool(path)), sizes, limit)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            lengths.append(len(ids))
            cut.append(num_cut)
        return lengths, sum(number > 0 for number in cut), sum(cut)


def plan_batches(lengths: list[int], batch_size: int, max_tokens: int | None) -> list[list[int]]:
    """Cut inputs into batches of like length, the longest first, so that the largest batch comes at once.

    Args:
        lengths: tokens of each input.
        batch_size: most inputs of a batch.
        max_tokens: most tokens of a batch, padding included; a longer input stands alone. None for no limit.

    Returns:
        Positions of the inputs of each batch; every input stands in one.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        batch = batches[-1] if batches else []
        too_large = bool(batch) and max_tokens is not None and (len(batch) + 1) * lengths[batch[0]] > max_tokens
        if not batch or len(batch) == batch_size or too_large:
            batches.append([index])
        else:
            batch.append(index)
    return batches


def count_right(embeddings: torch.Tensor, queries: np.ndarray, targets: list[np.ndarray]) -> tuple[int, int, int]:
    """Count the queries whose right candidate is strictly more similar than every other different one.

    Args:
        embeddings: of the different inputs, of shape [N, d]; need not be normalised.
        queries: the input of each query, of shape [Q].
        targets: the inputs of each query's candidates, the right one first.

    Returns:
        How many are right; how many are not because of a tie; how many because of a score that is no finite number.
    """
    num_right = num_ties = num_not_finite = 0
    for query, candidates in zip(queries.tolist(), targets):
        pool = embeddings[torch.from_numpy(candidates).long()].double()  # [C, d]
        vector = embeddings[query].double()  # [d]
        scores = (pool @ vector) / (pool.norm(dim=-1) * vector.norm())  # [C], NaN where a vector is zero
        if not scores.isfinite().all():
            num_not_finite += 1
            continue
        others = scores[torch.from_numpy(candidates != candidates[0])]
        margin = float(scores[0] - others.max()) if len(others) else float("inf")
        num_right += margin > _TIE
        num_ties += abs(margin) <= _TIE
    return num_right, num_ties, num_not_finite


def _write(path, text):
    """Write a file that is whole as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


__all__ = ["MMEBEvaluator", "count_right", "plan_batches"]
