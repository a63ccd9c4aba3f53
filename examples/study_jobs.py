"""The study's jobs: in which order they run, several at a time, each once."""

import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import study_runs
from study_data import fingerprint
from study_rows import CURVES, MOCA, PRETRAININGS, ROWS
from study_scales import settings_of

logger = logging.getLogger("study")


@dataclass(frozen=True)
class Job:
    """A function of `study_runs` with its arguments, and the folder that it writes to."""

    name: str
    function: str
    arguments: dict


def run_job(job, output, data, scale):
    """Run a job in this process, and keep what it returns in `result.json`, which is there whole or not at all."""
    folder = Path(output) / job.name
    folder.mkdir(parents=True, exist_ok=True)
    result = getattr(study_runs, job.function)(folder, data, scale, **job.arguments)
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result))
    os.replace(partial, folder / "result.json")


class Study:
    """Jobs with their results in a folder.

    Args:
        output: the folder.
        data: the data's folder.
        scale: sizes and budgets.
        rows: of the table, by name.
        curves: settings of stage 1, by name.

    Raises:
        ValueError: the folder holds results of other settings, or of other data.
    """

    def __init__(self, output, data, scale, rows=ROWS, curves=CURVES):
        self.output, self.data, self.scale = Path(output), str(data), scale
        self.rows, self.curves = rows, curves
        self.output.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({"scale": settings_of(scale), "data": fingerprint(data)}))
        path = self.output / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise ValueError(
                f"{self.output} holds results of other settings or other data ({path}): name another folder."
            )
        path.write_text(json.dumps(settings, indent=1))

    def result(self, name):
        """Return what a job returned, or None if it has not ended."""
        path = self.output / name / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, jobs, part="table"):
        """Run those of the jobs that have no result yet, some at a time, and return all results by name.

        Args:
            jobs: one may stand there twice.
            part: whose time it counts to, "table" or "curves".
        """
        todo = {job.name: job for job in jobs if self.result(job.name) is None}
        start = time.perf_counter()
        if todo:
            logger.info("%d of %d jobs to run", len(todo), len({job.name for job in jobs}))
        if self.scale.num_processes == 1 or len(todo) == 1:
            study_runs.begin_process(self.scale)
            for job in todo.values():
                run_job(job, self.output, self.data, self.scale)
                logger.info("%s (%.0f s)", job.name, time.perf_counter() - start)
        elif todo:
            # Fresh processes: each has its own number of threads.
            with ProcessPoolExecutor(
                self.scale.num_processes,
                multiprocessing.get_context("spawn"),
                study_runs.begin_process,
                (self.scale,),
            ) as pool:
                jobs_of = {pool.submit(run_job, job, self.output, self.data, self.scale): job for job in todo.values()}
                try:
                    for future in as_completed(jobs_of):
                        future.result()
                        logger.info("%s (%.0f s)", jobs_of[future].name, time.perf_counter() - start)
                except BaseException:
                    # Else the error is seen when all the others have run.
                    pool.shutdown(cancel_futures=True)
                    raise
        self._add_seconds(part, time.perf_counter() - start)
        return {job.name: self.result(job.name) for job in jobs}

    def trials(self, row):
        """Return the learning rates of stage 1 and stage 2 to try for a row: equally many for every row."""
        scale = self.scale
        if row.pretraining is None:
            return [(None, rate) for rate in scale.wide_learning_rates]
        return [(first, second) for first in scale.cpt_learning_rates for second in scale.cl_learning_rates]

    def pretraining(self, kind, learning_rate, seed, settings=None, suffix=""):
        """Return the job of stage 1."""
        return Job(
            f"cpt/{_slug(kind)}{suffix}-{learning_rate:g}-seed{seed}",
            "pretrain",
            {
                "backbone": str(self.output / "backbone"),
                "settings": PRETRAININGS[kind] if settings is None else settings,
                "learning_rate": learning_rate,
                "seed": seed,
            },
        )

    def tuning(self, name, rates, seed):
        """Return the job of stage 2 for a row of the table."""
        row = self.rows[name]
        if row.pretraining is None:
            start = self.output / "backbone" / ("bidirectional" if row.bidirectional else "causal")
        else:
            start = self.output / self.pretraining(row.pretraining, rates[0], seed).name / row.part
        label = "-".join(f"{rate:g}" for rate in rates if rate is not None)
        return Job(f"cl/{_slug(name)}-{label}-seed{seed}", "fine_tune", self._tuning(row, start, rates[1], seed))

    def run_table(self):
        """Choose learning rates on the dev rows, run every seed with them, and search the held-out rows once."""
        first = self.scale.seeds[0]
        self.run([Job("backbone", "make_backbone", {})])
        kinds = {row.pretraining for row in self.rows.values()} - {None}
        self.run(
            [
                self.pretraining(kind, rate, first)
                for kind in PRETRAININGS
                if kind in kinds
                for rate in self.scale.cpt_learning_rates
            ]
        )
        trials = {
            name: {rates: self.tuning(name, rates, first) for rates in self.trials(row)}
            for name, row in self.rows.items()
        }
        results = self.run([job for jobs in trials.values() for job in jobs.values()])
        scores = {
            name: {rates: results[job.name]["score"] for rates, job in jobs.items()} for name, jobs in trials.items()
        }
        chosen = {name: max(of_row, key=of_row.get) for name, of_row in scores.items()}
        self.run(self._pretrainings(chosen))
        runs = {name: [self.tuning(name, chosen[name], seed) for seed in self.scale.seeds] for name in self.rows}
        self.run([job for jobs in runs.values() for job in jobs])
        held_out = {
            name: [
                Job(
                    job.name.replace("cl/", "test/"),
                    "search_held_out",
                    {"model": str(self.output / job.name / "model")},
                )
                for job in jobs
            ]
            for name, jobs in runs.items()
        }
        self.run([job for jobs in held_out.values() for job in jobs])
        return {
            "trials": {
                name: [{"learning_rates": list(rates), "score": score} for rates, score in of_row.items()]
                for name, of_row in scores.items()
            },
            "chosen": {name: list(rates) for name, rates in chosen.items()},
            "dev": {name: [self.result(job.name)["score"] for job in jobs] for name, jobs in runs.items()},
            "test": {name: [self.result(job.name)["test"] for job in jobs] for name, jobs in held_out.items()},
            "num_tokens": {name: self._num_tokens(name, jobs) for name, jobs in runs.items()},
            "backbone": self.result("backbone"),
            "cpt": {job.name: self.result(job.name) for job in self._pretrainings(chosen)},
        }

    def run_curves(self, chosen):
        """Run MoCa with other settings of stage 1 and the learning rates that the table chose; dev rows only."""
        cpt_rate, cl_rate = chosen[MOCA]
        first, curves = self.scale.seeds[0], {}
        for setting, values in self.curves.items():
            curves[setting] = {}
            for value in values:
                settings = {} if setting == "learning_rate" else {setting: value}
                rate = cpt_rate * value if setting == "learning_rate" else cpt_rate
                curves[setting][value] = self.pretraining("moca", rate, first, settings, f"-{setting}-{value:g}")
        self.run([job for jobs in curves.values() for job in jobs.values()], "curves")
        tuned = {
            setting: {
                value: Job(
                    job.name.replace("cpt/", "cl/"),
                    "fine_tune",
                    self._tuning(self.rows[MOCA], self.output / job.name / "last", cl_rate, first),
                )
                for value, job in jobs.items()
            }
            for setting, jobs in curves.items()
        }
        results = self.run([job for jobs in tuned.values() for job in jobs.values()], "curves")
        return {
            setting: [{"value": value, "score": results[job.name]["score"]} for value, job in jobs.items()]
            for setting, jobs in tuned.items()
        }

    def _pretrainings(self, chosen):
        """Return the jobs of stage 1 that the table rests on, each once."""
        jobs = [
            self.pretraining(row.pretraining, chosen[name][0], seed)
            for name, row in self.rows.items()
            if row.pretraining is not None
            for seed in self.scale.seeds
        ]
        return list({job.name: job for job in jobs}.values())

    def _num_tokens(self, name, jobs):
        """Return the tokens that a row has seen in stage 1 and in stage 2, a number a seed."""
        row = self.rows[name]
        first = [0] * len(jobs)
        if row.pretraining is not None:
            part = 1 if row.part == "last" else Fraction(row.part.replace("-", "/"))
            starts = [job.arguments["start_model"] for job in jobs]
            names = [str(Path(start).parent.relative_to(self.output)) for start in starts]
            first = [round(self.result(name)["num_tokens"] * part) for name in names]
        return {"cpt": first, "cl": [self.result(job.name)["num_tokens"] for job in jobs]}

    def _tuning(self, row, start, learning_rate, seed):
        return {
            "start_model": str(start),
            "leave_out": list(row.leave_out),
            "task_batches": row.task_batches,
            "learning_rate": learning_rate,
            "seed": seed,
        }

    @property
    def seconds(self):
        """How long the table and the curves have taken, over all starts."""
        path = self.output / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {"table": 0.0, "curves": 0.0}

    def _add_seconds(self, part, seconds):
        total = self.seconds
        total[part] += seconds
        (self.output / "seconds.json").write_text(json.dumps(total))


def _slug(name):
    return "".join(letter if letter.isalnum() else "_" for letter in name)
