"""The scan and its convolution on a CPU: the compiled kernels of `csrc/`, as operators of PyTorch."""

import ctypes
from dataclasses import dataclass

import torch

from .cpu_library import (
    DTYPES,
    SCAN_DTYPES,
    Convolution,
    ConvolutionGradients,
    Scan,
    ScanGradients,
    Sequence,
    kernels,
    pointer,
)
from .operators import operator

CHUNK_SIZE = 32  # steps between the states that are kept for the backward pass, `kChunk` of csrc/selective_scan.cpp


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernels can't run on tensors of this device, if they can't."""
    if device_type != "cpu":
        return "needs tensors on a CPU"
    try:
        kernels()
    except (ImportError, OSError, AttributeError) as error:
        return f"the compiled kernel can't be loaded: {error}"
    return None


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    """The backend `cpu` of [`selective_scan`]; float32, bfloat16 and float16, which is computed as float32."""
    sequences = [x, dt, B, C, z, add]
    dtype = x.dtype if all(s is None or s.dtype == x.dtype for s in sequences) else torch.float32
    if dtype == torch.float16:  # the output before the gate can exceed it, and the gradient of the gate needs that
        dtype = torch.float32
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


def _num_chunks(length):
    return (length + CHUNK_SIZE - 1) // CHUNK_SIZE


def _call_scan(x, dt, A, B, C, D, z, dt_bias, add, dt_proj, reverse, y, checkpoints=None, ungated=None, gradients=None):
    """Runs the kernel into `y`, or, given the structure of gradients, the backward kernel into those."""
    x, dt, B, C, z, add = map(_rows, (x, dt, B, C, z, add))
    A, D = A.contiguous(), D.contiguous()
    dt_bias, dt_proj = (None if tensor is None else tensor.contiguous() for tensor in (dt_bias, dt_proj))
    (batch, length, channels), state = x.shape, A.shape[1]
    rank = 0 if dt_proj is None else dt_proj.shape[1]

    def sequence(name, tensor, width=channels):
        return Sequence.of(name, tensor, (batch, length, width), x.dtype)

    arguments = Scan(
        *(batch, length, channels, state, rank, torch.get_num_threads(), SCAN_DTYPES[x.dtype], reverse),
        *(sequence("x", x), sequence("dt", dt, rank or channels), sequence("B", B, state), sequence("C", C, state)),
        *(sequence("z", z), sequence("add", add)),
        *(pointer("dt_proj", dt_proj, (channels, rank)), pointer("A", A, (channels, state))),
        *(pointer("D", D, (channels,)), pointer("dt_bias", dt_bias, (channels,)), None),
        pointer("checkpoints", checkpoints, (_num_chunks(length), batch, state, channels)),
        *(sequence("y", y), sequence("ungated", ungated)),
    )
    if x.numel() == 0:
        return
    if gradients is None:
        kernels().videomamba_selective_scan(ctypes.byref(arguments))
    else:
        kernels().videomamba_selective_scan_backward(ctypes.byref(arguments), ctypes.byref(gradients))


def scan(x, dt, A, B, C, D, z, dt_bias, add, *, reverse, keep, dt_proj=None, ungated=None):
    """
    The output, and, to `keep` for the backward pass, the output before the gate, in `ungated` if that is given, which
    may be `add`, and the states before each chunk. With `dt_proj` (channels, rank) `dt` is what it projects,
    (batch, length, rank).
    """
    y, memory, checkpoints = scan_outputs(x, A, z if ungated is None else None, keep)
    ungated = memory if ungated is None else ungated
    kept = {"checkpoints": checkpoints} if keep else {}
    if keep and z is not None:
        kept["ungated"] = ungated
    _call_scan(x, dt, A, B, C, D, z, dt_bias, add, dt_proj, reverse, y, **kept)
    return y, ungated, checkpoints


def scan_outputs(x, A, z, keep):
    """Memory for what [`scan`] returns."""
    (batch, length, channels), state = x.shape, A.shape[1]
    ungated = _empty(x) if keep and z is not None else x.new_empty(0)
    return _empty(x), ungated, A.new_empty(_num_chunks(length) if keep else 0, batch, state, channels)


@dataclass
class Gate:
    """
    `z`, the output before it, and memory for what the backward pass makes: the gradients of `z` and of that output,
    which may take the place of the gradient of the output after it, and, if there is a `y`, that output anew.
    """

    z: torch.Tensor
    ungated: torch.Tensor
    grad_z: torch.Tensor
    grad_ungated: torch.Tensor
    y: torch.Tensor | None = None


@dataclass
class ScanGradient:
    """Gradients of the tensors of [`scan`] by name; `projected` (batch, length, ...): those of `dt_low`, B and C."""

    x: torch.Tensor
    dt: torch.Tensor | None  # without `dt_proj`
    projected: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    dt_proj: torch.Tensor | None


def scan_backward(
    grad_y, x, dt, A, B, C, D, dt_bias, *, checkpoints, reverse, dt_proj=None, gate=None, convolution=None
):
    """
    Gradients of [`scan`]. With `convolution`, its weight and bias, `x` is what [`convolve`] makes the input of the scan
    of, and the gradient of `x` that of this input.
    """
    rank = 0 if dt_proj is None else dt_proj.shape[1]
    grad_y = _rows(grad_y)
    weight, bias = (tensor.contiguous() for tensor in convolution) if convolution else (None, None)
    new = A.new_zeros if x.numel() == 0 else A.new_empty
    gradient = ScanGradient(
        x=_empty(x),
        dt=None if rank else _empty(dt),
        projected=new(*x.shape[:2], rank + 2 * A.shape[1]),
        **{"A": new(A.shape), "D": new(D.shape), "dt_bias": new(D.shape)},
        dt_proj=None if dt_proj is None else new(dt_proj.shape),
    )
    z, ungated, grad_z, grad_ungated, y = vars(gate).values() if gate else [None] * 5
    sequences = {"y": grad_y, "x": gradient.x, "dt": gradient.dt, "z": grad_z, "ungated": grad_ungated}
    own = (gradient.A, gradient.D, gradient.dt_bias, gradient.dt_proj, gradient.projected)
    width = 0 if weight is None else weight.shape[1]
    gradients = ScanGradients(
        *(Sequence.of(f"grad_{name}", tensor, x.shape, x.dtype) for name, tensor in sequences.items()),
        *(None if tensor is None else tensor.data_ptr() for tensor in own),
        *(pointer("conv_weight", weight, (x.shape[2], width)), pointer("conv_bias", bias, x.shape[2:]), width),
    )
    arguments = (x, dt, A, B, C, D, z, dt_bias, None, dt_proj, reverse, y)
    _call_scan(*arguments, checkpoints=checkpoints, ungated=ungated, gradients=gradients)
    return gradient


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
    return scan(x, dt, A, B, C, D, z, dt_bias, add, reverse=reverse, keep=keep)


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
    gate = None if z is None else Gate(z, ungated, grad_z=_empty(z), grad_ungated=_empty(x))
    gradient = scan_backward(grad_y, x, dt, A, B, C, D, dt_bias, checkpoints=checkpoints, reverse=reverse, gate=gate)
    grad_B, grad_C = (part.to(B.dtype, copy=True).contiguous() for part in gradient.projected.chunk(2, dim=-1))
    gradients = [gradient.x, gradient.dt, gradient.A, grad_B, grad_C, gradient.D, gradient.dt_bias]
    return [*gradients, gate.grad_z, gate.grad_ungated] if gate else gradients


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
    channels, width = x.shape[2], weight.shape[1]
    arguments = Convolution(
        *(*x.shape, width, torch.get_num_threads(), DTYPES[x.dtype], reverse),
        *(Sequence.of("x", x, x.shape, x.dtype), Sequence()),
        *(pointer("weight", weight, (channels, width)), pointer("bias", bias, (channels,))),
        Sequence.of("y", y, x.shape, x.dtype),
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


def convolve_backward(grad_y, x, weight, bias, reverse, grad_x, *, add=False, x_proj=None, grad_projected=None):
    """
    Gradients of `weight`, `bias` and `x_proj`; that of `x` goes into `grad_x`, or, to `add`, is added to what is there.
    What is convolved goes through `x_proj` (outputs, channels), if there is one, besides where `grad_y` is from;
    `grad_projected` (batch, length, outputs) is the gradient of what that makes. Both are float32.
    """
    grad_y = _rows(grad_y)
    new = weight.new_zeros if x.numel() == 0 else weight.new_empty
    grad_weight, grad_bias = new(weight.shape), new(len(weight))
    x_proj, grad_projected = (None if tensor is None else tensor.contiguous() for tensor in (x_proj, grad_projected))
    grad_x_proj = None if x_proj is None else new(x_proj.shape)
    outputs = 0 if x_proj is None else len(x_proj)
    sequences = {"y": grad_y, "x": grad_x, "x, which is added": grad_x if add else None}
    gradients = ConvolutionGradients(
        *(Sequence.of(f"grad_{name}", tensor, x.shape, x.dtype) for name, tensor in sequences.items()),
        *(grad_weight.data_ptr(), grad_bias.data_ptr(), outputs),
        pointer("x_proj", x_proj, (outputs, x.shape[2])),
        pointer("grad_projected", grad_projected, (*x.shape[:2], outputs)),
        None if grad_x_proj is None else grad_x_proj.data_ptr(),
    )
    _call_convolution(x, weight, bias, reverse, None, gradients=gradients)
    return grad_weight, grad_bias, grad_x_proj


def cpu_causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """[`convolve`] as an operator."""
    return convolve(x, weight, bias, reverse)


def cpu_causal_conv1d_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x, weight, bias`."""
    grad_x = _empty(x)
    return grad_x, *convolve_backward(grad_y, x, weight, bias, reverse, grad_x)[:2]


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
