"""Image processor of VideoMamba."""

import errno
import io
import math
import os
import struct
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .configuration_videomamba import VideoMambaConfig

WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # PyTorch can hardly compute with them
COUNTS = {"num_frames": 10**5, "num_clips": 10**3, "num_crops": 10**2}  # the largest numbers that can be meant
MAX_FRAMES = 10**6
MAX_SIDE = 2**14
MAX_NUMBER = 1e6  # of means, standard deviations and factors
SIDES = {  # names that a size has, sorted
    "size": (["shortest_edge"], ["longest_edge", "shortest_edge"], ["height", "width"], ["max_height", "max_width"]),
    "crop_size": (["height", "width"],),
}
RESAMPLINGS = (0, 1, 2, 3, "nearest", "nearest-exact", "bilinear", "bicubic", "lanczos")  # of PIL and torchvision
UNSUPPORTED = {
    "fps": "VideoMamba samples `num_frames` frames",
    "video_metadata": "sampling depends on the frames of the video alone",
}
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
GREY_MEAN, GREY_STD = (np.mean(values).round(3).item() for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def is_image_source(image: Any) -> bool:
    """Whether [`open_image`] takes it."""
    return isinstance(image, str | os.PathLike | bytes | dict)


def open_image(image: str | os.PathLike | bytes | dict[str, Any]) -> Image.Image:
    r"""
    The picture in a file, upright.

    Args:
        image (`str`, `os.PathLike`, `bytes` or `dict`): A path, an http(s) URL, the base64 of a file, the bytes of one,
            or a value of the `Image` feature of `datasets`: a dictionary with `path` or `bytes`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `OSError`: if it can't be read or downloaded.
        `ValueError`: if it is not a picture, or truncated.
    """
    source: Any = image
    name = None
    if isinstance(image, dict):
        if not {"path", "bytes"} & image.keys():
            raise ValueError(f"A dictionary in `images` must have `path` or `bytes`, got {sorted(image)}.")
        content, name = image.get("bytes"), image.get("path")
        source = name if content is None else content
    name = name or ("a picture in `images`" if isinstance(source, bytes) else str(source)[:200])
    try:
        if isinstance(source, str) and not os.path.exists(source):  # noqa: PTH110 (base64 is too long for `Path`)
            return _load_address(source, name)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.args[1:]:
            raise  # of the system; those of PIL have no number
        raise ValueError(f"{name}: not a picture, or truncated ({error})") from error


def _load_address(address: str, name: str) -> Image.Image:
    """The picture behind a URL, or in base64."""
    if not address.startswith(("http://", "https://", "data:")):
        try:
            return load_image(address)
        except ValueError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file, and not the base64 of a picture", name) from error
    try:
        return load_image(address)
    except UnidentifiedImageError:
        raise
    except Exception as error:  # whatever the network does
        raise OSError(errno.EIO, f"can't be downloaded ({error})", name) from error


def as_tensor(name: str, pixels: Any) -> torch.Tensor:
    """
    A picture or an array as a tensor that PyTorch can compute with; a PIL image, and grey without a dimension for it,
    with the channels last.
    """
    if isinstance(pixels, Image.Image):
        if pixels.mode.startswith(("I", "F")):
            raise ValueError(f"{name} in PIL mode {pixels.mode!r} have more than 8 bits: pass them as an array.")
        pixels = np.array(pixels.convert("RGB"))
    if isinstance(pixels, np.ndarray):
        if pixels.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be integers or floating point, got {pixels.dtype}.")
        wide = pixels.dtype.kind == "u" and pixels.dtype.itemsize > 1
        dtype = np.float64 if pixels.dtype.itemsize > 8 else pixels.dtype.newbyteorder("=")
        pixels = torch.from_numpy(np.require(pixels, np.int64 if wide else dtype, ["C", "W"]))
    if pixels.dtype in WIDE_UNSIGNED:
        pixels = pixels.to(torch.int64)
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
        `torch.Tensor`: the same pixels, uint8 if they are integers from 0 to 255, else float32.

    Raises:
        `ValueError`: for empty pixels, a dtype that is no number, NaN, or values out of range.
    """
    if pixels.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(pixels.shape)}.")
    if pixels.dtype == torch.uint8 and do_rescale:
        return pixels
    if pixels.dtype == torch.bool or pixels.is_complex():
        raise ValueError(f"{name} must be integers or floating point, got {pixels.dtype}.")
    if pixels.is_floating_point():
        pixels = pixels.float()
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
    return pixels.to(torch.uint8 if do_rescale else torch.float32)


def to_grey(pixels: torch.Tensor) -> torch.Tensor:
    """The brightness of RGB `(..., 3, height, width)`, `(..., 1, height, width)` of the same dtype."""
    grey = torch.einsum("...chw,c->...hw", pixels.float(), torch.tensor(LUMA, device=pixels.device)).unsqueeze(-3)
    return grey if pixels.is_floating_point() else grey.round().to(pixels.dtype)


def channel_settings(config: VideoMambaConfig) -> dict[str, Any]:
    """Settings of a processor for the channels of a model. Raises `ValueError` where it can't make such channels."""
    if config.num_channels == 1:
        return {"do_grayscale": True, "image_mean": [GREY_MEAN], "image_std": [GREY_STD]}
    if config.num_channels != 3:
        raise ValueError(
            f"A processor makes 1 channel (grey) or 3 (RGB), and the model has `num_channels` {config.num_channels}: "
            "make its `pixel_values` without one."
        )
    return {}


def check_processor_settings(settings: dict[str, Any]) -> None:
    r"""
    Checks settings of a processor, those of a call as those of a file.

    Args:
        settings (`dict[str, Any]`): By name. A setting that is missing is not checked, nor, but for numbers of frames
            and views, one that is `None`.

    Raises:
        `ValueError`: for one that can't be meant; the message names it.
    """
    for name in COUNTS & settings.keys():
        _check_whole(f"`{name}`", settings[name], COUNTS[name])
    given = {name: value for name, value in settings.items() if value is not None}
    for name in UNSUPPORTED & given.keys():
        raise ValueError(f"`{name}` is not supported, got {given[name]}: {UNSUPPORTED[name]}.")
    frames = math.prod(given.get(name, 1) for name in COUNTS)
    if frames > MAX_FRAMES:
        names = " x ".join(f"`{name}`" for name in COUNTS)
        raise ValueError(f"{names} must be at most {MAX_FRAMES} frames of a video, got {frames}.")
    for name, value in given.items():
        if (name.startswith("do_") or name == "default_to_square") and not isinstance(value, bool):
            raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    for name in SIDES & given.keys():
        for side, length in _sides(name, given[name]).items():
            _check_whole(f"`{name}` ({side})", length, MAX_SIDE)
    channels = 1 if given.get("do_grayscale") else 3
    for name in {"image_mean", "image_std"} & given.keys():
        values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
        if len(values) not in (1, channels):
            raise ValueError(
                f"`{name}` must have 1 or as many values as channels ({channels}) with "
                f"`do_grayscale={bool(given.get('do_grayscale'))}`, got {given[name]}."
            )
        for value in values:
            _check_number(name, value)
    if "rescale_factor" in given:
        _check_number("rescale_factor", given["rescale_factor"])
    if "resample" in given:
        _check_resample(given["resample"])
    if "device" in given:
        _check_device(given["device"])


def _sides(name: str, size: Any) -> dict[str, Any]:
    if isinstance(size, dict | SizeDict):
        sides = dict(size)
        if sorted(sides) not in SIDES[name]:
            allowed = " or ".join(" and ".join(names) for names in SIDES[name])
            raise ValueError(f"`{name}` must have {allowed}, got {sides}.")
        return sides
    if isinstance(size, list | tuple):
        if len(size) != 2:
            raise ValueError(f"`{name}` must be a number, two (height and width) or a dictionary, got {size}.")
        return dict(zip(("height", "width"), size, strict=True))
    return {"side": size}


def _check_whole(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}.")


def _check_number(name: str, value: Any) -> None:
    """With larger and smaller numbers pixels would not be finite in float32."""
    least = -MAX_NUMBER if name == "image_mean" else 1 / MAX_NUMBER
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= MAX_NUMBER:
        raise ValueError(f"`{name}` must be a number from {least:g} to {MAX_NUMBER:g}, got {value!r}.")


def _check_resample(value: Any) -> None:
    mode = value.value if isinstance(value, InterpolationMode) else value
    if isinstance(mode, bool | float) or mode not in RESAMPLINGS:
        raise ValueError(f"`resample` must be 0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic), got {value!r}.")


def _check_device(value: Any) -> None:
    try:
        torch.zeros(1, device=value).item()  # "meta" has no values
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be one that PyTorch can use here, got {value!r}.") from error


def is_picture(value: Any) -> bool:
    """Whether it is one picture: of PIL, or an array of two or three dimensions."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim in (2, 3))


def _opened(images: Any) -> Any:
    """With pictures in place of files, in lists too."""
    if isinstance(images, list | tuple):
        return [_opened(image) for image in images]
    return open_image(images) if is_image_source(images) else images


class VideoMambaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg] # a TypedDict
    """
    Arguments beyond those of every image processor.

    Args:
        do_grayscale (`bool`): Whether to make one channel, grey, for a model of one.
    """

    do_grayscale: bool | None


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
    do_grayscale = False
    valid_kwargs = VideoMambaImageProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[VideoMambaImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        check_processor_settings(kwargs)
        return super()._standardize_kwargs(**kwargs)

    @classmethod
    def for_model(cls, config: VideoMambaConfig) -> "VideoMambaImageProcessor":
        """
        The processor for the resolution and channels of a model. Raises `ValueError` for other channels than 1 and 3.
        """
        height, width = config.input_size
        size = {"shortest_edge": max(height, width) * 256 // 224}
        return cls(size=size, crop_size={"height": height, "width": width}, **channel_settings(config))

    def __call__(
        self, images: Any = None, *args, videos: Any = None, **kwargs: Unpack[VideoMambaImageProcessorKwargs]
    ) -> BatchFeature:
        r"""
        Args:
            images (*optional*):
                One image or a list of them. An image is a PIL image, an array or tensor `(height, width)`,
                `(height, width, channels)` or `(channels, height, width)`, a path, an http(s) URL, the bytes of a file,
                or a value of the `Image` feature of `datasets`. A list of lists is a batch of videos. Pixels are 0 to
                255, or 0 to 1 with `do_rescale=False`, of any number type but `bool`.
            videos (*optional*):
                Instead of `images`: one video as a list of frames, or a list of videos.
            kwargs: Any attribute of the processor, for this call; `return_tensors="pt"` gives tensors.

        Returns:
            `BatchFeature` with `pixel_values`: float32 `(batch, channels, height, width)` for images,
            `(batch, frames, channels, height, width)` for videos.

        Raises:
            `ValueError`: if both or none of `images` and `videos` are given, a file is no picture, a setting can't be
                meant, or for a wrong number of channels, dtype or range of pixels.
            `FileNotFoundError`: if there is no such file.
            `OSError`: if a file can't be read or downloaded.
        """
        check_processor_settings({"do_grayscale": self.do_grayscale, **kwargs})
        if (images is None) == (videos is None):
            raise ValueError("Pass either `images` or `videos`.")
        if videos is not None:
            if is_image_source(videos):
                raise ValueError("`videos` must be frames: VideoMambaVideoProcessor reads files of videos.")
            one = isinstance(videos, list | tuple) and all(is_picture(v) or is_image_source(v) for v in videos)
            one = one or (isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 4)
            images = [list(videos)] if one else list(videos)
        return self.preprocess(images, *args, **kwargs)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A list of pictures, or a list of lists of them."""
        if is_image_source(images) or is_picture(images):
            images = [images]
        images = [_opened(image) for image in images]
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
        do_grayscale: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        image = rgb_tensor("Pixels of `images`", image, input_data_format, do_convert_rgb).to(device)
        image = check_pixels("Pixels of `images`", image, do_rescale)
        return (to_grey(image) if do_grayscale else image).contiguous()

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
