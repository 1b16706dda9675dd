"""Trains a classifier that a smaller trained model teaches (self-distillation, section 3.3 of the paper).

    accelerate launch scripts/distill.py --data IMAGES --teacher TEACHER --size middle --output-dir OUTPUT

TEACHER is a directory or a Hub id; everything else is as in finetune.py. The student's features of all tokens are drawn
to those of the teacher, which keeps a large model from overfitting. OUTPUT/best and OUTPUT/last are plain classifiers.
"""

import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from modeling_videomamba.training.arguments import DataArguments, RunArguments, parse_arguments
from modeling_videomamba.training.augmentation import AugmentationArguments
from modeling_videomamba.training.classification import Arguments
from modeling_videomamba.training.diagnosis import NonFiniteError
from modeling_videomamba.training.distillation import DistillationArguments, DistillationRun
from modeling_videomamba.training.models import ModelArguments
from modeling_videomamba.training.optimization import OptimizationArguments

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    classes = (DataArguments, ModelArguments, AugmentationArguments, OptimizationArguments, RunArguments)
    *groups, distillation = parse_arguments(__doc__ or "", RECIPES, *classes, DistillationArguments)
    try:
        run = DistillationRun(Arguments(*groups), distillation)
    except (OSError, ValueError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    try:
        run.train()
    except NonFiniteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
