"""The selective scan of Mamba (arXiv 2312.00752, section 3): its contract, its reference and the choice of backend.

The backends and the setting that forces one are described in [`selective_scan_backends`].
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .causal_conv1d_triton import causal_conv1d as _triton_causal_conv1d
from .matrix_product_cpu import linear as _cpu_linear
from .operators import operator
from .rms_norm_cpu import rms_norm as _cpu_rms_norm
from .selective_scan_cpu import causal_conv1d as _cpu_causal_conv1d
from .selective_scan_cpu import selective_scan as _cpu_selective_scan
from .selective_scan_cpu import unavailable_reason as _cpu_unavailable_reason
from .selective_scan_triton import selective_scan as _triton_selective_scan
from .triton_kernels import unavailable_reason as _triton_unavailable_reason

BACKEND_VARIABLE = "VIDEOMAMBA_SCAN_BACKEND"

# Steps whose states exist at the same time in the reference: `(batch, CHUNK_SIZE, channels, state)` is its work space.
CHUNK_SIZE = 16


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
    _check_matrix("A", A, ("channels", "state"))
    channels, state = x.shape[2], A.shape[1]
    whole, each = tuple(x.shape), (*x.shape[:2], state)
    _check_fit("x", x, dt=(dt, whole), A=(A, (channels, state)), B=(B, each), C=(C, each), D=(D, (channels,)))
    _check_fit("x", x, z=(z, whole), dt_bias=(dt_bias, (channels,)), add=(add, whole))
    backend = _BACKENDS[_choose_backend(x.device.type, x.dtype)]
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
    _check_matrix("weight", weight, ("channels", "1", "width"))
    channels = x.shape[2]
    _check_fit("x", x, weight=(weight, (channels, 1, weight.shape[2])), bias=(bias, (channels,)))
    backend = _BACKENDS[_choose_backend(x.device.type, x.dtype)]
    return backend.convolution(x, weight, bias, reverse)


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
    _check_matrix("weight", weight, ("out_features", "in_features"))
    _check_fit("weight", weight, hidden_states=(hidden_states, (*hidden_states.shape[:-1], weight.shape[1])))
    return _BACKENDS[_choose_backend(hidden_states.device.type, hidden_states.dtype)].linear(hidden_states, weight)


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
    _check_matrix("weight", weight, ("D",))
    _check_fit("weight", weight, hidden_states=(hidden_states, (*hidden_states.shape[:-1], len(weight))))
    backend = _BACKENDS[_choose_backend(hidden_states.device.type, weight.dtype)]
    return backend.rms_norm(hidden_states.float(), weight, eps)


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
    for name, backend in _BACKENDS.items():
        reasons = [backend.unavailable_reason(device_type) for device_type in backend.device_types]
        reason = "" if None in reasons else "; ".join(filter(None, reasons))
        report[name] = SelectiveScanBackend(usable=not reason, reason=reason)
    return report


@torch.compiler.assume_constant_result
def _choose_backend(device_type: str, dtype: torch.dtype) -> str:
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced is None:
        usable = (name for name, backend in _BACKENDS.items() if backend.reason_against(device_type, dtype) is None)
        name = next(usable, None)
        if name is None:
            raise RuntimeError(f"No backend computes in {dtype}.")
        if name == "torch" and dtype != torch.float64 and device_type != "meta":
            _warn_of_slow_scan(device_type)
        return name
    if forced not in _BACKENDS:
        raise RuntimeError(f"{BACKEND_VARIABLE}={forced!r} is not a backend. Backends: {', '.join(_BACKENDS)}.")
    reason = _BACKENDS[forced].reason_against(device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"{BACKEND_VARIABLE}={forced!r} is not usable for {dtype} tensors on {device_type!r}: {reason}."
        )
    return forced


@functools.cache
def _warn_of_slow_scan(device_type: str) -> None:
    reasons = {name: backend.unavailable_reason(device_type) for name, backend in _BACKENDS.items()}
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


def _check_matrix(name: str, tensor: torch.Tensor, dimensions: tuple[str, ...]) -> None:
    """The last dimension has a size of its own, to which the other tensors have to fit."""
    if tensor.ndim != len(dimensions) or tensor.shape[-1] == 0 or not tensor.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point ({', '.join(dimensions)}) with a {dimensions[-1]} of at least 1, got "
            f"{tuple(tensor.shape)} {tensor.dtype}."
        )


def _check_fit(name: str, first: torch.Tensor, **others: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """The other tensors have the shape that is given for each, and are floating point on the device of the first."""
    for other, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != first.device:
            raise ValueError(
                f"`{other}` must be a floating-point tensor of shape {shape} on {first.device} to fit `{name}`, got "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}."
            )


# The reference, in PyTorch.


def _torch_selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    dtype = torch.promote_types(x.dtype, torch.float32)
    u = x.to(dtype)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    y, _ = reference_scan(u, F.softplus(dt), A.to(dtype), B.to(dtype), C.to(dtype), reverse)
    y = y + D.to(dtype) * u
    if add is not None:
        y = y + add.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def _torch_causal_conv1d(x, weight, bias, reverse):
    width = weight.shape[-1]
    padding = (0, width - 1) if reverse else (width - 1, 0)
    weight = weight.flip(-1) if reverse else weight
    y = F.conv1d(F.pad(x.transpose(1, 2), padding), weight.to(x.dtype), groups=weight.shape[0])
    y = y.transpose(1, 2)
    return F.silu(y if bias is None else y + bias.to(x.dtype))


def _torch_rms_norm(hidden_states, weight, eps):
    return F.rms_norm(hidden_states, weight.shape, weight.float(), eps).to(weight.dtype)


def _chunks(length: int, reverse: bool) -> Iterator[tuple[slice, int]]:
    """Slices of the sequence in the order of the scan, and the step of time inside each."""
    starts = range(0, length, CHUNK_SIZE)
    for start in reversed(starts) if reverse else starts:
        yield slice(start, min(start + CHUNK_SIZE, length)), -1 if reverse else 1


def _chunk_states(x, dt, A, B, h, step):
    """`exp(dt * A)` and all states of one chunk, `(batch, chunk, channels, state)`, from the state `h` before it."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    states = (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    for t in range(states.shape[1])[::step]:
        h = states[:, t].addcmul_(decay[:, t], h)
    return decay, states


def _dot(states, vectors):
    """Sum over the state, `(batch, chunk, channels, state)` by `(batch, chunk, state)`."""
    return (vectors.unsqueeze(-2) @ states.mT).squeeze(-2)


# An operator of its own, so that `torch.compile` and `torch.export` keep it whole instead of unrolling every step.
@operator
def reference_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y_t = C_t . h_t`, and the states before each chunk `(chunks, batch, channels, state)`, in the scan's order."""
    h = x.new_zeros(x.shape[0], *A.shape)
    y, checkpoints = torch.empty_like(x, memory_format=torch.contiguous_format), []
    with torch.autocast(x.device.type, enabled=False):
        for chunk, step in _chunks(x.shape[1], reverse):
            checkpoints.append(h)
            _, states = _chunk_states(x[:, chunk], dt[:, chunk], A, B[:, chunk], h, step)
            y[:, chunk] = _dot(states, C[:, chunk])
            h = states[:, -1 if step == 1 else 0].clone()  # a view would keep the states of the whole chunk
    return y, torch.stack(checkpoints)


@reference_scan.register_fake
def _(x, dt, A, B, C, reverse):
    num_chunks = (x.shape[1] + CHUNK_SIZE - 1) // CHUNK_SIZE
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(num_chunks, x.shape[0], *A.shape)


@operator
def reference_scan_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    checkpoints: torch.Tensor,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x, dt, A, B, C`: the adjoint scan, chunk by chunk against the order of the scan."""
    grad_x, grad_dt, grad_A, grad_B, grad_C = map(torch.zeros_like, (x, dt, A, B, C))
    carry = torch.zeros_like(checkpoints[0])
    chunks = zip(_chunks(x.shape[1], reverse), checkpoints, strict=True)
    with torch.autocast(x.device.type, enabled=False):
        for (chunk, step), h in reversed(list(chunks)):
            xc, dtc, Bc, Cc, grad_yc = (tensor[:, chunk] for tensor in (x, dt, B, C, grad_y))
            decay, states = _chunk_states(xc, dtc, A, Bc, h, step)
            grad_h = grad_yc.unsqueeze(-1) * Cc.unsqueeze(-2)
            for t in range(states.shape[1])[::-step]:
                grad_h[:, t] += carry
                carry = decay[:, t] * grad_h[:, t]
            grad_C[:, chunk] = (grad_yc.unsqueeze(-2) @ states).squeeze(-2)
            grad_B[:, chunk] = ((dtc * xc).unsqueeze(-2) @ grad_h).squeeze(-2)
            grad_u = _dot(grad_h, Bc)
            before = torch.empty_like(states)
            if step == 1:
                before[:, 0], before[:, 1:] = h, states[:, :-1]
            else:
                before[:, -1], before[:, :-1] = h, states[:, 1:]
            grad_dtA = grad_h.mul_(decay).mul_(before)
            grad_A += (grad_dtA * dtc.unsqueeze(-1)).sum((0, 1))
            grad_dt[:, chunk] = (grad_dtA * A).sum(-1) + grad_u * xc
            grad_x[:, chunk] = grad_u * dtc
    return grad_x, grad_dt, grad_A, grad_B, grad_C


@reference_scan_backward.register_fake
def _(grad_y, x, dt, A, B, C, checkpoints, reverse):
    return tuple(map(torch.empty_like, (x, dt, A, B, C)))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_y, grad_checkpoints):
    return *reference_scan_backward(grad_y, *ctx.saved_tensors, ctx.reverse), None


reference_scan.register_autograd(_backward, setup_context=_setup_context)


# The stock `mamba-ssm` release.


def _mamba_ssm_selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    """
    `selective_scan_fn` wants channels before length, one dtype for the sequences, float32 for the rest. It has no
    `add`, which is gated outside: a gate outside for both would round the gradient before the scan, whose sum over the
    steps may be far smaller than its terms.
    """
    selective_scan_fn, _ = _mamba_ssm()
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


def _mamba_ssm_causal_conv1d(x, weight, bias, reverse):
    """`causal_conv1d_fn` wants channels before length and widths of 2 to 4; it is a package of its own."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception:  # not installed, or built for another PyTorch
        return _torch_causal_conv1d(x, weight, bias, reverse)
    if not 2 <= weight.shape[-1] <= 4:
        return _torch_causal_conv1d(x, weight, bias, reverse)
    sequence = (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    y = causal_conv1d_fn(sequence, weight.squeeze(1).to(x.dtype), bias, activation="silu").transpose(1, 2)
    return y.flip(1) if reverse else y


def _mamba_ssm_unavailable_reason(device_type: str) -> str | None:
    if device_type != "cuda":
        return "needs tensors on a CUDA device"
    if not torch.cuda.is_available():
        return "needs a CUDA device and a PyTorch build for CUDA"
    return _mamba_ssm()[1]


@functools.cache
def _mamba_ssm() -> tuple[Callable[..., torch.Tensor] | None, str | None]:
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
_BACKENDS = {
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
        lambda device_type: None,
        ("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    ),
}


def has_compiled_kernels(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels of `csrc/` compute tensors of this device type and dtype."""
    return _choose_backend(device_type, dtype) == "cpu"


__all__ = ["causal_conv1d", "has_compiled_kernels", "linear", "rms_norm", "selective_scan", "selective_scan_backends"]
