"""The RMS norm of the residual stream on a CPU: the compiled kernel of `csrc/residual_stream.cpp`, as an operator."""

import ctypes

import torch
import torch.nn.functional as F

from .cpu_library import DTYPES, Norm, NormGradients, Sequence, kernels
from .operators import operator


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of float32 `(..., D)`, in the dtype of `weight` `(D,)`."""
    is_plain = type(hidden_states) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_recorded or not is_plain or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return F.rms_norm(hidden_states, weight.shape, weight.float(), eps).to(weight.dtype)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
        return _rms_norm(hidden_states, weight, eps)
    return cpu_rms_norm(hidden_states, weight, eps)


def _rows(tensor):
    return tensor.reshape(1, -1, tensor.shape[-1]).contiguous()


def _prepare(x, weight, eps, dtype, y=None):
    sequences = (Sequence.of(x), weight.data_ptr(), Sequence.of(y))
    return Norm(*x.shape, torch.get_num_threads(), DTYPES[dtype], eps, *sequences)


def cpu_rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See [`rms_norm`]."""
    x, scale = _rows(hidden_states), weight.float().contiguous()
    y = torch.empty_like(x, dtype=weight.dtype)
    if y.numel():
        kernels().videomamba_rms_norm(ctypes.byref(_prepare(x, scale, eps, y.dtype, y)))
    return y.view(hidden_states.shape)


def cpu_rms_norm_backward(
    grad_y: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `hidden_states, weight`."""
    x, scale, grad_y = _rows(hidden_states), weight.float().contiguous(), _rows(grad_y)
    grad_x, grad_weight = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), x.shape[-1])
    if x.numel():
        gradients = NormGradients(Sequence.of(grad_y), Sequence.of(grad_x), grad_weight.data_ptr())
        norm = _prepare(x, scale, eps, grad_y.dtype)
        kernels().videomamba_rms_norm_backward(ctypes.byref(norm), ctypes.byref(gradients))
    return grad_x.view(hidden_states.shape), grad_weight.sum(0).to(weight.dtype)


_rms_norm = operator(cpu_rms_norm)
_rms_norm_backward = operator(cpu_rms_norm_backward)


@_rms_norm.register_fake
def _(hidden_states, weight, eps):
    return torch.empty_like(hidden_states, dtype=weight.dtype, memory_format=torch.contiguous_format)


@_rms_norm_backward.register_fake
def _(grad_y, hidden_states, weight, eps):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    return *_rms_norm_backward(grad_y, *ctx.saved_tensors, ctx.eps), None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
