"""Image processor of VideoMamba."""

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    is_valid_image,
    make_flat_list_of_images,
    make_nested_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .configuration_videomamba import VideoMambaConfig


def check_pixels(name: str, pixels: torch.Tensor, do_rescale: bool | None) -> torch.Tensor:
    """
    Checks pixels `(..., channels, height, width)` before they are rescaled and normalised.

    Args:
        name (`str`): What the errors call them.
        pixels (`torch.Tensor`): RGB, 0 to 255 where they will be rescaled, else floating point from 0 to 1.
        do_rescale (`bool`): Whether they will be divided by 255.

    Returns:
        `torch.Tensor`: the same pixels, uint8 if they are integers.

    Raises:
        `ValueError`: for another number of channels than 3, a dtype that is no number, NaN, or values out of range.
    """
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(f"{name} must have 3 (RGB), 1 or 4 channels, got shape {tuple(pixels.shape)}.")
    if pixels.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(pixels.shape)}.")
    if pixels.dtype == torch.uint8:
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
            images = make_nested_list_of_images(videos)
        return self.preprocess(images, *args, **kwargs)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        if isinstance(images, list | tuple) and images and all(isinstance(video, list | tuple) for video in images):
            return make_nested_list_of_images(images, expected_ndims=expected_ndims)
        if (
            is_valid_image(images) and getattr(images, "ndim", 0) == expected_ndims + 2
        ):  # a batch of videos in one array
            return [list(video) for video in images]
        return make_flat_list_of_images(self.fetch_images(images), expected_ndims=expected_ndims)

    def process_image(self, image: ImageInput, do_rescale: bool | None = None, **kwargs: Any) -> torch.Tensor:
        image = super().process_image(image, **kwargs)
        return check_pixels("Pixels of `images`", image, do_rescale)

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
