"""The demo's report: loss curves, queries with their top five answers, a masked page beside its reconstruction."""

import base64
import html
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from demo_data import pair_rows, pretraining_rows
from matplotlib import pyplot as plt

from modeling_moca import MoCaForPreTraining
from trainers.cpt_collator import CPTCollator

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>MoCa demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #ccc; padding: .3rem .6rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} img {{ max-width: 100%; }}
</style>
<h1>MoCa demo</h1>
<p>A small causal vision-language model, made bidirectional by continual pre-training (CPT) on unlabelled pages and
digits, then fine-tuned with a contrastive loss (CL) on a few labelled pairs. P@1 / nDCG@5 on held-out rows, every
answer of a task being a candidate; more than one seed: mean ± standard deviation.</p>
{table}
<h2>Loss curves</h2><img alt="loss curves" src="{losses}">
<h2>Queries and their first five answers</h2>
<p>From the exported model, loaded in a fresh process. A green frame marks the right answer.</p>
<img alt="queries with their top five" src="{contact_sheet}">
<h2>Masked and reconstructed</h2>
<p>A held-out page and a strip of digits: as it is, with half of the image tokens replaced by noise, and with those
tokens filled in by the masked autoencoder after stage 1.</p>
<img alt="reconstruction" src="{reconstruction}">
</html>
"""


def patches_to_image(patches, grid, processor):
    """Put rows of `pixel_values` back into a picture.

    Args:
        patches (`torch.Tensor` of shape `(num_patches, patch_dim)`): normalised rows, in the processor's order.
        grid (`Sequence[int]`): patches in time, height and width.
        processor ([`MoCaProcessor`]): gives merge size, patch size, mean and standard deviation.

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)`, values 0 to 1.
    """
    images = processor.image_processor
    merge, size = images.merge_size, images.patch_size
    _, height, width = (int(n) for n in grid)
    blocks = patches.view(height // merge, width // merge, merge, merge, 3, images.temporal_patch_size, size, size)
    blocks = blocks[:, :, :, :, :, 0]  # a still image repeats itself in time: [H/m, W/m, m, m, 3, P, P]
    picture = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, 3)
    mean, deviation = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    return (picture * deviation + mean).clamp(0, 1).numpy()


def plot_losses(path, history):
    """Draw both stages' training losses against steps."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, name in zip(axes, ("mlm_loss", "mae_loss")):
        for prefix, label in (("", "training"), ("eval_", "held-out")):
            points = [(entry["step"], entry[prefix + name]) for entry in history["cpt"] if prefix + name in entry]
            axis.plot(*zip(*points), label=label, marker="o" if prefix else None)
        axis.set(title=f"stage 1: {name}", xlabel="step")
        axis.legend()
    for name, entries in history["cl"].items():
        points = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        axes[2].plot(*zip(*points), label=name)
    axes[2].set(title="stage 2: InfoNCE", xlabel="step")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_contact_sheet(path, searched, queries_per_task=4):
    """Draw some queries of each task whose answers are images, with their first five answers."""
    rows = []
    for task, pairs in pair_rows("test", 0).items():
        if pairs[0]["positive"]["image"] is not None:
            rows += [(task, pairs, query) for query in range(min(queries_per_task, len(pairs)))]
    images = [pairs[0]["positive"]["image"] for _, pairs, _ in rows]
    heights = [image.height / image.width + 0.08 for image in images]
    figure, axes = plt.subplots(
        len(rows),
        6,
        figsize=(13, 1.9 * sum(heights)),
        layout="constrained",
        width_ratios=[1.4, 1, 1, 1, 1, 1],
        height_ratios=heights,
    )
    for axis_row, (task, pairs, query) in zip(axes, rows):
        words = textwrap.fill(pairs[query]["query"]["text"], 38)
        axis_row[0].text(0, 0.5, words, va="center", fontsize=9)
        axis_row[0].set_axis_off()
        for axis, candidate in zip(axis_row[1:], searched[task]["top5"][query]):
            axis.imshow(pairs[candidate]["positive"]["image"])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="tab:green" if candidate == query else "0.8")
            axis.spines[:].set_linewidth(5 if candidate == query else 0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_reconstruction(path, folder, processor, rows, max_length):
    """Draw the images of rows as they are, masked, and reconstructed by the model of stage 1.

    Args:
        path (`pathlib.Path`): file to write.
        folder (`pathlib.Path`): model of stage 1.
        processor ([`MoCaProcessor`]): turns pixels into patches.
        rows (`list[dict]`): `text` and `images`, two images or more together.
        max_length (`int`): most tokens of a row.
    """
    model = MoCaForPreTraining.from_pretrained(folder).eval()
    batch = CPTCollator(processor, max_length=max_length)(rows)
    original = CPTCollator(processor, max_length=max_length, mlm_ratio=0.0, mae_ratio=0.0)(rows)["pixel_values"]
    with torch.no_grad():
        predicted = model(**{name: value for name, value in batch.items() if name != "skipped_rows"}).patch_predictions
    per_token = model.config.num_patches_per_token
    chosen = batch["patch_mask"][batch["input_ids"] == model.config.image_token_id]  # [num image tokens]
    filled = original.clone().view(-1, per_token, original.shape[-1])
    filled[chosen] = predicted
    stages = {"original": original, "masked": batch["pixel_values"], "reconstructed": filled.flatten(0, 1)}
    sizes = batch["image_grid_thw"].prod(-1).tolist()
    heights = (batch["image_grid_thw"][:, 1] / batch["image_grid_thw"][:, 2]).tolist()
    figure, axes = plt.subplots(
        len(sizes), 3, figsize=(13, 5 * sum(heights)), layout="constrained", height_ratios=heights
    )
    for axis_row, grid, *parts in zip(axes, batch["image_grid_thw"], *(s.split(sizes) for s in stages.values())):
        for axis, title, part in zip(axis_row, stages, parts):
            axis.imshow(patches_to_image(part, grid, processor))
            axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(output, table, history, searched, processor):
    """Write `report.html` and its pictures.

    Args:
        output (`pathlib.Path`): the demo's folder; `seed-0/cpt` in it holds the model of stage 1.
        table (`str`): the comparison, as Markdown.
        history (`dict`): log histories of stage 1 (`cpt`) and stage 2 (`cl`, by row of the table).
        searched (`dict`): what `demo_search.search` returned for the export.
        processor ([`MoCaProcessor`]): turns pixels into patches.
    """
    pictures = {name: output / f"{name}.png" for name in ("losses", "contact_sheet", "reconstruction")}
    plot_losses(pictures["losses"], history)
    plot_contact_sheet(pictures["contact_sheet"], searched)
    rows = [row for row in pretraining_rows("dev", 0) if len(row["images"]) == 2][:1]
    plot_reconstruction(pictures["reconstruction"], output / "seed-0" / "cpt", processor, rows, max_length=256)
    lines = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in (lines[0], *lines[2:])]
    inline = {name: _data_url(path) for name, path in pictures.items()}
    (output / "report.html").write_text(PAGE.format(table=f"<table>{''.join(rows)}</table>", **inline))


def _data_url(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
