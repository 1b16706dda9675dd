"""
The steps of a layer for inference on a CPU in pieces of the tokens: the compiled kernels of `csrc/`, without gradients,
into memory that is there already. What does not change from one piece to the next is prepared once.
"""

import ctypes

import torch

from .cpu_library import DTYPES, Convolution, Norm, Scan, Sequence, kernels


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(-1) != 1:
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)}, dtype {dtype} and rows without gaps, got "
            f"{tuple(tensor.shape)}, {tensor.dtype} and strides {tensor.stride()}."
        )


def _pointer(parameter: torch.Tensor | None) -> int | None:
    return None if parameter is None else parameter.data_ptr()


def rms_norm_into(out: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of float32 `(batch, length, D)` into `out` of the same shape and of any dtype of the kernels."""
    _check("hidden_states", hidden_states, out.shape, torch.float32)
    _check("out", out, out.shape, out.dtype)
    weight = weight.float()
    norm = Norm(
        *(*out.shape, torch.get_num_threads(), DTYPES[out.dtype], eps),
        *(Sequence.of(hidden_states), weight.data_ptr(), Sequence.of(out)),
    )
    if out.numel():
        kernels().videomamba_rms_norm(ctypes.byref(norm))
    return out


class PiecewiseConvolution:
    """
    [`causal_conv1d`] of a sequence that comes in pieces: from the first to the last, or, with `reverse`, from the last
    to the first.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, reverse: bool) -> None:
        (channels, _, width), self.reverse = weight.shape, reverse
        self.weight = weight.squeeze(1).float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.context: torch.Tensor | None = None
        self.arguments = Convolution(
            **{"channels": channels, "width": width, "threads": torch.get_num_threads(), "reverse": reverse},
            **{"weight": self.weight.data_ptr(), "bias": _pointer(self.bias)},
        )

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The next piece, `(batch, length, channels)`, into `out` of the same shape and dtype."""
        (batch, length, _), arguments, width = x.shape, self.arguments, self.arguments.width
        _check("x", x, (batch, length, arguments.channels), x.dtype)
        _check("out", out, x.shape, x.dtype)
        if self.context is not None:
            _check("the piece before", self.context, (batch, width - 1, arguments.channels), x.dtype)
            arguments.context = Sequence.of(self.context)
        arguments.batch, arguments.length, arguments.dtype = batch, length, DTYPES[x.dtype]
        arguments.x, arguments.y = Sequence.of(x), Sequence.of(out)
        if x.numel():
            kernels().videomamba_causal_conv1d(ctypes.byref(arguments))
        self.context = x[:, : width - 1] if self.reverse else x[:, max(0, length - width + 1) :]
        return out


class PiecewiseScan:
    """
    [`selective_scan`] of a sequence that comes in pieces: from the first to the last, or, with `reverse`, from the last
    to the first. `dt_proj` `(rank, channels)` makes the time steps, before bias and softplus.
    """

    def __init__(
        self,
        A: torch.Tensor,
        D: torch.Tensor,
        dt_bias: torch.Tensor,
        dt_proj: torch.Tensor,
        *,
        batch: int,
        reverse: bool,
    ) -> None:
        (channels, states), rank = A.shape, len(dt_proj)
        shapes = {"D": (D, (channels,)), "dt_bias": (dt_bias, (channels,)), "dt_proj": (dt_proj, (rank, channels))}
        for name, (parameter, shape) in shapes.items():
            _check(name, parameter, shape, parameter.dtype)
        self.parameters = [parameter.float().contiguous() for parameter in (A, D, dt_bias, dt_proj)]
        self.state = torch.zeros(batch, states, channels)
        names = ("A", "D", "dt_bias", "dt_proj", "h")
        self.arguments = Scan(
            **{"batch": batch, "channels": channels, "state": states, "rank": rank, "reverse": reverse},
            **{name: tensor.data_ptr() for name, tensor in zip(names, (*self.parameters, self.state), strict=True)},
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
    ) -> torch.Tensor:
        """
        The next piece, into `out`, which may be `add`.

        Args:
            x (`torch.Tensor` of shape `(batch, length, channels)`): Input.
            dt (`torch.Tensor` of shape `(batch, length, rank)`): What time steps are made of.
            B, C (`torch.Tensor` of shape `(batch, length, state)`): Input and output matrix of each step.
            out, z, add (`torch.Tensor` of shape `(batch, length, channels)`): Output; gate and summand, *optional*.

        All have the dtype of `x`.
        """
        arguments, length = self.arguments, x.shape[1]
        batch, channels, states = arguments.batch, arguments.channels, arguments.state
        whole, each = (batch, length, channels), (batch, length, states)
        _check("x", x, whole, x.dtype)
        arguments.length, arguments.dtype, arguments.x = length, DTYPES[x.dtype], Sequence.of(x)
        sequences = {"dt": (dt, (batch, length, arguments.rank)), "B": (B, each), "C": (C, each), "y": (out, whole)}
        for name, (sequence, shape) in {**sequences, "z": (z, whole), "add": (add, whole)}.items():
            if sequence is not None:
                _check(name, sequence, shape, x.dtype)
            setattr(arguments, name, Sequence.of(sequence))
        if x.numel():
            kernels().videomamba_selective_scan(ctypes.byref(arguments))
        return out
