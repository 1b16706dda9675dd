"""The scan and its convolution on a CPU: the compiled kernels of `csrc/`, as operators of PyTorch."""

import ctypes
from dataclasses import dataclass

import torch

from .cpu_library import DTYPES, Convolution, ConvolutionGradients, Scan, ScanGradients, Sequence, kernels
from .operators import operator

CHUNK_SIZE = 32  # steps between the states that are kept for the backward pass, `kChunk` of csrc/selective_scan.cpp


def unusable(device_type: str) -> str | None:
    """Why the kernels can't run on tensors of this device, if they can't."""
    if device_type != "cpu":
        return "needs tensors on a CPU"
    try:
        kernels()
    except (ImportError, OSError, AttributeError) as error:
        return f"the compiled kernel can't be loaded: {error}"
    return None


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    """The backend `cpu` of [`selective_scan`]; float32, bfloat16 and float16."""
    sequences = [x, dt, B, C, z, add]
    dtype = x.dtype if all(s is None or s.dtype == x.dtype for s in sequences) else torch.float32
    x_, dt, B, C, z, add = (None if s is None else s.to(dtype) for s in sequences)
    inputs = [x_, dt, A.float(), B, C, D.float(), z, None if dt_bias is None else dt_bias.float(), add]
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return _scan(*inputs, reverse, keep)[0].to(x.dtype)


def causal_conv1d(x, weight, bias, reverse):
    """The backend `cpu` of [`causal_conv1d`]; float32, bfloat16 and float16."""
    return _convolution(x, weight.squeeze(1).float(), None if bias is None else bias.float(), reverse)


def _empty(like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _rows(tensor):
    """Rows without gaps between their entries; a whole tensor may have gaps."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _call_scan(x, dt, A, B, C, D, z, dt_bias, add, dt_proj, reverse, y, checkpoints=None, ungated=None, gradients=None):
    """Runs the kernel into `y`, or, given the structure of gradients, the backward kernel into those."""
    x, dt, B, C, z, add = map(_rows, (x, dt, B, C, z, add))
    A, D = A.contiguous(), D.contiguous()
    dt_bias, dt_proj = (None if tensor is None else tensor.contiguous() for tensor in (dt_bias, dt_proj))
    (batch, length, channels), state = x.shape, A.shape[1]
    arguments = Scan(
        *(batch, length, channels, state, 0 if dt_proj is None else len(dt_proj), torch.get_num_threads()),
        *(DTYPES[x.dtype], reverse),
        *map(Sequence.of, (x, dt, B, C, z, add)),
        *map(_pointer, (dt_proj, A, D, dt_bias, None, checkpoints)),
        *map(Sequence.of, (y, ungated)),
    )
    if x.numel() == 0:
        return
    if gradients is None:
        kernels().videomamba_selective_scan(ctypes.byref(arguments))
    else:
        kernels().videomamba_selective_scan_backward(ctypes.byref(arguments), ctypes.byref(gradients))


def scan(x, dt, A, B, C, D, z, dt_bias, add, dt_proj, reverse, keep):
    """
    The output, and, to `keep` for the backward pass, the output before the gate and the states before each chunk. With
    `dt_proj` (rank, channels) `dt` is what it projects, (batch, length, rank).
    """
    y, ungated, checkpoints = scan_outputs(x, A, z, keep)
    kept = {"checkpoints": checkpoints} if keep else {}
    if keep and z is not None:
        kept["ungated"] = ungated
    _call_scan(x, dt, A, B, C, D, z, dt_bias, add, dt_proj, reverse, y, **kept)
    return y, ungated, checkpoints


def scan_outputs(x, A, z, keep):
    """Memory for what [`scan`] returns."""
    (batch, length, channels), state = x.shape, A.shape[1]
    ungated = _empty(x) if keep and z is not None else x.new_empty(0)
    num_chunks = (length + CHUNK_SIZE - 1) // CHUNK_SIZE if keep else 0
    return _empty(x), ungated, A.new_empty(num_chunks, batch, state, channels)


@dataclass
class ScanGradient:
    """Gradients of the tensors of [`scan`] by name; `projected` (batch, length, ...): those of `dt_low`, B and C."""

    x: torch.Tensor
    dt: torch.Tensor  # without `dt_proj`
    projected: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    dt_proj: torch.Tensor
    add: torch.Tensor  # with a gate


def scan_backward(
    grad_y, x, dt, A, B, C, D, dt_bias, dt_proj, checkpoints, reverse, *, z=None, grad_z=None, ungated=None, y=None
):
    """
    Gradients of [`scan`]. With the gate `z` that of `z` goes into `grad_z`, and, where there is a `y`, the output into
    that, computed anew. Without one the gradient of `add` is `grad_y`, and missing here.
    """
    (batch, length, channels), state = x.shape, A.shape[1]
    rank = 0 if dt_proj is None else len(dt_proj)
    grad_y = _rows(grad_y)
    threads = torch.get_num_threads()
    slots = min(threads, -(-threads // max(batch, 1)) + 1)  # threads that can share a sample
    projected = A.new_zeros(slots, batch, length, rank + 2 * state)
    dt_low, grad_B, grad_C = projected.split([rank, state, state], dim=-1)
    grad_A, grad_dt_proj = A.new_empty(batch, state, channels), A.new_empty(batch, rank, channels)
    grad_D, grad_dt_bias = D.new_empty(2, batch, channels)
    sums = {"projected": projected, "A": grad_A, "D": grad_D, "dt_bias": grad_dt_bias, "dt_proj": grad_dt_proj}
    sequences = {"x": _empty(x), "dt": _empty(dt) if rank == 0 else None, "add": None if z is None else _empty(x)}
    addresses = {**sums, "B": grad_B, "C": grad_C, "dt_low": dt_low}
    del addresses["projected"]
    gradients = ScanGradients(
        **{name: Sequence.of(tensor) for name, tensor in {"y": grad_y, "z": grad_z, **sequences}.items()},
        **{name: tensor.data_ptr() for name, tensor in addresses.items()},
        row_stride=projected.shape[-1],
    )
    arguments = (x, dt, A, B, C, D, z, dt_bias, None, dt_proj, reverse, y)
    _call_scan(*arguments, checkpoints=checkpoints, ungated=ungated, gradients=gradients)
    sums = {name: parts.sum(0) for name, parts in sums.items()}
    return ScanGradient(**sequences, **{**sums, "A": sums["A"].T.contiguous()})


def cpu_selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    add: torch.Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`scan`] as an operator, of time steps before bias and softplus."""
    return scan(x, dt, A, B, C, D, z, dt_bias, add, None, reverse, keep)


def cpu_selective_scan_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    ungated: torch.Tensor,
    checkpoints: torch.Tensor,
    reverse: bool,
) -> list[torch.Tensor]:
    """Gradients of `x, dt, A, B, C, D, dt_bias`, then, with a gate, of `z` and of what was added before the gate."""
    gate = {} if z is None else {"z": z, "grad_z": _empty(z), "ungated": ungated}
    gradient = scan_backward(grad_y, x, dt, A, B, C, D, dt_bias, None, checkpoints, reverse, **gate)
    grad_B, grad_C = (part.to(B.dtype, copy=True).contiguous() for part in gradient.projected.chunk(2, dim=-1))
    gradients = [gradient.x, gradient.dt, gradient.A, grad_B, grad_C, gradient.D, gradient.dt_bias]
    return gradients if z is None else [*gradients, gate["grad_z"], gradient.add]


_scan = operator(cpu_selective_scan)
_scan_backward = operator(cpu_selective_scan_backward)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, add, reverse, keep):
    return scan_outputs(x, A, z, keep)


@_scan_backward.register_fake
def _(grad_y, x, dt, A, B, C, D, z, dt_bias, ungated, checkpoints, reverse):
    gradients = [*map(_empty, (x, dt, A, B, C, D)), torch.empty_like(D)]
    return gradients if z is None else [*gradients, _empty(z), _empty(x)]


def _setup_scan(ctx, inputs, output):
    *tensors, add, ctx.reverse, _ = inputs
    ctx.has_add = add is not None
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward_scan(ctx, grad_y, grad_ungated, grad_checkpoints):
    x, dt, A, B, C, D, z, dt_bias, ungated, checkpoints = ctx.saved_tensors
    gradients = _scan_backward(grad_y, x, dt, A, B, C, D, z, dt_bias, ungated, checkpoints, ctx.reverse)
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_dt_bias, *rest = gradients
    grad_z, grad_add = rest or (None, grad_y)
    return (
        *(grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z),
        None if dt_bias is None else grad_dt_bias,
        grad_add if ctx.has_add else None,
        *(None, None),
    )


_scan.register_autograd(_backward_scan, setup_context=_setup_scan)


def _call_convolution(x, weight, bias, reverse, y, gradients=None):
    """Runs the kernel into `y`, or, given the structure of gradients, the backward kernel into those."""
    x = _rows(x)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    arguments = Convolution(
        *(*x.shape, weight.shape[1], torch.get_num_threads()),
        *(DTYPES[x.dtype], reverse),
        *map(Sequence.of, (x, None)),
        *map(_pointer, (weight, bias)),
        Sequence.of(y),
    )
    if x.numel() == 0:
        return
    if gradients is None:
        kernels().videomamba_causal_conv1d(ctypes.byref(arguments))
    else:
        kernels().videomamba_causal_conv1d_backward(ctypes.byref(arguments), ctypes.byref(gradients))


def convolve(x, weight, bias, reverse):
    """SiLU of the convolution with `weight` (channels, width)."""
    y = _empty(x)
    _call_convolution(x, weight, bias, reverse, y)
    return y


def convolve_backward(grad_y, x, weight, bias, reverse, grad_x, *, add=False):
    """Gradients of `weight` and `bias`; that of `x` goes into `grad_x`, or, to `add`, is added to what is there."""
    batch, (channels, width) = x.shape[0], weight.shape
    grad_y = _rows(grad_y)
    grad_weight, grad_bias = weight.new_empty(batch, width, channels), weight.new_empty(batch, channels)
    sequences = map(Sequence.of, (grad_y, grad_x, grad_x if add else None))
    gradients = ConvolutionGradients(*sequences, *map(_pointer, (grad_weight, grad_bias)))
    _call_convolution(x, weight, bias, reverse, None, gradients=gradients)
    return grad_weight.sum(0).T.contiguous(), grad_bias.sum(0)


def cpu_causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """[`convolve`] as an operator."""
    return convolve(x, weight, bias, reverse)


def cpu_causal_conv1d_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x, weight, bias`."""
    grad_x = _empty(x)
    return grad_x, *convolve_backward(grad_y, x, weight, bias, reverse, grad_x)


_convolution = operator(cpu_causal_conv1d)
_convolution_backward = operator(cpu_causal_conv1d_backward)


@_convolution.register_fake
def _(x, weight, bias, reverse):
    return _empty(x)


@_convolution_backward.register_fake
def _(grad_y, x, weight, bias, reverse):
    return _empty(x), _empty(weight), weight.new_empty(weight.shape[0])


def _setup_convolution(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward_convolution(ctx, grad_y):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _convolution_backward(grad_y, x, weight, bias, ctx.reverse)
    return grad_x, grad_weight, None if bias is None else grad_bias, None


_convolution.register_autograd(_backward_convolution, setup_context=_setup_convolution)
