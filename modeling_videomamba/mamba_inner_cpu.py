"""
Convolution, projections and scan of one direction on a CPU as one operator, which is what Mamba's release calls its
inner function.

To training it is what inference in pieces is to inference: the time steps exist for a chunk only, the output of the
convolution for the time of a call. The backward pass computes both anew, as Mamba's does (arXiv 2312.00752, section 3.3.2).
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .matrix_product_cpu import linear
from .operators import operator
from .selective_scan_cpu import cpu_causal_conv1d, cpu_causal_conv1d_backward, scan, scan_backward, scan_outputs


def mamba_inner(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, *, z, add, reverse):
    """
    [`selective_scan`] of what [`causal_conv1d`] makes of `x` (batch, length, channels), with time steps, B and C from the
    linear layers `x_proj` (rank + 2 * state, channels) and, for the time steps, `dt_proj` (channels, rank).
    """
    parameters = [conv_weight.squeeze(1).float(), conv_bias.float(), x_proj, dt_proj.float(), dt_bias.float()]
    inputs = [x, *parameters, A.float(), D.float(), z, add]
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return _inner(*inputs, reverse, keep)[0]


def _split(projected, dt_proj, A):
    return projected.split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)


def cpu_mamba_inner(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    add: torch.Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what is to `keep` for the backward pass: as [`scan`], and what `x_proj` made."""
    convolved = cpu_causal_conv1d(x, conv_weight, conv_bias, reverse)
    with torch.autocast("cpu", enabled=False):
        projected = linear(convolved, x_proj)
    dt, B, C = _split(projected, dt_proj, A)
    y, ungated, checkpoints = scan(convolved, dt, A, B, C, D, z, dt_bias, add, dt_proj.T, reverse, keep)
    return y, ungated, checkpoints, projected


def cpu_mamba_inner_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    ungated: torch.Tensor,
    checkpoints: torch.Tensor,
    projected: torch.Tensor,
    reverse: bool,
) -> list[torch.Tensor]:
    """Gradients of `x` and the parameters, then, with a gate, of `z` and of what was added before the gate."""
    convolved = cpu_causal_conv1d(x, conv_weight, conv_bias, reverse)
    dt, B, C = _split(projected, dt_proj, A)
    gradient = scan_backward(
        *(grad_y, convolved, dt, A, B, C, D, z, dt_bias, dt_proj.T, ungated, checkpoints, reverse)
    )
    grad_convolved, grad_projected = gradient.x, gradient.projected.to(x.dtype)
    with torch.autocast("cpu", enabled=False):
        grad_convolved.flatten(0, 1).addmm_(grad_projected.flatten(0, 1), x_proj)
        grad_x_proj = grad_projected.flatten(0, 1).T @ convolved.flatten(0, 1)
    grad_x, grad_conv_weight, grad_conv_bias = cpu_causal_conv1d_backward(
        *(grad_convolved, x, conv_weight, conv_bias, reverse)
    )
    gradients = [grad_x, grad_conv_weight, grad_conv_bias, grad_x_proj, gradient.dt_proj.T.contiguous()]
    gradients += [gradient.dt_bias, gradient.A, gradient.D]
    return gradients if z is None else [*gradients, gradient.z, gradient.add]


_inner = operator(cpu_mamba_inner)
_inner_backward = operator(cpu_mamba_inner_backward)


@_inner.register_fake
def _(x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, z, add, reverse, keep):
    return *scan_outputs(x, A, z, keep), x.new_empty(*x.shape[:2], len(x_proj))


@_inner_backward.register_fake
def _(grad_y, x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, z, ungated, checkpoints, projected, reverse):
    tensors = (x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, *(() if z is None else (z, x)))
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


@register_flop_formula(_inner._opoverload.overloadpacket)
def _(x_shape, conv_weight_shape, conv_bias_shape, x_proj_shape, dt_proj_shape, *args, **kwargs):
    """Of the projections, as those of other layers are counted."""
    batch, length, channels = x_shape
    return 2 * batch * length * channels * (x_proj_shape[0] + dt_proj_shape[1])


@register_flop_formula(_inner_backward._opoverload.overloadpacket)
def _(grad_y_shape, x_shape, conv_weight_shape, conv_bias_shape, x_proj_shape, dt_proj_shape, *args, **kwargs):
    batch, length, channels = x_shape
    return 4 * batch * length * channels * (x_proj_shape[0] + dt_proj_shape[1])


def _setup_context(ctx, inputs, output):
    *tensors, add, ctx.reverse, _ = inputs
    ctx.has_add = add is not None
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, *_):
    gradients = _inner_backward(grad_y, *ctx.saved_tensors, ctx.reverse)
    grad_z, grad_add = gradients[8:] or (None, grad_y)
    return *gradients[:8], grad_z, grad_add if ctx.has_add else None, None, None


_inner.register_autograd(_backward, setup_context=_setup_context)
