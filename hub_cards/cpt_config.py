"""Settings of a data set for continual pre-training that is made from documents or from captioned images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass
class CPTDatasetConfig:
    """What to make a data set of, how rows are cut, and what its card says.

    Args:
        output_dir (`str`): folder of the data set: new, or that of a run that goes on.
        documents (`str`, *optional*): folder of Markdown, HTML and PDF files, at any depth. Images are found below it.
        tables (`list[str]`, *optional*): instead of `documents`, CSV, JSONL or Parquet files of captioned images.
        image_column, caption_column (`str`, default to `"image"` and `"caption"`): columns of the tables. An image is a
            path, encoded bytes, `{"bytes", "path"}`, or a data URI.
        image_folder (`str`, *optional*): folder that the paths in the tables are below; each table's own when omitted.
        max_characters (`int`, defaults to 4000): longest text of a row. Documents are cut between paragraphs, a longer
            paragraph between lines or words (counted); pages of a PDF never share a row. A longer caption is refused.
            With the default of `max_images` a row fits into the 2,048 tokens that stage 1 reads.
        max_images (`int`, defaults to 1): most images of a row. An image takes up to 1,024 tokens there: raise it for
            small pictures.
        alt_text (`bool`, defaults to `False`): put the alternative text of an image behind it.
        pdf_as_pages (`bool`, defaults to `False`): a page becomes one image (JPEG) and the text behind it, instead of
            its text and the images embedded in it.
        pdf_dpi (`int`, defaults to 144): resolution of such pages.
        min_image_side (`int`, defaults to 28): images with a shorter side, in pixels, are left out: they are less than
            one image token.
        max_image_bytes (`int`, defaults to 32 MiB): largest image, encoded; data URIs included.
        max_document_bytes (`int`, defaults to 64 MiB): largest Markdown or HTML file.
        max_shard_bytes (`int`, defaults to 450,000,000): size of a Parquet file, at which the next one begins.
        validation_share (`float`, defaults to 0): share of the documents (of tables: of the images) that make up a
            split `validation`.
        dedupe (`bool`, defaults to `False`): leave out rows whose text and images came before.
        on_bad_row (`str`, defaults to `"skip"`): what cannot be used is left out, counted, and listed in
            `rejected.jsonl`; `"raise"` stops at it.
        max_bad_row_share (`float`, defaults to 0.05): stop once more than this share of all rows and images (of 100,
            while there are fewer) cannot be used. What settings leave out does not count.
        seed (`int`, defaults to 0): seed of the split.
        repo_id (`str`, *optional*): name that the card's snippets load; `output_dir` when omitted.
        pretty_name (`str`, *optional*): title of the card; the last part of the name when omitted.
        license (`str`, *optional*), language (`list[str]`, *optional*), source_datasets (`list[str]`, *optional*): for
            the card's head.

    Raises:
        ValueError: a number is out of range, a choice unknown, or not exactly one of `documents` and `tables` is given.
    """

    output_dir: str = ""
    documents: str | None = field(default=None, metadata={"help": "Folder of Markdown, HTML and PDF files."})
    tables: list[str] | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet files instead."})
    image_column: str = field(default="image", metadata={"help": "Column of paths or encoded bytes."})
    caption_column: str = "caption"
    image_folder: str | None = field(default=None, metadata={"help": "Folder that paths in tables are below."})
    max_characters: int = field(default=4000, metadata={"help": "Longest text of a row."})
    max_images: int = field(default=1, metadata={"help": "Most images of a row."})
    alt_text: bool = field(default=False, metadata={"help": "Put alternative text behind images."})
    pdf_as_pages: bool = field(default=False, metadata={"help": "A page is one image, followed by its text."})
    pdf_dpi: int = 144
    min_image_side: int = field(default=28, metadata={"help": "Leave out images with a shorter side, in pixels."})
    max_image_bytes: int = 2**25
    max_document_bytes: int = 2**26
    max_shard_bytes: int = 450_000_000
    validation_share: float = field(default=0.0, metadata={"help": "Share of the documents for validation."})
    dedupe: bool = field(default=False, metadata={"help": "Leave out rows that came before."})
    on_bad_row: str = field(default="skip", metadata={"help": "'skip' or 'raise'."})
    max_bad_row_share: float = 0.05
    seed: int = 0
    repo_id: str | None = field(default=None, metadata={"help": "Name that the card's snippets load."})
    pretty_name: str | None = None
    license: str | None = None
    language: list[str] | None = None
    source_datasets: list[str] | None = None

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir must be given.")
        if (self.documents is None) == (not self.tables):
            raise ValueError(
                f"Give either documents (a folder) or tables (files), got documents={self.documents!r} and "
                f"tables={self.tables!r}."
            )
        if self.on_bad_row not in ("skip", "raise"):
            raise ValueError(f"on_bad_row must be 'skip' or 'raise', got {self.on_bad_row!r}.")
        least = ("max_characters", "max_images", "pdf_dpi", "min_image_side", "max_image_bytes")
        for name in (*least, "max_document_bytes", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, most in (("validation_share", 0.999), ("max_bad_row_share", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most:g}], got {getattr(self, name)}.")
        if self.documents is not None:
            self._check_folder()

    def _check_folder(self):
        if not Path(self.documents).is_dir():
            raise ValueError(f"documents={self.documents!r} is not a folder.")
        root, output = os.path.realpath(self.documents), os.path.realpath(self.output_dir)
        if os.path.commonpath([root, output]) == root:
            raise ValueError(f"output_dir={self.output_dir!r} lies inside documents={self.documents!r}.")

    @property
    def splits(self):
        """Names of the splits, in the order in which they are made."""
        return ["train", "validation"] if self.validation_share else ["train"]

    def row_settings(self):
        """Return what decides which rows there are: a run that goes on must have the same."""
        card = ("repo_id", "pretty_name", "license", "language", "source_datasets")
        # Where things lie may change; which files there are is compared by itself.
        other = ("output_dir", "documents", "tables", "image_folder", "on_bad_row", "max_bad_row_share")
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in card + other}


__all__ = ["CPTDatasetConfig"]
