"""The RMS norm of the CPU kernels, with each variant that this processor has, against PyTorch's."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba.linear_and_norm import rms_norm
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from tests.conftest import needs_kernel

cpu = importlib.import_module("modeling_videomamba.rms_norm_cpu")
pytestmark = needs_kernel


def reference(hidden_states, weight, eps):
    return F.rms_norm(hidden_states.double(), weight.shape, weight.double(), eps)


def gradients(norm, hidden_states, weight, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden_states, weight)]
    y = norm(*leaves, 1e-5)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (5, 16), (2, 7, 192), (2, 3, 4, 41)])
def test_parity_of_outputs_and_gradients(variant, dtype, shape):
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(shape), torch.rand(shape[-1]).to(dtype)
    grad = torch.randn(shape)
    actual = gradients(rms_norm, hidden_states, weight, grad)
    expected = gradients(reference, hidden_states, weight, grad.to(dtype))
    assert [tensor.dtype for tensor in actual] == [dtype, torch.float32, dtype]
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 70), st.integers(1, 100), st.integers(1, 5), st.booleans())
def test_any_sizes_threads_and_strides(batch, length, width, threads, is_strided):
    hidden_states = torch.randn(batch, length, 2 * width)[..., ::2] if is_strided else torch.randn(batch, length, width)
    weight, grad = torch.rand(width), torch.randn(batch, length, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = gradients(rms_norm, hidden_states, weight, grad)
    finally:
        torch.set_num_threads(before)
    for one, two in zip(actual, gradients(reference, hidden_states, weight, grad), strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-4, atol=1e-4)


def test_extreme_values_stay_finite(variant):
    hidden_states = torch.stack([torch.zeros(40), torch.full((40,), 1e15), torch.full((40,), 1e-20)])
    for tensor in gradients(rms_norm, hidden_states, torch.ones(40), torch.ones(3, 40)):
        assert tensor.isfinite().all()


def test_the_norm_is_left_to_torch_where_that_is_better(monkeypatch):
    def refuse():
        raise AssertionError("the kernel was asked for")

    hidden_states, weight = torch.randn(3, 20), torch.rand(20)
    expected = rms_norm(hidden_states, weight, 1e-5)
    monkeypatch.setattr(cpu, "kernels", refuse)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="eager")(hidden_states, weight, 1e-5)
    torch.testing.assert_close(compiled, expected)
    assert rms_norm(hidden_states.to("meta"), weight.to("meta"), 1e-5).device.type == "meta"
    assert rms_norm(hidden_states.double(), weight.double(), 1e-5).dtype == torch.float64
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    torch.testing.assert_close(rms_norm(hidden_states, weight, 1e-5), expected)
