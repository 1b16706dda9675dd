"""The compiled kernels of `csrc/`: finding and loading them, and the structures that they take."""

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

# What follows repeats csrc/arguments.h.

VERSION = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCAN_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # a scan in float16 can exceed it between input and output


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


def check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "any strides",
    has_layout: bool = True,
) -> None:
    """
    Checks that memory has what a kernel will read or write there. Every tensor is checked before a kernel gets its
    address.

    Raises:
        `ValueError`: for another shape, dtype, device or layout.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu" or not has_layout:
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)}, dtype {dtype}, device cpu and {layout}, got "
            f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device} and strides {tensor.stride()}."
        )


def pointer(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int | None:
    """The address of a tensor without gaps; null without a tensor. Raises what [`check`] raises."""
    if tensor is None:
        return None
    check(name, tensor, shape, dtype, "no gaps", tensor.is_contiguous())
    return tensor.data_ptr()


class Sequence(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_void_p, "data"), *_fields(ctypes.c_int64, "batch_stride row_stride")]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> "Sequence":
        """A tensor whose rows have no gaps; without a tensor there is no data. Raises what [`check`] raises."""
        if tensor is None:
            return cls()
        # where there is no second entry, strides can be anything
        has_rows = tensor.stride(-1) == 1 or shape[-1] == 1 or tensor.numel() == 0
        check(name, tensor, shape, dtype, "rows without gaps", has_rows)
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class Scan(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length channels state rank threads"),
        *_fields(ctypes.c_int32, "dtype reverse"),
        *_fields(Sequence, "x dt B C z add"),
        *_fields(ctypes.c_void_p, "dt_proj A D dt_bias h checkpoints"),
        *_fields(Sequence, "y ungated"),
    ]


class ScanGradients(ctypes.Structure):
    _fields_ = [
        *_fields(Sequence, "y x dt z add"),
        *_fields(ctypes.c_void_p, "A D dt_bias dt_proj projected conv_weight conv_bias"),
        *_fields(ctypes.c_int64, "conv_width"),
    ]


class Convolution(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length channels width threads"),
        *_fields(ctypes.c_int32, "dtype reverse"),
        *_fields(Sequence, "x context"),
        *_fields(ctypes.c_void_p, "weight bias"),
        *_fields(Sequence, "y"),
    ]


class ConvolutionGradients(ctypes.Structure):
    _fields_ = [
        *_fields(Sequence, "y x add"),
        *_fields(ctypes.c_void_p, "weight bias"),
        *_fields(ctypes.c_int64, "outputs"),
        *_fields(ctypes.c_void_p, "x_proj projected x_proj_gradient"),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length width threads"),
        *_fields(ctypes.c_int32, "dtype"),
        *_fields(ctypes.c_float, "eps"),
        *_fields(Sequence, "x"),
        *_fields(ctypes.c_void_p, "weight"),
        *_fields(Sequence, "y"),
    ]


class NormGradients(ctypes.Structure):
    _fields_ = [*_fields(Sequence, "y x add"), *_fields(ctypes.c_void_p, "weight")]


class Sum(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch length width threads"),
        *_fields(ctypes.c_int32, "dtype"),
        *_fields(Sequence, "x z y"),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_void_p, "data"), *_fields(ctypes.c_int64, "row_stride column_stride")]


class MatrixProduct(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "rows inner columns threads"),
        *_fields(Matrix, "a b"),
        *_fields(ctypes.c_void_p, "packed c"),
        *_fields(ctypes.c_int64, "c_stride"),
    ]


@functools.cache
def load_library(*variants: str) -> ctypes.CDLL:
    """
    The first of these variants of the kernels that was compiled.

    It is looked for beside this file and in the packages of this Python: this file can be the copy of it that a Hub
    repository carries, or that of a clone, while the kernels are in the installed package.

    Raises:
        `ImportError`: if there is none, or one of another version.
        `OSError`: if the system refuses to load it.
    """
    packages = [Path(__file__).parent, *(Path(path) / "modeling_videomamba" for path in sys.path)]
    for variant in variants:
        for package in packages:
            for path in package.glob(f"_cpu_{variant}.*so"):
                library = ctypes.CDLL(str(path))
                if library.videomamba_version() != VERSION:
                    raise ImportError(f"{path} was compiled from another version, install the package anew")
                return library
    raise ImportError("it was not compiled when the package was installed, which needs a C++20 compiler (GCC or Clang)")


@functools.cache
def kernels() -> ctypes.CDLL:
    """All but the matrix products, as they were compiled for the widest vectors of this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    return load_library(*{"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ()), "baseline")
