"""Trains a classifier that a smaller trained model teaches (self-distillation, section 3.3 of the paper).

    python scripts/distill.py --data IMAGES --teacher TEACHER --size middle --output-dir OUTPUT

TEACHER is a directory or a Hub id; everything else is as in finetune.py. The student's features of all tokens are drawn
to those of the teacher, which keeps a large model from overfitting. OUTPUT/best and OUTPUT/last are plain classifiers.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from command_line import parse_dataclasses, run_main
from finetune import CLASSES, RECIPES
from videomamba_arguments import DistillationArguments


def main() -> None:
    *groups, distillation = parse_dataclasses(__doc__ or "", *CLASSES, DistillationArguments, recipes=RECIPES)
    from modeling_videomamba.training.classification import LabelledArguments
    from modeling_videomamba.training.distillation import DistillationRun
    from modeling_videomamba.training.run import run_or_exit

    run_or_exit(lambda: DistillationRun(LabelledArguments(*groups), distillation))


if __name__ == "__main__":
    run_main(main, go_on="--resume")
