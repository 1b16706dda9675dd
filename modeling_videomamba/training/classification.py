"""Training of classifiers and regressors of videos and images."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from videomamba_arguments import (
    LabelledAugmentationArguments,
    LabelledDataArguments,
    ModelArguments,
)

from .augmentation import Mixing
from .data import EvaluationViews, cut_into_windows, hold_back
from .evaluation import Predictions, class_scores, compute_metrics, predict
from .loop import Batch
from .losses import classification_loss, regression_loss
from .models import load_classifier
from .reports import draw_confusion_matrix
from .run import Arguments, TrainingRun
from .sources import EVALUATION_SPLITS, Split, find_evaluation_split, load_split, media_kind, split_names

CARD_USE = """
from transformers import pipeline

classifier = pipeline("{task}", model="{model_name}", trust_remote_code=True)
classifier("{example}")
"""


@dataclass
class LabelledArguments(Arguments):
    """What a run with labels is told."""

    data: LabelledDataArguments
    model: ModelArguments
    augmentation: LabelledAugmentationArguments


class ClassificationRun(TrainingRun):
    r"""
    A run of training of a classifier or, where the labels are numbers, a regressor.

    Args:
        args ([`LabelledArguments`]): Of the run.
        model_changes: Fields of the model's configuration.

    Raises:
        `OSError`, `ValueError`: for data, a model or values that don't fit.
    """

    args: LabelledArguments

    def __init__(self, args: LabelledArguments, **model_changes: Any):
        self.model_changes = model_changes
        self.predictions = Predictions()
        super().__init__(args)
        for name, split in (("train", self.train_split), (self.evaluation_name, self.test_split)):
            self.check_readable(name, split, EvaluationViews(self.processor))
        self.mixing = None if self.label_names is None else Mixing(args.augmentation, len(self.label_names))

    def load_data(self) -> None:
        data = self.args.data
        options: dict[str, Any] = {"data_root": data.data_root, "regression": data.regression}
        names = data.label_names()
        self.train_split = load_split(data.data, "train", streaming=data.streaming, label_names=names, **options)
        self.kind = media_kind(self.train_split)
        self.label_names: list[str] | None = getattr(self.train_split.features["label"], "names", None)
        self.regression = self.label_names is None
        self.metric, self.minimize = ("mse", True) if self.regression else ("accuracy", False)
        mixing = self.args.augmentation
        if self.regression and (mixing.mixup or mixing.cutmix or mixing.label_smoothing):
            raise ValueError("--mixup, --cutmix and --label-smoothing are for classes, the labels are numbers")
        options |= {"regression": self.regression, "label_names": self.label_names, "indices": names is not None}
        self.evaluation_name, self.test_split = self._evaluation_split(options)
        if self.label_names is not None and len(self.label_names) < 2:
            raise ValueError(f"{data.data} must have labels of at least two classes, got {self.label_names[0]!r} alone")
        if media_kind(self.test_split) != self.kind:
            raise ValueError(
                f"{data.data}: the training split has a column {self.kind}, the {self.evaluation_name} split not"
            )
        if data.clip_seconds is not None:
            self.train_split = cut_into_windows(self.train_split, data.clip_seconds, data.clip_stride_seconds)
            self.test_split = cut_into_windows(self.test_split, data.clip_seconds, data.clip_stride_seconds)

    def _evaluation_split(self, options: dict[str, Any]) -> tuple[str, Split]:
        """Name and data of the split to evaluate on, or what is held back of the split train."""
        data = self.args.data
        has_split = set(EVALUATION_SPLITS) & set(split_names(data.data))
        if data.validation_share is None:
            if not has_split:
                raise ValueError(
                    f"{data.data} has no split validation or test: "
                    "--validation-share 0.2 evaluates on a fifth of the split train"
                )
            name = find_evaluation_split(data.data)
            return name, load_split(data.data, name, **options)
        share = f"--validation-share {data.validation_share:g}"
        if has_split:
            raise ValueError(f"{share}: {data.data} has a split {min(has_split)} to evaluate on")
        if data.streaming:
            raise ValueError(f"{share}: --streaming doesn't tell beforehand what there is to hold back")
        seed, examples = self.args.run.seed, len(self.train_split)
        held_back = hold_back(self.train_split["label"], data.validation_share, seed, by_class=not self.regression)
        if not held_back:
            raise ValueError(f"{share} of {examples} training examples holds none back: there must be more of a class")
        kept = sorted(set(range(examples)) - set(held_back))
        test_split, self.train_split = self.train_split.select(held_back), self.train_split.select(kept)
        if self.accelerator.is_main_process:
            way = "at random" if self.regression else "of each class alike"
            print(f"evaluates on {len(held_back)} of {examples} training examples, drawn {way} ({share}, seed {seed})")
        return "validation", test_split

    def load_model(self) -> PreTrainedModel:
        return load_classifier(self.args.model, self.kind, self.label_names, **self.model_changes)

    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy, or squared error for regression."""
        pixel_values, targets = self.mix(batch)
        return {"loss": self.loss(model(pixel_values).logits, targets)}

    def mix(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and targets after mixup, cutmix and label smoothing."""
        if self.mixing is None:
            return batch["pixel_values"], batch["labels"]
        return self.mixing(batch["pixel_values"], batch["labels"], batch["valid"])

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`(rows,)`"""
        return regression_loss(logits, targets) if self.regression else classification_loss(logits, targets)

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics on the test split, and the files of it that could not be read."""
        batches = self.batches_once(self.test_split, EvaluationViews(self.processor))
        score = partial(class_scores, model, regression=self.regression)
        predictions = predict(self.accelerator, model, score, batches)
        if "source" in self.test_split.features:
            predictions = predictions.grouped(dict(enumerate(self.test_split["source"])))
        self.predictions, self.evaluated = predictions, len(predictions.scores)
        return compute_metrics(predictions, self.regression, self.evaluation_name), predictions.broken

    def report(self) -> dict[str, Any]:
        if not self.regression:
            path = self.args.run.output_dir / "confusion_matrix.png"
            draw_confusion_matrix(self.predictions, self.label_names or [], path)
        return {}

    def classes(self) -> list[str]:
        return self.label_names or []

    def pipeline_tag(self) -> str:
        return f"{self.kind}-classification"

    def card_use(self, model_name: str) -> str:
        example = "clip.mp4" if self.kind == "video" else "picture.jpg"
        return CARD_USE.format(task=self.pipeline_tag(), model_name=model_name, example=example)
