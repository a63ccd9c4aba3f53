"""The study's figures: one a claim, curves, and what stage 1 fills in for hidden patches and tokens."""

import re
import statistics

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from study_data import FAMILIES
from study_results import family_scores, verdict
from study_rows import CLAIMS, MOCA, STEPS

from modeling_moca import MoCaForPreTraining
from trainers.cpt_collator import CPTCollator
from trainers.cpt_config import CPTConfig

# The same file from the same results; text as text, not as outlines.
plt.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "none"})


def draw_figures(folder, results):
    """Draw every claim and every curve of the results; return the files written, by name.

    Args:
        folder: where to.
        results: what `study_results.summarise` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for key, found in results["claims"].items():
        written[key] = _save(_claim(results, key, found), folder / f"{key}.svg")
    if all(row in results["test"] for row in STEPS):
        written["cpt_steps"] = _save(_steps(results), folder / "cpt_steps.svg")
    for setting, points in results.get("curves", {}).items():
        written[setting] = _save(_curve(results, setting, points), folder / f"curve_{setting}.svg")
    return written


def _claim(results, key, found):
    """Both rows' scores by family, a point a seed; and the difference with its interval."""
    claim, names = CLAIMS[key], [*FAMILIES, "mean"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", width_ratios=[3, 2])
    for offset, row, colour in ((-0.15, claim.better, "tab:blue"), (0.15, claim.worse, "tab:orange")):
        scores = [family_scores(by_task) for by_task in results["test"][row]]
        for place, name in enumerate(names):
            values = [seed[name] for seed in scores]
            left.plot([place + offset] * len(values), values, ".", color=colour, alpha=0.6)
            left.plot(place + offset, statistics.mean(values), "_", ms=16, color=colour, label=None if place else row)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("nDCG@5, held-out")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    for place, name in enumerate(names):
        middle, low, high = found[name]
        right.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="black", capsize=3)
    right.axvline(0, color="0.6", lw=1)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlabel("difference, 95% interval")
    figure.suptitle(f"{claim.text}: {verdict(found['mean'])}", fontsize=10)
    return figure


def _steps(results):
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for name in (*FAMILIES, "mean"):
        points = [
            (part, statistics.mean(family_scores(seed)[name] for seed in results["test"][row]))
            for row, part in STEPS.items()
        ]
        axis.plot(*zip(*points), marker="o", label=name, color="black" if name == "mean" else None)
    axis.set(xlabel="part of stage 1", ylabel="nDCG@5, held-out")
    axis.legend(fontsize=8)
    return figure


def _curve(results, setting, points):
    figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
    own = 1.0 if setting == "learning_rate" else CPTConfig.__dataclass_fields__[setting].default
    seeds = results["dev"][MOCA]
    line = sorted([(point["value"], point["score"]) for point in points] + [(own, seeds[0])])
    axis.plot(*zip(*line), marker="o")
    axis.errorbar(
        own, seeds[0], yerr=[[seeds[0] - min(seeds)], [max(seeds) - seeds[0]]], fmt="s", color="black", capsize=3
    )
    axis.set(xlabel=setting + (" (factor)" if setting == "learning_rate" else ""), ylabel="nDCG@5, dev")
    if setting == "learning_rate":
        axis.set_xscale("log", base=2)
    return figure


def filled_in(model_folder, processor, text, max_length):
    """Return a text in which every hidden token is shown with what stage 1 predicts for it, in Markdown.

    A right one stands as `**[token]**`, a wrong one as `[token → prediction]`, without the space before it.
    """
    model = MoCaForPreTraining.from_pretrained(model_folder).eval()
    batch = CPTCollator(processor, max_length=max_length, shift_labels=model.config.shift_labels)([{"text": text}])
    whole = CPTCollator(processor, max_length=max_length, mlm_ratio=0.0)([{"text": text}])
    with torch.no_grad():
        output = model(**{name: value for name, value in batch.items() if name not in ("skipped_rows", "cut_rows")})
    predictions = iter(output.mlm_logits.argmax(-1).tolist())
    chosen = batch["input_ids"][0] == processor.mask_token_id
    words = []
    for true, is_hidden in zip(whole["input_ids"][0].tolist(), chosen.tolist()):
        token = processor.tokenizer.decode([true])
        if not is_hidden:
            words.append(_plain(token))
            continue
        found = processor.tokenizer.decode([next(predictions)])
        gap = " " if token[:1].isspace() else ""
        true_text, found_text = (_plain(text.strip()) or "⏎" for text in (token, found))
        shown = f"**[{true_text}]**" if found == token else f"[{true_text} → {found_text}]"
        words.append(gap + shown)
    return "".join(words)


def _plain(text):
    """Keep characters from being taken for Markdown."""
    return re.sub(r"([\\`*_\[\]<>#~|])", r"\\\1", text)


def _save(figure, path):
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path.name
