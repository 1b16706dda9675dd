"""The scan and its convolution on a CPU: the compiled kernels of `csrc/`, as operators of PyTorch."""

import ctypes
import functools
import sys
from pathlib import Path

import torch

from .operators import operator

VERSION = 2  # `kVersion` of csrc/arguments.h, whose structures are repeated here
CHUNK_SIZE = 32  # steps between the states that are kept for the backward pass, `kChunk` of csrc/selective_scan.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Sequence(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64)]


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class _Scan(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length channels state rank threads"),
        *_fields(ctypes.c_int32, "dtype reverse"),
        *_fields(_Sequence, "x dt B C z add"),
        *_fields(ctypes.c_void_p, "dt_proj A D dt_bias h checkpoints"),
        *_fields(_Sequence, "y ungated"),
    ]


class _ScanGradients(ctypes.Structure):
    _fields_ = [*_fields(_Sequence, "y x dt z add"), *_fields(ctypes.c_void_p, "A D dt_bias B C")]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length channels width threads"),
        *_fields(ctypes.c_int32, "dtype reverse"),
        *_fields(_Sequence, "x context"),
        *_fields(ctypes.c_void_p, "weight bias"),
        *_fields(_Sequence, "y"),
    ]


class _ConvolutionGradients(ctypes.Structure):
    _fields_ = [*_fields(_Sequence, "y x"), *_fields(ctypes.c_void_p, "weight bias")]


@functools.cache
def _library() -> ctypes.CDLL:
    """
    The kernel that was compiled for the widest vectors of this processor.

    It is looked for beside this file and in the packages of this Python: this file can be the copy of it that a Hub
    repository carries, or that of a clone, while the kernel is in the installed package.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    variants = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}.get(capability, ("baseline",))
    packages = [Path(__file__).parent, *(Path(path) / "modeling_videomamba" for path in sys.path)]
    for variant in variants:
        for package in packages:
            for path in package.glob(f"_cpu_{variant}.*so"):
                library = ctypes.CDLL(str(path))
                if library.videomamba_version() != VERSION:
                    raise ImportError(f"{path} was compiled from another version, install the package anew")
                return library
    raise ImportError("it was not compiled when the package was installed, which needs a C++20 compiler (GCC or Clang)")


def unusable(device_type: str) -> str | None:
    """Why the kernels can't run on tensors of this device, if they can't."""
    if device_type != "cpu":
        return "needs tensors on a CPU"
    try:
        _library()
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


def scan_piece(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    dt_bias: torch.Tensor,
    reverse: bool,
    state: torch.Tensor,
    out: torch.Tensor,
    dt_proj: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`selective_scan`] of a piece of a long sequence, without gradients and into memory that is there already.

    Args:
        dt (`torch.Tensor` of shape `(batch, length, channels)`, or `(batch, length, rank)`):
            Time steps before bias and softplus, or what `dt_proj` makes them of.
        state (`torch.Tensor` of shape `(batch, state, channels)`, float32):
            That before the first step, which is overwritten with that after the last.
        out (`torch.Tensor` of shape `(batch, length, channels)`): Where to write the output; it may be `add`.
        dt_proj (`torch.Tensor` of shape `(rank, channels)`, *optional*): Time steps are `dt @ dt_proj`.

    The other arguments are those of [`selective_scan`], with all sequences in the dtype of `x`.
    """
    (batch, length, channels), num_states = x.shape, A.shape[1]
    if dt_proj is None:
        _check("dt", dt, x.shape, x.dtype)
    else:
        _check("dt", dt, (batch, length, len(dt_proj)), x.dtype)
        _check("dt_proj", dt_proj, (len(dt_proj), channels), dt_proj.dtype)
        dt_proj = dt_proj.float().contiguous()
    for name, sequence in {"out": out, "z": z, "add": add}.items():
        _check(name, sequence, x.shape, x.dtype)
    for name, sequence in {"B": B, "C": C}.items():
        _check(name, sequence, (batch, length, num_states), x.dtype)
    _check("state", state, (batch, num_states, channels), torch.float32)
    if not state.is_contiguous():
        raise ValueError(f"`state` must be contiguous, got strides {state.stride()}.")
    A, D, dt_bias = A.float(), D.float(), dt_bias.float()
    _call_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse, out, h=state, dt_proj=dt_proj)
    return out


def convolve_piece(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, reverse: bool, context: torch.Tensor | None
) -> torch.Tensor:
    """
    [`causal_conv1d`] of a piece of a long sequence, without gradients. `context` `(batch, width - 1, channels)` are the
    steps before the piece, or, with `reverse`, after it; zeros if absent.
    """
    _check("context", context, (x.shape[0], weight.shape[2] - 1, x.shape[2]), x.dtype)
    y = _empty(x)
    weight, bias = weight.squeeze(1).float(), None if bias is None else bias.float()
    _call_convolution(x, weight, bias, reverse, y, context=context)
    return y


def _check(name, tensor, shape, dtype):
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.stride(-1) != 1):
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)}, dtype {dtype} and rows without gaps, got "
            f"{tuple(tensor.shape)}, {tensor.dtype} and strides {tensor.stride()}."
        )


def _empty(like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _rows(tensor):
    """Rows without gaps between their entries; a whole tensor may have gaps."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _sequence(tensor):
    return _Sequence() if tensor is None else _Sequence(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _call_scan(
    x, dt, A, B, C, D, z, dt_bias, add, reverse, y, dt_proj=None, h=None, checkpoints=None, ungated=None, gradients=None
):
    """Runs the kernel into `y`, or, given the structure of gradients, the backward kernel into those."""
    x, dt, B, C, z, add = map(_rows, (x, dt, B, C, z, add))
    A, D = A.contiguous(), D.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    (batch, length, channels), state = x.shape, A.shape[1]
    arguments = _Scan(
        *(batch, length, channels, state, 0 if dt_proj is None else len(dt_proj), torch.get_num_threads()),
        *(DTYPES[x.dtype], reverse),
        *map(_sequence, (x, dt, B, C, z, add)),
        *map(_pointer, (dt_proj, A, D, dt_bias, h, checkpoints)),
        *map(_sequence, (y, ungated)),
    )
    if x.numel() == 0:
        return
    if gradients is None:
        _library().videomamba_selective_scan(ctypes.byref(arguments))
    else:
        _library().videomamba_selective_scan_backward(ctypes.byref(arguments), ctypes.byref(gradients))


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
    """The output, and, to `keep` for the backward pass, the output before the gate and the states before each chunk."""
    y, ungated, checkpoints = _scan_outputs(x, dt, A, B, C, D, z, dt_bias, add, reverse, keep)
    kept = {"checkpoints": checkpoints} if keep else {}
    if keep and z is not None:
        kept["ungated"] = ungated
    _call_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse, y, **kept)
    return y, ungated, checkpoints


def _scan_outputs(x, dt, A, B, C, D, z, dt_bias, add, reverse, keep):
    (batch, length, channels), state = x.shape, A.shape[1]
    ungated = _empty(x) if keep and z is not None else x.new_empty(0)
    num_chunks = (length + CHUNK_SIZE - 1) // CHUNK_SIZE if keep else 0
    return _empty(x), ungated, A.new_empty(num_chunks, batch, state, channels)


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
    (batch, length, channels), state = x.shape, A.shape[1]
    grad_y = _rows(grad_y)
    grad_x, grad_dt = _empty(x), _empty(dt)
    grad_z, grad_add = (None, None) if z is None else (_empty(z), _empty(x))
    grad_A = A.new_empty(batch, state, channels)
    grad_D, grad_dt_bias = D.new_empty(batch, channels), D.new_empty(batch, channels)
    threads = torch.get_num_threads()
    slots = min(threads, -(-threads // max(batch, 1)) + 1)  # threads that can share a sample
    grad_B, grad_C = A.new_zeros(2, slots, batch, length, state)
    gradients = _ScanGradients(
        *map(_sequence, (grad_y, grad_x, grad_dt, grad_z, grad_add)),
        *map(_pointer, (grad_A, grad_D, grad_dt_bias, grad_B, grad_C)),
    )
    _call_scan(
        *(x, dt, A, B, C, D, z, dt_bias, None, reverse, None),
        checkpoints=checkpoints,
        ungated=None if z is None else ungated,
        gradients=gradients,
    )
    return [
        grad_x,
        grad_dt,
        grad_A.sum(0).T.contiguous(),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        grad_D.sum(0),
        grad_dt_bias.sum(0),
        *(() if z is None else (grad_z, grad_add)),
    ]


_scan = operator(cpu_selective_scan)
_scan_backward = operator(cpu_selective_scan_backward)
_scan.register_fake(_scan_outputs)


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


def _call_convolution(x, weight, bias, reverse, y, context=None, gradients=None):
    """Runs the kernel into `y`, or, given the structure of gradients, the backward kernel into those."""
    x, context = _rows(x), _rows(context)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    arguments = _Convolution(
        *(*x.shape, weight.shape[1], torch.get_num_threads()),
        *(DTYPES[x.dtype], reverse),
        *map(_sequence, (x, context)),
        *map(_pointer, (weight, bias)),
        _sequence(y),
    )
    if x.numel() == 0:
        return
    if gradients is None:
        _library().videomamba_causal_conv1d(ctypes.byref(arguments))
    else:
        _library().videomamba_causal_conv1d_backward(ctypes.byref(arguments), ctypes.byref(gradients))


def cpu_causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """SiLU of the convolution with `weight` (channels, width)."""
    y = _empty(x)
    _call_convolution(x, weight, bias, reverse, y)
    return y


def cpu_causal_conv1d_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x, weight, bias`."""
    batch, (channels, width) = x.shape[0], weight.shape
    grad_y, grad_x = _rows(grad_y), _empty(x)
    grad_weight, grad_bias = weight.new_empty(batch, width, channels), weight.new_empty(batch, channels)
    sequences, parameters = map(_sequence, (grad_y, grad_x)), map(_pointer, (grad_weight, grad_bias))
    gradients = _ConvolutionGradients(*sequences, *parameters)
    _call_convolution(x, weight, bias, reverse, None, gradients=gradients)
    return grad_x, grad_weight.sum(0).T.contiguous(), grad_bias.sum(0)


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
