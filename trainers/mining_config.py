"""Settings of hard-negative mining."""

from __future__ import annotations

from dataclasses import dataclass, field

from .contrastive_sources import LAYOUTS, PairSource


@dataclass
class MiningConfig:
    """What to mine, with which model, and which candidates count as hard negatives.

    Args:
        datasets (`list[PairSource]`): data sets of pairs. Each is mined for itself, against its own positives and the
            documents of `corpus`, with its own instructions; negatives that its rows have are left out.
        corpus (`list[PairSource]`, *optional*): further documents, the `positive` side of each entry. `query` may be
            omitted; instructions are those of the data set that is mined.
        output_dir (`str`): folder for a Parquet file a data set and `mining_report.json`.
        embeddings_dir (`str`, *optional*): folder of the embeddings, which a later run with the same model, rows and
            batches takes instead of encoding them again; `output_dir/embeddings` when omitted.
        model_name_or_path (`str`): a sentence-transformers model, or a MoCa checkpoint of either stage.
        model_revision (`str`, *optional*): branch, tag or commit on the Hub.
        trust_remote_code (`bool`, defaults to `False`): run the code of a model on the Hub.
        dtype (`str`, defaults to `"auto"`): type of the weights and of the stored embeddings, such as `"bfloat16"`;
            `"auto"` is the checkpoint's. Scores are float32 always.
        attn_implementation (`str`, *optional*): as in transformers.
        device (`str`, *optional*): where to encode and search; chosen by sentence-transformers when omitted.
        max_length (`int`, *optional*): most tokens of an input; the model's own limit when omitted.
        num_negatives (`int`, defaults to 2): hard negatives of a row at most, the most similar ones (paper: 2).
        range_min (`int`, defaults to 0): the most similar candidates that are skipped, counted among those that the
            margins leave, as sentence-transformers counts.
        absolute_margin (`float`, *optional*): candidates whose cosine is above the positive's minus this are refused.
        relative_margin (`float`, *optional*, defaults to 0.05): candidates whose cosine is above the positive's minus
            this share of its absolute value are refused: they may be positives that nobody labelled. `null` switches it
            off. A cosine right at a margin is allowed; of several positives of a query the least similar one counts.
        batch_size (`int`, defaults to 32): inputs that are encoded at a time.
        shard_size (`int`, defaults to 256): inputs whose images are decoded at a time, and embeddings a file. What a
            killed run loses is one of them.
        query_block_size, corpus_block_size (`int`, default to 4096): queries and documents whose scores are held at a
            time.
        on_bad_row (`str`, defaults to `"skip"`): rows that cannot be used are left out, and listed in `rejected.jsonl`;
            `"raise"` stops at one.
        num_proc (`int`, *optional*): processes that check and hash rows; one when omitted.
        seed (`int`, defaults to 0): seed of the samples of `max_rows`.

    Raises:
        ValueError: a number is out of range, there is no data set or model, or a choice is unknown.
    """

    datasets: list[PairSource] = field(default_factory=list, metadata={"help": "Data sets of pairs to mine for."})
    corpus: list[PairSource] = field(default_factory=list, metadata={"help": "Further documents: `positive` sides."})
    output_dir: str = ""
    embeddings_dir: str | None = None
    model_name_or_path: str = ""
    model_revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    max_length: int | None = None
    num_negatives: int = 2
    range_min: int = 0
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    batch_size: int = 32
    shard_size: int = 256
    query_block_size: int = 4096
    corpus_block_size: int = 4096
    on_bad_row: str = "skip"
    num_proc: int | None = None
    seed: int = 0

    def __post_init__(self):
        self.datasets = [PairSource(**entry) if isinstance(entry, dict) else entry for entry in self.datasets]
        self.corpus = [_documents(entry) if isinstance(entry, dict) else entry for entry in self.corpus]
        for name in ("output_dir", "model_name_or_path"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given.")
        if self.on_bad_row not in ("skip", "raise"):
            raise ValueError(f"on_bad_row must be 'skip' or 'raise', got {self.on_bad_row!r}.")
        least = {"num_negatives": 1, "range_min": 0, "batch_size": 1, "shard_size": 1}
        least |= {"query_block_size": 1, "corpus_block_size": 1, "num_proc": 1, "max_length": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}.")
        for name in ("absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 2:
                raise ValueError(f"{name} must be between 0 and 2, or null, got {value}.")


def _documents(entry):
    """Return an entry of `corpus` as a source whose queries are its documents: nobody reads them."""
    unused = ("query_instruction", "document_instruction", "negatives", "num_negatives", "weight")
    given = [name for name in unused if entry.get(name) is not None]
    if given:
        raise ValueError(f"An entry of `corpus` has only documents, its `positive` side: remove {given}.")
    positive = entry.get("positive") or LAYOUTS.get(entry.get("layout", "columns"), {}).get("positive")
    source = PairSource(**{**entry, "query": positive, "positive": positive, "num_negatives": 0})
    source.negatives = None
    return source


__all__ = ["MiningConfig"]
