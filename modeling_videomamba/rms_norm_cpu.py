"""The RMS norm of the residual stream on a CPU: the compiled kernel of `csrc/residual_stream.cpp`, with gradients."""

import ctypes

import torch
import torch.nn.functional as F

from .cpu_library import DTYPES, Norm, NormGradients, Sequence, kernels, pointer
from .operators import are_recorded


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of float32 `(..., D)`, in the dtype of `weight` `(D,)`."""
    is_plain = type(hidden_states) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
    if are_recorded() or not is_plain or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return F.rms_norm(hidden_states, weight.shape, weight.float(), eps).to(weight.dtype)
    return _RMSNorm.apply(hidden_states, weight, eps)


def _rows(tensor):
    return tensor.reshape(1, -1, tensor.shape[-1]).contiguous()


def _prepare(x, weight, eps, dtype, y=None):
    return Norm(
        *(*x.shape, torch.get_num_threads(), DTYPES[dtype], eps),
        *(Sequence.of("hidden_states", x, x.shape, torch.float32), pointer("weight", weight, x.shape[2:])),
        Sequence.of("y", y, x.shape, dtype),
    )


def norm_forward(hidden_states, weight, eps):
    """[`rms_norm`] alone."""
    x, scale = _rows(hidden_states), weight.float().contiguous()
    y = torch.empty_like(x, dtype=weight.dtype)
    if y.numel():
        kernels().videomamba_rms_norm(ctypes.byref(_prepare(x, scale, eps, y.dtype, y)))
    return y.view(hidden_states.shape)


def norm_backward(grad_y, hidden_states, weight, eps, add=None):
    """Gradients of `hidden_states`, to which `add` is added, and of `weight`."""
    x, scale, grad_y = _rows(hidden_states), weight.float().contiguous(), _rows(grad_y)
    add = None if add is None else _rows(add)
    grad_x, grad_weight = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), x.shape[-1])
    if x.numel():
        of_y = Sequence.of("grad_y", grad_y, x.shape, grad_y.dtype)
        of_x, summand = (Sequence.of(name, t, x.shape, torch.float32) for name, t in (("grad_x", grad_x), ("add", add)))
        gradients = NormGradients(of_y, of_x, summand, grad_weight.data_ptr())
        norm = _prepare(x, scale, eps, grad_y.dtype)
        kernels().videomamba_rms_norm_backward(ctypes.byref(norm), ctypes.byref(gradients))
    return grad_x.view(hidden_states.shape), grad_weight.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        ctx.save_for_backward(hidden_states, weight)
        ctx.eps = eps
        return norm_forward(hidden_states, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        return *norm_backward(grad_y, *ctx.saved_tensors, ctx.eps), None
