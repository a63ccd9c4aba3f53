"""Settings of continual pre-training (MoCa stage 1)."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .masking import PATCH_NOISES

ON_BAD_ROW = ("raise", "skip")


@dataclass
class CPTConfig(TrainingArguments):
    r"""Settings of [`CPTTrainer`]: everything of [`~transformers.TrainingArguments`], plus masking and loss.

    Only what differs from [`~transformers.TrainingArguments`] is listed. Source of the numbers: MoCa, arXiv
    2506.23115, sections 3.1 and 4.1.

    Parameters:
        > Masking

        mlm_ratio (`float`, *optional*, defaults to `0.4`):
            Probability that an ordinary text token is hidden. Paper: 0.4 for the 3B model, 0.6 for the 7B model.
        mae_ratio (`float`, *optional*, defaults to `0.5`):
            Probability that an image token, with all patches it owns, is hidden. Paper: 0.5 for 3B, 0.6 for 7B.
        patch_noise (`str`, *optional*, defaults to `"per_patch"`):
            `"per_patch"`: every hidden patch becomes its own Gaussian sample (paper). `"shared"`: one sample stands
            in all hidden patches of a batch (the authors' released code).
        mask_seed (`int`, *optional*):
            Seed of the masks; `seed` when not set. Evaluation always draws the masks of epoch 0.

        > Loss; written to the model's configuration when the trainer is made

        mae_loss_weight (`float`, *optional*, defaults to `0.5`):
            w in `loss = mlm_loss + w * mae_loss` (paper; the authors' released script: 0.1).
        shift_labels (`bool`, *optional*, defaults to `True`):
            Predict token i from the state at i - 1 (paper). `False`: from the state at i (the authors' released code).

        > Data

        max_length (`int`, *optional*, defaults to `2048`):
            Most tokens a row keeps, image tokens included. Only text is cut; an image that does not fit makes the row
            a bad one (paper: 2048; the authors' released script: 1280).
        max_cost (`int`, *optional*):
            With a [`trainers.CPTMixture`]: fill micro-batches up to this cost, `text + 4 * image tokens + 2 * images`
            of each row, instead of taking `per_device_train_batch_size` rows (paper: about 12,800).
        packing (`bool`, *optional*, defaults to `False`):
            Put the rows of a micro-batch into one sequence without padding, each seeing itself alone. Pays where the
            attention path has a kernel for it (flash attention, or `sdpa` in half precision on a GPU).
        shuffle_window (`int`, *optional*, defaults to `512`):
            With a [`trainers.CPTMixture`]: rows that a reader holds, and chooses from when it fills a micro-batch with
            rows of like length. Larger: less padding (`benchmarks/padding.py`) and more shuffling of streams; each row
            held is its encoded images in memory, a reader a worker.
        exact_resize (`bool`, *optional*, defaults to `False`):
            Resize the images of Qwen-VL backbones with Pillow, as embedding does, instead of with torch's antialiased
            filter: several times slower, for values that differ by at most a few levels of 255, and in few places.
        on_bad_row (`str`, *optional*, defaults to `"skip"`):
            What a row that cannot be used does (image that does not open, is truncated, larger than
            `PIL.Image.MAX_IMAGE_PIXELS` or of an aspect ratio over 200; placeholders and images that differ in number;
            empty text; images that do not fit): `"skip"` it, count it by reason in the logs and, with a
            [`trainers.CPTMixture`], list it in `rejected.jsonl`; or `"raise"` a `ValueError` naming it.
        max_bad_row_share (`float`, *optional*, defaults to `0.05`):
            Stop with a `ValueError` once more than this share of all rows read (of 100, while fewer are read) is bad.

        > Weights

        freeze_vision (`bool`, *optional*, defaults to `False`):
            Keep the vision tower as it is: it gets neither gradients nor optimizer states. What maps its output to the
            language model (Qwen-VL's mergers, the connector of Idefics3 and SmolVLM) goes on learning.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: `2e-6` instead of `5e-5` (paper).
    > - `warmup_steps`: `0.1` instead of `0`: a tenth of all steps (paper). The schedule stays linear.
    > - `max_grad_norm`: `5.0` instead of `1.0` (paper).
    > - `logging_steps`: `10` instead of `500`: loss curves of both losses are what one watches here.
    > - `logging_nan_inf_filter`: `False` instead of `True`: a loss that is not finite is shown, not replaced by a mean
    >   of those before it, and no step waits for the device to look for it.
    > - `hub_private_repo`: `True` instead of unset: what `push_to_hub` creates is private until you say otherwise.
    > - `remove_unused_columns`: `False` instead of `True`: the collator needs `text` and `images`, which are no
    >   arguments of the model's forward.
    > - `label_names`: `["labels"]`: otherwise a batch without images, which has no `patch_labels`, counts as
    >   unlabelled.
    > - `ddp_find_unused_parameters`: `True`: a batch without images uses neither vision tower nor MAE head, and ranks
    >   may differ in that.
    > - `accelerator_config.dispatch_batches`: `False` instead of unset: batches of a streamed data set would be read on
    >   rank 0 and cut along their first dimension, which is rows in `input_ids`, but patches in `pixel_values`.
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "Peak learning rate of AdamW (paper: 2e-6)."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps (paper: 0.1)."}
    )
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradient norm to clip at (paper: 5.0)."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace losses that are not finite in the logs by the mean of others."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the collator needs the columns `text` and `images`."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"],
        metadata={"help": "Names of the labels that every batch has, with images or without."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "A batch without images leaves the vision tower and the MAE head unused."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "A repository that push_to_hub creates is private, unless this is False."}
    )

    mlm_ratio: float = field(
        default=0.4, metadata={"help": "Probability that an ordinary text token is hidden (paper: 3B 0.4, 7B 0.6)."}
    )
    mae_ratio: float = field(
        default=0.5, metadata={"help": "Probability that an image token's patches are hidden (paper: 3B 0.5, 7B 0.6)."}
    )
    patch_noise: str = field(
        default="per_patch",
        metadata={
            "help": "'per_patch': a Gaussian sample for every hidden patch (paper); 'shared': one for all hidden "
            "patches of a batch (the authors' released code).",
            "choices": list(PATCH_NOISES),
        },
    )
    mask_seed: int | None = field(default=None, metadata={"help": "Seed of the masks; `seed` when not set."})
    mae_loss_weight: float = field(
        default=0.5, metadata={"help": "w in loss = mlm_loss + w * mae_loss (paper: 0.5; released script: 0.1)."}
    )
    shift_labels: bool = field(
        default=True,
        metadata={
            "help": "Predict token i from the state at i - 1 (paper); False: from the state at i (released code)."
        },
    )
    max_length: int = field(
        default=2048, metadata={"help": "Most tokens a row keeps, image tokens included (paper: 2048)."}
    )
    max_cost: int | None = field(
        default=None,
        metadata={
            "help": "Fill micro-batches up to this cost (text + 4 * image tokens + 2 * images; paper: 12800), instead "
            "of per_device_train_batch_size rows."
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Rows of a micro-batch stand in one sequence without padding."}
    )
    shuffle_window: int = field(
        default=512, metadata={"help": "Rows that a reader holds and fills micro-batches from."}
    )
    exact_resize: bool = field(
        default=False, metadata={"help": "Resize images with Pillow, as embedding does: several times slower."}
    )
    max_bad_row_share: float = field(
        default=0.05,
        metadata={"help": "Stop once a larger share of all rows read is bad, even if bad rows are skipped."},
    )
    freeze_vision: bool = field(
        default=False,
        metadata={"help": "Keep the vision tower as it is; what maps its output to the language model still learns."},
    )
    on_bad_row: str = field(
        default="skip",
        metadata={
            "help": "What a row that cannot be used does: 'raise' an error naming it, or 'skip' it and count it in the "
            "logs.",
            "choices": list(ON_BAD_ROW),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("mlm_ratio", "mae_ratio"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.mlm_ratio == 0.0 and self.mae_ratio == 0.0:
            raise ValueError("mlm_ratio and mae_ratio are both 0: nothing is hidden, so there is nothing to learn.")
        if self.patch_noise not in PATCH_NOISES:
            raise ValueError(f"patch_noise must be one of {list(PATCH_NOISES)}, got {self.patch_noise!r}.")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row must be one of {list(ON_BAD_ROW)}, got {self.on_bad_row!r}.")
        if self.mae_loss_weight < 0.0:
            raise ValueError(f"mae_loss_weight must be at least 0, got {self.mae_loss_weight}.")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}.")
        if self.max_cost is not None and self.max_cost < self.max_length:
            raise ValueError(
                f"max_cost must be at least max_length={self.max_length}, the cost of the longest row, got "
                f"{self.max_cost}."
            )
        if self.shuffle_window < 1:
            raise ValueError(f"shuffle_window must be at least 1, got {self.shuffle_window}.")
        if not 0.0 <= self.max_bad_row_share <= 1.0:
            raise ValueError(f"max_bad_row_share must lie in [0, 1], got {self.max_bad_row_share}.")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the columns 'text' and 'images' before the collator sees them; "
                "leave it False."
            )
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False is not supported: the loss is the mean over the chosen tokens "
                "and patches of the whole step, over all ranks."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config dispatch_batches=True is not supported: it cuts `pixel_values` of a batch between "
                "ranks as if its rows were the rows of `input_ids`."
            )
        self.accelerator_config.dispatch_batches = False
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is not supported, got {self.label_smoothing_factor}.")


__all__ = ["ON_BAD_ROW", "CPTConfig"]
