"""
The selective scan as Triton kernels, for CUDA, ROCm and XPU.

A time-varying linear recurrence `h_t = a_t * h_{t-1} + b_t` composes: two steps in a row are `(a, b)` followed by
`(a', b')` = `(a' * a, a' * b + b')`, which is associative. Here `a_t = exp(dt_t * A)` and `b_t = dt_t * B_t * x_t`. Of
that, three passes are made, so that one long sequence fills a GPU as well as many short ones do:

1. each chunk of the sequence finds the state at its end as if it began with zero (`_chunk_kernel`);
2. one short loop over the chunks turns these into the state before each chunk (`_carry_kernel`);
3. each chunk scans again from the state before it, and writes `y` (`_scan_kernel`).

The adjoint `e_t = dL/dh_t = C_t * dL/dy_t + a_{t+1} * e_{t+1}` is the same recurrence from the other end, and takes the
same three passes. With a single chunk only the third is left.

A program holds `BLOCK_STEPS` steps of all states of `BLOCK_CHANNELS` channels in registers, as `(step, state, channel)`
tiles: channels last, so that neighbouring threads read neighbouring addresses, and steps first, so that a thread holds
all steps of its channel and the scan over them needs no exchange between threads.
"""

import torch
from torch import Tensor

from .operators import operator
from .triton_kernels import ANY_SIZE, ceil, contiguous, launch, load, load_row, program, sigmoid, strided, tl, triton

BLOCK_CHANNELS = 32
BLOCK_STEPS = 16
# Elements of a tile at most: 32 in each thread of 8 warps. The backward pass has about six tiles alive.
TILE_SIZE = 8192
NUM_WARPS = 8
# A sequence is cut into chunks until there are as many programs, but into none shorter than `MIN_CHUNK_STEPS`: the
# states between chunks, `(batch, chunks, state, channels)`, are then at most a quarter of `x` in float32 (16 states).
TARGET_PROGRAMS = 512
MIN_CHUNK_STEPS = 64


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse) -> Tensor:
    r"""
    The selective scan of `selective_scan.py`, and with `add` the sum of both directions before the gate:

        h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * x_t,  dt_t <- softplus(dt_t + dt_bias)
        y_t = (C_t . h_t + D * x_t + add_t) * SiLU(z_t)

    Args:
        x (`torch.Tensor` of shape `(batch, length, channels)`): Input, float32, bfloat16 or float16 like all others.
        dt (`torch.Tensor` of shape `(batch, length, channels)`): Time steps before bias and softplus.
        A (`torch.Tensor` of shape `(channels, state)`): State matrix, not positive.
        B (`torch.Tensor` of shape `(batch, length, state)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch, length, state)`): Output matrix of each step.
        D (`torch.Tensor` of shape `(channels,)`): Skip connection.
        z (`torch.Tensor` of shape `(batch, length, channels)`, *optional*): Gate.
        dt_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to `dt`.
        add (`torch.Tensor` of shape `(batch, length, channels)`, *optional*): Output of the other direction.
        reverse (`bool`): Scan from the last step to the first.

    Returns:
        `torch.Tensor` of shape `(batch, length, channels)` and the dtype of `x`.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, add)
    # only a backward pass needs what is kept for it
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return triton_selective_scan(*tensors, reverse, save)[0]


# In the kernels.


@triton.jit
def _load_matrix(A, n, e, state, channels):
    mask = (n < state)[:, None] & (e < channels)[None, :]
    return tl.load(A + e[None, :] * state + n[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _state_offsets(index, n, e, state, channels):
    return index * state * channels + n[:, None] * channels + e[None, :]


@triton.jit
def _softplus(v):
    """`max(v, 0) + log1p(exp(-|v|))`; a logarithm of `1 + tiny` would lose time steps as small as the usual 1e-3."""
    small = tl.exp(-tl.abs(v))
    s = small / (2.0 + small)  # log1p(small) = 2 artanh(s), s <= 1/3
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def _load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps, e, channels, length, REVERSE: tl.constexpr):
    """`dt + dt_bias`; outside of the sequence -inf, of which the softplus is zero: no decay, no input."""
    v = load(dt, dt_batch, dt_step, batch, steps, e, channels, length, REVERSE)
    if dt_bias is not None:
        v += load_row(dt_bias, e, channels)[None, :]
    return tl.where(((steps >= 0) & (steps < length))[:, None], v, float("-inf"))


@triton.jit
def _load_grad(
    grad, grad_batch, grad_step, z, z_batch, z_step, batch, steps, e, channels, length, REVERSE: tl.constexpr
):
    """The gradient of `y` before the gate."""
    grad_y = load(grad, grad_batch, grad_step, batch, steps, e, channels, length, REVERSE)
    if z is not None:
        gate = load(z, z_batch, z_step, batch, steps, e, channels, length, REVERSE)
        grad_y *= gate * sigmoid(gate)
    return grad_y


@triton.jit
def _gate_gradient(
    grad, grad_batch, grad_step, z, z_batch, z_step, batch, steps, e, channels, length, REVERSE: tl.constexpr
):
    """The gradient of the gate, to be multiplied by `y` before it."""
    gate = load(z, z_batch, z_step, batch, steps, e, channels, length, REVERSE)
    grad_y = load(grad, grad_batch, grad_step, batch, steps, e, channels, length, REVERSE)
    return grad_y * sigmoid(gate) * (1.0 + gate * sigmoid(-gate))


@triton.jit
def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _recurrence(a, b, h, BACKWARDS: tl.constexpr):
    """All `h_t = a_t * h_{t-1} + b_t` of a tile `(step, state, channel)`, from the state `h` before it."""
    product, states = tl.associative_scan((a, b), 0, _compose, reverse=BACKWARDS)
    return states + product * h[None, :, :]


@triton.jit
def _states(
    x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, dt_bias, h,
    batch, steps, e, n, length, channels, state, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states of a tile, from the state `h` before it."""
    dt_tile = _softplus(_load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps, e, channels, length, REVERSE))
    x_tile = load(x, x_batch, x_step, batch, steps, e, channels, length, REVERSE)
    b = load(B, B_batch, B_step, batch, steps, n, state, length, REVERSE)
    decay = tl.exp(dt_tile[:, None, :] * a[None, :, :])
    return _recurrence(decay, (dt_tile * x_tile)[:, None, :] * b[:, :, None], h, False)


@triton.jit
def _step(tile, index, T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, T) == index)[:, None, None], tile, 0.0), 0)


# The three passes.


@triton.jit(do_not_specialize=ANY_SIZE)
def _chunk_kernel(
    x, x_batch, x_step, z, z_batch, z_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, dt_bias,
    ends, dt_sums, length, channels, state, num_chunks, num_tiles,
    REVERSE: tl.constexpr, ADJOINT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """
    What a chunk makes of a zero state, `ends`, and the sum of its time steps, which is all there is to its decay:
    `h_end = end + exp(A * dt_sum) * h`. For the adjoint, `x` is the gradient of the output and `B` is C.
    """
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    a = _load_matrix(A, n, e, state, channels)
    h = tl.zeros((N, E), tl.float32)
    dt_sum = tl.zeros((E,), tl.float32)
    for i in range(num_tiles):
        tile = num_tiles - 1 - i if ADJOINT else i
        steps = (chunk * num_tiles + tile) * T + tl.arange(0, T)
        if ADJOINT:
            weight = _load_grad(
                x, x_batch, x_step, z, z_batch, z_step, batch, steps, e, channels, length, REVERSE
            )  # fmt: skip
            dt_tile = _softplus(
                _load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps + 1, e, channels, length, REVERSE)
            )
        else:
            dt_tile = _softplus(_load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps, e, channels, length, REVERSE))
            weight = dt_tile * load(x, x_batch, x_step, batch, steps, e, channels, length, REVERSE)
        b = load(B, B_batch, B_step, batch, steps, n, state, length, REVERSE)
        decay = tl.exp(dt_tile[:, None, :] * a[None, :, :])
        states = _recurrence(decay, weight[:, None, :] * b[:, :, None], h, ADJOINT)
        h = _step(states, 0 if ADJOINT else T - 1, T)
        dt_sum += tl.sum(dt_tile, 0)
    index = batch * num_chunks + chunk
    inside = e < channels
    tl.store(ends + _state_offsets(index, n, e, state, channels), h, mask=(n < state)[:, None] & inside[None, :])
    tl.store(dt_sums + index * channels + e, dt_sum, mask=inside)


@triton.jit(do_not_specialize=ANY_SIZE)
def _carry_kernel(
    A, ends, dt_sums, starts, channels, state, num_chunks, ADJOINT: tl.constexpr, N: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """The state before each chunk, `starts`; after it in time, for the adjoint."""
    batch, _, block = program(1, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    mask = (n < state)[:, None] & (e < channels)[None, :]
    a = _load_matrix(A, n, e, state, channels)
    h = tl.zeros((N, E), tl.float32)
    for i in range(num_chunks):
        index = batch * num_chunks + (num_chunks - 1 - i if ADJOINT else i)
        offsets = _state_offsets(index, n, e, state, channels)
        tl.store(starts + offsets, h, mask=mask)
        dt_sum = load_row(dt_sums + index * channels, e, channels)
        h = tl.exp(dt_sum[None, :] * a) * h + tl.load(ends + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=ANY_SIZE)
def _scan_kernel(
    x, x_batch, x_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, C, C_batch, C_step, D,
    z, z_batch, z_step, dt_bias, add, add_batch, add_step,
    starts, tile_starts, y, ungated, length, channels, state, num_chunks, num_tiles,
    REVERSE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The scan from `starts`. Writes `y`, or, for the backward pass, only the state before each tile."""
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    a = _load_matrix(A, n, e, state, channels)
    state_mask = (n < state)[:, None] & (e < channels)[None, :]
    index = batch * num_chunks + chunk
    h = tl.load(starts + _state_offsets(index, n, e, state, channels), mask=state_mask, other=0.0)
    for tile in range(num_tiles):
        if tile_starts is not None:
            offsets = _state_offsets(index * num_tiles + tile, n, e, state, channels)
            tl.store(tile_starts + offsets, h, mask=state_mask)
        steps = (chunk * num_tiles + tile) * T + tl.arange(0, T)
        x_tile = load(x, x_batch, x_step, batch, steps, e, channels, length, REVERSE)
        dt_tile = _softplus(_load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps, e, channels, length, REVERSE))
        b = load(B, B_batch, B_step, batch, steps, n, state, length, REVERSE)
        decay = tl.exp(dt_tile[:, None, :] * a[None, :, :])
        states = _recurrence(decay, (dt_tile * x_tile)[:, None, :] * b[:, :, None], h, False)
        h = _step(states, T - 1, T)
        if y is not None:
            c = load(C, C_batch, C_step, batch, steps, n, state, length, REVERSE)
            y_tile = tl.sum(c[:, :, None] * states, 1) + load_row(D, e, channels)[None, :] * x_tile
            if add is not None:
                y_tile += load(add, add_batch, add_step, batch, steps, e, channels, length, REVERSE)
            offsets = contiguous(batch, steps, e, channels, length, REVERSE)
            mask = (steps < length)[:, None] & (e < channels)[None, :]
            if ungated is not None:
                tl.store(ungated + offsets, y_tile, mask=mask)
            if z is not None:
                gate = load(z, z_batch, z_step, batch, steps, e, channels, length, REVERSE)
                y_tile *= gate * sigmoid(gate)
            tl.store(y + offsets, y_tile, mask=mask)


@triton.jit(do_not_specialize=ANY_SIZE)
def _adjoint_kernel(
    grad, grad_batch, grad_step, x, x_batch, x_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, C, C_batch, C_step,
    D, z, z_batch, z_step, dt_bias, ungated, tile_starts, adjoints,
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_add,
    batch_size, length, channels, state, num_chunks, num_tiles,
    REVERSE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """
    The adjoint scan from `adjoints`, last tile first, and from it all gradients. Those of `A, D, dt_bias` are sums over
    the chunk, those of `B, C` over the block of channels: what is left of each sum is for `torch.sum`, in fixed order.
    """
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    first = tl.arange(0, T) == 0
    a = _load_matrix(A, n, e, state, channels)
    d = load_row(D, e, channels)
    state_mask = (n < state)[:, None] & (e < channels)[None, :]
    index = batch * num_chunks + chunk
    carry = tl.load(adjoints + _state_offsets(index, n, e, state, channels), mask=state_mask, other=0.0)
    sum_A = tl.zeros((N, E), tl.float32)
    sum_D = tl.zeros((E,), tl.float32)
    sum_dt = tl.zeros((E,), tl.float32)
    for i in range(num_tiles):
        tile = num_tiles - 1 - i
        steps = (chunk * num_tiles + tile) * T + tl.arange(0, T)
        offsets = contiguous(batch, steps, e, channels, length, REVERSE)
        mask = (steps < length)[:, None] & (e < channels)[None, :]

        # h_{t-1}, from the steps one earlier than the tile's: the difference h_t - dt_t B_t x_t would be inexact
        start = _state_offsets(index * num_tiles + tile, n, e, state, channels)
        h = tl.load(tile_starts + start, mask=state_mask, other=0.0)
        earlier = tl.where(first, -1, steps - 1)
        before = _states(
            x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, dt_bias, h,
            batch, earlier, e, n, length, channels, state, REVERSE,
        )  # fmt: skip

        # e_t = C_t * grad_y_t + exp(dt_{t+1} * A) * e_{t+1}
        grad_y = _load_grad(
            grad, grad_batch, grad_step, z, z_batch, z_step, batch, steps, e, channels, length, REVERSE
        )  # fmt: skip
        c = load(C, C_batch, C_step, batch, steps, n, state, length, REVERSE)
        dt_tile = _softplus(_load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps + 1, e, channels, length, REVERSE))
        decay = tl.exp(dt_tile[:, None, :] * a[None, :, :])
        grad_h = _recurrence(decay, grad_y[:, None, :] * c[:, :, None], carry, True)
        carry = _step(grad_h, 0, T)

        x_tile = load(x, x_batch, x_step, batch, steps, e, channels, length, REVERSE)
        v = _load_dt(dt, dt_batch, dt_step, dt_bias, batch, steps, e, channels, length, REVERSE)
        dt_tile = _softplus(v)
        b = load(B, B_batch, B_step, batch, steps, n, state, length, REVERSE)
        decayed = tl.exp(dt_tile[:, None, :] * a[None, :, :]) * before
        dt_x = dt_tile * x_tile
        states = decayed + dt_x[:, None, :] * b[:, :, None]
        partial = contiguous(block * batch_size + batch, steps, n, state, length, REVERSE)
        partial_mask = (steps < length)[:, None] & (n < state)[None, :]
        tl.store(grad_C + partial, tl.sum(grad_y[:, None, :] * states, 2), mask=partial_mask)
        tl.store(grad_B + partial, tl.sum(grad_h * dt_x[:, None, :], 2), mask=partial_mask)

        grad_dtA = grad_h * decayed
        grad_dt_x = tl.sum(grad_h * b[:, :, None], 1)
        grad_v = (tl.sum(grad_dtA * a[None, :, :], 1) + grad_dt_x * x_tile) * sigmoid(v)
        tl.store(grad_dt + offsets, grad_v, mask=mask)
        tl.store(grad_x + offsets, grad_dt_x * dt_tile + d[None, :] * grad_y, mask=mask)
        sum_A += tl.sum(grad_dtA * dt_tile[:, None, :], 0)
        sum_D += tl.sum(grad_y * x_tile, 0)
        sum_dt += tl.sum(tl.where(mask, grad_v, 0.0), 0)
        if grad_add is not None:
            tl.store(grad_add + offsets, grad_y, mask=mask)
        if z is not None:
            grad_z_tile = _gate_gradient(
                grad, grad_batch, grad_step, z, z_batch, z_step, batch, steps, e, channels, length, REVERSE
            )  # fmt: skip
            grad_z_tile *= tl.load(ungated + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_z + offsets, grad_z_tile, mask=mask)
    tl.store(grad_A + _state_offsets(index, n, e, state, channels), sum_A, mask=state_mask)
    tl.store(grad_D + index * channels + e, sum_D, mask=e < channels)
    tl.store(grad_dt_bias + index * channels + e, sum_dt, mask=e < channels)


# The scan as operators.


def _blocks(channels: int, state: int) -> dict[str, int]:
    """Shape of a tile."""
    N, E = triton.next_power_of_2(state), min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    return {"T": max(2, min(BLOCK_STEPS, TILE_SIZE // (N * E))), "N": N, "E": E, "num_warps": NUM_WARPS}


def _num_chunks(batch, length, channels):
    """Written for symbolic sizes too: no branches, hence no guards."""
    programs = torch.sym_max(batch * ceil(channels, BLOCK_CHANNELS), 1)
    return torch.sym_max(torch.sym_min(TARGET_PROGRAMS // programs, ceil(length, MIN_CHUNK_STEPS)), 1)


def _starts(x, z, dt, A, B, dt_bias, num_chunks, num_tiles, blocks, reverse, adjoint):
    """Passes 1 and 2: the state before each chunk, `(batch, chunks, state, channels)`."""
    (batch, length, channels), state = x.shape, A.shape[1]
    sizes, programs = (batch, num_chunks, state, channels), batch * ceil(channels, blocks["E"])
    if num_chunks == 1:
        return torch.zeros(sizes, dtype=torch.float32, device=x.device)
    starts, ends = (torch.empty(sizes, dtype=torch.float32, device=x.device) for _ in range(2))
    dt_sums = torch.empty((batch, num_chunks, channels), dtype=torch.float32, device=x.device)
    launch(
        _chunk_kernel, programs * num_chunks, *strided(x), *strided(z), *strided(dt), A, *strided(B), dt_bias,
        ends, dt_sums, length, channels, state, num_chunks, num_tiles, REVERSE=reverse, ADJOINT=adjoint, **blocks,
    )  # fmt: skip
    blocks = {**blocks, "num_warps": 4}
    del blocks["T"]
    launch(
        _carry_kernel, programs, A, ends, dt_sums, starts, channels, state, num_chunks, ADJOINT=adjoint, **blocks
    )  # fmt: skip
    return starts


@operator
def triton_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    add: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, and for the backward pass `y` before the gate and the states before each chunk, or two empty tensors."""
    (batch, length, channels), state = x.shape, A.shape[1]
    blocks = _blocks(channels, state)
    num_chunks = _num_chunks(batch, length, channels)
    num_tiles = ceil(ceil(length, num_chunks), blocks["T"])
    A, D, dt_bias = A.contiguous(), D.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if save and z is not None else None
    starts = _starts(x, None, dt, A, B, dt_bias, num_chunks, num_tiles, blocks, reverse, adjoint=False)
    launch(
        _scan_kernel, batch * num_chunks * ceil(channels, blocks["E"]),
        *strided(x), *strided(dt), A, *strided(B), *strided(C), D, *strided(z), dt_bias, *strided(add),
        starts, None, y, ungated, length, channels, state, num_chunks, num_tiles, REVERSE=reverse, **blocks,
    )  # fmt: skip
    return y, y.new_empty(0) if ungated is None else ungated, starts if save else starts.new_empty(0)


@triton_selective_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, add, reverse, save):
    batch, length, channels = x.shape
    starts = (batch, _num_chunks(batch, length, channels), A.shape[1], channels) if save else (0,)
    ungated = x.shape if save and z is not None else (0,)
    return x.new_empty(x.shape), x.new_empty(ungated), x.new_empty(starts, dtype=torch.float32)


@operator
def triton_selective_scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    ungated: Tensor,
    starts: Tensor,
    reverse: bool,
    with_add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    Gradients of `x, dt, A, B, C, D, z, dt_bias, add`, empty for those that are not there.

    Beside them, it needs for a while `state / T` times `x` in float32 for the states before each tile of T steps, and
    `2 * state / E` times that for the sums over E channels in the gradients of `B` and `C`: with 16 states, twice `x`.
    """
    (batch, length, channels), state = x.shape, A.shape[1]
    blocks = _blocks(channels, state)
    num_chunks, num_blocks = starts.shape[1], ceil(channels, blocks["E"])
    num_tiles = ceil(ceil(length, num_chunks), blocks["T"])
    num_programs = batch * num_chunks * num_blocks
    A_, D_, dt_bias_ = A.contiguous(), D.contiguous(), None if dt_bias is None else dt_bias.contiguous()

    tile_starts = starts.new_empty(batch, num_chunks * num_tiles, state, channels)
    launch(
        _scan_kernel, num_programs,
        *strided(x), *strided(dt), A_, *strided(B), None, 0, 0, None, None, 0, 0, dt_bias_, None, 0, 0,
        starts, tile_starts, None, None, length, channels, state, num_chunks, num_tiles, REVERSE=reverse, **blocks,
    )  # fmt: skip
    adjoints = _starts(grad, z, dt, A_, C, dt_bias_, num_chunks, num_tiles, blocks, reverse, adjoint=True)

    grad_x, grad_dt = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, dt))
    grad_z = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    grad_add = torch.empty_like(grad_x) if with_add else None
    grad_A = starts.new_empty(batch * num_chunks, state, channels)
    grad_D, grad_dt_bias = (starts.new_empty(batch * num_chunks, channels) for _ in range(2))
    grad_B, grad_C = (starts.new_empty(num_blocks, batch, length, state) for _ in range(2))
    launch(
        _adjoint_kernel, num_programs,
        *strided(grad), *strided(x), *strided(dt), A_, *strided(B), *strided(C), D_, *strided(z), dt_bias_,
        ungated, tile_starts, adjoints,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_add,
        batch, length, channels, state, num_chunks, num_tiles, REVERSE=reverse, **blocks,
    )  # fmt: skip
    empty = x.new_empty
    return (
        grad_x,
        grad_dt,
        grad_A.sum(0).t().to(A.dtype, memory_format=torch.contiguous_format),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        grad_D.sum(0).to(D.dtype),
        empty(0) if grad_z is None else grad_z,
        empty(0) if dt_bias is None else grad_dt_bias.sum(0).to(dt_bias.dtype),
        empty(0) if grad_add is None else grad_add,
    )


@triton_selective_scan_backward.register_fake
def _(grad, x, dt, A, B, C, D, z, dt_bias, ungated, starts, reverse, with_add):
    tensors = (x, dt, A, B, C, D, z, dt_bias, x if with_add else None)
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)


def _save_for_selective_scan(ctx, inputs, output):
    *tensors, add, ctx.reverse, _ = inputs
    ctx.add_dtype = None if add is None else add.dtype
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # nobody takes gradients of what is saved


def _differentiate_selective_scan(ctx, grad, *_):
    *tensors, ungated, starts = ctx.saved_tensors
    z, dt_bias = tensors[6:]
    with_add = ctx.add_dtype is not None
    *grads, grad_z, grad_dt_bias, grad_add = triton_selective_scan_backward(
        grad, *tensors, ungated, starts, ctx.reverse, with_add and z is not None
    )
    if with_add:
        grad_add = (grad if z is None else grad_add).to(ctx.add_dtype)
    return (
        *grads,
        None if z is None else grad_z,
        None if dt_bias is None else grad_dt_bias,
        grad_add if with_add else None,
        None,
        None,
    )


triton_selective_scan.register_autograd(_differentiate_selective_scan, setup_context=_save_for_selective_scan)
