"""Settings of the evaluation on MMEB."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .mmeb_rows import local_tasks
from .mmeb_tasks import TASKS, check_tasks


@dataclass
class MMEBConfig:
    """Which model to evaluate, on which tasks, and where the rows and images are.

    Args:
        model_name_or_path (`str`): a sentence-transformers model, or a MoCa checkpoint of either stage.
        model_revision (`str`, *optional*): branch, tag or commit on the Hub.
        model_id (`str`, *optional*): what results call the model; its Hub id, or the name of its folder, when omitted.
        trust_remote_code (`bool`, defaults to `False`): run the code of a model on the Hub.
        dtype (`str`, defaults to `"auto"`): type of the weights, such as `"bfloat16"`; `"auto"` is the checkpoint's.
            Scores are float64 always.
        attn_implementation (`str`, *optional*): as in transformers.
        device (`str`, *optional*): where to encode; chosen by sentence-transformers when omitted.
        max_length (`int`, *optional*): most tokens of an input; the model's own limit when omitted.
        dataset_path (`str`, defaults to `"TIGER-Lab/MMEB-eval"`): Hub id, whose rows are streamed; or a folder with a
            folder a task, which holds `test*.parquet` or `test*.jsonl`, as the Hub's repository does.
        dataset_revision (`str`, *optional*): branch, tag or commit on the Hub; results name the commit.
        image_folder (`str`, *optional*): folder or zip file that image paths are below: the repository's `images.zip`,
            as it is or unpacked. `images` or `images.zip` in a local `dataset_path` when omitted.
        tasks (`list[str]`, *optional*): names of tasks; all 36, or those that a local folder has, when omitted.
        strip_text (`bool`, defaults to `False`): leave out the white space around a text and its image, as stage 2 of
            this project does; the authors' code keeps it, a line break behind the image in most tasks.
        output_dir (`str`): folder for `results/<task>.json`, which model cards read, `counts/<task>.json`,
            `summary.md`, `summary.csv`, and `settings.json`. A task whose result is there is not run again.
        max_tokens (`int`, defaults to 16,384): most tokens of a batch, image tokens and padding included; an input that
            has more stands alone. Counted with a `MoCaProcessor` only.
        batch_size (`int`, defaults to 64): most inputs of a batch.

    Raises:
        ValueError: a number is out of range, a task is unknown, or something is missing.
    """

    model_name_or_path: str = ""
    model_revision: str | None = None
    model_id: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    max_length: int | None = None
    dataset_path: str = "TIGER-Lab/MMEB-eval"
    dataset_revision: str | None = None
    image_folder: str | None = None
    tasks: list[str] = field(default_factory=list, metadata={"help": "Names of tasks; all there are when omitted."})
    strip_text: bool = False
    output_dir: str = ""
    max_tokens: int = 16384
    batch_size: int = 64

    def __post_init__(self):
        for name in ("output_dir", "model_name_or_path"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given.")
        for name in ("max_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        check_tasks(self.tasks)
        local = Path(self.dataset_path).is_dir()
        if not self.tasks:
            self.tasks = local_tasks(self.dataset_path) if local else list(TASKS)
        if not self.tasks:
            raise ValueError(f"{self.dataset_path} has no folder of a task; allowed are {list(TASKS)}.")
        if self.image_folder is None and local:
            beside = [Path(self.dataset_path) / name for name in ("images", "images.zip")]
            self.image_folder = next((str(path) for path in beside if path.exists()), None)
        if self.model_id is None:
            is_folder = Path(self.model_name_or_path).is_dir()
            self.model_id = Path(self.model_name_or_path).resolve().name if is_folder else self.model_name_or_path


__all__ = ["MMEBConfig"]
