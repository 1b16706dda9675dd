"""The backend `mamba_ssm`: the CUDA kernels of the stock `mamba-ssm` release, and of `causal-conv1d` if installed."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .selective_scan_torch import causal_conv1d as torch_causal_conv1d


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    """
    `selective_scan_fn` wants channels before length, one dtype for the sequences, float32 for the rest. It has no
    `add`, which is gated outside: a gate outside for both would round the gradient before the scan, whose sum over the
    steps may be far smaller than its terms.
    """
    selective_scan_fn, _ = load_kernel()
    given = [tensor.dtype for tensor in (x, dt, B, C, z, add) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, given)
    if dtype == torch.float16:  # the output before the gate can exceed it, and the gradient of the gate needs that
        dtype = torch.float32

    def sequence(tensor):
        tensor = tensor.flip(1) if reverse else tensor
        return tensor.to(dtype).transpose(1, 2).contiguous()

    y = selective_scan_fn(
        sequence(x),
        sequence(dt),
        A.float().contiguous(),
        sequence(B),
        sequence(C),
        D.float(),
        z=None if z is None else sequence(z),
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=True,
    )
    y = y.transpose(1, 2)
    y = y.flip(1) if reverse else y
    if add is not None:
        y = y + add if z is None else torch.addcmul(y, add.to(dtype), F.silu(z.to(dtype)))
    return y.to(x.dtype)


def causal_conv1d(x, weight, bias, reverse):
    """`causal_conv1d_fn` wants channels before length and widths of 2 to 4; it is a package of its own."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception:  # not installed, or built for another PyTorch
        return torch_causal_conv1d(x, weight, bias, reverse)
    if not 2 <= weight.shape[-1] <= 4:
        return torch_causal_conv1d(x, weight, bias, reverse)
    sequence = (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    y = causal_conv1d_fn(sequence, weight.squeeze(1).to(x.dtype), bias, activation="silu").transpose(1, 2)
    return y.flip(1) if reverse else y


def unavailable_reason(device_type: str) -> str | None:
    if device_type != "cuda":
        return "needs tensors on a CUDA device"
    if not torch.cuda.is_available():
        return "needs a CUDA device and a PyTorch build for CUDA"
    return load_kernel()[1]


@functools.cache
def load_kernel() -> tuple[Callable[..., torch.Tensor] | None, str | None]:
    """
    `selective_scan_fn` of the installed `mamba-ssm`, else of the build on the Hub that Transformers' own Mamba takes
    where `kernels` is installed; or why there is neither.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn, None
    except Exception as error:  # a wheel built for another PyTorch fails with more than ImportError
        reason = f"`mamba-ssm` can't be imported ({error})"
    try:
        from transformers.integrations import hub_kernels

        if not (hub_kernels.is_kernels_available() and hub_kernels._kernels_enabled):
            return None, f"{reason}, and `kernels` is not installed or turned off by USE_HUB_KERNELS"
        kernel = hub_kernels.get_kernel("kernels-community/mamba-ssm", version=4)
        return kernel.ops.selective_scan_interface.selective_scan_fn, None
    except Exception as error:  # no build for this machine, no network, another version of Transformers
        return None, f"{reason}, and not loaded from the Hub either ({error})"
