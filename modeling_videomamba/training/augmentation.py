"""Augmentation of the released runs with torchvision, the same for all frames of a clip."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from videomamba_arguments import AugmentationArguments, LabelledAugmentationArguments

from ..image_processing_videomamba import to_grey
from .data import Processor


class RandAugment(nn.Module):
    r"""
    RandAugment as in the released runs (`rand-m7-n4-mstd0.5-inc1` of timm): `num_ops` random operations, each done with
    probability 1/2, at magnitudes drawn around `magnitude`. The operations are those of torchvision.

    Args:
        num_ops (`int`): Operations drawn for a clip.
        magnitude (`float`): Mean of their magnitudes, 0 to 10.
        magnitude_std (`float`): Standard deviation of their magnitudes.
        fill (`list[float]`): Colour of what comes into the picture, 0 to 255.
    """

    bins = 31

    def __init__(self, num_ops: int, magnitude: float, magnitude_std: float, fill: list[float]):
        super().__init__()
        self.num_ops, self.magnitude, self.magnitude_std, self.fill = num_ops, magnitude, magnitude_std, fill

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames `(..., channels, height, width)`, uint8, to the same."""
        for _ in range(self.num_ops):
            if torch.rand(()) < 0.5:
                magnitude = (self.magnitude + self.magnitude_std * torch.randn(())).clamp(0, 10).item()
                level = round(magnitude / 10 * (self.bins - 1))
                frames = v2.RandAugment(1, level, self.bins, v2.InterpolationMode.BILINEAR, self.fill)(frames)
        return frames


class Grey(nn.Module):
    """For a model of one channel."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return to_grey(frames)


def training_transform(processor: Processor, args: AugmentationArguments) -> nn.Module | None:
    r"""
    What is done to one clip, in timm's order: crop, flip, RandAugment, normalisation, erasing.

    Args:
        processor: Of the model: crop size, interpolation, mean and standard deviation.
        args ([`AugmentationArguments`]): `None` is returned if they change nothing.

    Returns:
        `nn.Module`: from uint8 frames `(frames, 3, height, width)` to float32 ones of the crop size. Draws from the
        global generator of PyTorch.
    """
    if not args.changes_pixels:
        return None
    crop = processor.crop_size["height"], processor.crop_size["width"]
    interpolation = v2.InterpolationMode.BICUBIC
    if args.min_crop_area is not None:
        steps: list[nn.Module] = [v2.RandomResizedCrop(crop, (args.min_crop_area, 1.0), interpolation=interpolation)]
    else:
        size = processor.size.get("shortest_edge") or (processor.size["height"], processor.size["width"])
        steps = [v2.Resize(size, interpolation), v2.CenterCrop(crop)]
    if args.flip:
        steps.append(v2.RandomHorizontalFlip())
    if processor.do_grayscale:
        steps.append(Grey())
    fill = [255 * value for value in processor.image_mean]
    if args.rand_augment_ops:
        steps.append(RandAugment(args.rand_augment_ops, args.rand_augment_magnitude, args.rand_augment_std, fill))
    if args.auto_augment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, v2.InterpolationMode.BILINEAR, fill))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
    if args.random_erasing:
        steps.append(v2.RandomErasing(args.random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"))
    return v2.Compose(steps)


class Mixing:
    r"""
    Mixup or cutmix of a batch, each with probability 1/2 where both are on, and the targets that belong to it.

    Args:
        args ([`LabelledAugmentationArguments`]): `mixup`, `cutmix` and `label_smoothing`.
        num_classes (`int`): Classes of the targets.
    """

    def __init__(self, args: LabelledAugmentationArguments, num_classes: int):
        self.smoothing, self.num_classes = args.label_smoothing, num_classes
        self.choices: list[nn.Module] = []
        if args.mixup:
            self.choices.append(v2.MixUp(alpha=args.mixup, num_classes=num_classes))
        if args.cutmix:
            self.choices.append(v2.CutMix(alpha=args.cutmix, num_classes=num_classes))

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, ..., channels, height, width)`): Rows that are not `valid`
                are left out of the mixture.
            labels (`torch.Tensor` of shape `(batch,)`): Class indices.
            valid (`torch.Tensor` of shape `(batch,)`): Booleans.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the mixed pixels, and probabilities `(batch, num_classes)`. Draws from
            the global generator of PyTorch.
        """
        targets = F.one_hot(labels, self.num_classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        if not self.choices or int(valid.sum()) < 2:
            return pixel_values, targets
        mix = self.choices[int(torch.randint(len(self.choices), ()))]
        kind = tv_tensors.Video if pixel_values.ndim == 5 else tv_tensors.Image
        mixed, mixed_targets = mix(kind(pixel_values[valid]), targets[valid])
        pixel_values, targets = pixel_values.clone(), targets.clone()
        pixel_values[valid], targets[valid] = mixed.as_subclass(torch.Tensor), mixed_targets
        return pixel_values, targets
