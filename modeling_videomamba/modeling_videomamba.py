"""PyTorch VideoMamba: bidirectional Mamba mixer, layer, model, classification heads."""

import copy
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_videomamba import VideoMambaConfig
from .embeddings import VideoMambaEmbeddings, take_tokens, temporal_first, visible_tokens
from .layer_cpu import InferenceBuffers, can_fuse, fused_layer, fusible, inference_buffers
from .linear_and_norm import linear, rms_norm
from .operators import has_hooks
from .selective_scan import causal_conv1d, selective_scan

# The scans of each order: the tokens are read frame by frame ("spatial") or patch position by patch position
# ("temporal"), from the first to the last or, where `reverse`, from the last to the first (paper, figure 4).
SCANS = {
    "spatial_first": (("spatial", False), ("spatial", True)),
    "temporal_first": (("temporal", False), ("temporal", True)),
    "spatiotemporal_v1": (("spatial", False), ("temporal", True)),
    "spatiotemporal_v2": (("spatial", False), ("spatial", True), ("temporal", False), ("temporal", True)),
}

# Which class of this file each Auto class loads, for directories that carry their code.
AUTO_MAP = {
    "AutoModel": "modeling_videomamba.VideoMambaModel",
    "AutoModelForImageClassification": "modeling_videomamba.VideoMambaForImageClassification",
    "AutoModelForVideoClassification": "modeling_videomamba.VideoMambaForVideoClassification",
}


@dataclass
class VideoMambaClassifierOutput(ModelOutput):
    r"""
    Output of the classification models.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Cross-entropy, binary cross-entropy or mean squared error, by `config.problem_type`.
        logits (`torch.Tensor` of shape `(batch, num_labels)`):
            Scores before softmax or sigmoid; the values themselves for regression.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            As in [`VideoMambaModel.forward`].
        distillation_features (`torch.Tensor` of shape `(batch, length, teacher_hidden_size)`, *optional*):
            What self-distillation aligns with the features of the teacher, if `config.teacher_hidden_size` is set.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    distillation_features: torch.Tensor | None = None


@fusible
class VideoMambaRMSNorm(nn.Module):
    """RMS norm in float32 of any input, `(..., D)` to `(..., D)` in the dtype of its weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


@fusible
class VideoMambaDropPath(nn.Module):
    """Stochastic depth: drops the branch of a whole sample with probability `rate` during training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = self.scale(hidden_states)
        return hidden_states if scale is None else hidden_states * scale

    def scale(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """What each sample is to be multiplied by, `(batch, 1, 1)`, if any is."""
        if not self.training or self.rate == 0.0:
            return None
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return keep / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


@fusible
class VideoMambaLinear(nn.Linear):
    """A linear layer without bias, on the matrix units of a CPU that has them."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states, self.weight)


@fusible
class VideoMambaCausalConv1d(nn.Conv1d):
    """SiLU of a depthwise convolution, causal in the direction of the scan, `(batch, length, E)` to the same."""

    def __init__(self, channels: int, kernel_size: int, reverse: bool):
        super().__init__(channels, channels, kernel_size, groups=channels)
        self.reverse = reverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x, self.weight, self.bias, reverse=self.reverse)


@fusible
class VideoMambaScan(nn.Module):
    """One scan of the tokens with the parameters of its own: convolution, then selective state space model."""

    def __init__(self, config: VideoMambaConfig, reverse: bool):
        super().__init__()
        channels, rank, state = config.intermediate_size, int(config.time_step_rank), config.state_size
        self.reverse = reverse
        self.split_sizes = [rank, state, state]
        self.conv1d = VideoMambaCausalConv1d(channels, config.conv_kernel, reverse)
        self.x_proj = VideoMambaLinear(channels, sum(self.split_sizes))
        self.dt_proj = nn.Linear(rank, channels, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(channels))  # apart from `dt_proj`: the scan adds it in float32
        self.A_log = nn.Parameter(torch.zeros(channels, state))
        self.D = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None, z: torch.Tensor | None = None) -> torch.Tensor:
        """
        `(batch, length, E)` to the same: the scan of `x`, plus `add` (the output of the scans before this one), times
        `SiLU(z)`.
        """
        x = self.conv1d(x)
        dt_low, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        A = -torch.exp(self.A_log.float())
        dt = self.dt_proj(dt_low)
        if x.dtype == torch.float16:  # what the scans leave before the gate, which its gradient needs, can exceed it
            x = x.float()
        return selective_scan(x, dt, A, B, C, self.D, z=z, dt_bias=self.dt_bias, reverse=self.reverse, add=add)


@fusible
class VideoMambaOutputProjection(VideoMambaLinear):
    """The linear layer that feeds the residual stream; it is initialised by the depth of the model."""


@fusible
class VideoMambaMixer(nn.Module):
    """The bidirectional Mamba block (paper, section 3.1): the scans share the projections and the gate."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        self.orders = [order for order, _ in SCANS[config.scan_order]]
        self.in_proj = VideoMambaLinear(config.hidden_size, 2 * config.intermediate_size)
        self.scans = nn.ModuleList(VideoMambaScan(config, reverse) for _, reverse in SCANS[config.scan_order])
        self.out_proj = VideoMambaOutputProjection(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, permutation: torch.Tensor | None = None) -> torch.Tensor:
        """
        `(batch, length, D)` to the same; `permutation`, `(batch, length)` or `(1, length)`, gives the temporal-first
        order.
        """
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        y: torch.Tensor | Any = None
        for order, scan in zip(self.orders, self.scans, strict=True):
            gate = z if scan is self.scans[-1] else None
            if order == "temporal" and permutation is not None:
                sequences = [None if s is None else take_tokens(s, permutation) for s in (x, y, gate)]
                y = take_tokens(scan(*sequences), permutation.argsort(dim=1))
            else:
                y = scan(x, y, gate)
        return self.out_proj(y.to(z.dtype))


class VideoMambaLayer(GradientCheckpointingLayer):
    """Norm, mixer and drop path around a residual stream in float32."""

    def __init__(self, config: VideoMambaConfig, drop_path_rate: float):
        super().__init__()
        self.norm = VideoMambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = VideoMambaMixer(config)
        self.drop_path = VideoMambaDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        permutation: torch.Tensor | None = None,
        buffers: InferenceBuffers | None = None,
    ) -> torch.Tensor:
        """Maps `(batch, length, D)` to the same shape, both float32. Inference on a CPU passes shared `buffers`."""
        if permutation is None and can_fuse(self, hidden_states, buffers):
            return fused_layer(self, hidden_states, buffers)
        return hidden_states + self.drop_path(self.mixer(self.norm(hidden_states), permutation).float())


class VideoMambaPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and changes of input size that all VideoMamba models share."""

    config: VideoMambaConfig
    base_model_prefix = "videomamba"
    main_input_name = "pixel_values"
    input_modalities = ("video", "image")
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # as any: there is no attention, and models that hold this one have some
    _auto_map = AUTO_MAP
    _no_split_modules = ["VideoMambaEmbeddings", "VideoMambaLayer"]
    _keys_to_ignore_on_load_unexpected: list[str] | None = [r"^alignment_decoders\."]  # of masked pretraining

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv1d):  # PyTorch's own initialisation, as in Mamba
            bound = (module.in_channels // module.groups * module.kernel_size[0]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.Linear, nn.Conv3d)):
            if isinstance(module, VideoMambaOutputProjection):
                std /= math.sqrt(self.config.num_hidden_layers)
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VideoMambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, VideoMambaEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
            if module.temporal_position_embeddings is not None:
                init.zeros_(module.temporal_position_embeddings)
        elif isinstance(module, VideoMambaScan):
            self._init_scan(module)

    def _init_scan(self, scan: VideoMambaScan) -> None:
        """Mamba's: `A = -(1..N)`, `D = 1`, time steps log-uniform in `[time_step_min, time_step_max]`."""
        config, device = self.config, scan.D.device
        states = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=device)
        init.copy_(scan.A_log, torch.log(states).expand_as(scan.A_log))
        init.ones_(scan.D)
        bound = int(config.time_step_rank) ** -0.5
        init.uniform_(scan.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(low + (high - low) * torch.rand_like(scan.dt_bias, dtype=torch.float32))
        dt = dt.clamp(min=config.time_step_floor)
        init.copy_(scan.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.patch_embeddings

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        if self._auto_class is not None:  # Transformers alone would map the saved class only
            self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, **kwargs)

    def resize_position_embeddings(
        self, image_size: int | list[int] | tuple[int, int] | None = None, num_frames: int | None = None
    ) -> "VideoMambaPreTrainedModel":
        r"""
        Makes the resizing of position embeddings to another input size permanent, in the weights and in the config:
        spatially bicubic, temporally linear. An image model that is given `num_frames` gets a temporal embedding of
        zeros.

        Args:
            image_size (`int` or `(height, width)`, *optional*): In pixels, multiples of `patch_size`.
            num_frames (`int`, *optional*): A multiple of `tubelet_size`.

        Returns:
            The model itself.

        Raises:
            `StrictDataclassClassValidationError`: if a size does not fit `patch_size` or `tubelet_size`.
        """
        image_size = self.config.image_size if image_size is None else image_size
        num_frames = self.config.num_frames if num_frames is None else num_frames
        self._check_config(image_size=image_size, num_frames=num_frames)
        self.base_model.embeddings.resize_positions(image_size, num_frames)
        return self

    def inflate(self, num_frames: int, tubelet_size: int = 1) -> "VideoMambaPreTrainedModel":
        r"""
        Turns an image model into a video model, as the paper starts its video models from ImageNet weights: the patch
        kernel becomes the centre of a kernel of `tubelet_size` frames that is zero elsewhere, and the temporal
        position embedding is zero.

        Args:
            num_frames (`int`): Frames of the temporal position embedding, a multiple of `tubelet_size`.
            tubelet_size (`int`, defaults to 1): Frames that one patch token spans.

        Returns:
            The model itself.

        Raises:
            `ValueError`: if the model is a video model already.
            `StrictDataclassClassValidationError`: if `num_frames` is not a multiple of `tubelet_size`.

        Example:

        ```python
        >>> model = VideoMambaForVideoClassification.from_pretrained("org/videomamba-ti-in1k", num_labels=174,
        ...     ignore_mismatched_sizes=True).inflate(num_frames=16)
        ```
        """
        config = self.config
        if config.num_frames is not None or config.tubelet_size != 1:
            raise ValueError(
                "`inflate` takes an image model (`num_frames` None and `tubelet_size` 1 in its config), got one with "
                f"`num_frames` {config.num_frames} and `tubelet_size` {config.tubelet_size}. "
                "`resize_position_embeddings` changes the number of frames of a video model."
            )
        self._check_config(num_frames=num_frames, tubelet_size=tubelet_size)
        self.base_model.embeddings.inflate_patches(tubelet_size)
        return self.resize_position_embeddings(num_frames=num_frames)

    def _check_config(self, **changes: Any) -> None:
        """Raises what a config with these changes would raise, before anything is changed."""
        candidate = copy.copy(self.config)
        for name, value in changes.items():
            setattr(candidate, name, value)
        candidate.validate()


class VideoMambaModel(VideoMambaPreTrainedModel):
    """The VideoMamba encoder without a head."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / (depth - 1) for i in range(depth - 1)] + [config.drop_path_rate]
        self.embeddings = VideoMambaEmbeddings(config)
        self.layers = nn.ModuleList(VideoMambaLayer(config, rate) for rate in rates)
        self.norm = VideoMambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.uses_temporal_order = any(order == "temporal" for order, _ in SCANS[config.scan_order])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, or
                `(batch, channels, height, width)` for images):
                Normalised pixels. `frames` is a multiple of `tubelet_size`, `height` and `width` are multiples of
                `patch_size`.
            bool_masked_pos (`torch.Tensor` of shape `(batch, T'P)`, boolean, *optional*):
                `True` for the patch tokens that are hidden: only the class token and the others enter the layers. The
                same number of each sample.
            output_hidden_states (`bool`, *optional*, defaults to `config.output_hidden_states`):
                Whether to return the residual stream after the embeddings and after every layer.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, 1 + T'P, D)` after the final norm, the class
            token first, then the patches of frame 0, of frame 1, ...; `pooler_output` `(batch, D)`, its class token;
            `hidden_states`, `num_hidden_layers + 1` float32 tensors `(batch, 1 + T'P, D)` before the final norm. With
            `bool_masked_pos` the length is `1 + visible`.

        Raises:
            `ValueError`: if the shape of `pixel_values` or `bool_masked_pos` does not fit.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        depth = self.config.num_hidden_layers
        streams = self.residual_streams(
            pixel_values, bool_masked_pos, range(depth + 1) if output_hidden_states else (depth,)
        )
        last_hidden_state = self.norm(streams[depth])
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            hidden_states=tuple(streams.values()) if output_hidden_states else None,
        )

    def residual_streams(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, wanted: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """
        The residual stream `(batch, length, D)`, float32, before each of the layers `wanted`, or after all of them
        under `num_hidden_layers`. No layer is run that it doesn't take. Arguments and errors are those of `forward`.
        """
        hidden_states, permutation = self._tokens(pixel_values, bool_masked_pos)
        buffers = inference_buffers(hidden_states)
        streams: dict[int, torch.Tensor] = {}
        source: nn.Module = self.embeddings
        for index in range(max(wanted) + 1):
            if index in wanted:
                streams[index] = hidden_states
            if index == max(wanted):
                break
            if buffers is not None:
                buffers.overwritable = None if index in wanted or has_hooks(source) else hidden_states
            source = self.layers[index]
            hidden_states = source(hidden_states, permutation, buffers)
        return streams

    def _tokens(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first residual stream, and the permutation to the temporal-first order where a scan takes it."""
        tokens, num_steps = self.embeddings(pixel_values)
        num_patches, permutation = tokens.shape[1] - 1, None
        if self.uses_temporal_order:
            permutation = temporal_first(num_steps, num_patches // num_steps, tokens.device)
        if bool_masked_pos is not None:
            visible = visible_tokens(bool_masked_pos, len(tokens), num_patches)
            tokens = take_tokens(tokens, visible)
            if permutation is not None:
                places = permutation.argsort(dim=1).expand(len(tokens), -1)
                permutation = take_tokens(places, visible).argsort(dim=1)
        return tokens.float(), permutation


class VideoMambaForVideoClassification(VideoMambaPreTrainedModel):
    """VideoMamba with a linear head on the class token. Takes videos and images."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.videomamba = VideoMambaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distillation_head = None
        if config.teacher_hidden_size is not None:
            self.distillation_head = nn.Sequential(
                VideoMambaRMSNorm(config.hidden_size, config.layer_norm_epsilon),
                nn.Linear(config.hidden_size, config.teacher_hidden_size),
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> VideoMambaClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, or
                `(batch, channels, height, width)` for images): As in [`VideoMambaModel.forward`].
            labels (`torch.Tensor`, *optional*):
                Class indices `(batch,)`; for `config.problem_type` `"multi_label_classification"` zeros and ones
                `(batch, num_labels)`; for `"regression"` targets `(batch, num_labels)` or, for one label, `(batch,)`.
            output_hidden_states (`bool`, *optional*): As in [`VideoMambaModel.forward`].

        Returns:
            [`VideoMambaClassifierOutput`]
        """
        outputs = self.videomamba(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        features = None
        if self.distillation_head is not None:
            features = F.normalize(self.distillation_head(outputs.last_hidden_state), dim=-1)
        return VideoMambaClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, distillation_features=features
        )


class VideoMambaForImageClassification(VideoMambaForVideoClassification):
    """[`VideoMambaForVideoClassification`] under the name by which image checkpoints and pipelines know it."""


__all__ = [
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
]
