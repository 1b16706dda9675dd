"""Scores of a model for every example of a split exactly once, on any number of processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .diagnosis import NothingReadError
from .metrics import ClassificationMetric, RegressionMetric


@dataclass
class Predictions:
    """Scores and labels by the index of the example, and files that could not be read: reasons by their paths."""

    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    labels: dict[int, float] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def grouped(self, groups: dict[int, int]) -> "Predictions":
        """Mean scores of the windows that belong to one video; `groups` gives the video of an example."""
        members: dict[int, list[int]] = {}
        for index in self.scores:
            members.setdefault(groups[index], []).append(index)
        return Predictions(
            {group: torch.stack([self.scores[index] for index in rows]).mean(0) for group, rows in members.items()},
            {group: self.labels[rows[0]] for group, rows in members.items()},
            self.broken,
        )


def is_regression(model: PreTrainedModel) -> bool:
    """Whether its logits are numbers rather than scores of classes."""
    return model.config.problem_type == "regression"


def class_scores(model: nn.Module, pixel_values: torch.Tensor, regression: bool) -> torch.Tensor:
    """Probabilities of the classes, or the values of a regressor, `(rows, num_labels)`."""
    logits = model(pixel_values).logits.float()
    return logits if regression else logits.softmax(-1)


def predict_batch(
    accelerator: Accelerator, score: Callable[[torch.Tensor], torch.Tensor], batch: dict[str, Any]
) -> list[tuple[int, torch.Tensor, float]]:
    r"""
    Index, scores and label of each example of a batch that is `valid`. `score` makes scores `(rows, size)` of pixels;
    those of the views of an example are averaged.
    """
    with torch.no_grad(), accelerator.autocast():
        scores = score(send_to_device(batch["pixel_values"], accelerator.device)).cpu()
    predictions = []
    for index in batch["indices"][batch["valid"]].unique().tolist():
        rows = batch["indices"] == index
        predictions.append((index, scores[rows].mean(0), batch["labels"][rows][0].item()))
    return predictions


def predict(
    accelerator: Accelerator,
    model: nn.Module,
    score: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[dict[str, Any]],
) -> Predictions:
    """What `score` makes of the examples of `batches` on all processes, known to each of them; `model` is tested."""
    was_training = model.training
    model.eval()
    found: list[tuple[int, torch.Tensor, float]] = []
    broken: list[tuple[str, str]] = []
    for batch in batches:
        broken += batch["broken"]
        found += predict_batch(accelerator, score, batch)
    model.train(was_training)
    found, broken = gather_object(found), gather_object(broken)
    return Predictions(
        {index: scores for index, scores, _ in found}, {index: label for index, _, label in found}, dict(broken)
    )


def compute_metrics(predictions: Predictions, regression: bool, split_name: str = "given") -> dict[str, float]:
    """
    Metrics of [`ClassificationMetric`] or [`RegressionMetric`]. Raises [`NothingReadError`] if nothing was predicted.
    """
    if not predictions.scores:
        raise NothingReadError(split_name, predictions.broken)
    indices = sorted(predictions.scores)
    scores = torch.stack([predictions.scores[index] for index in indices]).numpy()
    labels = [predictions.labels[index] for index in indices]
    metric = RegressionMetric(keep_in_memory=True) if regression else ClassificationMetric(keep_in_memory=True)
    return metric.compute(predictions=scores[:, 0] if regression else scores, references=labels)
