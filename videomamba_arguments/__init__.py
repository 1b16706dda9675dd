"""
What the training scripts take: dataclasses with a help text for each field.

They are a package of their own that imports neither PyTorch nor Transformers, so that the scripts read their command
lines, and show their help, at once.
"""

from .data import ON_BROKEN_VIDEO, CaptionedDataArguments, DataArguments, LabelledDataArguments
from .model import SIZES, ModelArguments, StartArguments, VideoTextModelArguments
from .objective import (
    MASK_TYPES,
    MAX_TEXT_LENGTH,
    AlignmentLoss,
    DistillationArguments,
    MaskType,
    PretrainingArguments,
    VideoTextArguments,
)
from .training import (
    MIXED_PRECISION,
    AugmentationArguments,
    LabelledAugmentationArguments,
    OptimizationArguments,
    RunArguments,
)

__all__ = [
    "MASK_TYPES",
    "MAX_TEXT_LENGTH",
    "MIXED_PRECISION",
    "ON_BROKEN_VIDEO",
    "SIZES",
    "AlignmentLoss",
    "AugmentationArguments",
    "CaptionedDataArguments",
    "DataArguments",
    "DistillationArguments",
    "LabelledAugmentationArguments",
    "LabelledDataArguments",
    "MaskType",
    "ModelArguments",
    "OptimizationArguments",
    "PretrainingArguments",
    "RunArguments",
    "StartArguments",
    "VideoTextArguments",
    "VideoTextModelArguments",
]
