"""The pipeline `zero-shot-video-classification`: which of some texts a video shows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pipelines.base import Pipeline

from .processing_videomamba import check_tokenizer

TASK = "zero-shot-video-classification"

# How a directory that carries its code names the pipeline to Transformers.
CUSTOM_PIPELINES = {
    TASK: {"impl": "zero_shot_video_classification.ZeroShotVideoClassificationPipeline", "pt": ["AutoModel"]}
}


class ZeroShotVideoClassificationPipeline(Pipeline):
    r"""
    Tells which of the `candidate_labels` a video shows, by a model of videos and texts that has not been trained on
    these labels.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> classifier = pipeline("zero-shot-video-classification", "org/videomamba-m-25m-f8-224", trust_remote_code=True)
    >>> classifier("clip.mp4", candidate_labels=["a dog runs", "a cat sleeps"])
    [{'score': 0.97, 'label': 'a dog runs'}, {'score': 0.03, 'label': 'a cat sleeps'}]
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    _encoded: tuple[tuple[str, ...], torch.Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_tokenizer(self.tokenizer)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        r"""
        Args:
            inputs: A video, or a list of videos: whatever [`VideoMambaVideoProcessor`] reads, such as paths.
            candidate_labels (`list[str]`): What the video may show.
            hypothesis_template (`str`, defaults to `"This is a video of {}."`): Each label takes the place of its `{}`.
            top_k (`int`, *optional*): The number of labels to return; by default all.

        Returns:
            `list[dict]`: `score`, from the softmax over all labels, and `label`, the best first; for a list of videos a
            list of these.

        Raises:
            `ValueError`: if there is no label, the template has no `{}`, or `top_k` is below 1.
            `BrokenVideoError`: if a video can't be read.
        """
        self._encoded = None
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | None = None,
        top_k: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward: dict[str, Any] = {}
        postprocess: dict[str, Any] = {}
        if candidate_labels is not None:
            if isinstance(candidate_labels, str) or not all(isinstance(label, str) for label in candidate_labels):
                raise ValueError(f"`candidate_labels` must be a list of texts, got {candidate_labels!r}.")
            forward["candidate_labels"] = postprocess["candidate_labels"] = list(candidate_labels)
        if hypothesis_template is not None:
            if "{}" not in hypothesis_template:
                raise ValueError(f"`hypothesis_template` must contain {{}} for the label, got {hypothesis_template!r}.")
            forward["hypothesis_template"] = hypothesis_template
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
            postprocess["top_k"] = top_k
        return {}, forward, postprocess

    def preprocess(self, video: Any) -> dict[str, torch.Tensor]:
        inputs = self.video_processor(video, return_tensors="pt").to(self.dtype)
        return {"video": inputs["pixel_values"]}  # under their own name Transformers fails to batch them

    def _forward(
        self,
        model_inputs: dict[str, torch.Tensor],
        candidate_labels: Sequence[str] = (),
        hypothesis_template: str = "This is a video of {}.",
    ) -> dict[str, torch.Tensor]:
        if not candidate_labels:
            raise ValueError("`candidate_labels` must name at least one label.")
        texts = tuple(hypothesis_template.replace("{}", label) for label in candidate_labels)
        video_embeds = self.model.get_video_features(model_inputs["video"]).pooler_output
        logits = self.model.similarity_logits(F.normalize(video_embeds.float(), dim=-1), self._encode(texts))
        return {"logits": logits}

    def _encode(self, texts: tuple[str, ...]) -> torch.Tensor:
        """Once for all videos of a call."""
        if self._encoded is None or self._encoded[0] != texts:
            tokens = self.tokenizer(list(texts), padding=True, return_token_type_ids=False, return_tensors="pt")
            features = self.model.get_text_features(**tokens.to(self.device)).pooler_output
            self._encoded = texts, F.normalize(features.float(), dim=-1)
        return self._encoded[1]

    def postprocess(
        self, model_outputs: dict[str, torch.Tensor], candidate_labels: Sequence[str], top_k: int | None = None
    ) -> list[dict[str, Any]]:
        scores = model_outputs["logits"][0].float().softmax(dim=-1)
        best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
        return [{"score": scores[index].item(), "label": candidate_labels[index]} for index in best]


__all__ = ["ZeroShotVideoClassificationPipeline"]
