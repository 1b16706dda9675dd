"""Video processor of VideoMamba: decoding, frame sampling, views, normalisation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .configuration_videomamba import VideoMambaConfig
from .image_processing_videomamba import (
    as_tensor,
    channel_settings,
    check_pixels,
    check_processor_settings,
    is_picture,
    rgb_tensor,
    to_grey,
)
from .video_decoding import is_video_source, read_frames


def sample_frame_indices(
    total_frames: int, num_frames: int, num_clips: int = 1, generator: np.random.Generator | None = None
) -> np.ndarray:
    r"""
    Indices of the frames of each clip: the video is cut into `num_frames` equal segments; one clip takes their middles,
    of `K` clips clip `k` takes the point at `(k + 1) / (K + 1)` of each, or, given a `generator`, each takes a random
    point of each. A video shorter than `num_frames` repeats frames by the same rule. This is the sampling by which the
    released weights were tested and, with a generator, trained.

    Args:
        total_frames (`int`): Frames of the video, at least 1.
        num_frames (`int`): Frames of a clip.
        num_clips (`int`, defaults to 1): Clips.
        generator (`np.random.Generator`, *optional*): Draws a frame from each segment, both of its ends included.

    Returns:
        `np.ndarray` of shape `(num_clips, num_frames)`: indices from 0 to `total_frames - 1`.

    Raises:
        `ValueError`: if an argument is not positive.
    """
    for name, value in {"total_frames": total_frames, "num_frames": num_frames, "num_clips": num_clips}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    segment = (total_frames - 1) / num_frames
    bounds = np.round(segment * np.arange(num_frames + 1)).astype(int)
    if generator is not None:
        return generator.integers(bounds[:-1], bounds[1:], size=(num_clips, num_frames), endpoint=True)
    offsets = np.array([int(segment / (num_clips + 1) * (clip + 1)) for clip in range(num_clips)])
    return np.minimum(bounds[:-1] + offsets[:, None], total_frames - 1)


def spatial_crop_offsets(
    height: int, width: int, crop_size: tuple[int, int], num_crops: int = 1
) -> list[tuple[int, int]]:
    r"""
    Corners of the spatial views of a frame: one crop is the centre, more are spread evenly along the longer side.

    Args:
        height, width (`int`): Size of the resized frame.
        crop_size (`tuple[int, int]`): Height and width of a crop.
        num_crops (`int`, defaults to 1): Crops.

    Returns:
        `list[tuple[int, int]]`: `(top, left)` of each crop.

    Raises:
        `ValueError`: if `num_crops` is not positive or a crop is larger than the frame.
    """
    if num_crops < 1:
        raise ValueError(f"`num_crops` must be at least 1, got {num_crops}.")
    room = height - crop_size[0], width - crop_size[1]
    if min(room) < 0:
        raise ValueError(f"`crop_size` {crop_size} is larger than the resized frame {(height, width)}.")
    top, left = room[0] // 2, room[1] // 2
    if num_crops == 1:
        return [(top, left)]
    along_height = height > width
    steps = [int(crop * room[0 if along_height else 1] / (num_crops - 1)) for crop in range(num_crops)]
    return [(step, left) if along_height else (top, step) for step in steps]


class VideoMambaVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg] # a TypedDict
    """
    Arguments beyond those of every video processor.

    Args:
        num_clips (`int`): Clips along time that each video is tested with.
        num_crops (`int`): Spatial crops of each clip.
        do_grayscale (`bool`): Whether to make one channel, grey, for a model of one.
    """

    num_clips: int | None
    num_crops: int | None
    do_grayscale: bool | None


class VideoMambaVideoProcessor(BaseVideoProcessor):
    r"""
    From videos to `pixel_values`: samples `num_frames` frames at the middle of equal segments, resizes the short side
    to 224 (bilinear), crops the centre of 224 pixels, rescales to [0, 1] and normalises with the mean and standard
    deviation of ImageNet. Files are decoded with torchcodec where it works, else with PyAV, and only as far as the
    sampled frames need.

    Multi-view testing: `num_clips` x `num_crops` views of each video, one after the other along the batch; average the
    scores of each `num_clips * num_crops` consecutive rows. The released weights are tested with 4 x 3 views. The
    pipelines of Transformers look at the first row only: give them one view.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    do_grayscale = False
    do_sample_frames = True
    num_frames = 8
    num_clips = 1
    num_crops = 1
    valid_kwargs = VideoMambaVideoProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[VideoMambaVideoProcessorKwargs]):
        super().__init__(**kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        check_processor_settings(kwargs)
        return super()._standardize_kwargs(**kwargs)

    @classmethod
    def for_model(cls, config: VideoMambaConfig) -> "VideoMambaVideoProcessor":
        """
        The processor for the resolution, channels and number of frames of a model. Raises `ValueError` for other
        channels than 1 and 3.
        """
        height, width = config.input_size
        return cls(
            size={"shortest_edge": max(height, width)},  # a crop that is not square fits into frames of any shape
            crop_size={"height": height, "width": width},
            num_frames=config.num_frames or cls.num_frames,
            **channel_settings(config),
        )

    def __call__(self, videos: Any, **kwargs: Unpack[VideoMambaVideoProcessorKwargs]) -> BatchFeature:
        r"""
        Args:
            videos:
                One video or a list of them. A video is a path, an http(s) URL, the bytes of a file, a value of the
                `Video` feature of `datasets`, an array or tensor `(frames, height, width, channels)` or
                `(frames, channels, height, width)`, or a list of frames (PIL images or arrays). A 5-D array is a batch.
                Pixels are 0 to 255, or 0 to 1 with `do_rescale=False`.
            kwargs: Any attribute of the processor, for this call; `return_tensors="pt"` gives tensors, and
                `do_sample_frames=False` takes all frames.

        Returns:
            `BatchFeature` with `pixel_values`: float32
            `(videos * num_clips * num_crops, num_frames, channels, height, width)`.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `BrokenVideoError`: if a file is no video, has no video stream or no frame, or is truncated.
            `ValueError`: for a wrong number of channels, dtype or range of pixels, or a setting that can't be meant.
        """
        return self.preprocess(videos, **kwargs)

    def preprocess(self, videos: Any, **kwargs: Unpack[VideoMambaVideoProcessorKwargs]) -> BatchFeature:
        """See `__call__`."""
        if kwargs.get("num_frames") is None:
            kwargs.pop("num_frames", None)  # stands for the processor's
        for name in ("num_clips", "num_crops", "do_sample_frames"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self, name)
        defaults = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        check_processor_settings(defaults | {name: value for name, value in kwargs.items() if value is not None})
        if kwargs["num_clips"] > 1 and not kwargs["do_sample_frames"]:
            raise ValueError(f"`num_clips` {kwargs['num_clips']} needs `do_sample_frames=True`.")
        return super().preprocess(videos, **kwargs)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, num_clips: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Indices of the frames of all clips, `(num_clips * num_frames,)`; see [`sample_frame_indices`]."""
        num_frames = self.num_frames if num_frames is None else num_frames
        num_clips = self.num_clips if num_clips is None else num_clips
        return sample_frame_indices(metadata.total_num_frames, num_frames, num_clips).flatten()

    def _decode_and_sample_videos(
        self,
        videos: Any,
        video_metadata: None,
        do_sample_frames: bool,
        sample_indices_fn: Callable[..., np.ndarray] | None,
    ) -> tuple[list[torch.Tensor], list[VideoMetadata]]:
        decoded = []
        for video in _list_of_videos(videos):
            if is_video_source(video):
                decoded.append(read_frames(video, sample_indices_fn))
            else:
                frames = _tensor_of_frames(video)
                metadata = VideoMetadata(total_num_frames=len(frames))
                indices = sample_indices_fn(metadata) if sample_indices_fn is not None else np.arange(len(frames))
                metadata.frames_indices = indices.tolist()
                decoded.append((frames[torch.from_numpy(indices)], metadata))
        return [frames for frames, _ in decoded], [metadata for _, metadata in decoded]

    def _prepare_input_videos(
        self,
        videos: list[torch.Tensor],
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
    ) -> list[torch.Tensor]:
        return [rgb_tensor("A video", video, input_data_format, do_convert_rgb).to(device) for video in videos]

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        num_clips: int = 1,
        num_crops: int = 1,
        do_grayscale: bool | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if num_crops > 1 and not do_center_crop:
            raise ValueError(f"`num_crops` {num_crops} needs `do_center_crop=True`.")
        views: list[torch.Tensor] = []
        for video in videos:
            video = check_pixels("Pixels of `videos`", video, do_rescale)
            if do_grayscale:
                video = to_grey(video)
            if do_resize:
                video = self.resize(video, size=size, resample=resample)
            crops = [video]
            if do_center_crop:
                crop = crop_size.height, crop_size.width
                corners = spatial_crop_offsets(video.shape[-2], video.shape[-1], crop, num_crops)
                crops = [tvF.crop(video, top, left, *crop) for top, left in corners]
            crops = [
                self.rescale_and_normalize(crop, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
                for crop in crops
            ]
            clips = zip(*(crop.chunk(num_clips) for crop in crops), strict=True)
            views.extend(view for clip in clips for view in clip)
        return BatchFeature({"pixel_values": views}, tensor_type=return_tensors)


def _list_of_videos(videos: Any) -> list[Any]:
    """One video or several, as a list."""
    if is_video_source(videos):
        return [videos]
    if isinstance(videos, np.ndarray | torch.Tensor):
        if videos.ndim not in (4, 5):
            raise ValueError(
                "An array in `videos` must be one video, 4-D with the frames first, or a 5-D batch, "
                f"got shape {tuple(videos.shape)}."
            )
        return [videos] if videos.ndim == 4 else list(videos)
    if not isinstance(videos, list | tuple):
        raise ValueError(f"`videos` must be paths, URLs, bytes, arrays or lists of frames, got {type(videos)}.")
    if not videos:
        raise ValueError("`videos` is an empty list.")
    if all(map(is_picture, videos)):
        return [videos]
    return [video for item in videos for video in _list_of_videos(item)]


def _tensor_of_frames(video: Any) -> torch.Tensor:
    """One array or list of frames as a tensor with the frames first."""
    if isinstance(video, list | tuple):
        frames = [as_tensor("Frames of a video", frame) for frame in video]
        shapes = sorted({tuple(frame.shape) for frame in frames})
        if len(shapes) > 1:
            raise ValueError(f"The frames of a video must have one size, got the shapes {shapes}.")
        return torch.stack(frames)
    if len(video) == 0:
        raise ValueError(f"A video in `videos` has no frames, its shape is {tuple(video.shape)}.")
    return as_tensor("A video", video)


__all__ = [
    "VideoMambaVideoProcessor",
    "VideoMambaVideoProcessorKwargs",
    "sample_frame_indices",
    "spatial_crop_offsets",
]
