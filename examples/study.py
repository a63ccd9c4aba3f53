"""The study: what of the paper is seen at a small scale, on real data, with equal budgets.

    python examples/study.py --scale cpu --data DATA      # two CPU cores
    python examples/study.py --scale gpu --data DATA      # a GPU, a larger model

A small causal vision-language model is trained once. From it every row of the paper's tables is made (stage 1 or not,
both losses or one, all pairs or some, ...), each with as many steps and as many trials of learning rates, which are
chosen on the dev rows. Then the held-out rows are searched once with every row and seed. `docs/study.md` tells what
DATA holds, and what came out.

Everything lands in `--output`: `results.json`, `tables.md`, and figures. A run that was stopped goes on where it
stopped when it is started again.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from demo_report import plot_reconstruction
from study_data import searches, unlabelled_rows
from study_figures import draw_figures, filled_in
from study_jobs import Study
from study_results import render, summarise
from study_rows import MOCA
from study_scales import SCALES

from modeling_moca import MoCaProcessor

logger = logging.getLogger("study")


def main():
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of docs/study.md")
    parser.add_argument("--output", type=Path, help="folder for everything written (default study_output/SCALE)")
    parser.add_argument("--no-curves", action="store_true", help="leave out the curves of single settings of stage 1")
    args = parser.parse_args()
    output = args.output or Path("study_output") / args.scale
    if SCALES[args.scale].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--scale {args.scale} needs a GPU, and torch sees none; --scale cpu does without.")
    study = Study(output, args.data, SCALES[args.scale])
    raw = study.run_table()
    if not args.no_curves:
        raw["curves"] = study.run_curves(raw["chosen"])
    raw["minutes"] = {part: round(seconds / 60, 1) for part, seconds in study.seconds.items()}
    write(study, raw)
    logger.info("%s, after minutes of work: %s", output / "results.json", raw["minutes"])


def write(study, raw):
    """Write `results.json`, and from it tables and figures."""
    held_out = searches(study.data, "test")
    num_candidates = {task: len(found["candidates"]) for task, found in held_out.items()}
    results = summarise(raw, json.loads((study.output / "settings.json").read_text()), num_candidates)
    (study.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_figures(study.output / "figures", results)
    first = study.pretraining("moca", raw["chosen"][MOCA][0], study.scale.seeds[0])
    model, length = study.output / first.name / "last", study.scale.cpt_max_length
    processor = MoCaProcessor.from_pretrained(model)
    captions = [row for row in unlabelled_rows(study.data, "dev", study.scale.num_characters) if row["images"]]
    pictures = captions[-40::10]  # rows of captions stand last
    plot_reconstruction(study.output / "figures" / "reconstruction.jpg", model, processor, pictures, length)
    texts = [row["text"] for row in unlabelled_rows(study.data, "dev", study.scale.num_characters) if not row["images"]]
    filled = [filled_in(model, processor, text, length) for text in texts[::200][:3]]
    sections = {**render(results), "filled-in": "\n\n".join("> " + " ".join(text.split()) for text in filled)}
    text = "\n\n".join(f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->" for name, table in sections.items())
    (study.output / "tables.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
