"""What a run starts from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

SIZES = ("tiny", "small", "middle", "base")


@dataclass
class StartArguments:
    """Model: what the run starts from, and how it changes."""

    starts: ClassVar[tuple[str, ...]]  # arguments of which exactly one is given

    model: str | None = field(default=None, metadata={"help": "directory or Hub id to start from (no default)"})
    config: Path | None = field(
        default=None, metadata={"help": "configuration (JSON) of a model to train from scratch (no default)"}
    )
    num_frames: int | None = field(default=None, metadata={"help": "frames of a clip (default: the model's)"})
    image_size: int | None = field(
        default=None, metadata={"help": "height and width of a frame in pixels (default: the model's)"}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "stochastic depth of the last layer, 0 to 1 (default: the model's)"}
    )

    def __post_init__(self):
        given = [name for name in self.starts if getattr(self, name) is not None]
        if len(given) != 1:
            *others, last = (f"--{name}" for name in self.starts)
            raise ValueError(f"pass one of {', '.join(others)} and {last}, got {' and '.join(given) or 'none'}")


@dataclass
class ModelArguments(StartArguments):
    """Model: exactly one of --model, --config and --size, and how it changes."""

    starts = ("model", "config", "size")

    size: str | None = field(
        default=None, metadata={"help": f"train this size from scratch: {', '.join(SIZES)} (no default)"}
    )
    tubelet_size: int | None = field(default=None, metadata={"help": "frames of a token (default: the model's)"})

    def __post_init__(self):
        super().__post_init__()
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {self.size}")


@dataclass
class VideoTextModelArguments(StartArguments):
    """Model: exactly one of --model, --config, and --vision with --text, and how it changes."""

    starts = ("model", "config", "vision")

    vision: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a VideoMamba, with --text (no default)"}
    )
    text: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a BERT, with --vision (no default)"}
    )
    fusion_layer: int | None = field(
        default=None, metadata={"help": "with --text: the first layer of BERT that attends to the video (default: 9)"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "with --config: directory or Hub id (default: one is made of the captions)"}
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.vision is None) != (self.text is None):
            raise ValueError("--vision and --text go together")
        if self.fusion_layer is not None and self.text is None:
            raise ValueError(f"--fusion-layer {self.fusion_layer} is for --text")
        if self.tokenizer is not None and self.config is None:
            raise ValueError(f"--tokenizer {self.tokenizer} is for --config")

    @property
    def makes_tokenizer(self) -> bool:
        """Whether there is no tokenizer yet."""
        return self.config is not None and self.tokenizer is None
