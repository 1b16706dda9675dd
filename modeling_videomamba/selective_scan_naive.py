"""
The selective scan and its convolution as the equations say, step by step, differentiated by autograd: every backend
is tested against them. The arguments are the public functions', in the order of the backends.
"""

import torch
import torch.nn.functional as F


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    """Mamba, algorithm 2 and equation 2."""
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias)
    h, ys = x.new_zeros(x.shape[0], *A.shape), {}
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        ys[t] = (h * C[:, t, None]).sum(-1) + D * x[:, t]
    y = torch.stack([ys[t] for t in steps], dim=1)
    y = y if add is None else y + add
    return y if z is None else y * F.silu(z)


def causal_conv1d(x, weight, bias, reverse):
    """SiLU of a depthwise convolution, causal in the direction of the scan."""
    width = weight.shape[-1]
    weight = weight.flip(-1) if reverse else weight
    padded = F.pad(x.transpose(1, 2), (0, width - 1) if reverse else (width - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=weight.shape[0])).transpose(1, 2)
