"""What a run minimises besides the loss of its labels: teachers, masks and texts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

AlignmentLoss = Literal["l2", "mse", "smooth_l1"]
MaskType = Literal["random", "tube", "clip_row", "frame_row", "attention"]
MASK_TYPES: tuple[str, ...] = get_args(MaskType)
DEFAULT_MASK_RATIOS = {"video": 0.8, "image": 0.5}
MAX_TEXT_LENGTH = {"help": "most tokens of a text; longer texts are cut, and their number is reported"}


@dataclass
class DistillationArguments:
    """Distillation: the teacher."""

    teacher: str = field(metadata={"help": "directory or Hub id of a smaller model, trained on the same task"})
    distillation_weight: float = field(
        default=1.0, metadata={"help": "weight of the distance between the features of student and teacher in the loss"}
    )

    def __post_init__(self):
        if self.distillation_weight < 0:
            raise ValueError(f"`distillation_weight` must not be negative, got {self.distillation_weight}.")


@dataclass
class PretrainingArguments:
    """Masked pretraining: the teacher, the masks, and how the model is judged on its way."""

    teacher: str = field(metadata={"help": "directory or Hub id of a CLIP model"})
    mask_type: MaskType = field(
        default="attention", metadata={"help": "which tokens are hidden (docs/training.md, Masked pretraining)"}
    )
    mask_ratio: float = field(default=0.8, metadata={"help": "share of the tokens that is hidden, 0 to 1"})
    alignment_loss: AlignmentLoss | None = field(
        default=None, metadata={"help": "distance of features (default: the model's, l2 for a new one)"}
    )
    num_aligned_layers: int | None = field(
        default=None, metadata={"help": "layers aligned with as many of the teacher (default: the model's, 1)"}
    )
    alignment_interval: int | None = field(
        default=None, metadata={"help": "layers from one aligned layer to the next (default: the model's, 1)"}
    )
    teacher_cache: Path | None = field(
        default=None,
        metadata={
            "help": "folder for the teacher's features; clips then are the same in every epoch (default: no cache)"
        },
    )
    evaluation_examples: int = field(default=256, metadata={"help": "most examples on which the loss is evaluated"})
    probe_data: str | None = field(
        default=None,
        metadata={"help": "labelled data like those of finetune.py, to probe the features with (default: no probe)"},
    )
    probe_data_root: Path | None = field(
        default=None,
        metadata={"help": "folder that the paths in the lists of --probe-data are relative to (default: their folder)"},
    )
    probe_examples: int = field(default=5000, metadata={"help": "most examples of each split of --probe-data"})
    probe: Literal["knn", "linear"] = field(
        default="knn", metadata={"help": "classifier on the frozen features: nearest neighbours or linear"}
    )

    def __post_init__(self):
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"`mask_ratio` must be at least 0 and below 1, got {self.mask_ratio}.")
        for name in ("num_aligned_layers", "alignment_interval", "evaluation_examples", "probe_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass
class VideoTextArguments:
    """Objectives: the teacher, the masks, the texts, and how the model is judged on its way."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "directory or Hub id of a CLIP model, whose tokens the video's are to match (default: none)"},
    )
    video_mask_type: MaskType | None = field(
        default=None, metadata={"help": "which tokens of a video are hidden (default: no tokens)"}
    )
    video_mask_ratio: float | None = field(
        default=None, metadata={"help": f"share of hidden tokens, 0 to 1 (default: {DEFAULT_MASK_RATIOS['video']})"}
    )
    image_mask_type: MaskType | None = field(
        default=None, metadata={"help": "which tokens of an image are hidden (default: no tokens)"}
    )
    image_mask_ratio: float | None = field(
        default=None, metadata={"help": f"share of hidden tokens, 0 to 1 (default: {DEFAULT_MASK_RATIOS['image']})"}
    )
    mlm_probability: float = field(
        default=0.5, metadata={"help": "share of words that masked language modelling guesses, 0 for none"}
    )
    max_text_length: int = field(default=32, metadata=MAX_TEXT_LENGTH)
    evaluation_examples: int = field(default=1000, metadata={"help": "most videos on which retrieval is evaluated"})

    def __post_init__(self):
        for kind in ("video", "image"):
            mask_type, ratio = getattr(self, f"{kind}_mask_type"), getattr(self, f"{kind}_mask_ratio")
            if ratio is not None and not 0 <= ratio < 1:
                raise ValueError(f"`{kind}_mask_ratio` must be at least 0 and below 1, got {ratio}.")
            if ratio is not None and mask_type is None:
                raise ValueError(f"`{kind}_mask_ratio` {ratio} is for a `{kind}_mask_type`: pass one.")
            if mask_type == "attention" and self.teacher is None:
                raise ValueError(f"`{kind}_mask_type` attention is that of a `teacher`: pass one.")
        if not 0 <= self.mlm_probability < 1:
            raise ValueError(f"`mlm_probability` must be at least 0 and below 1, got {self.mlm_probability}.")
        for name, least in (("max_text_length", 3), ("evaluation_examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    def mask(self, kind: str) -> tuple[MaskType | None, float]:
        """Type and ratio of the masks of `"video"` or `"image"`."""
        ratio = getattr(self, f"{kind}_mask_ratio")
        return getattr(self, f"{kind}_mask_type"), DEFAULT_MASK_RATIOS[kind] if ratio is None else ratio
