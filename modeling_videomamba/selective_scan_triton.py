"""
The selective scan as Triton kernels, for CUDA, ROCm and XPU.

A program goes through the steps of a sequence one by one, with the states of `BLOCK_CHANNELS` channels, `(state,
channel)`, in its registers: one warp, so that nothing has to wait for another. For one long sequence to fill a GPU as
well as many short ones do, sequences are cut into chunks:

1. each chunk finds the state at its end as if it began with zero (`_chunk_kernel`);
2. these give the state before each chunk: `h <- exp(A * sum of dt) * h + end`, the recurrence again (`_carry_kernel`);
3. each chunk is gone through again from the state before it, and `y` is written (`_scan_kernel`).

With a single chunk only the third is left. The gradient of the state before a step, `f_t = exp(dt_t * A) * (f_{t+1} +
C_t * dL/dy_t)`, is the same recurrence from the other end and goes the same way (`_adjoint_kernel`).
"""

import torch
from torch import Tensor

from .operators import operator
from .triton_kernels import (
    ANY_SIZE,
    LN_2,
    LOG2_E,
    ceil,
    launch,
    load_row,
    load_step,
    program,
    sigmoid,
    step_offset,
    strided,
    tl,
    triton,
)

BLOCK_CHANNELS = 64
BLOCK_STATES = 1024  # of these channels: 32 in each of 32 threads
# A sequence is cut into chunks until there are as many programs, but into none shorter than `MIN_CHUNK_STEPS`: the
# states between chunks, `(batch, chunks, state, channels)` in float32, are kept for the backward pass.
TARGET_PROGRAMS = 4096
MIN_CHUNK_STEPS = 32
# Steps whose states a program of the backward pass holds at the same time, in 32 KB of memory.
TILE_STEPS = 8
# Of a program over the chunks of a sequence.
CARRY_CHUNKS, CARRY_CHANNELS = 16, 128


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
    dtype = x.dtype
    if dtype == torch.float16:  # the output before the gate can exceed it, and the gradient of the gate needs that
        x = x.float()
    tensors = (x, dt, A, B, C, D, z, dt_bias, add)
    # only a backward pass needs what is kept for it
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return triton_selective_scan(*tensors, reverse, save)[0].to(dtype)


# In the kernels.


@triton.jit
def _load_matrix(A, n, e, state, channels):
    """`A * log2(e)`, from `A` of shape `(state, channels)`, for `exp2`: the exponential that a GPU has."""
    mask = (n < state)[:, None] & (e < channels)[None, :]
    return tl.load(A + n[:, None] * channels + e[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def _state_offsets(index, n, e, state, channels):
    return index * state * channels + n[:, None] * channels + e[None, :]


@triton.jit
def _softplus(v):
    """`max(v, 0) + log1p(exp(-|v|))`; a logarithm of `1 + tiny` would lose time steps as small as the usual 1e-3."""
    small = tl.exp2(-tl.abs(v) * LOG2_E)
    s = small / (2.0 + small)  # log1p(small) = 2 artanh(s), s <= 1/3
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def _load_grad(
    grad, grad_batch, grad_step, z, z_batch, z_step, batch, step, e, channels, length, REVERSE: tl.constexpr
):
    """The gradient of `y` before the gate."""
    grad_y = load_step(grad, grad_batch, grad_step, batch, step, e, channels, length, REVERSE)
    if z is not None:
        gate = load_step(z, z_batch, z_step, batch, step, e, channels, length, REVERSE)
        grad_y *= gate * sigmoid(gate)
    return grad_y


@triton.jit
def _next_state(
    h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
    batch, step, e, n, length, channels, state, REVERSE: tl.constexpr,
):  # fmt: skip
    """`exp(dt_t * A) * h + dt_t * B_t * x_t`, and `x_t` and `dt_t`."""
    dt_t = _softplus(load_step(dt, dt_batch, dt_step, batch, step, e, channels, length, REVERSE) + bias)
    x_t = load_step(x, x_batch, x_step, batch, step, e, channels, length, REVERSE)
    b = load_step(B, B_batch, B_step, batch, step, n, state, length, REVERSE)
    return tl.exp2(dt_t[None, :] * a) * h + (dt_t * x_t)[None, :] * b[:, None], x_t, dt_t


@triton.jit
def _keep_states(
    states, h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
    batch, first, count, e, n, length, channels, state,
    REVERSE: tl.constexpr, EVERY: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Goes through `count` steps from `h` on and leaves the state before every so many of them in `states`."""
    for i in range(count):
        if i % EVERY == 0:
            tl.store(states + i // EVERY * N * E, h)
        h, _, _ = _next_state(
            h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
            batch, first + i, e, n, length, channels, state, REVERSE,
        )  # fmt: skip
    tl.debug_barrier()  # whoever reads them may be another thread than the one that wrote them
    return h


# The three passes.


@triton.jit(do_not_specialize=ANY_SIZE)
def _chunk_kernel(
    x, x_batch, x_step, z, z_batch, z_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, dt_bias,
    ends, dt_sums, length, channels, state, num_chunks, chunk_steps,
    REVERSE: tl.constexpr, ADJOINT: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """
    What a chunk makes of a zero state, `ends`, and the sum of its time steps, which is all there is to its decay:
    `h_end = end + exp(A * dt_sum) * h`. For the adjoint, `x` is the gradient of the output and `B` is C.
    """
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    a = _load_matrix(A, n, e, state, channels)
    bias = load_row(dt_bias, e, channels)
    h = tl.zeros((N, E), tl.float32)
    dt_sum = tl.zeros((E,), tl.float32)
    first = chunk * chunk_steps
    count = tl.minimum(chunk_steps, length - first)
    for i in range(count):
        if ADJOINT:
            step = first + count - 1 - i
            grad_y = _load_grad(x, x_batch, x_step, z, z_batch, z_step, batch, step, e, channels, length, REVERSE)
            dt_t = _softplus(load_step(dt, dt_batch, dt_step, batch, step, e, channels, length, REVERSE) + bias)
            c = load_step(B, B_batch, B_step, batch, step, n, state, length, REVERSE)
            h = tl.exp2(dt_t[None, :] * a) * (h + grad_y[None, :] * c[:, None])
        else:
            h, _, dt_t = _next_state(
                h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
                batch, first + i, e, n, length, channels, state, REVERSE,
            )  # fmt: skip
        dt_sum += dt_t
    index = batch * num_chunks + chunk
    inside = e < channels
    tl.store(ends + _state_offsets(index, n, e, state, channels), h, mask=(n < state)[:, None] & inside[None, :])
    tl.store(dt_sums + index * channels + e, dt_sum, mask=inside)


@triton.jit
def _compose(a1, b1, a2, b2):
    """Two steps in a row of `h <- a * h + b`."""
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize=ANY_SIZE)
def _carry_kernel(
    A, ends, dt_sums, starts, channels, state, num_chunks, ADJOINT: tl.constexpr, K: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """The state before each chunk, `starts`; after it in time, for the adjoint. A program has one row of the state."""
    batch, n, block = program(state, channels, E)
    e = block * E + tl.arange(0, E)
    inside = e < channels
    a = load_row(A + n * channels, e, channels) * LOG2_E
    rows = batch * num_chunks * state + n
    h = tl.zeros((E,), tl.float32)
    tl.store(starts + (rows + (num_chunks - 1 if ADJOINT else 0) * state) * channels + e, h, mask=inside)
    for first in range(0, num_chunks, K):
        order = first + tl.arange(0, K)
        chunk = num_chunks - 1 - order if ADJOINT else order
        following = chunk - 1 if ADJOINT else chunk + 1
        mask = (order < num_chunks)[:, None] & inside[None, :]
        sums = dt_sums + (batch * num_chunks + chunk)[:, None] * channels + e[None, :]
        decay = tl.exp2(tl.load(sums, mask=mask, other=0.0) * a[None, :])
        end = tl.load(ends + (rows + chunk * state)[:, None] * channels + e[None, :], mask=mask, other=0.0)
        decay, end = tl.associative_scan((decay, end), 0, _compose)
        end += decay * h[None, :]
        mask &= (order + 1 < num_chunks)[:, None]
        tl.store(starts + (rows + following * state)[:, None] * channels + e[None, :], end, mask=mask)
        h = tl.sum(tl.where((order == first + K - 1)[:, None], end, 0.0), 0)


@triton.jit(do_not_specialize=ANY_SIZE)
def _scan_kernel(
    x, x_batch, x_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, C, C_batch, C_step, D,
    z, z_batch, z_step, dt_bias, add, add_batch, add_step, starts, y, ungated,
    length, channels, state, num_chunks, chunk_steps, REVERSE: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The scan from `starts`."""
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    inside = e < channels
    a = _load_matrix(A, n, e, state, channels)
    d, bias = load_row(D, e, channels), load_row(dt_bias, e, channels)
    state_mask = (n < state)[:, None] & inside[None, :]
    h = tl.load(
        starts + _state_offsets(batch * num_chunks + chunk, n, e, state, channels), mask=state_mask, other=0.0
    )  # fmt: skip
    first = chunk * chunk_steps
    for i in range(tl.minimum(chunk_steps, length - first)):
        step = first + i
        h, x_t, _ = _next_state(
            h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
            batch, step, e, n, length, channels, state, REVERSE,
        )  # fmt: skip
        c = load_step(C, C_batch, C_step, batch, step, n, state, length, REVERSE)
        y_t = tl.sum(c[:, None] * h, 0) + d * x_t
        if add is not None:
            y_t += load_step(add, add_batch, add_step, batch, step, e, channels, length, REVERSE)
        offsets = step_offset(batch, step, length, REVERSE) * channels + e
        if ungated is not None:
            tl.store(ungated + offsets, y_t, mask=inside)
        if z is not None:
            gate = load_step(z, z_batch, z_step, batch, step, e, channels, length, REVERSE)
            y_t *= gate * sigmoid(gate)
        tl.store(y + offsets, y_t, mask=inside)


@triton.jit(do_not_specialize=ANY_SIZE)
def _adjoint_kernel(
    grad, grad_batch, grad_step, x, x_batch, x_step, dt, dt_batch, dt_step, A, B, B_batch, B_step, C, C_batch, C_step,
    D, z, z_batch, z_step, dt_bias, ungated, starts, adjoints, tile_starts, before,
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_add,
    batch_size, length, channels, state, num_chunks, chunk_steps,
    REVERSE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """
    The adjoint scan from `adjoints`, last step first, and from it all gradients. It needs the state before each step:
    a first way through the chunk leaves that before each tile of `T` steps, and the tiles, last one first, find the
    others from there. Gradients of `A, D, dt_bias` are sums over the chunk, those of `B, C` over the block of channels:
    what is left of each sum is for `torch.sum`, in fixed order.
    """
    batch, chunk, block = program(num_chunks, channels, E)
    e = block * E + tl.arange(0, E)
    n = tl.arange(0, N)
    inside = e < channels
    a = _load_matrix(A, n, e, state, channels)
    d, bias = load_row(D, e, channels), load_row(dt_bias, e, channels)
    state_mask = (n < state)[:, None] & inside[None, :]
    index = batch * num_chunks + chunk
    offsets = _state_offsets(index, n, e, state, channels)
    first = chunk * chunk_steps
    count = tl.minimum(chunk_steps, length - first)

    # a place for each program, and in it (tile or step, state, channel)
    place = tl.arange(0, N)[:, None] * E + tl.arange(0, E)[None, :]
    tile_starts += tl.program_id(0).to(tl.int64) * tl.cdiv(chunk_steps, T) * N * E + place
    before += tl.program_id(0).to(tl.int64) * T * N * E + place

    h = tl.load(starts + offsets, mask=state_mask, other=0.0)
    _keep_states(
        tile_starts, h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
        batch, first, count, e, n, length, channels, state, REVERSE, T, N, E,
    )  # fmt: skip

    carry = tl.load(adjoints + offsets, mask=state_mask, other=0.0)
    sum_A = tl.zeros((N, E), tl.float32)
    sum_D = tl.zeros((E,), tl.float32)
    sum_dt = tl.zeros((E,), tl.float32)
    num_tiles = tl.cdiv(count, T)
    for k in range(num_tiles):
        tile = num_tiles - 1 - k
        tile_first = first + tile * T
        tile_count = tl.minimum(T, count - tile * T)
        h = tl.load(tile_starts + tile * N * E)
        h = _keep_states(
            before, h, x, x_batch, x_step, dt, dt_batch, dt_step, a, B, B_batch, B_step, bias,
            batch, tile_first, tile_count, e, n, length, channels, state, REVERSE, 1, N, E,
        )  # fmt: skip
        for k_step in range(tile_count):
            i = tile_count - 1 - k_step
            step = tile_first + i
            grad_y = _load_grad(
                grad, grad_batch, grad_step, z, z_batch, z_step, batch, step, e, channels, length, REVERSE
            )  # fmt: skip
            x_t = load_step(x, x_batch, x_step, batch, step, e, channels, length, REVERSE)
            v = load_step(dt, dt_batch, dt_step, batch, step, e, channels, length, REVERSE) + bias
            b = load_step(B, B_batch, B_step, batch, step, n, state, length, REVERSE)
            c = load_step(C, C_batch, C_step, batch, step, n, state, length, REVERSE)
            dt_t = _softplus(v)
            partial = step_offset(block * batch_size + batch, step, length, REVERSE) * state + n
            tl.store(grad_C + partial, tl.sum(grad_y[None, :] * h, 1), mask=n < state)
            grad_h = carry + grad_y[None, :] * c[:, None]
            tl.store(grad_B + partial, tl.sum(grad_h * (dt_t * x_t)[None, :], 1), mask=n < state)
            grad_dt_x = tl.sum(grad_h * b[:, None], 0)

            carry = tl.exp2(dt_t[None, :] * a) * grad_h
            h = tl.load(before + i * N * E)
            grad_dtA = carry * h
            sum_A += grad_dtA * dt_t[None, :]
            grad_v = (tl.sum(grad_dtA * a, 0) * LN_2 + grad_dt_x * x_t) * sigmoid(v)
            row = step_offset(batch, step, length, REVERSE) * channels + e
            tl.store(grad_dt + row, grad_v, mask=inside)
            tl.store(grad_x + row, grad_dt_x * dt_t + d * grad_y, mask=inside)
            sum_D += grad_y * x_t
            sum_dt += grad_v
            if grad_add is not None:
                tl.store(grad_add + row, grad_y, mask=inside)
            if z is not None:
                gate = load_step(z, z_batch, z_step, batch, step, e, channels, length, REVERSE)
                grad_z_t = load_step(grad, grad_batch, grad_step, batch, step, e, channels, length, REVERSE)
                grad_z_t *= sigmoid(gate) * (1.0 + gate * sigmoid(-gate))
                grad_z_t *= tl.load(ungated + row, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_z + row, grad_z_t, mask=inside)
        tl.debug_barrier()
    tl.store(grad_A + offsets, sum_A, mask=state_mask)
    tl.store(grad_D + index * channels + e, sum_D, mask=inside)
    tl.store(grad_dt_bias + index * channels + e, sum_dt, mask=inside)


# The scan as operators.


def _block(channels: int, state: int) -> dict[str, int]:
    """What a program holds: states and channels."""
    N = triton.next_power_of_2(state)
    E = min(BLOCK_CHANNELS, triton.next_power_of_2(channels), max(1, BLOCK_STATES // N))
    return {"N": N, "E": E, "num_warps": 1}


def _num_chunks(batch, length, channels):
    """Written for symbolic sizes too: no branches, hence no guards."""
    programs = torch.sym_max(batch * ceil(channels, BLOCK_CHANNELS), 1)
    return torch.sym_max(torch.sym_min(TARGET_PROGRAMS // programs, length // MIN_CHUNK_STEPS), 1)


def _starts(x, z, dt, A, B, dt_bias, num_chunks, chunk_steps, reverse, adjoint):
    """Passes 1 and 2: the state before each chunk, `(batch, chunks, state, channels)`."""
    (batch, length, channels), state = x.shape, A.shape[0]
    sizes, block = (batch, num_chunks, state, channels), _block(channels, state)
    if num_chunks == 1:
        return torch.zeros(sizes, dtype=torch.float32, device=x.device)
    starts, ends = (torch.empty(sizes, dtype=torch.float32, device=x.device) for _ in range(2))
    dt_sums = torch.empty((batch, num_chunks, channels), dtype=torch.float32, device=x.device)
    launch(
        _chunk_kernel, batch * num_chunks * ceil(channels, block["E"]),
        *strided(x), *strided(z), *strided(dt), A, *strided(B), dt_bias,
        ends, dt_sums, length, channels, state, num_chunks, chunk_steps, REVERSE=reverse, ADJOINT=adjoint, **block,
    )  # fmt: skip
    launch(
        _carry_kernel, batch * state * ceil(channels, CARRY_CHANNELS),
        A, ends, dt_sums, starts, channels, state, num_chunks, ADJOINT=adjoint, K=CARRY_CHUNKS, E=CARRY_CHANNELS,
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
    block = _block(channels, state)
    num_chunks = _num_chunks(batch, length, channels)
    chunk_steps = ceil(length, num_chunks)
    A, D, dt_bias = A.t().contiguous(), D.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if save and z is not None else None
    starts = _starts(x, None, dt, A, B, dt_bias, num_chunks, chunk_steps, reverse, adjoint=False)
    launch(
        _scan_kernel, batch * num_chunks * ceil(channels, block["E"]),
        *strided(x), *strided(dt), A, *strided(B), *strided(C), D, *strided(z), dt_bias, *strided(add),
        starts, y, ungated, length, channels, state, num_chunks, chunk_steps, REVERSE=reverse, **block,
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

    Beside them, it needs for a while as much as 7.5 times `x` in float32, with 16 states and chunks of 32 steps: twice
    for the states before each tile, 4 times for those in a tile, and half as much as `x` each for the states after each
    chunk, for parts of the gradient of A, and for parts of those of B and C.
    """
    (batch, length, channels), state = x.shape, A.shape[1]
    block, num_chunks = _block(channels, state), starts.shape[1]
    chunk_steps, num_blocks = ceil(length, num_chunks), ceil(channels, block["E"])
    num_programs = batch * num_chunks * num_blocks
    A_, D_, dt_bias_ = A.t().contiguous(), D.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    adjoints = _starts(grad, z, dt, A_, C, dt_bias_, num_chunks, chunk_steps, reverse, adjoint=True)
    tile_starts = starts.new_empty(num_programs, ceil(chunk_steps, TILE_STEPS), block["N"], block["E"])
    before = starts.new_empty(num_programs, TILE_STEPS, block["N"], block["E"])
    grad_x, grad_dt = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, dt))
    grad_z = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    grad_add = torch.empty_like(grad_x) if with_add else None
    grad_A = starts.new_empty(batch * num_chunks, state, channels)
    grad_D, grad_dt_bias = (starts.new_empty(batch * num_chunks, channels) for _ in range(2))
    grad_B, grad_C = (starts.new_empty(num_blocks, batch, length, state) for _ in range(2))
    launch(
        _adjoint_kernel, num_programs,
        *strided(grad), *strided(x), *strided(dt), A_, *strided(B), *strided(C), D_, *strided(z), dt_bias_,
        ungated, starts, adjoints, tile_starts, before,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_add,
        batch, length, channels, state, num_chunks, chunk_steps, REVERSE=reverse, T=TILE_STEPS, **block,
    )  # fmt: skip
    empty = x.new_empty
    return (
        grad_x,
        grad_dt,
        grad_A.sum(0).t().contiguous().to(A.dtype),
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
