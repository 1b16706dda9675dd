"""Tests a model of videos and texts: how well it finds videos by texts, and texts by videos.

    python scripts/evaluate_retrieval.py MODEL --data CLIPS --output-dir OUTPUT
    python scripts/evaluate_retrieval.py MODEL --annotations msrvtt_ret_test1k.json --videos VIDEOS \\
        --output-dir OUTPUT

CLIPS is what pretrain_video_text.py takes. --annotations takes the files of MSR-VTT, DiDeMo, ActivityNet Captions,
LSMDC and MSVD as they are published. Videos and texts are ranked by the dual encoder, the first --top-k of each query
again by the fusion layers. OUTPUT/metrics.json gets the metrics. A run may be stopped at any moment and started again,
also on another number of processes or with another --top-k than 0: what is encoded stays in OUTPUT, in half precision.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from dataclasses import dataclass, field
from pathlib import Path

from command_line import parse_dataclasses, run_main
from videomamba_arguments import MAX_TEXT_LENGTH, MIXED_PRECISION, ON_BROKEN_VIDEO


@dataclass
class Arguments:
    """Test: what is tested, and how."""

    model: str = field(metadata={"help": "directory or Hub id", "positional": True})
    output_dir: Path = field(metadata={"help": "folder for the metrics, and for what is encoded while it runs"})
    data: str | None = field(default=None, metadata={"help": "videos or images with captions (default: --annotations)"})
    data_root: Path | None = field(
        default=None, metadata={"help": "folder that the paths in lists are relative to (default: the list's)"}
    )
    split: str | None = field(default=None, metadata={"help": "split of --data (default: validation, or else test)"})
    annotations: Path | None = field(default=None, metadata={"help": "file of a benchmark (default: --data)"})
    videos: Path | None = field(
        default=None, metadata={"help": "folder with the videos of --annotations (default: --data)"}
    )
    annotation_split: str | None = field(
        default=None, metadata={"help": "split in a file of MSR-VTT (default: all videos)"}
    )
    names: Path | None = field(
        default=None, metadata={"help": "text file with the names of the videos to take (default: all videos)"}
    )
    paragraphs: bool = field(default=False, metadata={"help": "join the captions of a video (ActivityNet, DiDeMo)"})
    first_seconds: float | None = field(
        default=None, metadata={"help": "seconds of each video that are seen, 30 for DiDeMo (default: all)"}
    )
    top_k: int = field(default=128, metadata={"help": "candidates of a query to rank again, 0 for none"})
    max_text_length: int = field(default=32, metadata=MAX_TEXT_LENGTH)
    batch_size: int = field(default=8, metadata={"help": "videos of a batch on each process"})
    num_workers: int = field(default=4, metadata={"help": "decoding processes of each process"})
    on_broken_video: str = field(default="raise", metadata=ON_BROKEN_VIDEO)
    mixed_precision: str | None = field(default=None, metadata={"help": MIXED_PRECISION})

    def __post_init__(self):
        if (self.data is None) == (self.annotations is None):
            raise ValueError("pass one of --data and --annotations")
        if (self.annotations is None) != (self.videos is None):
            raise ValueError("--annotations and --videos go together")
        other = ("split", "data_root") if self.data is None else ("annotation_split", "names")
        for name in other:
            if getattr(self, name) is not None:
                owner = "--data" if self.data is None else "--annotations"
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is for {owner}")
        for name, least in (("top_k", 0), ("max_text_length", 3), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.first_seconds is not None and self.first_seconds <= 0:
            raise ValueError(f"--first-seconds must be positive, got {self.first_seconds}")


def main() -> None:
    (args,) = parse_dataclasses(__doc__ or "", Arguments)
    from retrieval_evaluation import run

    run(args)


if __name__ == "__main__":
    run_main(main, go_on="the same command")
