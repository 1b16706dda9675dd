"""The backend `torch`: the selective scan and its convolution in plain PyTorch, in chunks, with a backward pass."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .operators import operator

# Steps whose states exist at the same time: `(batch, CHUNK_SIZE, channels, state)` is the work space.
CHUNK_SIZE = 16


def selective_scan(x, dt, A, B, C, D, z, dt_bias, add, reverse):
    dtype = torch.promote_types(x.dtype, torch.float32)
    u = x.to(dtype)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    y, _ = reference_scan(u, F.softplus(dt), A.to(dtype), B.to(dtype), C.to(dtype), reverse)
    y = y + D.to(dtype) * u
    if add is not None:
        y = y + add.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def causal_conv1d(x, weight, bias, reverse):
    width = weight.shape[-1]
    padding = (0, width - 1) if reverse else (width - 1, 0)
    weight = weight.flip(-1) if reverse else weight
    y = F.conv1d(F.pad(x.transpose(1, 2), padding), weight.to(x.dtype), groups=weight.shape[0])
    y = y.transpose(1, 2)
    return F.silu(y if bias is None else y + bias.to(x.dtype))


def rms_norm(hidden_states, weight, eps):
    return F.rms_norm(hidden_states, weight.shape, weight.float(), eps).to(weight.dtype)


def unavailable_reason(device_type: str) -> None:
    """It can run everywhere."""


def _chunks(length: int, reverse: bool) -> Iterator[tuple[slice, int]]:
    """Slices of the sequence in the order of the scan, and the step of time inside each."""
    starts = range(0, length, CHUNK_SIZE)
    for start in reversed(starts) if reverse else starts:
        yield slice(start, min(start + CHUNK_SIZE, length)), -1 if reverse else 1


def _chunk_states(x, dt, A, B, h, step):
    """`exp(dt * A)` and all states of one chunk, `(batch, chunk, channels, state)`, from the state `h` before it."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    states = (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    for t in range(states.shape[1])[::step]:
        h = states[:, t].addcmul_(decay[:, t], h)
    return decay, states


def _dot(states, vectors):
    """Sum over the state, `(batch, chunk, channels, state)` by `(batch, chunk, state)`."""
    return (vectors.unsqueeze(-2) @ states.mT).squeeze(-2)


# An operator of its own, so that `torch.compile` and `torch.export` keep it whole instead of unrolling every step.
@operator
def reference_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y_t = C_t . h_t`, and the states before each chunk `(chunks, batch, channels, state)`, in the scan's order."""
    h = x.new_zeros(x.shape[0], *A.shape)
    y, checkpoints = torch.empty_like(x, memory_format=torch.contiguous_format), []
    with torch.autocast(x.device.type, enabled=False):
        for chunk, step in _chunks(x.shape[1], reverse):
            checkpoints.append(h)
            _, states = _chunk_states(x[:, chunk], dt[:, chunk], A, B[:, chunk], h, step)
            y[:, chunk] = _dot(states, C[:, chunk])
            h = states[:, -1 if step == 1 else 0].clone()  # a view would keep the states of the whole chunk
    return y, torch.stack(checkpoints)


@reference_scan.register_fake
def _(x, dt, A, B, C, reverse):
    num_chunks = (x.shape[1] + CHUNK_SIZE - 1) // CHUNK_SIZE
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(num_chunks, x.shape[0], *A.shape)


@operator
def reference_scan_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    checkpoints: torch.Tensor,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x, dt, A, B, C`: the adjoint scan, chunk by chunk against the order of the scan."""
    grad_x, grad_dt, grad_A, grad_B, grad_C = map(torch.zeros_like, (x, dt, A, B, C))
    carry = torch.zeros_like(checkpoints[0])
    chunks = zip(_chunks(x.shape[1], reverse), checkpoints, strict=True)
    with torch.autocast(x.device.type, enabled=False):
        for (chunk, step), h in reversed(list(chunks)):
            xc, dtc, Bc, Cc, grad_yc = (tensor[:, chunk] for tensor in (x, dt, B, C, grad_y))
            decay, states = _chunk_states(xc, dtc, A, Bc, h, step)
            grad_h = grad_yc.unsqueeze(-1) * Cc.unsqueeze(-2)
            for t in range(states.shape[1])[::-step]:
                grad_h[:, t] += carry
                carry = decay[:, t] * grad_h[:, t]
            grad_C[:, chunk] = (grad_yc.unsqueeze(-2) @ states).squeeze(-2)
            grad_B[:, chunk] = ((dtc * xc).unsqueeze(-2) @ grad_h).squeeze(-2)
            grad_u = _dot(grad_h, Bc)
            before = torch.empty_like(states)
            if step == 1:
                before[:, 0], before[:, 1:] = h, states[:, :-1]
            else:
                before[:, -1], before[:, :-1] = h, states[:, 1:]
            grad_dtA = grad_h.mul_(decay).mul_(before)
            grad_A += (grad_dtA * dtc.unsqueeze(-1)).sum((0, 1))
            grad_dt[:, chunk] = (grad_dtA * A).sum(-1) + grad_u * xc
            grad_x[:, chunk] = grad_u * dtc
    return grad_x, grad_dt, grad_A, grad_B, grad_C


@reference_scan_backward.register_fake
def _(grad_y, x, dt, A, B, C, checkpoints, reverse):
    return tuple(map(torch.empty_like, (x, dt, A, B, C)))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_y, grad_checkpoints):
    return *reference_scan_backward(grad_y, *ctx.saved_tensors, ctx.reverse), None


reference_scan.register_autograd(_backward, setup_context=_setup_context)
