"""Tests a classifier or regressor of videos or images on labelled data, with several views of each.

    python scripts/evaluate_video.py MODEL --data CLIPS --num-clips 4 --num-crops 3 --output-dir OUTPUT

CLIPS is what finetune.py takes. OUTPUT/predictions.jsonl gets a line for each video, OUTPUT/metrics.json the metrics. A
run may be stopped at any moment and started again: it goes on with the videos that have no line yet, also on another
number of processes.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from dataclasses import dataclass, field
from pathlib import Path

from command_line import parse_dataclasses, run_main
from videomamba_arguments import MIXED_PRECISION, LabelledDataArguments
from videomamba_arguments.data import DATA


@dataclass
class Arguments:
    """Test: what is tested, and how."""

    model: str = field(metadata={"help": "directory or Hub id", "positional": True})
    output_dir: Path = field(metadata={"help": "folder for predictions and metrics"})
    split: str | None = field(
        default=None, metadata={"help": "split of --data to test on (default: validation, or else test)"}
    )
    num_clips: int = field(default=1, metadata={"help": "clips along time of each video"})
    num_crops: int = field(default=1, metadata={"help": "crops in space of each clip"})
    batch_size: int = field(default=8, metadata={"help": "videos of a batch on each process"})
    mixed_precision: str | None = field(default=None, metadata={"help": MIXED_PRECISION})

    def __post_init__(self):
        for name in ("num_clips", "num_crops", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass
class TestDataArguments(LabelledDataArguments):
    """Data: videos or images with labels."""

    data: str = field(
        metadata={"help": f"{DATA}; whole numbers are indices of the model's classes, unless one is called by a number"}
    )


CLASSES = (Arguments, TestDataArguments)


def main() -> None:
    args, data = parse_dataclasses(__doc__ or "", *CLASSES)
    from video_evaluation import run

    run(args, data)


if __name__ == "__main__":
    run_main(main, go_on="the same command")
