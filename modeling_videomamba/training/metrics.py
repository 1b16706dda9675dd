"""Metrics of classification and regression as modules of `evaluate`, which need no network, and of retrieval."""

import datasets
import evaluate
import numpy as np
import torch

CITATION = "https://huggingface.co/papers/2403.06977"


class ClassificationMetric(evaluate.Metric):
    """
    Top-1, top-5 and mean-class accuracy of scores of all classes (`predictions`) for class indices (`references`).
    Among equal scores the lowest class counts as predicted.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation=CITATION, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        best = np.argsort(-scores, axis=1, kind="stable")
        hits = best[:, 0] == labels
        return {
            "accuracy": float(hits.mean()),
            "top5_accuracy": float((best[:, :5] == labels[:, None]).any(axis=1).mean()),
            "mean_class_accuracy": float(np.mean([hits[labels == label].mean() for label in np.unique(labels)])),
        }


class RegressionMetric(evaluate.Metric):
    """Mean squared error of numbers (`predictions`, `references`)."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation=CITATION, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"mse": float(np.square(np.asarray(predictions, float) - np.asarray(references, float)).mean())}


def retrieval_recall(
    video_to_text: torch.Tensor, text_to_video: torch.Tensor, video_of_text: torch.Tensor
) -> dict[str, float]:
    r"""
    Recall at 1, 5 and 10 in percent: how often the best ranked true match is among the first. A video may have several
    texts. Wrong candidates with the score of the true one rank before it, so that equal scores earn nothing.

    Args:
        video_to_text (`torch.Tensor` of shape `(videos, texts)`): Scores by which texts are ranked for each video.
        text_to_video (`torch.Tensor` of shape `(texts, videos)`): Scores by which videos are ranked for each text.
        video_of_text (`torch.Tensor` of shape `(texts,)`): Index of the video that each text describes.

    Returns:
        `dict[str, float]`: `video_to_text_r1`, `..._r5`, `..._r10`, and the same for `text_to_video`.

    Raises:
        `ValueError`: if the shapes do not fit, a video has no text, or a score is NaN.
    """
    return _recall(_ranks(video_to_text, text_to_video, video_of_text))


def _recall(ranks: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        f"{direction}_r{k}": 100 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in (1, 5, 10)
    }


def retrieval_metrics(
    video_to_text: torch.Tensor, text_to_video: torch.Tensor, video_of_text: torch.Tensor
) -> dict[str, float]:
    """[`retrieval_recall`], and `video_to_text_median_rank` and `text_to_video_median_rank`, from 1 on."""
    ranks = _ranks(video_to_text, text_to_video, video_of_text)
    medians = {f"{name}_median_rank": 1 + rank.double().quantile(0.5).item() for name, rank in ranks.items()}
    return {**_recall(ranks), **medians}


def _ranks(
    video_to_text: torch.Tensor, text_to_video: torch.Tensor, video_of_text: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Number of wrong candidates before the best true one `(queries,)`, in each direction."""
    videos, texts = video_to_text.shape
    if text_to_video.shape != (texts, videos) or video_of_text.shape != (texts,):
        raise ValueError(
            f"`video_to_text` is {tuple(video_to_text.shape)}: `text_to_video` must be {(texts, videos)} and "
            f"`video_of_text` {(texts,)}, got {tuple(text_to_video.shape)} and {tuple(video_of_text.shape)}."
        )
    missing = int(video_to_text.isnan().sum() + text_to_video.isnan().sum())
    if missing:
        raise ValueError(f"The scores must be numbers, {missing} of them are NaN.")
    matches = video_of_text == torch.arange(videos, device=video_of_text.device).unsqueeze(1)  # (videos, texts)
    if not matches.any(dim=1).all():
        without = (~matches.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"`video_of_text` gives no text to the videos {without}.")
    return {"video_to_text": _before(video_to_text, matches), "text_to_video": _before(text_to_video, matches.T)}


def _before(scores: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    best = scores.masked_fill(~matches, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~matches).sum(dim=1)
