"""
The bidirectional Mamba block on a CPU as one operator with gradients, as Mamba's release has its block.

For the backward pass it keeps what `in_proj` and `x_proj` make, the states between chunks and the output before the
gate. The output of the convolution, the time steps and the gated output are computed anew, which takes no more time
than to read them from memory (Mamba, arXiv 2312.00752, section 3.3.2).
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from .matrix_product_cpu import matmul, weight_gradient
from .operators import operator
from .selective_scan_cpu import convolve, convolve_backward, scan, scan_backward, scan_outputs


@dataclass
class ScanParameters:
    """
    Of one scan: `conv_weight` (channels, width), `conv_bias`, `dt_bias` and `D` (channels,), `x_proj`
    (rank + 2 * state, channels), `dt_proj` (channels, rank), `A` (channels, state). All but `x_proj` are float32.
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: torch.Tensor
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `dt_proj` makes time steps of, B and C."""
        return projected.split([self.dt_proj.shape[1], self.A.shape[1], self.A.shape[1]], dim=-1)


NUM_PARAMETERS = len(ScanParameters.__dataclass_fields__)


def mixer(
    hidden_states: torch.Tensor,
    in_proj: torch.Tensor,
    out_proj: torch.Tensor,
    scans: list[ScanParameters],
    reverse: list[bool],
) -> torch.Tensor:
    """
    `(batch, length, D)` to the same: `scans`, each in its direction, of the `x` that `in_proj` (2 * channels, D) makes,
    their sum times SiLU(z), and `out_proj` (D, channels).
    """
    parameters = [getattr(each, name) for each in scans for name in ScanParameters.__dataclass_fields__]
    needs_grad = any(tensor.requires_grad for tensor in (hidden_states, in_proj, out_proj, *parameters))
    keep = torch.is_grad_enabled() and needs_grad
    return _mixer(hidden_states, in_proj, out_proj, parameters, reverse, keep)[0]


def _by_scan(tensors):
    return [ScanParameters(*tensors[i : i + NUM_PARAMETERS]) for i in range(0, len(tensors), NUM_PARAMETERS)]


def _rows(tensor):
    return tensor.flatten(0, 1)


def cpu_mixer(
    hidden_states: torch.Tensor,
    in_proj: torch.Tensor,
    out_proj: torch.Tensor,
    parameters: list[torch.Tensor],
    reverse: list[bool],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """
    The output, and what is to `keep` for the backward pass: `x` and `z` in one tensor, the output before the gate, and,
    for each scan, what `x_proj` made and the states between chunks.
    """
    scans = _by_scan(parameters)
    xz = matmul(_rows(hidden_states), in_proj.T).unflatten(0, hidden_states.shape[:2])
    x, z = xz.chunk(2, dim=-1)
    y, ungated, kept = None, None, []
    for i, each in enumerate(scans):
        convolved = convolve(x, each.conv_weight, each.conv_bias, reverse[i])
        projected = matmul(_rows(convolved), each.x_proj.T).unflatten(0, hidden_states.shape[:2])
        dt, B, C = each.split(projected)
        gate = z if each is scans[-1] else None
        y, ungated, checkpoints = scan(
            *(convolved, dt, each.A, B, C, each.D, gate, each.dt_bias, y, each.dt_proj.T, reverse[i], keep)
        )
        kept += [projected, checkpoints]
    out = matmul(_rows(y), out_proj.T).unflatten(0, hidden_states.shape[:2])
    return (out, xz, ungated, kept) if keep else (out, *map(hidden_states.new_empty, (0, 0)), [])


def cpu_mixer_backward(
    grad_out: torch.Tensor,
    hidden_states: torch.Tensor,
    in_proj: torch.Tensor,
    out_proj: torch.Tensor,
    parameters: list[torch.Tensor],
    xz: torch.Tensor,
    ungated: torch.Tensor,
    kept: list[torch.Tensor],
    reverse: list[bool],
) -> list[torch.Tensor]:
    """Gradients of `hidden_states, in_proj, out_proj`, then of `parameters`."""
    scans, shape, grad_out = _by_scan(parameters), xz.shape[:2], _rows(grad_out)
    (x, z), grad_xz = xz.chunk(2, dim=-1), torch.empty_like(xz)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    grad_y = matmul(grad_out, out_proj).unflatten(0, shape)
    y = torch.empty_like(grad_y)
    gradients: list[torch.Tensor] = []
    for i, each in reversed(list(enumerate(scans))):
        is_last = each is scans[-1]
        convolved = convolve(x, each.conv_weight, each.conv_bias, reverse[i])
        projected, checkpoints = kept[2 * i : 2 * i + 2]
        dt, B, C = each.split(projected)
        gate = {"z": z, "grad_z": grad_z, "ungated": ungated, "y": y} if is_last else {}
        gradient = scan_backward(
            *(grad_y, convolved, dt, each.A, B, C, each.D, each.dt_bias, each.dt_proj.T, checkpoints, reverse[i]),
            **gate,
        )
        grad_y = gradient.add if is_last else grad_y
        grad_convolved, grad_projected = gradient.x, _rows(gradient.projected.to(xz.dtype))
        torch.addmm(_rows(grad_convolved), grad_projected, each.x_proj, out=_rows(grad_convolved))
        grad_x_proj = torch.mm(grad_projected.T, _rows(convolved))
        grad_conv = convolve_backward(
            *(grad_convolved, x, each.conv_weight, each.conv_bias, reverse[i], grad_x), add=not is_last
        )
        others = (grad_x_proj, gradient.dt_proj.T.contiguous(), gradient.dt_bias, gradient.A, gradient.D)
        gradients = [*grad_conv, *others, *gradients]
    grad_xz = _rows(grad_xz)
    return [
        matmul(grad_xz, in_proj).unflatten(0, shape),
        weight_gradient(grad_xz, _rows(hidden_states)),
        weight_gradient(grad_out, _rows(y)),
        *gradients,
    ]


_mixer = operator(cpu_mixer)
_mixer_backward = operator(cpu_mixer_backward)


@_mixer.register_fake
def _(hidden_states, in_proj, out_proj, parameters, reverse, keep):
    if not keep:
        return torch.empty_like(hidden_states), *map(hidden_states.new_empty, (0, 0)), []
    xz, kept = hidden_states.new_empty(*hidden_states.shape[:2], len(in_proj)), []
    x, z = xz.chunk(2, dim=-1)
    for each in _by_scan(parameters):
        _, ungated, checkpoints = scan_outputs(x, each.A, z, keep)
        kept += [hidden_states.new_empty(*hidden_states.shape[:2], len(each.x_proj)), checkpoints]
    return torch.empty_like(hidden_states), xz, ungated, kept


@_mixer_backward.register_fake
def _(grad_out, hidden_states, in_proj, out_proj, parameters, xz, ungated, kept, reverse):
    return list(map(torch.empty_like, (hidden_states, in_proj, out_proj, *parameters)))


def _count(hidden_states_shape, in_proj_shape, out_proj_shape, parameters_shape):
    """Operations of all products with weights, which is what is counted of other layers too."""
    weights = [in_proj_shape, out_proj_shape]
    for each in _by_scan(parameters_shape):
        weights += [each.x_proj, each.dt_proj]
    batch, length, _ = hidden_states_shape
    return 2 * batch * length * sum(rows * columns for rows, columns in weights)


@register_flop_formula(_mixer._opoverload.overloadpacket)
def _(*shapes, **kwargs):
    return _count(*shapes[:4])


@register_flop_formula(_mixer_backward._opoverload.overloadpacket)
def _(grad_out_shape, *shapes, **kwargs):
    return 2 * _count(*shapes[:4])


def _setup_context(ctx, inputs, output):
    hidden_states, in_proj, out_proj, parameters, ctx.reverse, _ = inputs
    _, xz, ungated, kept = output
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(hidden_states, in_proj, out_proj, xz, ungated, *parameters, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, *_):
    hidden_states, in_proj, out_proj, xz, ungated, *rest = ctx.saved_tensors
    parameters, kept = rest[: ctx.num_parameters], rest[ctx.num_parameters :]
    with torch.autocast("cpu", enabled=False):  # as it was in the forward pass
        gradients = _mixer_backward(
            *(grad_out, hidden_states, in_proj, out_proj, parameters, xz, ungated, kept, ctx.reverse)
        )
    return *gradients[:3], gradients[3:], None, None


_mixer.register_autograd(_backward, setup_context=_setup_context)
