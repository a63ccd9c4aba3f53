"""The whole of MoCa in one command, on two CPU cores, without a network.

    python examples/quickstart.py                # or: make demo
    python examples/quickstart.py --seeds 3      # mean and spread over three seeds
    python examples/quickstart.py --tune         # how the learning rates below were chosen, on the dev rows

A small causal vision-language model (`examples/demo_backbone`) is pre-trained in both directions on unlabelled pages
and digits (stage 1), fine-tuned on a few labelled pairs (stage 2), exported, loaded again in a fresh process, and
compared on held-out rows with what the same pairs make of it without stage 1. Everything lands in `demo_output/`;
open `demo_output/report.html`.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from demo_data import pair_rows, pretraining_rows
from demo_report import write_report
from demo_search import as_input, search
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hub_cards.export import export
from modeling_moca import MoCaForPreTraining, MoCaModel, MoCaProcessor
from trainers.contrastive_config import ContrastiveConfig
from trainers.contrastive_trainer import ContrastiveTrainer, build_sentence_transformer
from trainers.cpt_config import CPTConfig
from trainers.cpt_trainer import CPTTrainer
from trainers.evaluation import chance_level

logger = logging.getLogger("quickstart")

EXAMPLES = Path(__file__).resolve().parent
BACKBONE = EXAMPLES / "demo_backbone"
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}  # the demo's images keep their size
UNTOUCHED, CAUSAL, BIDIRECTIONAL, MOCA = "untouched backbone", "causal + CL", "bidirectional + CL", "MoCa: CPT + CL"
# Chosen on the dev rows, each row of the table for itself, from the grid that --tune runs.
LEARNING_RATES = {CAUSAL: 4e-4, BIDIRECTIONAL: 4e-4, MOCA: 4e-4}
TUNE_GRID = (1e-4, 2e-4, 4e-4)


def training_settings(folder, seed):
    """Return the settings that both stages share: CPU, float32, a progress bar, no reports to anywhere."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "dataloader_num_workers": 0,
    }


def make_processor():
    """Return the backbone's processor, with the mask token added."""
    return MoCaProcessor.from_backbone(BACKBONE, max_length=256, **PIXELS)


def save_start(folder, processor, bidirectional):
    """Write the untouched backbone as a MoCa model, causal or bidirectional, and return the folder."""
    model = MoCaModel.from_backbone(
        BACKBONE, bidirectional=bidirectional, mask_token_id=processor.mask_token_id, dtype=torch.float32
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def unlabelled_rows(split, seed, draws=1):
    """Return interleaved rows as a data set: `text` with placeholders, and `images` as encoded bytes."""
    features = Features({"text": Value("string"), "images": List(Value("binary"))})
    rows = [row for draw in range(draws) for row in pretraining_rows(split, draws * seed + draw)]
    return Dataset.from_list(rows, features=features)


def labelled_pairs(split, seed):
    """Return a data set a task, with columns `query` and `positive`, each text or image."""
    tasks = {}
    for task, rows in pair_rows(split, seed).items():
        columns = {side: [as_input(row[side]) for row in rows] for side in ("query", "positive")}
        kinds = {side: Value("string") if isinstance(values[0], str) else Image() for side, values in columns.items()}
        tasks[task] = Dataset.from_dict(columns, features=Features(kinds))
    return tasks


def continual_pretraining(folder, processor, seed, args):
    """Stage 1: masked language modelling and masked autoencoding on unlabelled interleaved rows.

    Returns:
        `tuple`: the folder written, and the log history.
    """
    set_seed(seed)
    model = MoCaForPreTraining.from_backbone(BACKBONE, mask_token_id=processor.mask_token_id, dtype=torch.float32)
    rows, held_out = unlabelled_rows("cpt", seed, args.cpt_draws), unlabelled_rows("dev", 0).select(range(64))
    config = CPTConfig(
        **training_settings(folder, seed),
        max_steps=args.cpt_steps,
        per_device_train_batch_size=args.cpt_batch_size,
        per_device_eval_batch_size=32,
        learning_rate=args.cpt_learning_rate,
        mlm_ratio=args.mlm_ratio,
        max_length=256,
        eval_strategy="steps",
        eval_steps=max(args.cpt_steps // 4, 1),
    )
    trainer = CPTTrainer(model, config, train_dataset=rows, eval_dataset=held_out, processing_class=processor)
    trainer.train()
    trainer.save_model()
    return folder, trainer.state.log_history


def contrastive_tuning(start, folder, seed, learning_rate, args):
    """Stage 2: contrastive fine-tuning on a few labelled pairs, one task a batch.

    Returns:
        `tuple`: the trained model, and the log history.
    """
    set_seed(seed)
    model = build_sentence_transformer(start, device="cpu")
    model.model_card_data.generate_widget_examples = False
    config = ContrastiveConfig(
        **training_settings(folder, seed),
        num_train_epochs=args.cl_epochs,
        per_device_train_batch_size=args.cl_batch_size,
        learning_rate=learning_rate,
    )
    trainer = ContrastiveTrainer(model, config, labelled_pairs("cl", seed))
    trainer.train()
    return model, trainer.state.log_history


def compare(seed, output, processor, args):
    """Run every row of the table for one seed; return test results by row and the histories of both stages."""
    folder = output / f"seed-{seed}"
    test = pair_rows("test", 0)
    causal = save_start(folder / "causal", processor, bidirectional=False)
    bidirectional = save_start(folder / "bidirectional", processor, bidirectional=True)
    logger.info("Stage 1, seed %d: %d steps on unlabelled rows", seed, args.cpt_steps)
    pretrained, cpt_history = continual_pretraining(folder / "cpt", processor, seed, args)
    results, histories = {UNTOUCHED: search(build_sentence_transformer(causal, device="cpu"), test)}, {}
    for name, start in ((CAUSAL, causal), (BIDIRECTIONAL, bidirectional), (MOCA, pretrained)):
        logger.info("Stage 2, seed %d: %s", seed, name)
        model, histories[name] = contrastive_tuning(start, folder / "cl", seed, LEARNING_RATES[name], args)
        results[name] = search(model, test)
    model.save_pretrained(str(folder / "moca"), create_model_card=False)
    return results, {"cpt": cpt_history, "cl": histories}


def tune(output, processor, args):
    """Print dev results of every row for every learning rate of the grid."""
    seed, dev = 0, pair_rows("dev", 0)
    starts = {
        CAUSAL: save_start(output / "tune" / "causal", processor, bidirectional=False),
        BIDIRECTIONAL: save_start(output / "tune" / "bidirectional", processor, bidirectional=True),
        MOCA: continual_pretraining(output / "tune" / "cpt", processor, seed, args)[0],
    }
    for name, start in starts.items():
        for learning_rate in TUNE_GRID:
            model, _ = contrastive_tuning(start, output / "tune" / "cl", seed, learning_rate, args)
            results = search(model, dev)
            line = "  ".join(f"{task} {result['P@1']:.3f}/{result['nDCG@5']:.3f}" for task, result in results.items())
            mean = statistics.mean(result["nDCG@5"] for result in results.values())
            print(f"dev  {name:20s} learning rate {learning_rate:<8g} {line}  mean nDCG@5 {mean:.3f}", flush=True)


def write_rows(output):
    """Write the first seed's rows as Parquet: the data of the small YAML files in `examples/configs`."""
    for folder in ("cpt", "pairs", "pairs/dev"):
        (output / folder).mkdir(exist_ok=True)
    unlabelled_rows("cpt", 0).to_parquet(output / "cpt" / "rows.parquet")
    for task, rows in labelled_pairs("cl", 0).items():
        rows.to_parquet(output / "pairs" / f"{task}.parquet")
    for task, rows in labelled_pairs("dev", 0).items():
        rows.to_parquet(output / "pairs" / "dev" / f"{task}.parquet")


def search_in_a_fresh_process(model, output):
    """Load an export as a user of the Hub would: another process, an empty cache, no network, no package of ours."""
    environment = {**os.environ, "HF_HOME": str(output / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(EXAMPLES / "demo_search.py"), "--model", str(model)]
    subprocess.run([*command, "--output", str(output / "search.json")], check=True, env=environment)
    results = json.loads((output / "search.json").read_text())
    module = results.pop("module")
    if not module.startswith("transformers_modules"):
        raise RuntimeError(f"the export was loaded with {module}, not with the code it carries")
    return results


def table(runs):
    """Return the comparison as a Markdown table: mean over seeds, and the sample standard deviation behind it."""
    tasks = list(runs[0][UNTOUCHED])
    lines = [
        "| P@1 / nDCG@5 on held-out rows | " + " | ".join([*tasks, "mean"]) + " |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    chances = [chance_level(runs[0][UNTOUCHED][task]["num_candidates"]) for task in tasks]

    def cell(values):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    def line(name, per_seed):
        columns = list(zip(*per_seed))  # a column a task, an entry a seed
        columns.append([{key: statistics.mean(row[key] for row in seed) for key in seed[0]} for seed in per_seed])
        cells = [" / ".join(cell([seed[key] for seed in column]) for key in ("P@1", "nDCG@5")) for column in columns]
        return f"| {name} | " + " | ".join(cells) + " |"

    lines.append(line("chance", [chances]))
    for name in runs[0]:
        lines.append(
            line(name, [[{key: run[name][task][key] for key in ("P@1", "nDCG@5")} for task in tasks] for run in runs])
        )
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run (default 1)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for everything written")
    parser.add_argument("--tune", action="store_true", help="try the learning rates on the dev rows, then stop")
    parser.add_argument("--cpt-steps", type=int, default=300)
    parser.add_argument("--cpt-draws", type=int, default=1, help="differently cut copies of the pages")
    parser.add_argument("--cpt-batch-size", type=int, default=32)
    parser.add_argument("--cpt-learning-rate", type=float, default=2e-3)
    parser.add_argument("--mlm-ratio", type=float, default=0.4)
    parser.add_argument("--cl-epochs", type=float, default=6)
    parser.add_argument("--cl-batch-size", type=int, default=32)
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    return args


def main():
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()  # those of writing small files; the bars of the two stages stay
    args = parse_arguments()
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    if args.tune:
        tune(args.output, processor, args)
        return
    write_rows(args.output)
    runs, histories = zip(*(compare(seed, args.output, processor, args) for seed in range(args.seeds)))

    published = args.output / "export"
    export(args.output / "seed-0" / "moca", published, overwrite=True)
    fresh = search_in_a_fresh_process(published, args.output)
    for task, result in fresh.items():
        if abs(result["nDCG@5"] - runs[0][MOCA][task]["nDCG@5"]) > 1e-6:
            raise RuntimeError(f"{task}: the export scores {result['nDCG@5']}, the trained model {runs[0][MOCA][task]}")
    results = table(runs)
    write_report(args.output, results, histories[0], fresh, processor)
    (args.output / "results.md").write_text(results + "\n")
    print(f"\n{results}\n")
    print(f"The model is in {published}, the report in {args.output / 'report.html'}.")
    print(f"The same numbers came from a fresh process that loaded the export. {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
