"""
What the Triton kernels share: how they read a sequence, and how they are launched.

Everything is computed in float32; offsets are 64-bit, as tensors can have 2**31 elements. A `step` counts in the order
of the scan; its place in memory is `length - 1 - step` in the reverse direction, and nothing is flipped or copied.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor

IMPORT_ERROR = None
try:
    import triton
    import triton.language as tl
except Exception as error:  # a build for another system fails with more than ImportError
    IMPORT_ERROR = error
    # enough to define the kernels all the same
    triton = tl = SimpleNamespace(jit=lambda function=None, **_: function or triton.jit, constexpr=float)

LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))

# Their values make no faster code, and videos of another length shall not compile the kernels anew.
ANY_SIZE = ["batch_size", "length", "num_chunks", "chunk_steps"]


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels can't run for tensors on a device of that type, or `None` if they can."""
    if device_type not in ("cuda", "xpu"):
        return "needs tensors on a CUDA, ROCm or XPU device"
    if not getattr(torch, device_type).is_available():
        return f"needs a device and a PyTorch build for {device_type!r}"
    if IMPORT_ERROR is not None:
        return f"`triton` can't be imported ({IMPORT_ERROR})"
    return None


# In a kernel.


@triton.jit
def program(num_chunks, channels, E: tl.constexpr):
    """Sequence, chunk and block of channels of a program. Those of one chunk follow each other: they share B and C."""
    num_blocks = (channels + E - 1) // E
    index = tl.program_id(0)
    batch = (index // num_blocks // num_chunks).to(tl.int64)
    return batch, index // num_blocks % num_chunks, index % num_blocks


@triton.jit
def contiguous(batch, steps, columns, width, length, REVERSE: tl.constexpr):
    """Offsets in a contiguous `(batch, length, width)`."""
    times = length - 1 - steps if REVERSE else steps
    return ((batch * length + times) * width)[:, None] + columns[None, :]


@triton.jit
def load(pointer, batch_stride, step_stride, batch, steps, columns, width, length, REVERSE: tl.constexpr):
    """`(steps, columns)` of a sequence, zero outside of it."""
    times = length - 1 - steps if REVERSE else steps
    offsets = batch * batch_stride + times.to(tl.int64)[:, None] * step_stride + columns[None, :]
    mask = ((steps >= 0) & (steps < length))[:, None] & (columns < width)[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_offset(batch, step, length, REVERSE: tl.constexpr):
    """Row of a step in a contiguous `(batch, length, width)`."""
    return batch * length + (length - 1 - step if REVERSE else step)


@triton.jit
def load_step(pointer, batch_stride, step_stride, batch, step, columns, width, length, REVERSE: tl.constexpr):
    """`(columns,)` of one step of a sequence."""
    time = length - 1 - step if REVERSE else step
    offsets = batch * batch_stride + time.to(tl.int64) * step_stride + columns
    return tl.load(pointer + offsets, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def load_row(pointer, columns, width):
    """`(columns,)` of a vector; zeros for one that is not there."""
    if pointer is None:
        row = tl.zeros(columns.shape, tl.float32)
    else:
        row = tl.load(pointer + columns, mask=columns < width, other=0.0).to(tl.float32)
    return row


@triton.jit
def sigmoid(v):
    small = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, small) / (1.0 + small)


# Around it.


def ceil(count, block):
    return (count + block - 1) // block


def strided(sequence):
    """A sequence for a kernel: pointer, and strides of batch and step. Columns are next to each other."""
    if sequence is None:
        return None, 0, 0
    sequence = sequence if sequence.stride(-1) == 1 else sequence.contiguous()
    return sequence, *sequence.stride()[:2]


def launch(kernel, num_programs, *arguments, **options):
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    guard = nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    with guard:
        if num_programs:  # an empty grid is an error
            kernel[(num_programs,)](*arguments, **options)
