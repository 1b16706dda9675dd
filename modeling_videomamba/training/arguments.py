"""Arguments that the training scripts share, from recipes and the command line."""

import argparse
import json
import sys
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

STARTS = {"model", "config", "size", "vision", "text"}  # those of a recipe give way to any that is given


@dataclass
class DataArguments:
    """Videos or images."""

    data: str = field(
        metadata={"help": "folder in the videofolder or imagefolder layout, of lists or of tar shards, or Hub id"}
    )
    data_root: Path | None = field(default=None, metadata={"help": "what the paths of lists are relative to"})
    streaming: bool = field(default=False, metadata={"help": "read the training shards as they come"})
    clip_seconds: float | None = field(default=None, metadata={"help": "cut videos into windows of so many seconds"})
    clip_stride_seconds: float = field(default=16.0, metadata={"help": "one window each so many seconds"})
    on_broken_video: str = field(default="raise", metadata={"help": "skip or raise", "choices": ["skip", "raise"]})
    num_workers: int = field(default=4, metadata={"help": "decoding processes of each process"})

    def __post_init__(self):
        for name in ("clip_seconds", "clip_stride_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if self.num_workers < 0:
            raise ValueError(f"--num-workers must not be negative, got {self.num_workers}")


@dataclass
class LabelledDataArguments(DataArguments):
    """Labelled videos or images."""

    label_file: Path | None = field(default=None, metadata={"help": "names of the classes, one a line, in order"})
    regression: bool = field(default=False, metadata={"help": "whole numbers are values to predict, not classes"})

    def label_names(self) -> list[str] | None:
        """Names of `label_file`."""
        if self.label_file is None:
            return None
        return [line for line in self.label_file.read_text("utf-8").splitlines() if line.strip()]


@dataclass
class RunArguments:
    """Where a run goes, and what it leaves on its way."""

    output_dir: Path = field(metadata={"help": "of models, states, metrics and pictures"})
    seed: int = 0
    steps_per_epoch: int | None = field(default=None, metadata={"help": "of a stream, whose length is not known"})
    evaluation_epochs: int = field(default=1, metadata={"help": "epochs from one evaluation to the next"})
    log_steps: int = field(default=10, metadata={"help": "steps from one line of metrics.jsonl to the next"})
    save_steps: int = field(default=500, metadata={"help": "steps from one state on disk to the next"})
    resume: bool = field(default=False, metadata={"help": "go on from the last state in --output-dir, if there is one"})
    report_to: str = field(default="tensorboard", metadata={"help": "tracker of accelerate, or none"})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id to which the best model is uploaded"})

    def __post_init__(self):
        for name in ("evaluation_epochs", "log_steps", "save_steps", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name old -> new` for each value of `now` that isn't as it was."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]


def check_settings(path: Path, settings: dict[str, Any], owner: str) -> None:
    """
    What is computed with other settings is not mixed: writes them to a JSON file, or raises `ValueError` where those in
    the file are others. `owner` says what they are of.
    """
    if path.exists():
        if changed := differences(json.loads(path.read_text("utf-8")), settings):
            raise ValueError(f"{owner}, with other settings: {', '.join(changed)}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(f".{uuid.uuid4().hex}")
    writing.write_text(json.dumps(settings, indent=2), "utf-8")
    writing.replace(path)


def parse_arguments(description: str, recipes: Path, *classes: Any) -> tuple[Any, ...]:
    r"""
    Values of dataclasses from the command line and, with `--recipe`, from a recipe: a YAML file in `recipes`, or a
    path. What the command line gives goes before what the recipe gives. Ends the process with a message for wrong ones.

    Args:
        description (`str`): Of the script.
        recipes (`Path`): Folder of the recipes.
        classes: Dataclasses.

    Returns:
        `tuple`: One instance of each class.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe")
    recipe, rest = first.parse_known_args()
    parser = HfArgumentParser(classes, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in recipes.glob("*.yaml"))
    parser.add_argument("--recipe", help=f"values of a published run: one of {', '.join(names)}, or a YAML file")
    if recipe.recipe is not None:
        parser.set_defaults(**_read_recipe(recipe.recipe, recipes, names, classes, rest))
    try:
        return parser.parse_args_into_dataclasses(rest)[: len(classes)]
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


def _read_recipe(name: str, recipes: Path, names: list[str], classes: Any, given: list[str]) -> dict[str, Any]:
    path = recipes / f"{name}.yaml" if name in names else Path(name)
    if not path.is_file():
        sys.exit(f"error: --recipe {name}: neither a file nor one of {', '.join(names)}")
    values = yaml.safe_load(path.read_text("utf-8"))
    known = {item.name for item_class in classes for item in fields(item_class)}
    unknown = set(values) - known
    if unknown:
        sys.exit(f"error: --recipe {name}: this script has no {', '.join(sorted(unknown))}")
    starts = {word.removeprefix("--").split("=")[0] for word in given} & STARTS
    return {name: value for name, value in values.items() if not (starts and name in STARTS)}
