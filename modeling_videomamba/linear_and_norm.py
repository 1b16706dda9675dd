"""Linear layers and RMS norms by the backends of the selective scan."""

import torch

from .selective_scan import BACKENDS, check_fit, check_matrix, choose_backend


def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""
    `hidden_states @ weight.T`, as [`torch.nn.functional.linear`] but for float32 on CPUs with matrix units: the backend
    `cpu` takes those, which is as exact and takes less time.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., in_features)`): Input, floating point.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): Weight.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`.

    Raises:
        `ValueError`: if a tensor is not floating point, or its shape or device does not fit the other.
        `RuntimeError`: as [`selective_scan`], or if the dtypes differ.
    """
    check_matrix("weight", weight, ("out_features", "in_features"))
    check_fit("weight", weight, hidden_states=(hidden_states, (*hidden_states.shape[:-1], weight.shape[1])))
    return BACKENDS[choose_backend(hidden_states.device.type, hidden_states.dtype)].linear(hidden_states, weight)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    r"""
    RMS norm, computed in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., D)`): Input, floating point.
        weight (`torch.Tensor` of shape `(D,)`): Weight.
        eps (`float`): Added to the mean of the squares.

    Returns:
        `torch.Tensor` of shape `(..., D)` and the dtype of `weight`.

    Raises:
        `ValueError`: if a tensor is not floating point, or its shape or device does not fit the other.
        `RuntimeError`: as [`selective_scan`].
    """
    check_matrix("weight", weight, ("D",))
    check_fit("weight", weight, hidden_states=(hidden_states, (*hidden_states.shape[:-1], len(weight))))
    backend = BACKENDS[choose_backend(hidden_states.device.type, weight.dtype)]
    return backend.rms_norm(hidden_states.float(), weight, eps)


__all__ = ["linear", "rms_norm"]
