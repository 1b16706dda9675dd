"""Training objectives as pure functions, one value for each example."""

import torch
import torch.nn.functional as F


def distillation_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    r"""
    Self-distillation (paper, section 3.3): the squared distance between the features of the student and the final
    features of a smaller, already trained teacher, both l2-normalised (`2 - 2 cos`), mean over tokens. Added with
    weight 1 to the classification loss.

    Args:
        student_features (`torch.Tensor` of shape `(batch, length, teacher_hidden_size)`):
            `distillation_features` of the student.
        teacher_features (`torch.Tensor` of the same shape): `last_hidden_state` of the teacher.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.

    Raises:
        `ValueError`: if the shapes differ.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"`student_features` {tuple(student_features.shape)} and `teacher_features` "
            f"{tuple(teacher_features.shape)} must have one shape."
        )
    difference = F.normalize(student_features.float(), dim=-1) - F.normalize(teacher_features.float(), dim=-1)
    return difference.square().sum(-1).mean(-1)


def classification_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Cross-entropy with probabilities as targets.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): Scores before softmax.
        targets (`torch.Tensor` of the same shape): Probabilities of the classes, as label smoothing, mixup and cutmix
            make them.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def regression_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error `(batch,)`, float32, of `logits` `(batch, 1)` for `targets` `(batch,)`."""
    return (logits.float().squeeze(-1) - targets).square()
