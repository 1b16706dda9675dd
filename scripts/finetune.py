"""Trains a classifier of videos or images, or a regressor, from a pretrained model or from scratch.

    accelerate launch scripts/finetune.py --data CLIPS --model MODEL --output-dir OUTPUT

CLIPS is a folder in the `videofolder` or `imagefolder` layout of `datasets` (`train/LABEL/*.mp4`,
`test/LABEL/*.mp4`), a folder with `train.csv` and `val.csv` of `path,label`, a folder of `webdataset` shards, or a data
set on the Hub; MODEL is a directory or a Hub id, also of an image model, which becomes a video model. With --recipe the
values are those of a published run. OUTPUT/best and OUTPUT/last are the models.
"""

import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from modeling_videomamba.training.arguments import DataArguments, RunArguments, parse_arguments
from modeling_videomamba.training.augmentation import AugmentationArguments
from modeling_videomamba.training.classification import Arguments, ClassificationRun
from modeling_videomamba.training.diagnosis import NonFiniteError
from modeling_videomamba.training.models import ModelArguments
from modeling_videomamba.training.optimization import OptimizationArguments

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    classes = (DataArguments, ModelArguments, AugmentationArguments, OptimizationArguments, RunArguments)
    args = Arguments(*parse_arguments(__doc__ or "", RECIPES, *classes))
    try:
        # a distillation head gets no gradient here, which several processes don't bear
        run = ClassificationRun(args, teacher_hidden_size=None)
    except (OSError, ValueError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    try:
        run.train()
    except NonFiniteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
