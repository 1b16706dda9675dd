"""Self-distillation (paper, section 3.3): a smaller trained model teaches a larger one."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from videomamba_arguments import DistillationArguments

from ..configuration_videomamba import VideoMambaConfig
from ..modeling_videomamba import VideoMambaModel
from .classification import ClassificationRun, LabelledArguments
from .loading import load_model, load_pretrained
from .loop import Batch
from .losses import distillation_loss


class DistillationRun(ClassificationRun):
    r"""
    A run of training whose loss is that of classification plus the distance of the features of all tokens from those of
    a teacher, which sees the same pixels. What is saved is a plain classifier without the distillation head.

    Args:
        args ([`LabelledArguments`]): Of the run.
        distillation ([`DistillationArguments`]): The teacher.

    Raises:
        `OSError`, `ValueError`: as [`ClassificationRun`], and if the teacher cuts its input into other tokens.
    """

    def __init__(self, args: LabelledArguments, distillation: DistillationArguments):
        self.distillation = distillation
        config = load_pretrained(VideoMambaConfig, distillation.teacher)
        super().__init__(args, teacher_hidden_size=config.hidden_size)
        for name in ("patch_size", "tubelet_size", "num_channels"):
            own, of_teacher = getattr(self.model.config, name), getattr(config, name)
            if own != of_teacher:
                raise ValueError(f"--teacher has `{name}` {of_teacher}, the student {own}: they must be the same")
        self.teacher = load_model(VideoMambaModel, distillation.teacher).eval().requires_grad_(False)
        self.teacher.to(self.accelerator.device)

    def argument_groups(self) -> list[Any]:
        return [*super().argument_groups(), self.distillation]

    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Loss of the task, distance from the teacher, and their sum."""
        pixel_values, targets = self.mix(batch)
        with torch.no_grad(), self.accelerator.autocast():
            features = self.teacher(pixel_values).last_hidden_state
        outputs = model(pixel_values)
        task = self.loss(outputs.logits, targets)
        distance = distillation_loss(outputs.distillation_features, features)
        return {
            "loss": task + self.distillation.distillation_weight * distance,
            "task_loss": task,
            "distillation_loss": distance,
        }

    def save_model(
        self, model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, metrics: dict[str, float]
    ) -> None:
        config = copy.deepcopy(model.config)
        config.teacher_hidden_size = None
        plain = type(model)(config)
        plain.load_state_dict({name: w for name, w in weights.items() if not name.startswith("distillation_head.")})
        super().save_model(plain, plain.state_dict(), folder, metrics)
