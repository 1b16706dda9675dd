"""Numbers at the ends of their range, with each variant of the CPU kernels that this processor has."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from modeling_videomamba.linear_and_norm import rms_norm
from modeling_videomamba.selective_scan import causal_conv1d
from modeling_videomamba.selective_scan_naive import selective_scan as naive_scan
from tests.conftest import needs_kernel

cpu = importlib.import_module("modeling_videomamba.selective_scan_cpu")
pytestmark = needs_kernel

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
MAGNITUDES = [1e-45, 1e-39, SMALLEST, 1e-30, 1e-10, 1e-3, 0.5, 1, 3, 10, 40, 80, 87, 87.3, 87.4, 88, 89, 100, 110, 1e3]
MAGNITUDES += [1e5, 1e10, 1e20, 1e30, 1e36, 3e38, LARGEST]
NUMBERS = torch.tensor([0.0, *MAGNITUDES, *(-number for number in MAGNITUDES)])
# Of several bits, which arithmetic must not turn into a number.
NANS = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFC00000, 0xFFC12345, 0x7FC00FFF]).int().view(torch.float32)


def assert_close(actual, expected, relative=2e-5, smallest=100 * SMALLEST):
    """Where an exponential is below the smallest normal number the kernels have zeros."""
    expected = expected.detach()
    error = (actual.double() - expected).abs() / (expected.abs() * relative + smallest)
    assert actual.isfinite().all() and error.max() <= 1


def silu(x):
    """By the kernel of the convolution, whose last tap is that of the step itself."""
    x = x.reshape(1, 1, -1)
    return causal_conv1d(x, torch.ones(x.shape[2], 1, 1)).flatten()


def test_silu_and_its_gradient(variant):
    x, exact = (tensor.requires_grad_() for tensor in (NUMBERS.clone(), NUMBERS.double()))
    y, expected = silu(x), F.silu(exact)
    assert_close(y, expected)
    (slope,) = torch.autograd.grad(y.sum(), x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert_close(slope, expected_slope, relative=1e-4)


def test_silu_of_what_is_not_finite(variant):
    x = torch.tensor([float("inf"), float("-inf")])
    torch.testing.assert_close(silu(x), F.silu(x), equal_nan=True)
    assert silu(NANS).isnan().all()


def scan_of(x, dt, A, *, z=None):
    """`y_t = h_t` of one state: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t`."""
    ones, zeros = torch.ones(*x.shape[:2], 1), torch.zeros(x.shape[2])
    return cpu.selective_scan(x, dt, A, ones, ones, zeros, z, None, None, False)


def test_softplus_and_its_slope(variant):
    dt = NUMBERS.view(1, 1, -1).clone().requires_grad_()
    exact = dt.detach().double().requires_grad_()
    A = torch.zeros(dt.shape[2], 1)
    y, expected = scan_of(torch.ones_like(dt), dt, A), torch.logaddexp(exact, torch.zeros(()))
    assert_close(y, expected)
    (slope,) = torch.autograd.grad(y.sum(), dt)
    assert_close(slope, exact.sigmoid(), relative=1e-4)
    assert scan_of(torch.ones(1, 1, 6), NANS.view(1, 1, -1), torch.zeros(6, 1)).isnan().all()


def test_a_time_step_of_zero_makes_no_state(variant):
    dt = torch.tensor([-200.0, -1e4, -1e30, -LARGEST]).view(1, 1, -1)
    assert (scan_of(torch.full_like(dt, 1e38), dt, -torch.ones(4, 1)) == 0).all()


def test_states_decay(variant):
    """By `exp(dt * A)`, to zero where that is below the smallest number, however large the state."""
    A = -torch.tensor([0.0, 1e-30, 1e-3, 1.0, 10.0, 87.0, 88.0, 100.0, 1e4, 1e30, LARGEST])[:, None]
    dt = torch.full((1, 3, len(A)), 1.0).expm1().log()  # softplus gives 1
    for size in (1.0, 1e30):
        x = torch.zeros_like(dt)
        x[:, 0] = size
        assert_close(scan_of(x, dt, A)[0, 1], size * A[:, 0].double().exp(), 1e-4, size * SMALLEST)
    for nan in NANS:
        assert scan_of(torch.ones(1, 2, 3), torch.ones(1, 2, 3), nan.expand(3, 1))[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_and_its_gradient(variant, dtype):
    """Where the output before the gate, or its product with a gradient, exceeds the dtype and the result does not."""
    largest = {torch.float16: 6e4}.get(dtype, 1e25)
    z = torch.tensor([-60.0, -12.0, -8.0, -3e4, -1.0, 0.0, 1e-3])
    shape = (1, 2, len(z))
    x, add = (torch.full(shape, largest, dtype=dtype).requires_grad_() for _ in range(2))
    z = z.expand(shape).to(dtype).requires_grad_()
    parameters = [-torch.ones(len(z[0, 0]), 1), torch.full((len(z[0, 0]),), 3.0)]
    dt, B = torch.full(shape, -1.0, dtype=dtype), torch.ones(1, 2, 1, dtype=dtype)

    def run(scan, *tensors):
        x, dt, A, B, D, z, add = tensors
        y = scan(x, dt, A, B, B, D, z, None, add, False)
        grad = torch.full(shape, 0.5 if dtype == torch.float16 else 1e22, dtype=y.dtype)
        return y, *torch.autograd.grad(y, (x, z, add), grad)

    tensors = (x, dt, parameters[0], B, parameters[1], z, add)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    for actual, expected in zip(run(cpu.selective_scan, *tensors), run(naive_scan, *exact), strict=True):
        fits = expected.abs() < torch.finfo(dtype).max
        assert actual[fits].isfinite().all() and fits.any()
        scale = expected[fits].abs() * {torch.float32: 1e-4}.get(dtype, 2e-2) + 1e-6
        assert ((actual.double() - expected)[fits].abs() <= scale).all()


@pytest.mark.parametrize("size", [SMALLEST, 1e-20, 1e-3, 1e15, 1.5e19, 1e20, 1e30, 1e38])
def test_rms_norm_of_any_size(variant, size):
    """Also where the squares exceed float32."""
    torch.manual_seed(0)
    x = torch.rand(3, 40) * size
    x[1, :30] = 0
    exact = x.double().requires_grad_()
    weight, grad = torch.rand(40), torch.randn(3, 40)
    y, expected = rms_norm(x.requires_grad_(), weight, 1e-5), F.rms_norm(exact, (40,), weight.double(), 1e-5)
    assert_close(y, expected, smallest=400 * SMALLEST)  # numbers below the smallest are zero, times 1 / sqrt(eps)
    (slope,) = torch.autograd.grad(y, x, grad)
    (expected_slope,) = torch.autograd.grad(expected, exact, grad.double())
    assert ((slope - expected_slope).abs() <= 1e-4 * expected_slope.abs().max() + SMALLEST).all()
    assert rms_norm(torch.full((1, 40), float("inf")), weight, 1e-5).isnan().all()
