"""What a run leaves for its reader: pictures and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError

from .cards import CARD as CARD_FILE
from .evaluation import Predictions
from .names import SECONDS
from .plots import pyplot

METRICS = {
    "accuracy": "Top-1 accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "mean_class_accuracy": "Mean-class accuracy",
    "mse": "Mean squared error",
    "knn_accuracy": "Accuracy of the nearest neighbours",
    "linear_accuracy": "Accuracy of a linear probe",
    "evaluation_loss": "Distance from the teacher's features",
    "mean_feature_loss": "Distance of the teacher's mean feature from them",
    **{
        f"{key}_{metric}": f"{way}, {name}"
        for key, way in (("text_to_video", "Text to video"), ("video_to_text", "Video to text"))
        for metric, name in (
            ("r1", "recall at 1 (%)"),
            ("r5", "recall at 5 (%)"),
            ("r10", "recall at 10 (%)"),
            ("median_rank", "median rank"),
        )
    },
}
LOSSES = ("loss", "evaluation_loss", "mean_feature_loss")
MAX_NAMED_CLASSES = 40
UNKNOWN_LICENCE = "unknown"

CARD = """---
{{ card_data }}
---

# {{ model_name }}

A [VideoMamba](https://huggingface.co/papers/2403.06977) model, trained on `{{ dataset_name }}` ({{ start }}).

| {{ split }} split, {{ examples }} examples | |
|---|---|
{% for name, value in results.items() %}| {{ name }} | {{ "%.4f" | format(value) }} |
{% endfor %}
{% if licence == "unknown" %}Its licence is not stated: set `license` in the first lines before you publish it.

{% endif %}## Use

```python
{{ use }}
```
{% if classes %}
## Classes

{{ classes | length }}: {{ classes | join(", ") }}
{% endif %}
## Training

{{ steps }} steps of {{ views_per_step }} views on {{ processes }} process(es), seed {{ seed }}{{ broken }}.

```
{{ command }}
```
"""


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Loss, learning rate and the metrics of the evaluations against steps, as a picture."""
    plots = pyplot()
    panels = {
        "loss": [name for name in LOSSES if any(name in record for record in records)],
        "learning rate": ["learning_rate"],
        "gradient norm": ["gradient_norm"],
        "evaluation": [name for name in METRICS if any(name in record for record in records) and name not in LOSSES],
    }
    figure, axes = plots.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            # wider and further behind from line to line, so that none hides another of the same values
            style = {"linewidth": 1.5 + 2 * number, "zorder": 3 - number / len(names), "label": name}
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if title == "evaluation" else None, **style)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plots.close(figure)


def draw_confusion_matrix(predictions: Predictions, names: list[str], path: Path) -> None:
    """How often each class (rows, each summing to 1) was taken for which (columns), as a picture."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    plots = pyplot()
    labels = [int(label) for label in predictions.labels.values()]
    predicted = [int(predictions.scores[index].argmax()) for index in predictions.labels]
    matrix = confusion_matrix(labels, predicted, labels=range(len(names)), normalize="true")
    named = len(names) <= MAX_NAMED_CLASSES
    size = min(16.0, 3 + 0.4 * len(names))
    figure, axis = plots.subplots(figsize=(size, size), layout="constrained")
    display = ConfusionMatrixDisplay(np.nan_to_num(matrix), display_labels=names if named else None)
    display.plot(ax=axis, cmap="Blues", include_values=len(names) <= 12, values_format=".2f", xticks_rotation=90)
    if not named:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=120)
    plots.close(figure)


def origin_of(start: str | None) -> dict[str, Any]:
    """
    `base_model` and `licence` of what is trained from a directory or a Hub id: for a directory what its card says, for
    a Hub id the id itself and the licence that the Hub tells, if it can be reached.
    """
    if start is None:
        return {}
    card = Path(start, CARD_FILE)
    try:
        if Path(start).is_dir():
            data = ModelCard.load(card).data if card.is_file() else ModelCardData()
            base_model = data.base_model
        else:
            data, base_model = HfApi().model_info(start, timeout=SECONDS).card_data or ModelCardData(), start
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return {"base_model": None if Path(start).is_dir() else start}
    return {"base_model": base_model, "licence": data.license or UNKNOWN_LICENCE}


def model_card(
    *,
    model_name: str,
    pipeline_tag: str,
    dataset_name: str,
    split: str,
    results: dict[str, float],
    use: str,
    classes: Sequence[str] = (),
    base_model: str | list[str] | None = None,
    licence: str = UNKNOWN_LICENCE,
    **facts: Any,
) -> ModelCard:
    r"""
    Card of a trained model with its results.

    Args:
        model_name (`str`): Id on the Hub, or name of the folder.
        pipeline_tag (`str`): Task on the Hub.
        dataset_name, split (`str`): What `results` were measured on.
        results (`dict[str, float]`): Metrics.
        use (`str`): Python code.
        classes (`Sequence[str]`): Names of the classes, in order.
        base_model (`str` or `list[str]`, *optional*): Id on the Hub of the model that training started from.
        licence (`str`, defaults to `"unknown"`): As the Hub names it.
        facts: What else the template shows.

    Returns:
        `huggingface_hub.ModelCard`
    """
    evaluations = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset_name,
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=value,
        )
        for name, value in results.items()
    ]
    data = ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        license=licence,
        tags=["videomamba", "mamba"],
        eval_results=evaluations or None,
    )
    shown = {METRICS[name]: value for name, value in results.items()}
    template = {"model_name": model_name, "dataset_name": dataset_name, "split": split, "results": shown}
    template |= {"licence": licence, "classes": [f"`{name}`" for name in classes], **facts}
    return ModelCard.from_template(data, template_str=CARD, use=use.strip(), **template)
