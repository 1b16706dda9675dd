"""Pretrains VideoMamba and a BERT on videos and images with texts, for retrieval (UMT; paper, section 4.4).

    python scripts/pretrain_video_text.py --recipe 5m --data WEBVID --more-data CC3M \\
        --vision VIDEOMAMBA --text google-bert/bert-base-uncased --teacher openai/clip-vit-base-patch16 \\
        --output-dir OUTPUT
    python scripts/pretrain_video_text.py --recipe 5m-unmasked --data WEBVID --more-data CC3M \\
        --model OUTPUT/last --output-dir OUTPUT-UNMASKED

Data are what finetune.py takes, with captions instead of labels: lists of `path,caption`, or JSON with several captions
of a video, tar shards with `txt`, or a data set on the Hub. Each batch is of videos or of images. First most tokens are
hidden, and those that are not are aligned with a CLIP teacher; then a short run goes on without masks.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from pathlib import Path

from command_line import parse_dataclasses, run_main
from videomamba_arguments import (
    AugmentationArguments,
    CaptionedDataArguments,
    OptimizationArguments,
    RunArguments,
    VideoTextArguments,
    VideoTextModelArguments,
)

RECIPES = Path(__file__).parent / "recipes" / "video-text"
CLASSES = (
    CaptionedDataArguments,
    VideoTextModelArguments,
    AugmentationArguments,
    OptimizationArguments,
    RunArguments,
    VideoTextArguments,
)


def main() -> None:
    *groups, pretraining = parse_dataclasses(__doc__ or "", *CLASSES, recipes=RECIPES)
    from modeling_videomamba.training.run import run_or_exit
    from modeling_videomamba.training.video_text import CaptionedArguments, VideoTextRun

    run_or_exit(lambda: VideoTextRun(CaptionedArguments(*groups), pretraining))


if __name__ == "__main__":
    run_main(main, go_on="--resume")
