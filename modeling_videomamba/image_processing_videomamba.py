"""Image processor of VideoMamba."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .configuration_videomamba import VideoMambaConfig


def as_tensor(name: str, pixels: Any) -> torch.Tensor:
    """A picture or an array as a tensor; a PIL image, and grey without a dimension for it, with the channels last."""
    if isinstance(pixels, Image.Image):
        if pixels.mode.startswith(("I", "F")):
            raise ValueError(f"{name} in PIL mode {pixels.mode!r} have more than 8 bits: pass them as an array.")
        pixels = np.array(pixels.convert("RGB"))
    if isinstance(pixels, np.ndarray):
        wide = pixels.dtype.kind == "u" and pixels.dtype.itemsize > 1  # hardly supported by PyTorch
        pixels = torch.from_numpy(np.require(pixels, np.int64 if wide else None, ["C", "W"]))
    return pixels.unsqueeze(-1) if pixels.ndim == 2 else pixels


def rgb_tensor(
    name: str, pixels: Any, layout: str | ChannelDimension | None = None, do_convert_rgb: bool | None = True
) -> torch.Tensor:
    """
    One picture, or the frames of a video in one array, as RGB with the channels before height and width. Grey becomes
    RGB, transparency is dropped.

    Args:
        name (`str`): What the errors call it.
        pixels (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A picture `(height, width)`, `(height, width, channels)` or `(channels, height, width)`; an array may have a
            dimension of frames before these three.
        layout (`ChannelDimension`, *optional*): Whether the channels come first or last; found out if left out.
        do_convert_rgb (`bool`, defaults to `True`): Whether arrays may be grey or have transparency.

    Returns:
        `torch.Tensor` of shape `(..., 3, height, width)` and the dtype of the pixels, signed where PyTorch needs it.

    Raises:
        `ValueError`: for another number of channels than 1, 3 and 4, or a PIL mode of more than 8 bits.
    """
    if isinstance(pixels, Image.Image) or pixels.ndim == 2:
        layout = ChannelDimension.LAST
    pixels = as_tensor(name, pixels)
    allowed = (1, 3, 4) if do_convert_rgb else (3,)
    shape = tuple(pixels.shape)
    if layout is None and {shape[-3], shape[-1]} & set(allowed):
        layout = infer_channel_dimension_format(pixels, num_channels=allowed)
    if layout == ChannelDimension.LAST:
        pixels = pixels.movedim(-1, -3)
    if pixels.shape[-3] not in allowed:
        numbers = "1, 3 or 4 channels" if do_convert_rgb else "3 channels"
        raise ValueError(f"{name} must have {numbers}, before or after height and width, got shape {shape}.")
    if pixels.shape[-3] == 1:
        return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    return pixels[..., :3, :, :]


def check_pixels(name: str, pixels: torch.Tensor, do_rescale: bool | None) -> torch.Tensor:
    """
    Checks pixels before they are rescaled and normalised.

    Args:
        name (`str`): What the errors call them.
        pixels (`torch.Tensor`): 0 to 255 where they will be rescaled, else floating point from 0 to 1.
        do_rescale (`bool`): Whether they will be divided by 255.

    Returns:
        `torch.Tensor`: the same pixels, uint8 if they are integers.

    Raises:
        `ValueError`: for empty pixels, a dtype that is no number, NaN, or values out of range.
    """
    if pixels.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(pixels.shape)}.")
    if pixels.dtype == torch.uint8 and do_rescale:
        return pixels
    if pixels.dtype == torch.bool or pixels.is_complex():
        raise ValueError(f"{name} must be integers or floating point, got {pixels.dtype}.")
    low, high = pixels.min().item(), pixels.max().item()
    allowed = 255 if do_rescale else 1
    if not (low >= 0 and high <= allowed):  # also for NaN
        raise ValueError(
            f"{name} must be between 0 and {allowed} with `do_rescale={bool(do_rescale)}`, got {low:g} to {high:g}."
        )
    if pixels.is_floating_point():
        if do_rescale and 0 < high <= 1:
            raise ValueError(
                f"{name} seem to be rescaled to [0, 1] already (the largest is {high:g}): pass `do_rescale=False`, "
                "or pixels from 0 to 255."
            )
        return pixels
    return pixels.to(torch.uint8)


def is_picture(value: Any) -> bool:
    """Whether it is one picture: of PIL, or an array of two or three dimensions."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim in (2, 3))


class VideoMambaImageProcessor(TorchvisionBackend):
    r"""
    Resizes the short side to 256 (bicubic), crops the centre of 224 pixels, rescales to [0, 1] and normalises with the
    mean and standard deviation of ImageNet. For a model of another resolution `size` is `resolution * 256 / 224`.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def for_model(cls, config: VideoMambaConfig) -> "VideoMambaImageProcessor":
        """The processor for the resolution of a model."""
        height, width = config.input_size
        size = {"shortest_edge": max(height, width) * 256 // 224}
        return cls(size=size, crop_size={"height": height, "width": width})

    def __call__(
        self, images: ImageInput | None = None, *args, videos: Any = None, **kwargs: Unpack[ImagesKwargs]
    ) -> BatchFeature:
        r"""
        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                One image, `(height, width, channels)` or `(channels, height, width)`, or a batch of them. A list of
                lists is a batch of videos. Pixels are 0 to 255, or 0 to 1 with `do_rescale=False`.
            videos (*optional*):
                Instead of `images`: one video as a list of frames, or a list of videos.
            kwargs: Any attribute of the processor, for this call; `return_tensors="pt"` gives tensors.

        Returns:
            `BatchFeature` with `pixel_values`: float32 `(batch, channels, height, width)` for images,
            `(batch, frames, channels, height, width)` for videos.

        Raises:
            `ValueError`: if both or none of `images` and `videos` are given, or for a wrong number of channels, dtype
                or range of pixels.
        """
        if (images is None) == (videos is None):
            raise ValueError("Pass either `images` or `videos`.")
        if videos is not None:
            one = isinstance(videos, list | tuple) and all(map(is_picture, videos))
            one = one or (isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 4)
            images = [list(videos)] if one else list(videos)
        return self.preprocess(images, *args, **kwargs)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A list of pictures, or a list of lists of them."""
        if isinstance(images, str) or is_picture(images):
            images = [images]
        images = [self.fetch_images(image) if isinstance(image, str) else image for image in images]
        if not images:
            raise ValueError("`images` is an empty list.")
        if all(map(is_picture, images)):
            return images
        videos = [list(video) for video in images if isinstance(video, list | tuple) or getattr(video, "ndim", 0) == 4]
        if len(videos) == len(images) and all(video and all(map(is_picture, video)) for video in videos):
            return videos
        raise ValueError("`images` must be pictures (PIL images or arrays) or lists of them.")

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        do_rescale: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        image = rgb_tensor("Pixels of `images`", image, input_data_format, do_convert_rgb).to(device)
        return check_pixels("Pixels of `images`", image, do_rescale).contiguous()

    def _preprocess(
        self, images: list[Any], return_tensors: str | TensorType | None = None, **kwargs: Any
    ) -> BatchFeature:
        if not images or not isinstance(images[0], list):
            return super()._preprocess(images, return_tensors=return_tensors, **kwargs)
        frames = super()._preprocess([frame for video in images for frame in video], return_tensors=None, **kwargs)
        remaining = iter(frames["pixel_values"])
        videos = [torch.stack([next(remaining) for _ in video]) for video in images]
        return BatchFeature({"pixel_values": videos}, tensor_type=return_tensors)


__all__ = ["VideoMambaImageProcessor"]
