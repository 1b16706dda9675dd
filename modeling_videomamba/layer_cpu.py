"""
A layer on a CPU as one function with gradients, as Mamba's release has its block: the norm, the bidirectional mixer and
the residual stream.

For the backward pass it keeps the stream, its norm, what `in_proj` and `x_proj` make, the states between chunks and the
output before the gate. The output of the convolution, the time steps and the gated output are computed anew, which
takes no more time than to read them from memory (Mamba, arXiv 2312.00752, section 3.3.2).
"""

from dataclasses import dataclass, fields

import torch

from .matrix_product_cpu import matmul, weight_gradient
from .rms_norm_cpu import norm_backward, norm_forward
from .selective_scan_cpu import Gate, convolve, convolve_backward, scan, scan_backward


@dataclass
class ScanParameters:
    """
    Of one scan, as its modules have them: `conv_weight` (channels, 1, width), `conv_bias`, `dt_bias` and `D`
    (channels,), `x_proj` (rank + 2 * state, channels), `dt_proj` (channels, rank), `A_log` (channels, state).
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: torch.Tensor
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor

    def of_convolution(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv_weight.squeeze(1).float(), self.conv_bias.float()

    def state_matrix(self) -> torch.Tensor:
        """A."""
        return self.A_log.float().exp().neg_()

    def of_scan(self) -> dict[str, torch.Tensor]:
        """The others."""
        return {"D": self.D.float(), "dt_bias": self.dt_bias.float(), "dt_proj": self.dt_proj.float()}

    def split(self, projected: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `x_proj` makes: what `dt_proj` makes time steps of, B and C."""
        state = self.A_log.shape[1]
        return dict(zip(("dt", "B", "C"), projected.split([self.dt_proj.shape[1], state, state], dim=-1), strict=True))


NUM_PARAMETERS = len(fields(ScanParameters))


def fused_layer(
    hidden_states: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    in_proj: torch.Tensor,
    out_proj: torch.Tensor,
    scans: list[ScanParameters],
    *,
    reverse: list[bool],
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """
    `(batch, length, D)` to the same, both float32: itself plus what the mixer makes of its norm, times `scale`
    `(batch, 1, 1)`. The mixer is `scans`, each in its direction, of the `x` that `in_proj` (2 * channels, D) makes,
    their sum times SiLU(z), and `out_proj` (D, channels). All parameters are of one dtype, in which the mixer computes;
    those in float16 are computed as float32: what is between the modules can exceed float16 where outputs and gradients
    fit.
    """
    tensors = [hidden_states, norm, in_proj, out_proj, *(tensor for each in scans for tensor in vars(each).values())]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Layer.apply(reverse, eps, scale, keep, *tensors)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, eps, scale, keep, hidden_states, norm, *parameters):
        ctx.reverse, ctx.eps, ctx.num_parameters = reverse, eps, len(parameters)
        normed = norm_forward(hidden_states, _computed(norm), eps)
        mixed, kept = _mix(normed, *_by_scan(parameters), reverse, keep)
        if keep:
            ctx.save_for_backward(scale, hidden_states, norm, normed, *parameters, *kept)
        return _scaled(mixed.float(), scale).add_(hidden_states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        # once: checkpoints compute them anew at each request
        scale, hidden_states, norm, normed, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.num_parameters], rest[ctx.num_parameters :]
        with torch.autocast("cpu", enabled=False):  # as it was in the forward pass
            grad_mixed = _scaled(grad_out, scale).to(normed.dtype)
            grad_normed, *gradients = _mix_backward(grad_mixed, normed, *_by_scan(parameters), ctx.reverse, *kept)
            grad_hidden, grad_norm = norm_backward(grad_normed, hidden_states, _computed(norm), ctx.eps, add=grad_out)
        gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, parameters, strict=True)]
        return None, None, None, None, grad_hidden, grad_norm.to(norm.dtype), *gradients


def _scaled(tensor, scale):
    return tensor if scale is None else tensor * scale


def _computed(parameter):
    return parameter.float() if parameter.dtype == torch.float16 else parameter


def _by_scan(parameters):
    """`in_proj`, `out_proj` and the parameters of the scans, in the dtype in which they are computed."""
    parameters = list(map(_computed, parameters))
    scans = [ScanParameters(*parameters[i : i + NUM_PARAMETERS]) for i in range(2, len(parameters), NUM_PARAMETERS)]
    return *parameters[:2], scans


def _rows(tensor):
    return tensor.flatten(0, 1)


def _mix(hidden_states, in_proj, out_proj, scans, reverse, keep):
    """
    The output, and what is to `keep` for the backward pass: `x` and `z` in one tensor, the output before the gate, and,
    for each scan, what `x_proj` made, the states between chunks and A.
    """
    shape, kept = hidden_states.shape[:2], []
    xz = matmul(_rows(hidden_states), in_proj.T).unflatten(0, shape)
    x, z = xz.chunk(2, dim=-1)
    y = ungated = None
    for i, each in enumerate(scans):
        convolved = convolve(x, *each.of_convolution(), reverse[i])
        projected = matmul(_rows(convolved), each.x_proj.T).unflatten(0, shape)
        A = each.state_matrix()
        y, ungated, checkpoints = scan(
            **{"x": convolved, "A": A},
            **each.split(projected),
            **each.of_scan(),
            **{"z": z if each is scans[-1] else None, "add": y, "ungated": y, "reverse": reverse[i], "keep": keep},
        )
        kept += [projected, checkpoints, A]
        del convolved  # whose place, which is in the cache, the next one takes
    return matmul(_rows(y), out_proj.T).unflatten(0, shape), [xz, ungated, *kept]


def _mix_backward(grad_out, hidden_states, in_proj, out_proj, scans, reverse, xz, ungated, *kept):
    """Gradients of `hidden_states, in_proj, out_proj`, then of the parameters of the scans."""
    shape, grad_out = xz.shape[:2], _rows(grad_out)
    (x, z), grad_xz = xz.chunk(2, dim=-1), torch.empty_like(xz)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    grad_y = matmul(grad_out, out_proj).unflatten(0, shape)
    gradients: list[torch.Tensor] = []
    for i in reversed(range(len(scans))):
        each, (projected, checkpoints, A), is_last = scans[i], kept[3 * i : 3 * i + 3], i == len(scans) - 1
        gate = Gate(z, ungated, grad_z, grad_ungated=grad_y, y=torch.empty_like(grad_y)) if is_last else None
        convolution = each.of_convolution()
        gradient = scan_backward(
            *(grad_y, x),
            **each.split(projected),
            **each.of_scan(),
            **{"A": A, "checkpoints": checkpoints, "gate": gate, "convolution": convolution, "reverse": reverse[i]},
        )
        if gate:
            grad_out_proj = weight_gradient(grad_out, _rows(gate.y))
        grad_weight, grad_bias, grad_x_proj = convolve_backward(
            *(gradient.x, x, *convolution, reverse[i], grad_x),
            add=not is_last,
            x_proj=each.x_proj.float(),
            grad_projected=gradient.projected,
        )
        of_scan = ScanParameters(
            conv_weight=grad_weight.unsqueeze(1),
            conv_bias=grad_bias,
            x_proj=grad_x_proj,
            dt_proj=gradient.dt_proj,
            dt_bias=gradient.dt_bias,
            A_log=gradient.A.mul_(A),
            D=gradient.D,
        )
        gradients = [*vars(of_scan).values(), *gradients]
        del gate, gradient  # whose places, which are in the cache, the next ones take
    grad_xz = _rows(grad_xz)
    return [
        matmul(grad_xz, in_proj).unflatten(0, shape),
        weight_gradient(grad_xz, _rows(hidden_states)),
        grad_out_proj,
        *gradients,
    ]
