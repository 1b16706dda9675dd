"""Pretrains VideoMamba on videos or images without labels: masked, against a CLIP teacher (UMT; paper, section 3.3).

    python scripts/pretrain_umt.py --data CLIPS --teacher openai/clip-vit-base-patch16 --size middle \\
        --output-dir OUTPUT

Most tokens of a clip are hidden from the model, which learns to give the others the features that CLIP gives them in
the whole clip. CLIPS is what finetune.py takes; labels are not used. OUTPUT/best and OUTPUT/last are what finetune.py
starts from: --model OUTPUT/best. With --recipe the values are those of a published run.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

from pathlib import Path

from command_line import parse_dataclasses, run_main
from videomamba_arguments import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PretrainingArguments,
    RunArguments,
)

RECIPES = Path(__file__).parent / "recipes" / "umt"
CLASSES = (
    DataArguments,
    ModelArguments,
    AugmentationArguments,
    OptimizationArguments,
    RunArguments,
    PretrainingArguments,
)


def main() -> None:
    *groups, pretraining = parse_dataclasses(__doc__ or "", *CLASSES, recipes=RECIPES)
    from modeling_videomamba.training.pretraining import PretrainingRun, UnlabelledArguments
    from modeling_videomamba.training.run import run_or_exit

    run_or_exit(lambda: PretrainingRun(UnlabelledArguments(*groups), pretraining))


if __name__ == "__main__":
    run_main(main, go_on="--resume")
