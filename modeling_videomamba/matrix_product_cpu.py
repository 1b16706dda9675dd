"""Products of float32 matrices on the matrix units of a CPU (AMX): the compiled kernel of `csrc/matrix_product.cpp`."""

import ctypes
import functools
import threading

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from .cpu_library import Matrix, MatrixProduct, check, load_library
from .operators import operator

# Below these PyTorch's product is as fast: there is too little to do, or too little for each row that is packed.
MIN_MULTIPLY_ADDS = 1 << 20
MIN_COLUMNS = 64
ALIGNMENT = 64  # bytes
MAX_SCRATCH = 32 << 20  # bytes that a thread keeps from one product to the next


@functools.cache
def matrix_kernels() -> ctypes.CDLL:
    """
    Packing and products, once the system has been asked for the matrix units.

    Raises:
        `ImportError`, `OSError`: if there is no kernel, no such unit, or no permission to use it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ImportError("needs a processor with AVX-512 and AMX")
    library = load_library("amx")
    if not library.videomamba_has_matrix_units():
        raise ImportError("needs a processor with AMX, and a system that lets it be used")
    library.videomamba_packed_size.restype = ctypes.c_int64
    library.videomamba_packed_size.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return library


@functools.cache
def unavailable_reason() -> str | None:
    """Why there are no products on matrix units here, if there are none."""
    try:
        matrix_kernels()
    except (ImportError, OSError, AttributeError) as error:
        return str(error)
    return None


def linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T`, `(..., inner)` and `(outer, inner)` to `(..., outer)`, by what is fastest here."""
    if torch.compiler.is_compiling() or not can_use_amx(hidden_states, weight):
        return F.linear(hidden_states, weight)
    rows = hidden_states.flatten(0, -2)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        product = _matrix_product(rows, weight.T)
    else:
        product = cpu_matrix_product(rows, weight.T)
    return product.unflatten(0, hidden_states.shape[:-1])


def can_use_amx(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these can be multiplied on matrix units, may be, and are large enough."""
    if unavailable_reason() is not None or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    for tensor in (hidden_states, weight):
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # and no stand-in for one
        if not is_plain or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    if hidden_states.ndim < 2 or len(weight) < MIN_COLUMNS:
        return False
    if hidden_states.numel() * weight.shape[0] < MIN_MULTIPLY_ADDS:
        return False
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since PyTorch 2.9
    return getattr(settings, "fp32_precision", "none") in ("none", "tf32")


def rows_or_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without gaps in its rows or in its columns."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


class GrowingBuffer:
    """Memory that grows with what is wanted. To fill new memory would take as long as some of the products."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Of so many aligned bytes."""
        if len(self.buffer) < size + ALIGNMENT:
            self.buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        return -(-self.buffer.data_ptr() // ALIGNMENT) * ALIGNMENT


def prepare(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, memory: GrowingBuffer | None) -> MatrixProduct:
    """
    What the kernels want for `c = a @ b` with a new matrix `c`: matrices of which one stride is 1, and `memory` for `b`
    as the matrix units take it; without it, `b` is packed a few rows at a time while they multiply.

    Raises:
        `ValueError`: for another shape, dtype or device.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    a, b = rows_or_columns(a), rows_or_columns(b)
    check("a", a, (rows, inner), torch.float32)
    check("b", b, (inner, columns), torch.float32)
    check("c", c, (rows, columns), torch.float32, "rows without gaps", c.stride(1) == 1 or columns == 1)
    address = 0 if memory is None else memory.address(packed_size(inner, columns))
    product = MatrixProduct(
        *(rows, inner, columns, torch.get_num_threads()),
        *(Matrix(matrix.data_ptr(), *matrix.stride()) for matrix in (a, b)),
        *(address, c.data_ptr(), c.stride(0)),
    )
    product.kept = (a, b, c, memory and memory.buffer)  # as long as their addresses
    return product


def packed_size(inner: int, columns: int) -> int:
    """Bytes that `b` of this shape takes when packed."""
    return 2 * matrix_kernels().videomamba_packed_size(inner, columns)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory = GrowingBuffer()


_scratch = _Scratch()


def cpu_matrix_product(a: torch.Tensor, b: torch.Tensor, in_steps: bool = False) -> torch.Tensor:
    """
    `a @ b` of float32 matrices `(rows, inner)` and `(inner, columns)`.

    With `in_steps` each thread takes a part of the inner dimension and packs `b` as it goes: where that is long, all of
    `b` packed first would go to memory and back. The last bits then depend on the number of threads.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    if not rows * inner * columns:
        return a.new_zeros(rows, columns)
    c, memory = a.new_empty(rows, columns), None
    if not in_steps:
        memory = _scratch.memory if packed_size(inner, columns) <= MAX_SCRATCH else GrowingBuffer()
    product = prepare(a, b, c, memory)
    if memory:
        matrix_kernels().videomamba_pack(ctypes.byref(product))
    matrix_kernels().videomamba_matrix_product(ctypes.byref(product))
    return c


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of matrices, by what is fastest here, for what has gradients of its own."""
    return cpu_matrix_product(a, b) if can_use_amx(a, b.T) else torch.mm(a, b)


def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`grad.T @ inputs` of `(rows, out_features)` and `(rows, in_features)`: that of the weight of a linear layer."""
    return (
        cpu_matrix_product(grad.T, inputs, in_steps=True) if can_use_amx(grad.T, inputs.T) else torch.mm(grad.T, inputs)
    )


_matrix_product = operator(cpu_matrix_product)


@_matrix_product.register_fake
def _(a, b, in_steps=False):
    return a.new_empty(a.shape[0], b.shape[1])


@register_flop_formula(_matrix_product._opoverload.overloadpacket)
def _(a_shape, b_shape, *args, **kwargs):
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad[:2]
    grad_a = _matrix_product(grad, b.T) if needs_a else None
    # as the weight of a linear layer lies in memory, of which `b` is the transpose
    return grad_a, _matrix_product(grad.T, a, True).T if needs_b else None, None


_matrix_product.register_autograd(_backward, setup_context=_setup_context)
