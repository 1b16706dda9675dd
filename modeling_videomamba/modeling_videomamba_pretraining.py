"""PyTorch VideoMamba for masked pretraining: features of visible tokens are aligned with those of a CLIP teacher."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_videomamba import VideoMambaConfig
from .embeddings import take_tokens, visible_tokens
from .modeling_videomamba import AUTO_MAP, VideoMambaModel, VideoMambaPreTrainedModel


@dataclass
class VideoMambaForMaskedPreTrainingOutput(ModelOutput):
    r"""
    Output of [`VideoMambaForMaskedPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `teacher_features` is given):
            Mean of [`alignment_loss`].
        aligned_features (`torch.Tensor` of shape `(num_aligned_layers, batch, 1 + visible, alignment_size)`):
            Features of the class token and of the visible tokens, l2-normalised, the aligned layers in order of depth.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            As in [`VideoMambaModel.forward`].
    """

    loss: torch.Tensor | None = None
    aligned_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def alignment_loss(aligned_features: torch.Tensor, teacher_features: torch.Tensor, kind: str = "l2") -> torch.Tensor:
    r"""
    Distance of the features of the student from those of the teacher, mean over layers and tokens.

    Args:
        aligned_features (`torch.Tensor` of shape `(layers, batch, length, alignment_size)`): l2-normalised.
        teacher_features (`torch.Tensor` of the same shape): l2-normalised.
        kind (`str`, defaults to `"l2"`): `"l2"`, that is `2 - 2 cos`, `"mse"` or `"smooth_l1"`.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.

    Raises:
        `ValueError`: if the shapes differ, or for another `kind`.
    """
    if aligned_features.shape != teacher_features.shape:
        raise ValueError(
            f"`teacher_features` must be of shape {tuple(aligned_features.shape)} like `aligned_features`, got "
            f"{tuple(teacher_features.shape)}."
        )
    student, teacher = aligned_features.float(), teacher_features.float()
    if kind == "l2":
        distances = 2 - 2 * (student * teacher).sum(-1)
    elif kind == "mse":
        distances = F.mse_loss(student, teacher, reduction="none").mean(-1)
    elif kind == "smooth_l1":
        distances = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    else:
        raise ValueError(f"`kind` must be l2, mse or smooth_l1, got {kind}.")
    return distances.mean(dim=(0, 2))


def sinusoidal_positions(length: int, size: int, device: torch.device) -> torch.Tensor:
    """The fixed position embeddings `(length, size)` of the Transformer: sines in even columns, cosines in odd ones."""
    # in float64, which not every device has: positions are large angles
    rates = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size].float().to(device)


class VideoMambaAlignmentDecoder(nn.Module):
    """A linear layer and a layer norm, `(batch, length, D)` to l2-normalised `(batch, length, alignment_size)`."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        self.head = nn.Linear(config.hidden_size, config.alignment_size)
        self.norm = nn.LayerNorm(config.alignment_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.head(hidden_states.to(self.head.weight.dtype))
        return F.normalize(self.norm(hidden_states).float(), dim=-1)


@torch.no_grad()
def init_alignment_decoder(decoder: VideoMambaAlignmentDecoder) -> None:
    """As in the original release; its layer norm is initialised as any."""
    init.xavier_uniform_(decoder.head.weight)
    init.zeros_(decoder.head.bias)


def aligned_streams(config: VideoMambaConfig) -> list[int]:
    """
    The residual streams, as `residual_streams` counts them, that are aligned, in order of depth: of the last layer that
    before its output is added, of an earlier layer that after it.
    """
    last = config.num_hidden_layers - 1
    return [layer if layer == last else layer + 1 for layer in config.aligned_layers]


def align(
    config: VideoMambaConfig,
    decoders: nn.ModuleList,
    norm: nn.Module,
    streams: dict[int, torch.Tensor],
    positions: torch.Tensor,
) -> torch.Tensor:
    r"""
    What is aligned with the teacher's features.

    Args:
        config: Of the video encoder.
        decoders: [`VideoMambaAlignmentDecoder`] of each aligned layer.
        norm: Of the video encoder, for the streams of all but the last layer.
        streams: Residual streams `(batch, length, D)`, those of [`aligned_streams`] among them.
        positions (`torch.Tensor` of shape `(batch or 1, length, D)`): [`sinusoidal_positions`] of the tokens.

    Returns:
        `torch.Tensor` of shape `(num_aligned_layers, batch, length, alignment_size)`, float32, l2-normalised.
    """
    features = []
    for layer, place, decoder in zip(config.aligned_layers, aligned_streams(config), decoders, strict=True):
        is_last = layer == config.num_hidden_layers - 1
        features.append(decoder((streams[place] if is_last else norm(streams[place])) + positions))
    return torch.stack(features)


class VideoMambaForMaskedPreTraining(VideoMambaPreTrainedModel):
    r"""
    VideoMamba with decoders to the features of a CLIP teacher (UMT; paper, section 3.3). Its weights load into
    [`VideoMambaForVideoClassification`], which leaves the decoders out.

    For the last layer the residual stream is aligned before that layer's output is added to it, and without the final
    norm, as in the original release: the parameters of that layer have no gradient. For an earlier layer it is the norm
    of the stream after the layer.
    """

    _auto_map = {
        **AUTO_MAP,
        "AutoModelForPreTraining": "modeling_videomamba_pretraining.VideoMambaForMaskedPreTraining",
    }

    _keys_to_ignore_on_load_unexpected = None  # decoders that it has no place for are not passed over

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        self.videomamba = VideoMambaModel(config)
        self.alignment_decoders = nn.ModuleList(VideoMambaAlignmentDecoder(config) for _ in config.aligned_layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VideoMambaAlignmentDecoder):
            init_alignment_decoder(module)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        teacher_features: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> VideoMambaForMaskedPreTrainingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, or
                `(batch, channels, height, width)` for images): As in [`VideoMambaModel.forward`].
            bool_masked_pos (`torch.Tensor` of shape `(batch, T'P)`, boolean):
                `True` for the patch tokens that are hidden, the same number of each sample.
            teacher_features (`torch.Tensor` of shape `(num_aligned_layers, batch, 1 + visible, alignment_size)`,
                *optional*): What the features are aligned with, l2-normalised. [`take_visible`] makes it of the
                features of all tokens.
            output_hidden_states (`bool`, *optional*): As in [`VideoMambaModel.forward`].

        Returns:
            [`VideoMambaForMaskedPreTrainingOutput`]

        Raises:
            `ValueError`: if the shape of an argument does not fit.

        Example:

        ```python
        >>> import torch
        >>> from modeling_videomamba import VideoMambaConfig, VideoMambaForMaskedPreTraining

        >>> model = VideoMambaForMaskedPreTraining(VideoMambaConfig(num_frames=8, drop_path_rate=0.4))
        >>> bool_masked_pos = torch.ones(2, 8 * 196, dtype=torch.bool)
        >>> bool_masked_pos[:, ::5] = False
        >>> model(torch.randn(2, 8, 3, 224, 224), bool_masked_pos).aligned_features.shape
        torch.Size([1, 2, 315, 512])
        ```
        """
        config, last = self.config, self.config.num_hidden_layers - 1
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        streams = self.videomamba.residual_streams(
            pixel_values, bool_masked_pos, range(last + 2) if output_hidden_states else aligned_streams(config)
        )
        batch, num_patches = bool_masked_pos.shape
        positions = sinusoidal_positions(1 + num_patches, config.hidden_size, bool_masked_pos.device)
        positions = positions[visible_tokens(bool_masked_pos, batch, num_patches)]
        aligned_features = align(config, self.alignment_decoders, self.videomamba.norm, streams, positions)
        loss = None
        if teacher_features is not None:
            loss = alignment_loss(aligned_features, teacher_features, config.alignment_loss).mean()
        hidden_states = tuple(streams.values()) if output_hidden_states else None
        return VideoMambaForMaskedPreTrainingOutput(
            loss=loss, aligned_features=aligned_features, hidden_states=hidden_states
        )

    def freeze_unaligned(self) -> None:
        """Freezes what no loss reaches: the last layer, and the final norm if no earlier layer is aligned."""
        self.videomamba.layers[-1].requires_grad_(False)
        if self.config.num_aligned_layers == 1:
            self.videomamba.norm.requires_grad_(False)


def take_visible(features: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
    """Of features `(layers, batch, 1 + T'P, size)` those of the class token and of the tokens that are not masked."""
    visible = visible_tokens(bool_masked_pos, *bool_masked_pos.shape)
    return torch.stack([take_tokens(layer, visible) for layer in features])


__all__ = [
    "VideoMambaForMaskedPreTraining",
    "VideoMambaForMaskedPreTrainingOutput",
    "alignment_loss",
    "take_visible",
]
