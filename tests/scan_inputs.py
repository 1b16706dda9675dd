"""Inputs of the scan, and how a backend is held against the recurrence in float64."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# For the Triton kernels: small inputs have several blocks of channels, chunks, tiles in a chunk, groups of chunks.
SMALL_BLOCKS = {"BLOCK_CHANNELS": 4, "TILE_STEPS": 2, "MIN_CHUNK_STEPS": 3, "CARRY_CHUNKS": 2, "CARRY_CHANNELS": 4}


def make_inputs(batch=2, length=11, channels=5, state=4, dtype=torch.float32, without=(), device="cpu"):
    """`x, dt, A, B, C, D, z, dt_bias, add`; `x`, `z` and `B`, `C` are parts of one tensor as they are in the model."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x, z = randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    _, B, C = randn(batch, length, 3 + 2 * state).to(dtype).split([3, state, state], dim=-1)
    dt, add = randn(batch, length, channels).to(dtype), randn(batch, length, channels).to(dtype)
    parameters = torch.promote_types(dtype, torch.float32)
    A, D, dt_bias = (t.to(parameters) for t in (-torch.exp(randn(channels, state)), randn(channels), randn(channels)))
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "add": add}
    return {name: None if name in without else t.detach().requires_grad_() for name, t in inputs.items()}


def assert_same(function, reference, inputs, reverse, tolerance=1e-4, gradient_tolerance=1e-3):
    """Outputs and gradients are those of the reference in float64; gradients relative to their largest entry."""
    inputs = list(inputs)
    exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    actual, expected = function(*inputs, reverse), reference(*exact, reverse)
    assert actual.dtype == inputs[0].dtype and actual.shape == expected.shape
    if expected.numel():
        scale = 1.0 if actual.dtype in (torch.float32, torch.float64) else expected.abs().max()
        assert (actual.double() - expected).abs().max() <= tolerance * scale
    weights = torch.randn_like(expected).to(actual.dtype)
    tensors, exact = ([tensor for tensor in group if tensor is not None] for group in (inputs, exact))
    grads = torch.autograd.grad(actual, tensors, weights)
    for grad, other, tensor in zip(grads, torch.autograd.grad(expected, exact, weights.double()), tensors, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
        if grad.numel():
            assert (grad.double() - other).abs().max() <= gradient_tolerance * other.abs().max().clamp(min=1e-6)
