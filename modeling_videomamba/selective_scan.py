"""The selective scan of Mamba (arXiv 2312.00752, section 3): its contract, the table of backends and their choice.

The backends and the setting that forces one are described in [`selective_scan_backends`].
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .causal_conv1d_triton import causal_conv1d as _triton_causal_conv1d
from .matrix_product_cpu import linear as _cpu_linear
from .rms_norm_cpu import rms_norm as _cpu_rms_norm
from .selective_scan_cpu import causal_conv1d as _cpu_causal_conv1d
from .selective_scan_cpu import selective_scan as _cpu_selective_scan
from .selective_scan_cpu import unavailable_reason as _cpu_unavailable_reason
from .selective_scan_mamba_ssm import causal_conv1d as _mamba_ssm_causal_conv1d
from .selective_scan_mamba_ssm import selective_scan as _mamba_ssm_selective_scan
from .selective_scan_mamba_ssm import unavailable_reason as _mamba_ssm_unavailable_reason
from .selective_scan_torch import causal_conv1d as _torch_causal_conv1d
from .selective_scan_torch import rms_norm as _torch_rms_norm
from .selective_scan_torch import selective_scan as _torch_selective_scan
from .selective_scan_torch import unavailable_reason as _torch_unavailable_reason
from .selective_scan_triton import selective_scan as _triton_selective_scan
from .triton_kernels import unavailable_reason as _triton_unavailable_reason

BACKEND_VARIABLE = "VIDEOMAMBA_SCAN_BACKEND"


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    reverse: bool = False,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The selective scan, with `dt_t <- softplus(dt_t + dt_bias)` (Mamba, algorithm 2 and equation 2):

        h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * x_t
        y_t = C_t . h_t + D * x_t

    then `y_t + add_t` where `add` is given, then `y_t * SiLU(z_t)` where `z` is given. The state, the exponential and
    the sums are in float32 (in float64 for float64 `x`) whatever the dtype of the inputs. Differentiable in every
    tensor; the backward pass recomputes the states.

    Args:
        x (`torch.Tensor` of shape `(batch, length, channels)`): Input, floating point.
        dt (`torch.Tensor` of shape `(batch, length, channels)`): Time steps before bias and softplus.
        A (`torch.Tensor` of shape `(channels, state)`): State matrix, negative for a stable scan.
        B (`torch.Tensor` of shape `(batch, length, state)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch, length, state)`): Output matrix of each step.
        D (`torch.Tensor` of shape `(channels,)`): Skip connection.
        z (`torch.Tensor` of shape `(batch, length, channels)`, *optional*): Gate.
        dt_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to `dt` before the softplus.
        reverse (`bool`, defaults to `False`): Scan from the last step to the first.
        add (`torch.Tensor` of shape `(batch, length, channels)`, *optional*): Added before the gate: the output of the
            scan in the other direction.

    Returns:
        `torch.Tensor` of shape `(batch, length, channels)` and the dtype of `x`.

    Raises:
        `ValueError`: if a tensor is not floating point, or its shape or device does not fit the others.
        `RuntimeError`: if no backend computes in this dtype, or the backend that the environment asks for is unknown
            or not usable.
    """
    _check_sequence(x)
    check_matrix("A", A, ("channels", "state"))
    channels, state = x.shape[2], A.shape[1]
    whole, each = tuple(x.shape), (*x.shape[:2], state)
    check_fit("x", x, dt=(dt, whole), A=(A, (channels, state)), B=(B, each), C=(C, each), D=(D, (channels,)))
    check_fit("x", x, z=(z, whole), dt_bias=(dt_bias, (channels,)), add=(add, whole))
    backend = BACKENDS[choose_backend(x.device.type, x.dtype)]
    return backend.scan(x, dt, A, B, C, D, z, dt_bias, add, reverse)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    reverse: bool = False,
) -> torch.Tensor:
    r"""
    SiLU of a depthwise convolution that is causal in the direction of the scan: step `t` sees the `width - 1` steps
    before it, or, with `reverse`, after it. The last tap of `weight` is that of the step itself.

    Args:
        x (`torch.Tensor` of shape `(batch, length, channels)`): Input, floating point.
        weight (`torch.Tensor` of shape `(channels, 1, width)`): Depthwise kernel.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added before the SiLU.
        reverse (`bool`, defaults to `False`): Causal from the last step to the first.

    Returns:
        `torch.Tensor` of shape `(batch, length, channels)` and the dtype of `x`.

    Raises:
        `ValueError`: if a tensor is not floating point, or its shape or device does not fit the others.
        `RuntimeError`: as [`selective_scan`].
    """
    _check_sequence(x)
    check_matrix("weight", weight, ("channels", "1", "width"))
    channels = x.shape[2]
    check_fit("x", x, weight=(weight, (channels, 1, weight.shape[2])), bias=(bias, (channels,)))
    backend = BACKENDS[choose_backend(x.device.type, x.dtype)]
    return backend.convolution(x, weight, bias, reverse)


@dataclass(frozen=True)
class SelectiveScanBackend:
    """Whether a backend can run here: `usable`, and the `reason` why it can't (empty if it can)."""

    usable: bool
    reason: str


def selective_scan_backends() -> dict[str, SelectiveScanBackend]:
    r"""
    The backends of [`selective_scan`] in order of preference, and why those that can't run here can't:

    - `triton`: the Triton kernels of this package, for tensors on a GPU;
    - `mamba_ssm`: CUDA kernels of the stock `mamba-ssm` release, or of its build on the Hub if `kernels` is installed,
      and of `causal-conv1d` if that is installed, for tensors on a GPU: slower here, as both directions of a scan have
      to be brought into its layout, and one of them flipped;
    - `cpu`: the compiled kernel of this package, for tensors of at most float32 on a CPU;
    - `torch`: the reference in plain PyTorch, everywhere.

    The first one that is usable for the device and the dtype of the input is taken. The environment variable
    `VIDEOMAMBA_SCAN_BACKEND` forces one by name.

    Returns:
        `dict[str, SelectiveScanBackend]`: name -> usable or not, and the reason.
    """
    report = {}
    for name, backend in BACKENDS.items():
        reasons = [backend.unavailable_reason(device_type) for device_type in backend.device_types]
        reason = "" if None in reasons else "; ".join(filter(None, reasons))
        report[name] = SelectiveScanBackend(usable=not reason, reason=reason)
    return report


@torch.compiler.assume_constant_result
def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced is None:
        usable = (name for name, backend in BACKENDS.items() if backend.reason_against(device_type, dtype) is None)
        name = next(usable, None)
        if name is None:
            raise RuntimeError(f"No backend computes in {dtype}.")
        if name == "torch" and dtype != torch.float64 and device_type != "meta":
            _warn_of_slow_scan(device_type)
        return name
    if forced not in BACKENDS:
        raise RuntimeError(f"{BACKEND_VARIABLE}={forced!r} is not a backend. Backends: {', '.join(BACKENDS)}.")
    reason = BACKENDS[forced].reason_against(device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"{BACKEND_VARIABLE}={forced!r} is not usable for {dtype} tensors on {device_type!r}: {reason}."
        )
    return forced


@functools.cache
def _warn_of_slow_scan(device_type: str) -> None:
    reasons = {name: backend.unavailable_reason(device_type) for name, backend in BACKENDS.items()}
    reason = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    warnings.warn(
        f"The selective scan on {device_type!r} runs in plain PyTorch, many times slower. {reason}", stacklevel=2
    )


def _check_sequence(x: torch.Tensor) -> None:
    if x.ndim != 3 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            "`x` must be a floating-point tensor (batch, length, channels) of at least one step and one channel, "
            f"got {tuple(x.shape)} {x.dtype}."
        )


def check_matrix(name: str, tensor: torch.Tensor, dimensions: tuple[str, ...]) -> None:
    """The last dimension has a size of its own, to which the other tensors have to fit."""
    if tensor.ndim != len(dimensions) or tensor.shape[-1] == 0 or not tensor.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point ({', '.join(dimensions)}) with a {dimensions[-1]} of at least 1, got "
            f"{tuple(tensor.shape)} {tensor.dtype}."
        )


def check_fit(name: str, first: torch.Tensor, **others: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """The other tensors have the shape that is given for each, and are floating point on the device of the first."""
    for other, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != first.device:
            raise ValueError(
                f"`{other}` must be a floating-point tensor of shape {shape} on {first.device} to fit `{name}`, got "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}."
            )


@dataclass(frozen=True)
class _Backend:
    scan: Callable[..., torch.Tensor]
    convolution: Callable[..., torch.Tensor]
    unavailable_reason: Callable[[str], str | None]
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    linear: Callable[..., torch.Tensor] = F.linear
    rms_norm: Callable[..., torch.Tensor] = _torch_rms_norm

    def reason_against(self, device_type: str, dtype: torch.dtype) -> str | None:
        return self.unavailable_reason(device_type) if dtype in self.dtypes else f"does not compute in {dtype}"


# In order of preference. A new backend is one entry here.
BACKENDS = {
    "triton": _Backend(_triton_selective_scan, _triton_causal_conv1d, _triton_unavailable_reason, ("cuda", "xpu")),
    "mamba_ssm": _Backend(
        _mamba_ssm_selective_scan, _mamba_ssm_causal_conv1d, _mamba_ssm_unavailable_reason, ("cuda",)
    ),
    "cpu": _Backend(
        _cpu_selective_scan,
        _cpu_causal_conv1d,
        _cpu_unavailable_reason,
        ("cpu",),
        linear=_cpu_linear,
        rms_norm=_cpu_rms_norm,
    ),
    "torch": _Backend(
        _torch_selective_scan,
        _torch_causal_conv1d,
        _torch_unavailable_reason,
        ("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    ),
}


def has_compiled_kernels(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels of `csrc/` compute tensors of this device type and dtype."""
    return choose_backend(device_type, dtype) == "cpu"


__all__ = ["causal_conv1d", "has_compiled_kernels", "selective_scan", "selective_scan_backends"]
