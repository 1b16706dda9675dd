"""SiLU of the causal convolution before the scan as Triton kernels, for CUDA, ROCm and XPU."""

import torch
from torch import Tensor

from .operators import operator
from .triton_kernels import ANY_SIZE, ceil, contiguous, launch, load, load_row, program, sigmoid, strided, tl, triton

BLOCK_STEPS, BLOCK_CHANNELS = 32, 64


def causal_conv1d(x, weight, bias, reverse) -> Tensor:
    r"""
    SiLU of a depthwise convolution that is causal in the direction of the scan.

    Args:
        x (`torch.Tensor` of shape `(batch, length, channels)`): Input, float32, bfloat16 or float16.
        weight (`torch.Tensor` of shape `(channels, 1, width)`): Depthwise kernel, its last tap that of the step itself.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added before the SiLU.
        reverse (`bool`): Causal from the last step to the first.

    Returns:
        `torch.Tensor` of shape `(batch, length, channels)` and the dtype of `x`.
    """
    return triton_causal_conv1d(x, weight, bias, reverse)


@triton.jit
def _convolve(
    x, x_batch, x_step, weight, bias, batch, steps, e, channels, length,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    y = tl.zeros((T, E), tl.float32)
    if bias is not None:
        y += load_row(bias, e, channels)[None, :]
    for tap in tl.static_range(WIDTH):
        x_tile = load(x, x_batch, x_step, batch, steps - (WIDTH - 1 - tap), e, channels, length, REVERSE)
        y += _load_tap(weight, e, channels, tap, WIDTH)[None, :] * x_tile
    return y


@triton.jit
def _load_tap(weight, e, channels, tap, WIDTH: tl.constexpr):
    return tl.load(weight + e * WIDTH + tap, mask=e < channels, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=ANY_SIZE)
def _convolution_kernel(
    x, x_batch, x_step, weight, bias, y, length, channels, num_chunks,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    steps = chunk * T + tl.arange(0, T)
    y_tile = _convolve(
        x, x_batch, x_step, weight, bias, batch, steps, e, channels, length, WIDTH, REVERSE, T, E
    )  # fmt: skip
    if SILU:
        y_tile *= sigmoid(y_tile)
    offsets = contiguous(batch, steps, e, channels, length, REVERSE)
    tl.store(y + offsets, y_tile, mask=(steps < length)[:, None] & (e < channels)[None, :])


@triton.jit(do_not_specialize=ANY_SIZE)
def _convolution_gradient_kernel(
    grad, grad_batch, grad_step, x, x_batch, x_step, weight, bias, grad_y, grad_weight, grad_bias,
    length, channels, num_chunks, WIDTH: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution before the SiLU, and the part of this chunk in those of `weight` and `bias`."""
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    steps = chunk * T + tl.arange(0, T)
    y = _convolve(
        x, x_batch, x_step, weight, bias, batch, steps, e, channels, length, WIDTH, REVERSE, T, E
    )  # fmt: skip
    grad_tile = load(grad, grad_batch, grad_step, batch, steps, e, channels, length, REVERSE)
    grad_tile *= sigmoid(y) * (1.0 + y * sigmoid(-y))
    inside = e < channels
    offsets = contiguous(batch, steps, e, channels, length, REVERSE)
    tl.store(grad_y + offsets, grad_tile, mask=(steps < length)[:, None] & inside[None, :])
    index = batch * num_chunks + chunk
    tl.store(grad_bias + index * channels + e, tl.sum(grad_tile, 0), mask=inside)
    for tap in tl.static_range(WIDTH):
        x_tile = load(x, x_batch, x_step, batch, steps - (WIDTH - 1 - tap), e, channels, length, REVERSE)
        tl.store(grad_weight + (index * channels + e) * WIDTH + tap, tl.sum(grad_tile * x_tile, 0), mask=inside)


def _convolution_blocks(x):
    """Number of chunks, number of programs, shape of a tile."""
    batch, length, channels = x.shape
    num_chunks = ceil(length, BLOCK_STEPS)
    E = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    return num_chunks, batch * num_chunks * ceil(channels, E), {"T": BLOCK_STEPS, "E": E}


@operator
def triton_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_chunks, num_programs, blocks = _convolution_blocks(x)
    launch(
        _convolution_kernel, num_programs, *strided(x), weight.contiguous(), bias, y,
        x.shape[1], x.shape[2], num_chunks, WIDTH=weight.shape[-1], REVERSE=reverse, SILU=True, **blocks,
    )  # fmt: skip
    return y


@operator
def triton_causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; that of `x` is a convolution against the direction of the first."""
    (batch, length, channels), width = x.shape, weight.shape[-1]
    num_chunks, num_programs, blocks = _convolution_blocks(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    grad_weight = torch.empty(batch * num_chunks, channels, 1, width, dtype=torch.float32, device=x.device)
    grad_bias = torch.empty(batch * num_chunks, channels, dtype=torch.float32, device=x.device)
    launch(
        _convolution_gradient_kernel, num_programs, *strided(grad), *strided(x), weight.contiguous(), bias,
        grad_y, grad_weight, grad_bias, length, channels, num_chunks, WIDTH=width, REVERSE=reverse, **blocks,
    )  # fmt: skip
    launch(
        _convolution_kernel, num_programs, *strided(grad_y), weight.contiguous(), None, grad_x,
        length, channels, num_chunks, WIDTH=width, REVERSE=not reverse, SILU=False, **blocks,
    )  # fmt: skip
    empty = x.new_empty(0)
    return (
        grad_x,
        grad_weight.sum(0).to(weight.dtype),
        empty if bias is None else grad_bias.sum(0).to(bias.dtype),
    )


@triton_causal_conv1d.register_fake
def _(x, weight, bias, reverse):
    return x.new_empty(x.shape)


@triton_causal_conv1d_backward.register_fake
def _(grad, x, weight, bias, reverse):
    empty = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), empty


def _save_for_causal_conv1d(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_causal_conv1d(ctx, grad):
    grad_x, grad_weight, grad_bias = triton_causal_conv1d_backward(grad, *ctx.saved_tensors, ctx.reverse)
    return grad_x, grad_weight, None if ctx.saved_tensors[2] is None else grad_bias, None


triton_causal_conv1d.register_autograd(_differentiate_causal_conv1d, setup_context=_save_for_causal_conv1d)
