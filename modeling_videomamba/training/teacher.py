"""The CLIP teacher of masked pretraining."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from torch import nn
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_processing_base import ImageProcessingMixin

from ..configuration_videomamba import VideoMambaConfig
from .data import Processor
from .loading import load_model, one_line_errors

logger = get_logger(__name__)


class ClipTeacher(nn.Module):
    r"""
    The features of every token of a frozen CLIP vision model, frame by frame (UMT; paper, section 3.3).

    Args:
        model (`CLIPVisionModelWithProjection`): The teacher.
        student ([`VideoMambaConfig`]): What its tokens are to match: `patch_size`, `tubelet_size`, and the layers that
            are aligned.
        normalization (`nn.Module`, *optional*): From pixels as the student gets them to those that the teacher wants.

    Raises:
        `ValueError`: if the width of its features is not the student's `alignment_size`, or it has too few layers.
    """

    def __init__(
        self, model: CLIPVisionModelWithProjection, student: VideoMambaConfig, normalization: nn.Module | None = None
    ):
        super().__init__()
        config = model.config
        if config.projection_dim != student.alignment_size:
            raise ValueError(
                f"The teacher's features have {config.projection_dim} channels (`projection_dim`), the student's "
                f"`alignment_size` is {student.alignment_size}."
            )
        last = config.num_hidden_layers - 1
        self.layers = [last - i * student.alignment_interval for i in reversed(range(student.num_aligned_layers))]
        if self.layers[0] < 0:
            raise ValueError(
                f"The teacher has {config.num_hidden_layers} layers, too few for `num_aligned_layers` "
                f"{student.num_aligned_layers} with `alignment_interval` {student.alignment_interval}."
            )
        self.model = model.eval().requires_grad_(False)
        self.normalization = nn.Identity() if normalization is None else normalization
        self.patch_size, self.tubelet_size = student.patch_size, student.tubelet_size

    def train(self, mode: bool = True) -> "ClipTeacher":
        """It stays as it is tested."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, output_attention: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, or
                `(batch, channels, height, width)` for images):
                As the student gets them. Where the teacher would cut them into another number of patches than the
                student, they are resized. Of each tubelet it sees the frame in the middle.
            output_attention (`bool`, defaults to `False`): Whether to return the attention.

        Returns:
            `tuple`: features `(layers, batch, 1 + T'P, projection_dim)`, float32 and l2-normalised, without CLIP's
            final layer norm: first that of the class token, mean over the frames, then those of the patches of each
            frame; and the attention `(batch, T', P)` of the class token to the patches in the last layer, mean over
            heads.
        """
        if pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        else:
            pixel_values = pixel_values[:, self.tubelet_size // 2 :: self.tubelet_size]
        batch, vision = len(pixel_values), self.model.vision_model
        hidden_states = self._embed(self.normalization(pixel_values.flatten(0, 1)))
        features, attention = [], None
        for index, layer in enumerate(vision.encoder.layers):
            if output_attention and layer is vision.encoder.layers[-1]:
                attention = self._class_attention(layer, hidden_states).unflatten(0, (batch, -1))
            hidden_states = layer(hidden_states, None)
            if index in self.layers:
                features.append(self._features(hidden_states, batch))
        return torch.stack(features), attention

    def _embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Input `(frames, 1 + P, width)` of the first layer."""
        config, vision = self.model.config, self.model.vision_model
        grid = [side // self.patch_size for side in frames.shape[-2:]]
        size = [cells * config.patch_size for cells in grid]
        if size != list(frames.shape[-2:]):
            frames = F.interpolate(frames.float(), size, mode="bicubic", align_corners=False)
        resized = size != [config.image_size] * 2  # the teacher knows other positions
        embeddings = vision.embeddings(frames.to(self.model.dtype), interpolate_pos_encoding=resized)
        return vision.pre_layrnorm(embeddings)

    def _features(self, hidden_states: torch.Tensor, batch: int) -> torch.Tensor:
        """From `(batch * T', 1 + P, width)` to `(batch, 1 + T'P, projection_dim)`."""
        frames = hidden_states.unflatten(0, (batch, -1))
        tokens = torch.cat([frames[:, :, :1].mean(1), frames[:, :, 1:].flatten(1, 2)], dim=1)
        return F.normalize(self.model.visual_projection(tokens).float(), dim=-1)

    def _class_attention(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Attention `(batch * T', P)` of the class token in a layer, whose input is given. These are the only weights that
        anyone needs, so that the layers can take any implementation of attention.
        """
        normed = layer.layer_norm1(hidden_states)
        split = (self.model.config.num_attention_heads, -1)
        query = layer.self_attn.q_proj(normed[:, :1]).unflatten(-1, split).transpose(1, 2)
        key = layer.self_attn.k_proj(normed).unflatten(-1, split).transpose(1, 2)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.softmax(-1, dtype=torch.float32).mean(dim=1)[:, 0, 1:]


class Renormalization(nn.Module):
    """Pixels `(..., channels, height, width)`, normalised with one mean and standard deviation, to others."""

    def __init__(self, before: tuple[Sequence[float], Sequence[float]], after: tuple[Sequence[float], Sequence[float]]):
        super().__init__()
        (mean, std), (new_mean, new_std) = (map(torch.tensor, pair) for pair in (before, after))
        self.register_buffer("scale", (std / new_std).view(-1, 1, 1))
        self.register_buffer("offset", ((mean - new_mean) / new_std).view(-1, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values * self.get_buffer("scale") + self.get_buffer("offset")


class _VisionModel(CLIPVisionModelWithProjection):
    """Of a whole CLIP model it takes its part without a report of the rest."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


def teacher_config(path: str) -> CLIPVisionConfig:
    """Of the vision model of a CLIP. Raises `OSError` where there is none."""
    with one_line_errors(path):
        config = CLIPVisionConfig.from_pretrained(path)
        values, _ = CLIPVisionConfig.get_config_dict(path)
        if "vision_config" in values:  # a whole CLIP has one width for both towers
            config.projection_dim = CLIPConfig.from_pretrained(path).projection_dim
    return config


def load_teacher(path: str, student: VideoMambaConfig, processor: Processor) -> ClipTeacher:
    r"""
    The teacher for pixels that `processor` has prepared for a student. They are normalised anew as the teacher's own
    image processor says; where it has none, they stay as they are, and a warning says so.

    Args:
        path (`str`): Directory or Hub id of a CLIP model, or of its vision model.
        student ([`VideoMambaConfig`]), processor: Of the student.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or it does not fit the student.
    """
    model = load_model(_VisionModel, path, config=teacher_config(path))
    try:
        with one_line_errors(path):
            settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
        after = settings["image_mean"], settings["image_std"]
    except (OSError, KeyError):
        logger.warning(f"{path} has no image processor: it gets its pixels normalised as the student does")
        return ClipTeacher(model, student)
    return ClipTeacher(model, student, Renormalization((processor.image_mean, processor.image_std), after))
