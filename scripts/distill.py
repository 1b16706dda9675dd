"""Trains a classifier that a smaller trained model teaches (self-distillation, section 3.3 of the paper).

    accelerate launch scripts/distill.py --data IMAGES --teacher TEACHER --size middle --output-dir OUTPUT

TEACHER is a directory or a Hub id; everything else is as in finetune.py. The student's features of all tokens are drawn
to those of the teacher, which keeps a large model from overfitting. OUTPUT/best and OUTPUT/last are plain classifiers.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from pathlib import Path

from modeling_videomamba.training.classification import parse
from modeling_videomamba.training.distillation import DistillationArguments, DistillationRun
from modeling_videomamba.training.run import run_or_exit


def main() -> None:
    args, distillation = parse(__doc__ or "", Path(__file__).parent / "recipes", DistillationArguments)
    run_or_exit(lambda: DistillationRun(args, distillation))


if __name__ == "__main__":
    main()
