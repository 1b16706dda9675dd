"""
The steps of inference on a CPU in tiles of the tokens, without gradients, into memory that is there already: the
compiled kernels of `csrc/`, and products by PyTorch where there are no matrix units.

Steps are queued in a [`Queue`] and run once per layer: Python and PyTorch dispatch in between would evict the data from
the caches.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from .cpu_library import DTYPES, SCAN_DTYPES, Convolution, Norm, Scan, Sequence, Sum, kernels, pointer
from .matrix_product_cpu import GrowingBuffer, can_use_amx, matrix_kernels, prepare, rows_or_columns


class Queue:
    """Steps that are to run one after the other."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[], Any], tuple[torch.Tensor | None, ...]]] = []

    def add(self, kernel: Callable[[Any], None], arguments: ctypes.Structure, *kept: torch.Tensor | None) -> None:
        """A call of a kernel. The tensors whose memory its arguments name are `kept` until it has run."""
        self._steps.append((functools.partial(kernel, ctypes.byref(arguments)), kept))

    def add_call(self, function: Callable[[], Any]) -> None:
        self._steps.append((function, ()))

    def run(self) -> None:
        steps, self._steps = self._steps, []
        for step, _ in steps:
            step()


def norm_into(out: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, queue: Queue) -> None:
    """RMS norm of `hidden_states`, float32 `(batch, length, D)`, into `out` of the same shape."""
    weight = weight.float().contiguous()
    norm = Norm(
        *(*out.shape, torch.get_num_threads(), DTYPES[out.dtype], eps),
        Sequence.of("hidden_states", hidden_states, out.shape, torch.float32),
        pointer("weight", weight, out.shape[2:]),
        Sequence.of("out", out, out.shape, out.dtype),
    )
    queue.add(kernels().videomamba_rms_norm, norm, hidden_states, weight, out)


def sum_into(out: torch.Tensor, hidden_states: torch.Tensor, mixed: torch.Tensor, queue: Queue) -> None:
    """`hidden_states + mixed`, `(batch, length, D)`, into `out`; all but `mixed` are float32."""
    sum_ = Sum(
        *(*out.shape, torch.get_num_threads(), DTYPES[mixed.dtype]),
        Sequence.of("hidden_states", hidden_states, out.shape, torch.float32),
        Sequence.of("mixed", mixed, out.shape, mixed.dtype),
        Sequence.of("out", out, out.shape, torch.float32),
    )
    queue.add(kernels().videomamba_sum, sum_, hidden_states, mixed, out)


class TiledLinear:
    """A linear layer on tiles of the tokens. What the matrix units need of its weight is made once, in `memory`."""

    def __init__(self, weight: torch.Tensor, memory: GrowingBuffer, queue: Queue) -> None:
        self.weight, self.memory, self.queue = rows_or_columns(weight), memory, queue
        self.is_packed = False

    def __call__(self, hidden_states: torch.Tensor, out: torch.Tensor) -> None:
        """The next tile, contiguous `(batch, length, in_features)`, into `out`, contiguous and of the same dtype."""
        rows, target = hidden_states.view(-1, hidden_states.shape[-1]), out.view(-1, out.shape[-1])
        columns = self.weight.T
        if not (self.is_packed or can_use_amx(rows, self.weight)):
            self.queue.add_call(lambda: torch.mm(rows, columns, out=target))
            return
        product = prepare(rows, columns, target, self.memory)
        if not self.is_packed:
            self.queue.add(matrix_kernels().videomamba_pack, product, self.weight)
        self.queue.add(matrix_kernels().videomamba_matrix_product, product, rows, target)
        self.is_packed = True


class TiledConvolution:
    """
    [`causal_conv1d`] of a sequence that comes in tiles: from the first to the last, or, with `reverse`, from the last
    to the first.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, queue: Queue, *, reverse: bool) -> None:
        (channels, _, width), self.reverse, self.queue = weight.shape, reverse, queue
        self.weight = weight.squeeze(1).float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.context: torch.Tensor | None = None
        self.arguments = Convolution(
            **{"channels": channels, "width": width, "threads": torch.get_num_threads(), "reverse": reverse},
            **{"weight": pointer("weight", self.weight, (channels, width))},
            **{"bias": pointer("bias", self.bias, (channels,))},
        )

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The next tile, `(batch, length, channels)`, into `out` of the same shape and dtype."""
        arguments = Convolution.from_buffer_copy(self.arguments)
        (batch, length, _), channels, width = x.shape, arguments.channels, arguments.width
        shape, before = (batch, length, channels), (batch, width - 1, channels)
        arguments.batch, arguments.length, arguments.dtype = batch, length, DTYPES[x.dtype]
        arguments.x, arguments.y = Sequence.of("x", x, shape, x.dtype), Sequence.of("out", out, shape, x.dtype)
        arguments.context = Sequence.of("the tile before", self.context, before, x.dtype)
        self.queue.add(kernels().videomamba_causal_conv1d, arguments, self.weight, self.bias, x, out, self.context)
        self.context = x[:, : width - 1] if self.reverse else x[:, max(0, length - width + 1) :]


class TiledScan:
    """
    [`selective_scan`] of a sequence that comes in tiles: from the first to the last, or, with `reverse`, from the last
    to the first. `dt_proj` `(channels, rank)` makes the time steps, before bias and softplus.
    """

    def __init__(
        self,
        A: torch.Tensor,
        D: torch.Tensor,
        dt_bias: torch.Tensor,
        dt_proj: torch.Tensor,
        queue: Queue,
        *,
        batch: int,
        reverse: bool,
    ) -> None:
        (channels, states), rank, self.queue = A.shape, dt_proj.shape[1], queue
        self.kept = [parameter.float().contiguous() for parameter in (A, D, dt_bias, dt_proj)]
        self.kept.append(torch.zeros(batch, states, channels))
        shapes = {"A": A.shape, "D": (channels,), "dt_bias": (channels,), "dt_proj": (channels, rank)}
        shapes["h"] = (batch, states, channels)
        self.arguments = Scan(
            **{"batch": batch, "channels": channels, "state": states, "rank": rank, "reverse": reverse},
            **{name: pointer(name, t, shape) for (name, shape), t in zip(shapes.items(), self.kept, strict=True)},
            threads=torch.get_num_threads(),
        )

    def __call__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        out: torch.Tensor,
        z: torch.Tensor | None = None,
        add: torch.Tensor | None = None,
    ) -> None:
        """
        The next tile, into `out`, which may be `add`.

        Args:
            x (`torch.Tensor` of shape `(batch, length, channels)`): Input.
            dt (`torch.Tensor` of shape `(batch, length, rank)`): What time steps are made of.
            B, C (`torch.Tensor` of shape `(batch, length, state)`): Input and output matrix of each step.
            out, z, add (`torch.Tensor` of shape `(batch, length, channels)`): Output; gate and summand, *optional*.

        All have the dtype of `x`.
        """
        arguments = Scan.from_buffer_copy(self.arguments)
        batch, length, channels, states = arguments.batch, x.shape[1], arguments.channels, arguments.state
        whole, each = (batch, length, channels), (batch, length, states)
        sequences = {"x": (x, whole), "dt": (dt, (batch, length, arguments.rank)), "B": (B, each), "C": (C, each)}
        for name, (sequence, shape) in {**sequences, "y": (out, whole), "z": (z, whole), "add": (add, whole)}.items():
            setattr(arguments, name, Sequence.of(name, sequence, shape, x.dtype))
        arguments.length, arguments.dtype = length, SCAN_DTYPES[x.dtype]
        self.queue.add(kernels().videomamba_selective_scan, arguments, *self.kept, x, dt, B, C, out, z, add)
