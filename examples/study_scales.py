"""The study's two scales: one for two CPU cores, one for a GPU."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets of the study.

    Args:
        device: "cpu" or "cuda".
        num_processes: jobs at a time.
        num_merges: merges of Qwen2.5's tokenizer that are kept; all when None.
        shape: of the backbone, see `study_backbone.build_model`.
        num_image_tokens: most image tokens of an image.
        num_characters: of the pieces that documents are cut into for stage 1.
        cpt_max_length, pair_max_length: most tokens of a row of stage 1, and of a side of stage 2.
        backbone_steps, backbone_learning_rate: of the next-token training that makes the backbone.
        cpt_steps, cpt_batch_size: of stage 1; the backbone's batches are as large.
        cl_steps, cl_batch_size: of stage 2.
        rows_per_class: most photos of a class in stage 2.
        cpt_learning_rates: two of them, each tried with both of `cl_learning_rates`.
        cl_learning_rates: two of them.
        wide_learning_rates: of stage 2, for rows without stage 1: as many trials as the others have.
        seeds: of stage 1 and stage 2.
        num_dev_queries: most queries of a task while learning rates are chosen.
        precision: settings of the trainers.
    """

    device: str
    num_processes: int
    num_merges: int | None
    shape: dict
    num_image_tokens: int
    num_characters: int
    cpt_max_length: int
    pair_max_length: int
    backbone_steps: int
    backbone_learning_rate: float
    cpt_steps: int
    cpt_batch_size: int
    cl_steps: int
    cl_batch_size: int
    rows_per_class: int
    cpt_learning_rates: tuple
    cl_learning_rates: tuple
    wide_learning_rates: tuple
    seeds: tuple = (0, 1, 2)
    num_dev_queries: int = 200
    precision: dict = field(default_factory=dict)

    def __post_init__(self):
        num_trials = len(self.cpt_learning_rates) * len(self.cl_learning_rates)
        assert num_trials == len(self.wide_learning_rates), "every row has as many trials"
        assert self.cpt_steps % 8 == 0, "the model is kept after eighths of stage 1"


SCALES = {
    "cpu": Scale(
        device="cpu",
        num_processes=2,
        num_merges=8000,
        shape={
            "hidden_size": 96,
            "num_layers": 4,
            "num_heads": 3,
            "vision_hidden_size": 64,
            "vision_depth": 2,
            "rope_theta": 1000.0,
        },
        num_image_tokens=25,
        num_characters=260,
        cpt_max_length=128,
        pair_max_length=80,
        backbone_steps=500,
        backbone_learning_rate=2e-3,
        cpt_steps=200,
        cpt_batch_size=16,
        cl_steps=90,
        cl_batch_size=32,
        rows_per_class=30,
        cpt_learning_rates=(2e-3, 4e-3),
        cl_learning_rates=(3e-4, 1e-3),
        wide_learning_rates=(2e-4, 5e-4, 1e-3, 2e-3),
    ),
    "gpu": Scale(
        device="cuda",
        num_processes=1,
        num_merges=None,
        shape={
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "vision_hidden_size": 384,
            "vision_depth": 6,
            "rope_theta": 10000.0,
        },
        num_image_tokens=256,
        num_characters=2000,
        cpt_max_length=768,
        pair_max_length=384,
        backbone_steps=6000,
        backbone_learning_rate=5e-4,
        cpt_steps=2400,
        cpt_batch_size=32,
        cl_steps=600,
        cl_batch_size=64,
        rows_per_class=12,
        cpt_learning_rates=(2e-4, 5e-4),
        cl_learning_rates=(5e-5, 1e-4),
        wide_learning_rates=(2.5e-5, 5e-5, 1e-4, 2e-4),
        num_dev_queries=10_000,
        precision={"bf16": True},
    ),
}


def settings_of(scale):
    """Return a scale as JSON holds it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(scale).items()}
