"""The rows of the study's table, and what the paper says of them."""

from dataclasses import dataclass

# What stage 1 differs in; None is next-token training in its place, on the same rows.
PRETRAININGS = {
    "moca": {},
    "without MLM": {"mlm_ratio": 0.0},
    "without MAE": {"mae_ratio": 0.0},
    "labels not shifted": {"shift_labels": False},
    "next token": None,
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        pretraining: key of `PRETRAININGS`; None without stage 1.
        part: which model of stage 1: "last", or "1-8", "2-8", "4-8" on the way.
        bidirectional: of rows without stage 1.
        leave_out: families of pairs that stage 2 does without.
        task_batches: whether a batch of stage 2 is of one task.
    """

    pretraining: str | None = None
    part: str = "last"
    bidirectional: bool = True
    leave_out: tuple = ()
    task_batches: bool = True


MOCA = "MoCa: CPT + CL"
ROWS = {
    "causal + CL": Row(bidirectional=False),
    "causal, next-token training + CL": Row("next token"),
    "bidirectional + CL": Row(),
    MOCA: Row("moca"),
    "without MLM": Row("without MLM"),
    "without MAE": Row("without MAE"),
    "without text pairs": Row("moca", leave_out=("text",)),
    "without long-form pairs": Row("moca", leave_out=("long-form",)),
    "without task-aware batches": Row("moca", task_batches=False),
    "labels not shifted": Row("labels not shifted"),
    "1/8 of CPT": Row("moca", part="1-8"),
    "1/4 of CPT": Row("moca", part="2-8"),
    "1/2 of CPT": Row("moca", part="4-8"),
}
# Settings of stage 1 beside the ones that the table has; learning rates are factors of the one that was chosen.
CURVES = {
    "mlm_ratio": (0.2, 0.6, 0.8),
    "mae_ratio": (0.25, 0.75),
    "mae_loss_weight": (0.1, 1.0, 2.0),
    "learning_rate": (0.25, 2.0),
}


@dataclass(frozen=True)
class Claim:
    """Something the paper says of two rows of its tables, or that is asked of them here.

    Args:
        text: what is said.
        better, worse: rows of the table.
        paper: its numbers for them (MMEB's Precision@1 of the 3B model); empty where it has none.
    """

    text: str
    better: str
    worse: str
    paper: str = ""


CLAIMS = {
    "attention": Claim(
        "Without CPT, bidirectional attention is no better than causal attention",
        "causal + CL",
        "bidirectional + CL",
        "66.4, 65.4",
    ),
    "cpt": Claim("CPT helps a bidirectional model", MOCA, "bidirectional + CL", "67.5, 65.8"),
    "causal": Claim("MoCa is better than the causal model", MOCA, "causal + CL", "67.5, 66.4"),
    "tokens": Claim("What helps is more than more training on the same rows", MOCA, "causal, next-token training + CL"),
    "mlm": Claim("MLM is needed", MOCA, "without MLM", "67.5, 66.2"),
    "mae": Claim("MAE is needed", MOCA, "without MAE", "67.5, 66.8"),
    "text_pairs": Claim("Text pairs help", MOCA, "without text pairs", "67.5, 67.1"),
    "long_form_pairs": Claim("Long-form pairs help", MOCA, "without long-form pairs", "67.5, 66.9"),
    "batches": Claim("Task-aware batches help", MOCA, "without task-aware batches", "67.5, 67.2"),
    "shift": Claim("Labels of MLM should be shifted", MOCA, "labels not shifted"),
    "steps": Claim("More steps of CPT help", MOCA, "1/8 of CPT", "67.5, 66.0 (500 steps)"),
}
STEPS = {"bidirectional + CL": 0, "1/8 of CPT": 1 / 8, "1/4 of CPT": 1 / 4, "1/2 of CPT": 1 / 2, MOCA: 1}
