"""What a run is trained on."""

from dataclasses import dataclass, field
from pathlib import Path

DATA = "folder of videos or images, of lists or of tar shards, or data set on the Hub (docs/training.md, Data)"
NUM_WORKERS = 4
ON_BROKEN_VIDEO = {
    "help": "what a file that can't be read does: `skip` leaves it out and reports it, `raise` ends the run",
    "choices": ["skip", "raise"],
}


@dataclass
class DataArguments:
    """Data: videos or images."""

    data: str = field(metadata={"help": DATA})
    data_root: Path | None = field(
        default=None,
        metadata={"help": "folder that the paths in lists are relative to (default: the list's)"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the training shards as they come, without a copy on disk"}
    )
    clip_seconds: float | None = field(
        default=None, metadata={"help": "cut videos into windows of so many seconds (default: videos are not cut)"}
    )
    clip_stride_seconds: float = field(
        default=16.0, metadata={"help": "with --clip-seconds: seconds from the start of a window to the next start"}
    )
    on_broken_video: str = field(default="raise", metadata=ON_BROKEN_VIDEO)
    num_workers: int = field(
        default=NUM_WORKERS, metadata={"help": "processes that decode, for each process that trains; 0 for none"}
    )

    def __post_init__(self):
        for name in ("clip_seconds", "clip_stride_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if self.num_workers < 0:
            raise ValueError(f"--num-workers must not be negative, got {self.num_workers}")


@dataclass
class LabelledDataArguments(DataArguments):
    """Data: videos or images with labels."""

    label_file: Path | None = field(
        default=None,
        metadata={"help": "text file with the names of the classes, one a line, in order (default: found in the data)"},
    )
    regression: bool = field(default=False, metadata={"help": "whole numbers are values to predict, not classes"})

    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "share of each class of the split train to evaluate on, 0 to 1, where there is no other split "
            "(default: there must be a split validation or test)"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(f"--validation-share must be above 0 and below 1, got {self.validation_share}")

    def label_names(self) -> list[str] | None:
        """Names of `label_file`. Raises `OSError` or `ValueError` as `load_labels` of the package."""
        if self.label_file is None:
            return None
        from modeling_videomamba.labels import load_labels

        return load_labels(self.label_file)


@dataclass
class CaptionedDataArguments(DataArguments):
    """Data: videos and images with captions."""

    data_root: Path | None = field(
        default=None,
        metadata={"help": "folder that the paths in the lists of --data are relative to (default: their folder)"},
    )
    more_data: list[str] = field(
        default_factory=list,
        metadata={"help": "further training data like --data, also images where --data has videos (default: none)"},
    )
    evaluation_data: str | None = field(
        default=None,
        metadata={"help": "data with a split validation or test to evaluate on (default: --data)"},
    )
    num_workers: int = field(
        default=NUM_WORKERS,
        metadata={"help": "processes that decode, for videos and for images each, for each process that trains"},
    )
    image_share: float | None = field(
        default=None,
        metadata={"help": "with --streaming of videos and images: share of batches of images (default: 0.5)"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_share is not None and not 0 < self.image_share < 1:
            raise ValueError(f"--image-share must be between 0 and 1, got {self.image_share}")
