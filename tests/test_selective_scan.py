import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba import selective_scan, selective_scan_backends
from modeling_videomamba.selective_scan import CHUNK_SIZE, causal_conv1d

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def naive_scan(x, dt, A, B, C, D, *, z=None, dt_bias=None, reverse=False):
    """The recurrence, step by step, differentiated by autograd."""
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias)
    h, ys = x.new_zeros(x.shape[0], *A.shape), {}
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        ys[t] = (h * C[:, t, None]).sum(-1) + D * x[:, t]
    y = torch.stack([ys[t] for t in steps], dim=1)
    return y if z is None else y * F.silu(z)


def make_inputs(batch=2, length=11, channels=5, state=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "x": randn(batch, length, channels),
        "dt": randn(batch, length, channels),
        "A": -torch.exp(randn(channels, state)),
        "B": randn(batch, length, state),
        "C": randn(batch, length, state),
        "D": randn(channels),
        "z": randn(batch, length, channels),
        "dt_bias": randn(channels),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def call(function, inputs, **kwargs):
    positional = [inputs[name] for name in NAMES[:6]]
    return function(*positional, z=inputs.get("z"), dt_bias=inputs.get("dt_bias"), **kwargs)


def assert_same_gradients(actual, expected, inputs, tolerance):
    weights = torch.randn_like(expected.double()).to(expected.dtype)
    tensors = list(inputs.values())
    for name, one, other in zip(
        inputs,
        torch.autograd.grad((actual * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        scale = other.abs().max().clamp(min=1e-6) if other.numel() else 1.0
        assert ((one - other).abs() / scale).max().item() <= tolerance if other.numel() else True, name
        assert one.dtype == other.dtype


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 5]),
    channels=st.integers(1, 9),
    state=st.sampled_from([1, 3, 8, 16]),
    reverse=st.booleans(),
    with_z=st.booleans(),
    with_bias=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_recurrence(batch, length, channels, state, reverse, with_z, with_bias):
    inputs = make_inputs(batch, length, channels, state, torch.float64)
    if not with_z:
        del inputs["z"]
    if not with_bias:
        del inputs["dt_bias"]
    actual = call(selective_scan, inputs, reverse=reverse)
    expected = call(naive_scan, inputs, reverse=reverse)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(actual, expected, inputs, 1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_float32_is_close_to_float64(reverse):
    single, double = (make_inputs(2, 300, 8, 16, dtype) for dtype in (torch.float32, torch.float64))
    actual, expected = call(selective_scan, single, reverse=reverse), call(naive_scan, double, reverse=reverse)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((actual.double() * weights).sum(), list(single.values()))
    exact = torch.autograd.grad((expected * weights).sum(), list(double.values()))
    for one, other in zip(grads, exact, strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()


def test_gradients_pass_gradcheck():
    inputs = make_inputs(1, 5, 2, 3, torch.float64)
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *tensors, reverse=reverse: call(
                selective_scan, dict(zip(NAMES, tensors, strict=True)), reverse=reverse
            ),
            list(inputs.values()),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_keeps_its_dtype_and_a_float32_state(dtype, reverse):
    half = make_inputs(2, 200, 8, 16, dtype)
    single = {name: tensor.detach().float() for name, tensor in half.items()}
    y = call(selective_scan, half, reverse=reverse)
    assert y.dtype == dtype
    torch.testing.assert_close(y, call(naive_scan, single, reverse=reverse).to(dtype), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert all(tensor.grad.dtype == dtype and tensor.grad.isfinite().all() for tensor in half.values())


@pytest.mark.parametrize("reverse", [False, True])
def test_autocast_leaves_the_scan_in_float32(reverse):
    inputs = make_inputs(2, 40, 8, 16)
    expected = call(selective_scan, inputs, reverse=reverse)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(selective_scan, inputs, reverse=reverse)
        grads = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for grad, exact in zip(grads, torch.autograd.grad(expected.square().sum(), list(inputs.values())), strict=True):
        assert (grad - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize(("dt", "log_a"), [(80.0, 6.0), (-80.0, 6.0), (80.0, -20.0), (1e4, 3.0), (-1e4, 0.0)])
def test_extreme_time_steps_stay_finite(dt, log_a):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 70, 4, 8).items()}
    inputs["dt"].fill_(dt)
    inputs["A"] = -torch.exp(torch.full_like(inputs["A"], log_a))
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    for reverse in (False, True):
        y = call(selective_scan, inputs, reverse=reverse)
        grads = torch.autograd.grad(y.sum(), list(inputs.values()))
        assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_non_contiguous_inputs_and_an_empty_batch():
    inputs = {name: tensor.detach() for name, tensor in make_inputs(3, 40, 6, 4).items()}
    strided = {
        name: tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.ndim == 3 else tensor
        for name, tensor in inputs.items()
    }
    torch.testing.assert_close(call(selective_scan, strided), call(selective_scan, inputs))
    empty = {name: tensor[:0].requires_grad_() if tensor.ndim == 3 else tensor for name, tensor in inputs.items()}
    y = call(selective_scan, empty)
    y.sum().backward()
    assert y.shape == (0, 40, 6)


def test_the_backward_pass_keeps_no_states():
    inputs = make_inputs(2, 8 * CHUNK_SIZE, 8, 16)
    states = 2 * 8 * CHUNK_SIZE * 8 * 16
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        call(selective_scan, inputs)
    assert max(saved) <= states / 8


def test_as_an_operator_it_fulfils_the_contract_of_torch():
    x, dt, A, B, C = (tensor.detach() for tensor in list(make_inputs(2, 40, 3, 4).values())[:5])
    inputs = [tensor.requires_grad_() for tensor in (x, F.softplus(dt), A, B, C)]
    torch.library.opcheck(torch.ops.videomamba.selective_scan.default, (*inputs, True))


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_a_shape_that_does_not_fit_is_named(name):
    inputs = make_inputs()
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"`{'dt' if name == 'A' else name}`|`B`"):
        call(selective_scan, inputs)


def test_x_must_be_a_sequence_of_floats():
    inputs = make_inputs()
    for x in (inputs["x"][0], inputs["x"][:, :0], inputs["x"].long()):
        with pytest.raises(ValueError, match="`x`"):
            call(selective_scan, {**inputs, "x": x})


@pytest.mark.parametrize("reverse", [False, True])
def test_causal_conv1d_sees_only_the_past_of_its_direction(reverse):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, 4), torch.randn(3)
    expected = torch.zeros_like(x)
    for t in range(9):
        for tap in range(4):
            source = t + (3 - tap) * (1 if reverse else -1)
            if 0 <= source < 9:
                expected[:, t] += weight[:, 0, tap] * x[:, source]
    torch.testing.assert_close(causal_conv1d(x, weight, bias, reverse=reverse), F.silu(expected + bias))


def test_backends_are_reported_with_reasons():
    report = selective_scan_backends()
    assert list(report) == ["mamba_ssm", "torch"]
    assert report["torch"].usable and report["torch"].reason == ""
    if not torch.cuda.is_available():
        assert not report["mamba_ssm"].usable and "CUDA" in report["mamba_ssm"].reason


def test_a_backend_can_be_forced(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")
    call(selective_scan, inputs)
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "mamba_ssm")
    with pytest.raises(RuntimeError, match="VIDEOMAMBA_SCAN_BACKEND='mamba_ssm'.*cpu"):
        call(selective_scan, inputs)
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="abacus.*mamba_ssm, torch"):
        call(selective_scan, inputs)


def selective_scan_fn(u, delta, A, B=None, C=None, D=None, z=None, delta_bias=None, delta_softplus=False):
    """A twin of `mamba_ssm`'s function, with its layout `(batch, channels, length)` and its checks."""
    assert delta_softplus and A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
    assert all(tensor.is_contiguous() for tensor in (u, delta, A, B, C, z))
    assert u.shape == delta.shape == z.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
    tensors = [tensor.float().transpose(1, 2) for tensor in (u, delta, B, C, z)]
    u_, delta_, B_, C_, z_ = tensors
    return naive_scan(u_, delta_, A, B_, C_, D, z=z_, dt_bias=delta_bias).transpose(1, 2).to(u.dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_ssm_is_called_with_the_layout_it_wants(monkeypatch, reverse, dtype):
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    module = sys.modules["modeling_videomamba.selective_scan"]
    inputs = make_inputs(2, 21, 6, 4, dtype)
    actual = module._mamba_ssm_selective_scan(*inputs.values(), reverse)
    expected = call(selective_scan, inputs, reverse=reverse)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.float32:
        assert_same_gradients(actual, expected, inputs, 1e-3)


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    """A twin of `causal_conv1d`'s function, with its layout `(batch, channels, length)`."""
    assert activation == "silu" and weight.ndim == 2 and x.is_contiguous()
    assert x.dtype == weight.dtype == bias.dtype and x.shape[1] == weight.shape[0]
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [4, 5])
def test_causal_conv1d_is_called_with_the_layout_it_wants(monkeypatch, reverse, width):
    package = types.ModuleType("causal_conv1d")
    calls = []
    package.causal_conv1d_fn = lambda *args, **kwargs: calls.append(1) or causal_conv1d_fn(*args, **kwargs)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    module = sys.modules["modeling_videomamba.selective_scan"]
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, width), torch.randn(3)
    actual = module._mamba_ssm_causal_conv1d(x, weight, bias, reverse)
    torch.testing.assert_close(actual, causal_conv1d(x, weight, bias, reverse=reverse))
    assert len(calls) == (width == 4)  # its kernels go to a width of 4
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    torch.testing.assert_close(module._mamba_ssm_causal_conv1d(x, weight, bias, reverse), actual)
