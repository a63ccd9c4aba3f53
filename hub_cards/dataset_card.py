"""The card of a data set for continual pre-training, filled from what was counted while it was made."""

from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from .cpt_shards import FEATURES

TEMPLATE = Path(__file__).with_name("dataset_card.md")
TASKS = {
    "documents": ["feature-extraction", "visual-document-retrieval"],
    "tables": ["feature-extraction", "image-to-text"],
}


def write_dataset_card(output_dir, report, config):
    """Write `README.md`: the Hub's metadata, what the rows are, what was refused, and how to load them.

    Args:
        output_dir (`pathlib.Path`): folder of the data set.
        report (`dict`): what [`hub_cards.cpt_dataset.build_cpt_dataset`] counted, as in `build_report.json`.
        config ([`hub_cards.cpt_config.CPTDatasetConfig`]): names, licence and languages.

    Returns:
        `huggingface_hub.DatasetCard`: the card.
    """
    splits, repo_id = report["splits"], config.repo_id or str(output_dir)
    kind = "tables" if config.tables else "documents"
    num_rows, num_images = (sum(split[name] for split in splits.values()) for name in ("rows", "images"))
    title = config.pretty_name or repo_id.rstrip("/").split("/")[-1]
    data = DatasetCardData(
        language=config.language,
        license=config.license,
        source_datasets=config.source_datasets,
        pretty_name=title,
        size_categories=[size_category(num_rows)],
        task_categories=TASKS[kind],
        tags=["moca", "continual-pre-training", "interleaved", "image", "text"],
    )
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    _describe_rows(splits).to_dataset_card_data(data)
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        repo_id=repo_id,
        kind=kind,
        num_rows=num_rows,
        num_images=num_images,
        has_license=config.license is not None,
        report=report,
        settings=report["settings"],
        num_refused=sum(report["refused"].values()),
        num_left_out=sum(report["left_out"].values()),
    )
    card.save(output_dir / "README.md")
    return card


def size_category(num_rows):
    """Return the Hub's word for a number of rows.

    Args:
        num_rows (`int`): number of rows.

    Example:

    ```python
    >>> size_category(1077)
    '1K<n<10K'
    ```
    """
    borders = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = sum(num_rows >= 10 ** (3 + index) for index in range(len(borders)))
    if place in (0, len(borders)):
        return "n<1K" if place == 0 else "n>1T"
    return f"{borders[place - 1]}<n<{borders[place]}"


def _describe_rows(splits):
    info = datasets.DatasetInfo(
        features=FEATURES,
        splits=datasets.SplitDict(
            {
                name: datasets.SplitInfo(name, num_bytes=split["num_bytes"], num_examples=split["rows"])
                for name, split in splits.items()
            }
        ),
        download_size=sum(split["file_bytes"] for split in splits.values()),
        dataset_size=sum(split["num_bytes"] for split in splits.values()),
    )
    return DatasetInfosDict({"default": info})


__all__ = ["size_category", "write_dataset_card"]
