"""Trains a classifier of videos or images, or a regressor, from a pretrained model or from scratch.

    python scripts/finetune.py --data CLIPS --model MODEL --output-dir OUTPUT

CLIPS is a folder in the `videofolder` or `imagefolder` layout of `datasets` (`train/LABEL/*.mp4`,
`test/LABEL/*.mp4`), a folder with `train.csv` and `val.csv` of `path,label`, a folder of `webdataset` shards, or a data
set on the Hub; MODEL is a directory or a Hub id, also of an image model, which becomes a video model. With --recipe the
values are those of a published run. OUTPUT/best and OUTPUT/last are the models.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from pathlib import Path

from command_line import parse_dataclasses, run_main
from videomamba_arguments import (
    LabelledAugmentationArguments,
    LabelledDataArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
)

RECIPES = Path(__file__).parent / "recipes"
CLASSES = (LabelledDataArguments, ModelArguments, LabelledAugmentationArguments, OptimizationArguments, RunArguments)


def main() -> None:
    groups = parse_dataclasses(__doc__ or "", *CLASSES, recipes=RECIPES)
    from modeling_videomamba.training.classification import ClassificationRun, LabelledArguments
    from modeling_videomamba.training.run import run_or_exit

    # a distillation head gets no gradient here, which several processes don't bear
    run_or_exit(lambda: ClassificationRun(LabelledArguments(*groups), teacher_hidden_size=None))


if __name__ == "__main__":
    run_main(main, go_on="--resume")
