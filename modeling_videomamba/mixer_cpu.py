"""
The bidirectional Mamba block on a CPU as one function with gradients, as Mamba's release has its block.

For the backward pass it keeps what `in_proj` and `x_proj` make, the states between chunks and the output before the
gate. The output of the convolution, the time steps and the gated output are computed anew, which takes no more time
than to read them from memory (Mamba, arXiv 2312.00752, section 3.3.2).
"""

from dataclasses import dataclass, fields

import torch

from .matrix_product_cpu import matmul, weight_gradient
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

    def of_scan(self) -> dict[str, torch.Tensor]:
        others = {"D": self.D, "dt_bias": self.dt_bias, "dt_proj": self.dt_proj}
        return {"A": self.A_log.float().exp().neg_(), **{name: tensor.float() for name, tensor in others.items()}}

    def split(self, projected: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `x_proj` makes: what `dt_proj` makes time steps of, B and C."""
        state = self.A_log.shape[1]
        return dict(zip(("dt", "B", "C"), projected.split([self.dt_proj.shape[1], state, state], dim=-1), strict=True))


NUM_PARAMETERS = len(fields(ScanParameters))


def mixer(
    hidden_states: torch.Tensor,
    in_proj: torch.Tensor,
    out_proj: torch.Tensor,
    scans: list[ScanParameters],
    reverse: list[bool],
) -> torch.Tensor:
    """
    `(batch, length, D)` to the same: `scans`, each in its direction, of the `x` that `in_proj` (2 * channels, D) makes,
    their sum times SiLU(z), and `out_proj` (D, channels). All are of one dtype, that of the output.
    """
    tensors = [hidden_states, in_proj, out_proj, *(tensor for each in scans for tensor in vars(each).values())]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Mixer.apply(reverse, keep, *tensors)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, keep, *tensors):
        ctx.reverse, ctx.num_inputs = reverse, len(tensors)
        out, kept = _forward(*_by_scan(tensors), reverse, keep)
        if keep:
            ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors  # once: checkpoints compute them anew at each request
        tensors, kept = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        with torch.autocast("cpu", enabled=False):  # as it was in the forward pass
            gradients = _backward(grad_out, *_by_scan(tensors), ctx.reverse, *kept)
        gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors, strict=True)]
        return None, None, *gradients


def _by_scan(tensors):
    """`hidden_states, in_proj, out_proj` and the parameters of the scans."""
    scans = [ScanParameters(*tensors[i : i + NUM_PARAMETERS]) for i in range(3, len(tensors), NUM_PARAMETERS)]
    return *tensors[:3], scans


def _rows(tensor):
    return tensor.flatten(0, 1)


def _forward(hidden_states, in_proj, out_proj, scans, reverse, keep):
    """
    The output, and what is to `keep` for the backward pass: `x` and `z` in one tensor, the output before the gate, and,
    for each scan, what `x_proj` made and the states between chunks.
    """
    shape, kept = hidden_states.shape[:2], []
    xz = matmul(_rows(hidden_states), in_proj.T).unflatten(0, shape)
    x, z = xz.chunk(2, dim=-1)
    y = ungated = None
    for i, each in enumerate(scans):
        convolved = convolve(x, *each.of_convolution(), reverse[i])
        projected = matmul(_rows(convolved), each.x_proj.T).unflatten(0, shape)
        y, ungated, checkpoints = scan(
            convolved,
            **each.split(projected),
            **each.of_scan(),
            **{"z": z if each is scans[-1] else None, "add": y, "ungated": y, "reverse": reverse[i], "keep": keep},
        )
        kept += [projected, checkpoints]
        del convolved  # whose place, which is in the cache, the next one takes
    return matmul(_rows(y), out_proj.T).unflatten(0, shape), [xz, ungated, *kept]


def _backward(grad_out, hidden_states, in_proj, out_proj, scans, reverse, xz, ungated, *kept):
    """Gradients of `hidden_states, in_proj, out_proj`, then of the parameters of the scans."""
    shape, grad_out = xz.shape[:2], _rows(grad_out)
    (x, z), grad_xz = xz.chunk(2, dim=-1), torch.empty_like(xz)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    grad_y = matmul(grad_out, out_proj).unflatten(0, shape)
    gradients: list[torch.Tensor] = []
    for i in reversed(range(len(scans))):
        each, (projected, checkpoints), is_last = scans[i], kept[2 * i : 2 * i + 2], i == len(scans) - 1
        gate = Gate(z, ungated, grad_z, grad_ungated=grad_y, y=torch.empty_like(grad_y)) if is_last else None
        convolution, parameters = each.of_convolution(), each.of_scan()
        gradient = scan_backward(
            *(grad_y, x),
            **each.split(projected),
            **parameters,
            **{"checkpoints": checkpoints, "gate": gate, "convolution": convolution, "reverse": reverse[i]},
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
            A_log=gradient.A.mul_(parameters["A"]),
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
