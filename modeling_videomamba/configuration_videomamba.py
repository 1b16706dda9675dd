"""VideoMamba model configurations."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import BertConfig
from transformers.configuration_utils import PreTrainedConfig

ScanOrder = Literal["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"]
AlignmentLoss = Literal["l2", "mse", "smooth_l1"]
Pooling = Literal["cls+avg", "avg", "cls"]

# Between which the temperature of contrastive learning is kept.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5

# The sizes of the paper (table 1) and of its released weights.
VIDEOMAMBA_SIZES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 24},
    "small": {"hidden_size": 384, "num_hidden_layers": 24},
    "middle": {"hidden_size": 576, "num_hidden_layers": 32},
    "base": {"hidden_size": 768, "num_hidden_layers": 24},
}


@as_validated_field
def positive(value: int | float):
    if value <= 0:
        raise ValueError(f"must be positive, got {value}")


@as_validated_field
def rate(value: int | float):
    if not 0 <= value < 1:
        raise ValueError(f"must be at least 0 and below 1, got {value}")


class _OwnConfig(PreTrainedConfig):
    """A configuration that is not read from one of another type of model, which would leave the defaults in silence."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"`model_type` must be {cls.model_type!r}, got {found!r}.")
        return super().from_dict(config_dict, **kwargs)


@strict
class VideoMambaConfig(_OwnConfig):
    r"""
    Configuration of a VideoMamba encoder ([VideoMamba](https://huggingface.co/papers/2403.06977)) and its heads.
    The defaults are those of VideoMamba-Ti for 8 frames of 224 pixels.

    Args:
        image_size (`int` or `(height, width)`, defaults to 224):
            Resolution, in pixels, of the spatial position embedding. Inputs of another resolution work: the embedding
            is resized on the fly.
        patch_size (`int`, defaults to 16):
            Height and width of a patch, in pixels.
        num_channels (`int`, defaults to 3):
            Channels of the input.
        num_frames (`int` or `None`, defaults to 8):
            Frames of the temporal position embedding. Inputs with another number of frames work: the embedding is
            resized on the fly. `None` is an image model, which has no temporal position embedding;
            [`~VideoMambaPreTrainedModel.inflate`] turns it into a video model.
        tubelet_size (`int`, defaults to 1):
            Frames that one patch token spans.
        hidden_size (`int`, defaults to 192):
            Width `D` of the tokens.
        num_hidden_layers (`int`, defaults to 24):
            Number of bidirectional Mamba layers.
        state_size (`int`, defaults to 16):
            Size `N` of the state of each channel of the scan.
        conv_kernel (`int`, defaults to 4):
            Width of the causal depthwise convolution before the scan.
        expand (`int`, defaults to 2):
            The scan has `E = expand * hidden_size` channels.
        time_step_rank (`int` or `"auto"`, defaults to `"auto"`):
            Rank `R` of the projection that gives the time steps; `"auto"` is `ceil(hidden_size / 16)`.
        time_step_min, time_step_max, time_step_floor (`float`, default to 0.001, 0.1 and 1e-4):
            Initial time steps are log-uniform between the first two and at least the third.
        scan_order (`str`, defaults to `"spatial_first"`):
            Order in which the scans read the tokens (section 3.2 of the paper): `"spatial_first"` (all released
            weights), `"temporal_first"`, `"spatiotemporal_v1"` or `"spatiotemporal_v2"`.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last layer; that of the layers before grows linearly from 0.
        layer_norm_epsilon (`float`, defaults to 1e-5):
            Epsilon of the RMS norms.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the truncated normal initialisation.
        teacher_hidden_size (`int`, *optional*):
            Width of the features of the teacher in self-distillation (section 3.3). When given, the classification
            models have a distillation head and return `distillation_features`.
        alignment_size (`int`, defaults to 512):
            Width of the features of the CLIP teacher of masked pretraining (section 3.3), after its projection.
        num_aligned_layers (`int`, defaults to 1):
            Layers whose features masked pretraining aligns with as many of the teacher, from the last one down.
        alignment_interval (`int`, defaults to 1):
            Layers from one aligned layer to the next.
        alignment_loss (`str`, defaults to `"l2"`):
            Distance of the aligned features, both l2-normalised: `"l2"` (`2 - 2 cos`), `"mse"` or `"smooth_l1"`.
        problem_type (`str`, *optional*):
            Loss of the classification models: `"single_label_classification"`, `"multi_label_classification"` or
            `"regression"`. Without it the labels and `num_labels` decide.

    Raises:
        `StrictDataclassFieldValidationError`, `StrictDataclassClassValidationError`: for a value of a wrong type or
            out of range; the message names the field.

    Example:

    ```python
    >>> from modeling_videomamba import VideoMambaConfig, VideoMambaModel

    >>> model = VideoMambaModel(VideoMambaConfig(hidden_size=576, num_hidden_layers=32, num_frames=16))
    >>> model.config.intermediate_size
    1152
    ```
    """

    model_type = "videomamba"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = positive(default=16)
    num_channels: int = positive(default=3)
    num_frames: int | None = 8
    tubelet_size: int = positive(default=1)
    hidden_size: int = positive(default=192)
    num_hidden_layers: int = positive(default=24)
    state_size: int = positive(default=16)
    conv_kernel: int = positive(default=4)
    expand: int = positive(default=2)
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_min: float = positive(default=0.001)
    time_step_max: float = positive(default=0.1)
    time_step_floor: float = positive(default=1e-4)
    scan_order: ScanOrder = "spatial_first"
    drop_path_rate: float | int = rate(default=0.0)
    layer_norm_epsilon: float = positive(default=1e-5)
    initializer_range: float = positive(default=0.02)
    teacher_hidden_size: int | None = None
    alignment_size: int = positive(default=512)
    num_aligned_layers: int = positive(default=1)
    alignment_interval: int = positive(default=1)
    alignment_loss: AlignmentLoss = "l2"
    # declared again because Transformers itself does not check it
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    def __post_init__(self, **kwargs):
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    @property
    def intermediate_size(self) -> int:
        """Channels `E` of the scan."""
        return self.expand * self.hidden_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of `image_size`."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of the spatial position embedding."""
        height, width = self.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def aligned_layers(self) -> list[int]:
        """Indices of the layers that masked pretraining aligns, in order of depth."""
        last = self.num_hidden_layers - 1
        return [last - i * self.alignment_interval for i in reversed(range(self.num_aligned_layers))]

    def validate_image_size(self):
        """`image_size` is one or two multiples of `patch_size`."""
        sizes = [self.image_size] * 2 if isinstance(self.image_size, int) else list(self.image_size)
        if len(sizes) != 2 or any(size < 1 or size % self.patch_size for size in sizes):
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size` ({self.patch_size}), or a height and a width "
                f"that are, got {self.image_size}."
            )

    def validate_num_frames(self):
        """`num_frames` is `None` or a multiple of `tubelet_size`."""
        if self.num_frames is not None and (self.num_frames < 1 or self.num_frames % self.tubelet_size):
            raise ValueError(
                f"`num_frames` must be `None` (an image model) or a multiple of `tubelet_size` ({self.tubelet_size}), "
                f"got {self.num_frames}."
            )

    def validate_time_step(self):
        """Ranks and bounds of the time steps are in order."""
        if self.time_step_rank < 1:
            raise ValueError(f"`time_step_rank` must be a positive integer or 'auto', got {self.time_step_rank}.")
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"`time_step_min` must not be above `time_step_max` ({self.time_step_max}), got {self.time_step_min}."
            )

    def validate_aligned_layers(self):
        """There are as many layers as are aligned."""
        if self.aligned_layers[0] < 0:
            raise ValueError(
                f"`num_hidden_layers` ({self.num_hidden_layers}) is too small for `num_aligned_layers` "
                f"{self.num_aligned_layers} with `alignment_interval` {self.alignment_interval}."
            )

    def validate_teacher_hidden_size(self):
        """`teacher_hidden_size` is `None` or positive."""
        if self.teacher_hidden_size is not None and self.teacher_hidden_size < 1:
            raise ValueError(f"`teacher_hidden_size` must be `None` or positive, got {self.teacher_hidden_size}.")


@strict
class VideoMambaVideoTextConfig(_OwnConfig):
    r"""
    Configuration of VideoMamba with a BERT whose upper layers attend to the video (section 4.4). The defaults are
    VideoMamba-Ti and BERT-base; the released models have VideoMamba-M.

    Args:
        vision_config (`VideoMambaConfig` or `dict`, *optional*):
            Of the video encoder.
        text_config (`BertConfig` or `dict`, *optional*):
            Of all layers of BERT, those that attend to the video included.
        fusion_layer (`int`, defaults to 9):
            The first layer that attends to the video. Those below are a plain BERT.
        projection_dim (`int`, defaults to 512):
            Width of the space that videos and texts share.
        temperature (`float`, defaults to 0.07):
            Initial temperature of contrastive learning, 0.001 to 0.5.
        pooling (`str`, defaults to `"cls+avg"`):
            What stands for a frame: `"cls+avg"`, the class token plus the mean of the patch tokens of the frame (all
            released weights), `"avg"`, that mean alone, or `"cls"`, the class token, of which there is one for all
            frames.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the normal initialisation of projections, heads and cross-attention.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the head of masked language modelling has the weights of the word embeddings.

    Raises:
        `StrictDataclassFieldValidationError`, `StrictDataclassClassValidationError`: for a value of a wrong type or
            out of range; the message names the field.
        `ValueError`: for a configuration of another model than VideoMamba or BERT.

    Example:

    ```python
    >>> from modeling_videomamba import VideoMambaForVideoTextRetrieval, VideoMambaVideoTextConfig

    >>> config = VideoMambaVideoTextConfig(vision_config={"hidden_size": 576, "num_hidden_layers": 32})
    >>> model = VideoMambaForVideoTextRetrieval(config)
    ```
    """

    model_type = "videomamba_video_text"
    sub_configs = {"vision_config": VideoMambaConfig, "text_config": BertConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    fusion_layer: int = positive(default=9)
    projection_dim: int = positive(default=512)
    temperature: float = 0.07
    pooling: Pooling = "cls+avg"
    initializer_range: float = positive(default=0.02)
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            values = value or {}
            kind = values.get("model_type", config_class.model_type) if isinstance(values, dict) else values.model_type
            if kind != config_class.model_type:
                raise ValueError(f"`{name}` must be a {config_class.__name__} or its values, got those of {kind!r}.")
            if isinstance(values, dict):
                setattr(self, name, config_class(**values))
        if not type(self).__module__.startswith("transformers_modules."):
            # the package has registered the pipeline, and Transformers would ask for leave to run that of the directory
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def validate_text_config(self):
        """BERT is an encoder; what attends to the video comes on top."""
        if self.text_config.is_decoder or self.text_config.add_cross_attention:
            raise ValueError("`text_config` must be of an encoder, got `is_decoder` or `add_cross_attention`.")

    def validate_fusion_layer(self):
        """Some layers attend to the video, and some don't."""
        if self.fusion_layer >= self.text_config.num_hidden_layers:
            raise ValueError(
                f"`fusion_layer` must be below the layers of `text_config` ({self.text_config.num_hidden_layers}), got "
                f"{self.fusion_layer}."
            )

    def validate_temperature(self):
        """`temperature` is within its bounds."""
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"`temperature` must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, got {self.temperature}."
            )


__all__ = ["VIDEOMAMBA_SIZES", "VideoMambaConfig", "VideoMambaVideoTextConfig"]
