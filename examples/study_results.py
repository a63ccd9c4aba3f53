"""From the study's raw results to the ones that are kept: means, spreads, paired bootstraps, and tables in Markdown."""

import statistics

import numpy as np
from study_data import FAMILIES, TASKS
from study_rows import CLAIMS, MOCA
from study_runs import METRICS, family_mean

from trainers.evaluation import chance_level

NUM_DRAWS = 10_000
HEADLINE = "nDCG@5"
SEEN, OPPOSITE, NOISE = "seen", "the opposite", "within noise"


def summarise(raw, settings, num_candidates):
    """Return what `results.json` holds: every query's metrics become means by task, and bootstraps.

    Args:
        raw: what `Study.run_table` returns.
        settings: scale and fingerprint of the data.
        num_candidates: of the held-out tasks.
    """
    test = raw["test"]
    means = {
        name: [
            {task: {metric: statistics.mean(found[task][metric]) for metric in METRICS} for task in TASKS}
            for found in seeds
        ]
        for name, seeds in test.items()
    }
    differences = {name: paired_bootstrap(test[name], test[MOCA]) for name in test if MOCA in test and name != MOCA}
    claims = {
        key: paired_bootstrap(test[claim.better], test[claim.worse])
        for key, claim in CLAIMS.items()
        if claim.better in test and claim.worse in test
    }
    kept = {name: value for name, value in raw.items() if name != "test"}
    return {
        "settings": settings,
        "num_candidates": num_candidates,
        "num_queries": {task: len(next(iter(test.values()))[0][task][HEADLINE]) for task in TASKS},
        **kept,
        "test": means,
        "differences_to_moca": differences,
        "claims": claims,
    }


def paired_bootstrap(first, second, num_draws=NUM_DRAWS, seed=0):
    """Return by how much the first row's nDCG@5 is larger, with 95% intervals, by family and over all.

    A draw takes as many seeds, and of each task as many queries, as there are, with replacement, the same ones for both
    rows, so that what makes a query hard for both does not count.

    Args:
        first, second: a list over seeds of {task: {metric: values of all queries}}; equal seeds, equal queries.
        num_draws: how many draws.
        seed: of the draws.

    Returns:
        `dict`: for each family and "mean" the difference, and the ends of the interval, `[difference, low, high]`.
    """
    generator = np.random.default_rng(seed)
    num_seeds = len(first)
    seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, num_draws) / num_seeds  # [D, S]
    observed, drawn = {}, {}
    for task in TASKS:
        values = np.array(
            [
                [a - b for a, b in zip(one[task][HEADLINE], other[task][HEADLINE], strict=True)]
                for one, other in zip(first, second, strict=True)
            ]
        )  # [S, Q]
        num_queries = values.shape[1]
        queries = generator.multinomial(num_queries, [1 / num_queries] * num_queries, num_draws) / num_queries  # [D, Q]
        observed[task] = values.mean()
        drawn[task] = ((seeds @ values) * queries).sum(1)  # [D]
    draws = {family: np.mean([drawn[task] for task in tasks], axis=0) for family, tasks in FAMILIES.items()}
    means = {family: statistics.mean(observed[task] for task in tasks) for family, tasks in FAMILIES.items()}
    draws["mean"], means["mean"] = np.mean(list(draws.values()), axis=0), family_mean(observed)
    return {
        name: [float(means[name]), *(float(end) for end in np.quantile(draws[name], (0.025, 0.975)))] for name in draws
    }


def verdict(interval):
    """Return whether a claim was seen: its 95% interval lies above 0, below 0 (the opposite), or holds it (noise)."""
    _, low, high = interval
    return SEEN if low > 0 else OPPOSITE if high < 0 else NOISE


def family_scores(by_task, metric=HEADLINE):
    """Return a seed's scores by family and over all.

    Args:
        by_task: {task: {metric: value}}.
        metric: which one.
    """
    scores = {name: statistics.mean(by_task[task][metric] for task in tasks) for name, tasks in FAMILIES.items()}
    return {**scores, "mean": statistics.mean(scores.values())}


def render(results):
    """Return the tables of the study's page as Markdown, by name."""
    return {
        "held-out": _held_out(results),
        "claims": _claims(results),
        "tasks": _tasks(results),
        "learning-rates": _learning_rates(results),
        "cpt": _cpt(results),
        "tokens": _num_tokens(results),
        **({"curves": _curves(results)} if "curves" in results else {}),
    }


def _held_out(results):
    names = [*FAMILIES, "mean"]
    lines = [_line("nDCG@5", *names, "P@1", "mean against MoCa, 95% interval"), _rule(len(names) + 3)]
    chance = {task: chance_level(number) for task, number in results["num_candidates"].items()}
    lines.append(
        _line(
            "chance",
            *(f"{value:.3f}" for value in family_scores(chance).values()),
            f"{family_scores(chance, 'P@1')['mean']:.3f}",
            "",
        )
    )
    for row, seeds in results["test"].items():
        scores = [family_scores(by_task) for by_task in seeds]
        cells = [_spread([seed[name] for seed in scores]) for name in names]
        hits = _spread([family_scores(by_task, "P@1")["mean"] for by_task in seeds])
        difference = results["differences_to_moca"].get(row)
        lines.append(_line(row, *cells, hits, "" if difference is None else _interval(difference["mean"])))
    return "\n".join(lines)


def _claims(results):
    lines = [_line("claim", "paper", *FAMILIES, "mean", "here"), _rule(len(FAMILIES) + 4)]
    for key, found in results["claims"].items():
        cells = [_interval(found[name]) for name in (*FAMILIES, "mean")]
        lines.append(_line(CLAIMS[key].text, CLAIMS[key].paper, *cells, verdict(found["mean"])))
    return "\n".join(lines)


def _tasks(results):
    lines = [_line("nDCG@5 / P@1", *TASKS), _rule(len(TASKS) + 1)]
    lines.append(
        _line(
            "queries, candidates",
            *(f"{results['num_queries'][task]}, {results['num_candidates'][task]}" for task in TASKS),
        )
    )
    chance = {task: chance_level(results["num_candidates"][task]) for task in TASKS}
    lines.append(_line("chance", *(f"{chance[task]['nDCG@5']:.3f} / {chance[task]['P@1']:.3f}" for task in TASKS)))
    for row, seeds in results["test"].items():
        cells = [
            " / ".join(f"{statistics.mean(seed[task][metric] for seed in seeds):.3f}" for metric in ("nDCG@5", "P@1"))
            for task in TASKS
        ]
        lines.append(_line(row, *cells))
    return "\n".join(lines)


def _learning_rates(results):
    lines = [_line("row", "trials: learning rate of CPT, of CL: dev nDCG@5", "chosen"), _rule(3)]
    for row, trials in results["trials"].items():
        cells = [f"{_rates(trial['learning_rates'])}: {trial['score']:.3f}" for trial in trials]
        lines.append(_line(row, "; ".join(cells), _rates(results["chosen"][row])))
    return "\n".join(lines)


def _cpt(results):
    lines = [_line("stage 1", "held-out MLM loss", "held-out MAE loss"), _rule(3)]
    for name, run in results["cpt"].items():
        losses = run.get("held_out", {})
        lines.append(_line(name, *(f"{losses[key]:.3f}" if key in losses else "" for key in ("mlm_loss", "mae_loss"))))
    return "\n".join(lines)


def _num_tokens(results):
    lines = [_line("row", "tokens of stage 1", "tokens of stage 2"), _rule(3)]
    for row, found in results["num_tokens"].items():
        lines.append(_line(row, *(f"{statistics.mean(found[stage]):,.0f}" for stage in ("cpt", "cl"))))
    return "\n".join(lines)


def _curves(results):
    first = results["dev"][MOCA][0]
    lines = [_line("setting of stage 1", "dev nDCG@5, by value"), _rule(2)]
    for setting, points in results["curves"].items():
        cells = [f"{point['value']:g}: {point['score']:.3f}" for point in points]
        lines.append(_line(f"`{setting}`" + (" (factor)" if setting == "learning_rate" else ""), "; ".join(cells)))
    spread = statistics.stdev(results["dev"][MOCA]) if len(results["dev"][MOCA]) > 1 else float("nan")
    lines.append(_line("as in the table", f"{first:.3f} (standard deviation of its seeds {spread:.3f})"))
    return "\n".join(lines)


def _rates(rates):
    return ", ".join("-" if rate is None else f"{rate:g}" for rate in rates)


def _spread(values):
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def _interval(values):
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*values)


def _line(*cells):
    return "| " + " | ".join(cells) + " |"


def _rule(number):
    return "|" + "---|" * number
