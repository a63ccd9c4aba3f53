"""Settings of contrastive fine-tuning (MoCa stage 2)."""

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .contrastive_loss import check_matryoshka

ON_BAD_ROW = ("raise", "skip")


@dataclass
class ContrastiveConfig(SentenceTransformerTrainingArguments):
    r"""Settings of [`ContrastiveTrainer`]: everything of
    [`~sentence_transformers.SentenceTransformerTrainingArguments`], plus loss and mixture.

    Only what differs is listed. Source of the numbers: MoCa, arXiv 2506.23115, sections 3.2 and 4.1.

    The contrastive batch is `per_device_train_batch_size` times the number of ranks (paper: 2048). Gradient
    accumulation does NOT enlarge it: accumulated batches never see each other's rows. For a large batch in little
    memory set `mini_batch_tokens`.

    Parameters:
        > Loss

        temperature (`float`, *optional*, defaults to `0.03`):
            Divisor of the cosine (paper).
        all_negatives (`bool`, *optional*, defaults to `True`):
            A row's hard negatives count for every row of the global batch (paper). `False`: only for their own row
            (the authors' released code).
        symmetric (`bool`, *optional*, defaults to `False`):
            Average with the loss of finding the query from the positive.
        false_negative_margin (`float`, *optional*):
            Leave out candidates whose cosine exceeds the positive's by more than this. Keeps all when not set.
        matryoshka_dims (`list[int]`, *optional*):
            Lengths of prefixes of the embedding, each renormalised, whose losses are added (arXiv 2205.13147), so that
            shorter embeddings serve as well. The whole embedding alone when not set.
        matryoshka_weights (`list[float]`, *optional*):
            What each prefix's loss is multiplied by; 1 each when not set.
        mini_batch_tokens (`int`, *optional*):
            Cached gradients (GradCache, arXiv 2101.06983), in mini-batches of at most so many tokens through the
            language model, padding included, plus image patches through the vision tower: a patch counts as a token, so
            that an image token with its 4 patches counts 5. Features then stay on the host until their mini-batch
            comes, and memory follows the mini-batch instead of the batch, for one more forward pass. A row of more
            tokens stands alone. Whole columns are embedded when neither this nor `mini_batch_size` is set.
        mini_batch_size (`int`, *optional*):
            The same, with at most so many rows in a mini-batch; with both, whichever limit is reached first.

        mask_equal_positives (`bool`, *optional*, defaults to `True`):
            Another row's positive, or negative, with the same content as the row's own positive is not its negative.
            `False`: it is (the authors' released code).

        > Model

        freeze_vision (`bool`, *optional*, defaults to `False`):
            Keep the vision tower as it is; what maps its output to the language model goes on learning. With adapters
            (`add_embedding_adapters`; in examples/train_contrastive.py `use_peft` and trl's `lora_*`) only these learn.

        > Evaluation

        eval_retrieval (`bool`, *optional*, defaults to `True`):
            Beside the loss of each data set of evaluation, report nDCG@10 and P@1 of finding each query's positive
            among all different positives and hard negatives of the data set (its `max_rows` bounds them):
            `eval_<task>_ndcg_at_10` and `eval_<task>_p_at_1`, and the means over tasks, `eval_ndcg_at_10` and
            `eval_p_at_1`. With `metric_for_best_model="ndcg_at_10"` the best checkpoint is never deleted for
            `save_total_limit`. The data is embedded a second time.

        > Data

        task_alpha (`float`, *optional*, defaults to `1.0`):
            Exponent of the mixture of tasks: 1 uses every row once an epoch, less draws fewer from large tasks, 0
            equally many from each.
        task_batches (`bool`, *optional*, defaults to `True`):
            Every global batch comes from one task, whose rows make harder negatives (paper). `False`: rows of all tasks
            are shuffled together (what the authors' released code comes to: it groups rows by task, and then shuffles).
        shuffle_window (`int`, *optional*, defaults to `256`):
            Streamed data sets: rows that a reader holds of each data set, and takes by chance. Memory of a worker is
            data sets times rows held times encoded row. Other data sets are shuffled as a whole.
        on_bad_row (`str`, *optional*, defaults to `"skip"`):
            What a row that cannot be used does (query or positive empty; image that does not open, is truncated, too
            large or does not fit; path that leads out of the image folder; negatives that are no list): `"skip"` it,
            count it, and list it in `rejected.jsonl`; or `"raise"` a `ValueError` naming it.
        max_bad_row_share (`float`, *optional*, defaults to `0.05`):
            Stop with a `ValueError` once more than this share of all rows (of 100, while fewer are read) is bad.
        max_length (`int`, *optional*):
            Most tokens of an input, image tokens included; the processor's own limit when not set.

    > [!NOTE]
    > These parameters have default values different from
    > [`~sentence_transformers.SentenceTransformerTrainingArguments`]:
    > - `learning_rate`: `1e-5` instead of `5e-5` (paper; the authors' released script: 2e-5).
    > - `num_train_epochs`: `1` instead of `3`.
    > - `warmup_steps`: `0.1` instead of `0`: a tenth of all steps.
    > - `logging_steps`: `10` instead of `500`: losses of single tasks are what one watches here.
    > - `hub_private_repo`: `True` instead of unset: what `push_to_hub` creates is private until you say otherwise.
    > - `ddp_find_unused_parameters`: `False`: a step runs one forward pass a column, and the search for unused
    >   parameters looks at the last one only. The trainer keeps the vision tower in use instead.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW (paper: 1e-5)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the mixture."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a share of all steps."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Must stay False: a step runs several forward passes."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "A repository that push_to_hub creates is private, unless this is False."}
    )

    temperature: float = field(default=0.03, metadata={"help": "Divisor of the cosine (paper: 0.03)."})
    all_negatives: bool = field(
        default=True,
        metadata={"help": "Hard negatives count for every row (paper), or for their own row only (released code)."},
    )
    symmetric: bool = field(default=False, metadata={"help": "Average with the loss from positive to query."})
    false_negative_margin: float | None = field(
        default=None, metadata={"help": "Leave out candidates this much nearer than the positive."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Lengths of prefixes of the embedding whose losses are added."}
    )
    matryoshka_weights: list[float] | None = field(
        default=None, metadata={"help": "What each prefix's loss is multiplied by; 1 each when not set."}
    )
    mini_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Padded tokens plus image patches of a mini-batch, with cached gradients."},
    )
    mini_batch_size: int | None = field(default=None, metadata={"help": "Rows of a mini-batch, with cached gradients."})
    mask_equal_positives: bool = field(
        default=True,
        metadata={"help": "A candidate equal to the row's positive is no negative; False: it is (released code)."},
    )
    freeze_vision: bool = field(
        default=False, metadata={"help": "Do not train the vision tower, only what maps its output."}
    )
    eval_retrieval: bool = field(
        default=True, metadata={"help": "Report nDCG@10 and P@1 of retrieval on data sets of evaluation."}
    )
    task_alpha: float = field(
        default=1.0, metadata={"help": "Exponent of the mixture of tasks: 1 by rows, 0 equally many of each."}
    )
    task_batches: bool = field(
        default=True,
        metadata={"help": "A global batch is of one task (paper), or of rows of all tasks (released code)."},
    )
    shuffle_window: int = field(
        default=256, metadata={"help": "Streamed data sets: rows that a reader holds of each, and takes by chance."}
    )
    on_bad_row: str = field(
        default="skip",
        metadata={
            "help": "What a row that cannot be used does: 'raise' an error naming it, or 'skip' it and list it in "
            "rejected.jsonl.",
            "choices": list(ON_BAD_ROW),
        },
    )
    max_bad_row_share: float = field(
        default=0.05, metadata={"help": "Stop once a larger share of all rows is bad, even if bad rows are skipped."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of an input; the processor's own limit when not set."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature} (ContrastiveConfig).")
        if not 0 <= self.task_alpha <= 1:
            raise ValueError(f"task_alpha must lie in [0, 1], got {self.task_alpha} (ContrastiveConfig).")
        if self.shuffle_window < 1:
            raise ValueError(f"shuffle_window must be at least 1, got {self.shuffle_window} (ContrastiveConfig).")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(
                f"on_bad_row must be one of {list(ON_BAD_ROW)}, got {self.on_bad_row!r} (ContrastiveConfig)."
            )
        if not 0 <= self.max_bad_row_share <= 1:
            raise ValueError(f"max_bad_row_share must lie in [0, 1], got {self.max_bad_row_share} (ContrastiveConfig).")
        if not self.task_batches and self.task_alpha != 1:
            raise ValueError(
                f"task_alpha={self.task_alpha} shapes a mixture of batches of single tasks: it needs task_batches=True "
                "(ContrastiveConfig)."
            )
        by_task = isinstance(self.prompts, dict) and any(isinstance(value, dict) for value in self.prompts.values())
        if not self.task_batches and by_task:
            raise ValueError(
                f"prompts by task need task_batches=True, got {self.prompts}: in a mixed batch a column has one prompt "
                "(ContrastiveConfig)."
            )
        for name in ("mini_batch_size", "mini_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value} (ContrastiveConfig).")
        is_by_steps = self.eval_strategy == IntervalStrategy.STEPS and self.save_strategy == SaveStrategy.STEPS
        if self.metric_for_best_model is not None and is_by_steps and self.eval_steps != self.save_steps:
            raise ValueError(
                f"With metric_for_best_model={self.metric_for_best_model!r} eval_steps must equal save_steps, or the "
                f"best model may not be saved; got {self.eval_steps} and {self.save_steps} (ContrastiveConfig)."
            )
        check_matryoshka(self.matryoshka_dims, self.matryoshka_weights, "ContrastiveConfig")
        if (
            self.batch_sampler != BatchSamplers.BATCH_SAMPLER
            or self.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.PROPORTIONAL
        ):
            raise ValueError(
                "ContrastiveTrainer deals global batches of one task itself: leave batch_sampler and "
                "multi_dataset_batch_sampler unset and shape the mixture with task_alpha, got "
                f"{self.batch_sampler!r} and {self.multi_dataset_batch_sampler!r}."
            )
