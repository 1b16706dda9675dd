"""How a run changes its examples, optimises, and what it leaves."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIXED_PRECISION = "no, bf16 or fp16 (default: as accelerate is configured, else no)"


def check_fields(args: Any, between_0_and_1: Iterable[str] = (), not_negative: Iterable[str] = ()) -> None:
    """Raises `ValueError` for a field that is out of range; `None` is in any."""
    for name in between_0_and_1:
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(args, name)}.")
    for name in not_negative:
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` must not be negative, got {getattr(args, name)}.")


@dataclass
class AugmentationArguments:
    """Augmentation: random changes of training examples; without any of them they are prepared as for testing."""

    flip: bool = field(default=False, metadata={"help": "flip half of the clips; not where left and right are labels"})
    min_crop_area: float | None = field(
        default=None,
        metadata={"help": "smallest share of the frame that a random crop shows, 0 to 1 (default: no random crops)"},
    )
    rand_augment_ops: int = field(default=0, metadata={"help": "operations of RandAugment drawn for a clip"})
    rand_augment_magnitude: float = field(default=7.0, metadata={"help": "mean of their magnitudes, 0 to 10"})
    rand_augment_std: float = field(default=0.5, metadata={"help": "standard deviation of their magnitudes"})
    auto_augment: bool = field(default=False, metadata={"help": "AutoAugment with its policy for ImageNet"})
    random_erasing: float = field(default=0.0, metadata={"help": "probability that a box becomes noise, 0 to 1"})
    num_sample: int = field(
        default=1, metadata={"help": "augmented views of each decoded clip (repeated augmentation)"}
    )

    def __post_init__(self):
        check_fields(self, between_0_and_1=("random_erasing", "min_crop_area"))
        check_fields(self, not_negative=("rand_augment_ops", "rand_augment_std"))
        if not 0 <= self.rand_augment_magnitude <= 10:
            raise ValueError(f"`rand_augment_magnitude` must be between 0 and 10, got {self.rand_augment_magnitude}.")
        if self.rand_augment_ops and self.auto_augment:
            raise ValueError("`rand_augment_ops` and `auto_augment` exclude each other.")
        if self.num_sample < 1:
            raise ValueError(f"`num_sample` must be at least 1, got {self.num_sample}.")

    @property
    def changes_pixels(self) -> bool:
        """Whether a clip by itself is changed."""
        return bool(
            self.flip or self.min_crop_area or self.rand_augment_ops or self.auto_augment or self.random_erasing
        )


@dataclass
class LabelledAugmentationArguments(AugmentationArguments):
    """Augmentation: random changes of training examples and of their labels."""

    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup, 0 for none"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha of cutmix, 0 for none; with mixup: one of them"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the label spread over all classes, 0 to 1"})

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, between_0_and_1=("label_smoothing",), not_negative=("mixup", "cutmix"))


@dataclass
class OptimizationArguments:
    """Optimisation: AdamW, its schedule, and how a step is computed."""

    epochs: float = field(default=30, metadata={"help": "times that the run sees the training data"})
    batch_size: int = field(default=16, metadata={"help": "examples of a batch on each process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches of a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "highest learning rate, after the warm-up"})
    min_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the end of the run"})
    warmup_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the beginning of the run"})
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs until the learning rate is highest"})
    base_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "views a step that the learning rates are for; they are scaled to the run's (default: not scaled)"
        },
    )
    weight_decay: float = field(
        default=0.05,
        metadata={"help": "weight decay of AdamW; biases, norms, position embeddings, `A_log` and `D` have none"},
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "learning rate of a layer over the rate of the next layer, above 0 to 1"}
    )
    adam_beta2: float = field(default=0.999, metadata={"help": "decay of the squared gradients' average in AdamW"})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "norm to which longer gradients are clipped (default: not clipped)"}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "evaluate and save a moving average of the weights with this decay, 0 to 1 (default: none)"},
    )
    mixed_precision: str | None = field(default=None, metadata={"help": MIXED_PRECISION})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    torch_compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})

    def __post_init__(self):
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("min_learning_rate", "warmup_learning_rate", "warmup_epochs", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("base_batch_size", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"`warmup_epochs` ({self.warmup_epochs}) must not be above `epochs` ({self.epochs}).")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {self.layer_decay}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay}.")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be no, bf16 or fp16, got {self.mixed_precision}.")


@dataclass
class RunArguments:
    """Run: where it goes, and what it leaves on its way."""

    output_dir: Path = field(metadata={"help": "folder for models, states, metrics and pictures"})
    seed: int = field(default=0, metadata={"help": "decides the order of the data and every random choice"})
    steps_per_epoch: int | None = field(
        default=None,
        metadata={"help": "with --streaming: steps of an epoch (no default: the length of a stream is not known)"},
    )
    evaluation_epochs: int = field(default=1, metadata={"help": "epochs from one evaluation to the next"})
    log_steps: int = field(default=10, metadata={"help": "steps from one line of metrics.jsonl to the next"})
    save_steps: int = field(default=500, metadata={"help": "steps from one state on disk to the next"})
    save_minutes: float = field(default=5.0, metadata={"help": "most minutes from one state on disk to the next"})
    resume: bool = field(default=False, metadata={"help": "go on from the last state in --output-dir, if there is one"})
    report_to: str = field(default="tensorboard", metadata={"help": "tracker of accelerate, or none"})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub id to which the best model is uploaded (default: not uploaded)"}
    )

    def __post_init__(self):
        for name in ("evaluation_epochs", "log_steps", "save_steps", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        if not self.save_minutes > 0:
            raise ValueError(f"--save-minutes must be positive, got {self.save_minutes}")
