import functools
import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba import selective_scan, selective_scan_backends
from modeling_videomamba.selective_scan import BACKENDS, causal_conv1d
from modeling_videomamba.selective_scan_naive import causal_conv1d as naive_conv
from modeling_videomamba.selective_scan_naive import selective_scan as naive_scan
from modeling_videomamba.selective_scan_torch import CHUNK_SIZE
from tests.conftest import VARIANTS, load_variant, needs_kernel
from tests.scan_inputs import DEVICE, SMALL_BLOCKS, assert_same, make_inputs

# by name, as the package has a function of the name of the module
module = importlib.import_module("modeling_videomamba.selective_scan")
mamba_ssm = importlib.import_module("modeling_videomamba.selective_scan_mamba_ssm")
reference = importlib.import_module("modeling_videomamba.selective_scan_torch")
cpu = importlib.import_module("modeling_videomamba.selective_scan_cpu")
library = importlib.import_module("modeling_videomamba.cpu_library")
triton_kernels = importlib.import_module("modeling_videomamba.triton_kernels")
triton_scan = importlib.import_module("modeling_videomamba.selective_scan_triton")


def selective_scan_fn(u, delta, A, B=None, C=None, D=None, z=None, delta_bias=None, delta_softplus=False):
    """A twin of `mamba_ssm`'s function, with its layout `(batch, channels, length)` and its checks."""
    assert delta_softplus and A.dtype == D.dtype == torch.float32
    assert delta_bias is None or delta_bias.dtype == torch.float32
    sequences = [u, delta, B, C] if z is None else [u, delta, B, C, z]
    assert all(tensor.dtype == u.dtype and tensor.is_contiguous() for tensor in sequences) and A.is_contiguous()
    assert u.shape == delta.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
    u_, delta_, B_, C_, *z_ = (tensor.float().transpose(1, 2) for tensor in sequences)
    y = naive_scan(u_, delta_, A, B_, C_, D, z_[0] if z_ else None, delta_bias, None, False)
    return y.transpose(1, 2).to(u.dtype)


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    """A twin of `causal_conv1d`'s function, with its layout `(batch, channels, length)`."""
    assert activation == "silu" and weight.ndim == 2 and x.is_contiguous() and x.shape[1] == weight.shape[0]
    assert x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))


@pytest.fixture(autouse=True)
def seed():
    """A draw that fails does so whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def mamba_ssm_twin(monkeypatch):
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    mamba_ssm.load_kernel.cache_clear()
    yield
    mamba_ssm.load_kernel.cache_clear()


@pytest.fixture(params=["mamba_ssm", "triton", *(f"cpu-{variant}" for variant in VARIANTS), "torch"])
def backend(request, monkeypatch):
    """Each entry of the table of backends: `mamba_ssm` by a twin, `triton` under its interpreter where no GPU is."""
    name, _, variant = request.param.partition("-")
    if name == "mamba_ssm":
        request.getfixturevalue("mamba_ssm_twin")
    elif name == "triton":
        if triton_kernels.IMPORT_ERROR is not None:
            pytest.skip("Triton is not installed")
        for constant, value in SMALL_BLOCKS.items():
            monkeypatch.setattr(triton_scan, constant, value)
    elif name == "cpu":
        kernels = load_variant(variant)
        monkeypatch.setattr(cpu, "kernels", lambda: kernels)
    return BACKENDS[name]


@pytest.fixture
def inputs_of(backend):
    """Inputs on the device of the backend."""
    return functools.partial(make_inputs, device=DEVICE if "cuda" in backend.device_types else "cpu")


# Every backend against the recurrence. The sizes are small because Triton's interpreter goes element by element.
# (batch, length, channels, state, without)
SHAPES = [
    (2, 13, 3, 8, ()),
    (1, 37, 17, 2, ("z",)),
    (1, 1, 5, 16, ()),
    (1, 5, 3, 64, ("dt_bias",)),
    (3, 7, 1, 16, ("add",)),
    (1, 33, 2, 5, ("z", "dt_bias", "add")),
    (1, 2, 19, 3, ("z", "add")),
]
INTERPRETED = (SHAPES[0], SHAPES[3], SHAPES[5])  # a second each; more shapes are in test_selective_scan_triton.py


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "length", "channels", "state", "without"), SHAPES)
def test_parity_of_outputs_and_gradients(backend, inputs_of, batch, length, channels, state, without, reverse):
    is_interpreted = backend is BACKENDS["triton"] and DEVICE == "cpu"
    if is_interpreted and (batch, length, channels, state, without) not in INTERPRETED:
        pytest.skip("the interpreter of Triton takes long")
    inputs = inputs_of(batch, length, channels, state, without=without)
    assert_same(backend.scan, naive_scan, inputs.values(), reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(backend, inputs_of, dtype, reverse):
    inputs = inputs_of(1, 18, 3, 4, dtype)
    assert_same(backend.scan, naive_scan, inputs.values(), reverse, 2e-2, 2e-2)
    parameters = [torch.randn(3, 1, 4, device=inputs["x"].device), torch.randn(3, device=inputs["x"].device)]
    convolution = [inputs["x"], *(tensor.requires_grad_() for tensor in parameters)]
    assert_same(backend.convolution, naive_conv, convolution, reverse, 2e-2, 2e-2)


@pytest.mark.parametrize("reverse", [False, True])
def test_parity_where_columns_are_apart_and_dtypes_differ(backend, inputs_of, reverse):
    apart = {
        name: tensor.detach().mT.contiguous().mT.requires_grad_() if tensor.ndim > 1 else tensor
        for name, tensor in inputs_of(2, 9, 5, 3).items()
    }
    assert_same(backend.scan, naive_scan, apart.values(), reverse)
    mixed = inputs_of(1, 9, 3, 4)
    for name, dtype in (("x", torch.bfloat16), ("B", torch.float16), ("D", torch.bfloat16), ("add", torch.bfloat16)):
        mixed[name] = mixed[name].detach().to(dtype).requires_grad_()
    assert_same(backend.scan, naive_scan, mixed.values(), reverse, 1e-2, 1e-2)


def test_parity_of_an_empty_batch(backend, inputs_of):
    inputs = inputs_of(0)
    y = backend.scan(*inputs.values(), False)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.shape == (0, 11, 5)
    assert all(grad.shape == t.shape and grad.abs().sum() == 0 for grad, t in zip(grads, inputs.values(), strict=True))
    weight = torch.randn(5, 1, 4, device=y.device)
    assert backend.convolution(inputs["x"], weight, None, True).shape == (0, 11, 5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dt", "log_a"), [(1e4, 6.0), (-1e4, 6.0), (1e4, -20.0), (-1e4, -20.0), (80.0, 2.0)])
def test_extreme_values_stay_finite(backend, inputs_of, dt, log_a, reverse):
    inputs = {name: tensor.detach() for name, tensor in inputs_of(1, 11, 2, 2).items()}
    inputs["dt"].fill_(dt)[:, 5] = 1e-3
    inputs["z"].fill_(-dt)
    inputs["A"].fill_(-torch.tensor(log_a).exp())
    inputs = [tensor.requires_grad_() for tensor in inputs.values()]
    y = backend.scan(*inputs, reverse)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for grad, other in zip(grads, torch.autograd.grad(naive_scan(*exact, reverse).sum(), exact), strict=True):
        assert (grad - other).abs().max() <= 1e-3 * other.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "channels", "width", "with_bias"),
    [(35, 5, 4, True), (1, 3, 3, True), (6, 37, 1, False), (130, 2, 5, True)],
)
def test_parity_of_the_convolution(backend, inputs_of, length, channels, width, with_bias, reverse):
    x = inputs_of(2, length, channels)["x"]
    weight = torch.randn(channels, 1, width, device=x.device).requires_grad_()
    bias = torch.randn(channels, device=x.device).requires_grad_() if with_bias else None
    assert_same(backend.convolution, naive_conv, [x, weight, bias], reverse)


def test_small_time_steps_keep_their_digits(backend, inputs_of):
    """`softplus(-16)` is 1e-7; by way of `log(1 + 1e-7)` it would be 1.2e-7."""
    inputs = [tensor.detach().abs() for tensor in list(inputs_of(1, 9, 2, 2).values())[:6]]
    inputs[1] = torch.linspace(-16, 4, 18, device=inputs[0].device).reshape(1, 9, 2)
    inputs[2], inputs[5] = -inputs[2], 0 * inputs[5]
    actual = backend.scan(*inputs, None, None, None, False)
    expected = naive_scan(*(tensor.double() for tensor in inputs), None, None, None, False)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


# The reference.


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 5]),
    channels=st.integers(1, 9),
    state=st.sampled_from([1, 3, 8, 16]),
    reverse=st.booleans(),
    without=st.sets(st.sampled_from(["z", "dt_bias", "add"])),
)
def test_the_reference_is_the_recurrence(batch, length, channels, state, reverse, without):
    inputs = make_inputs(batch, length, channels, state, torch.float64, without)
    assert_same(BACKENDS["torch"].scan, naive_scan, inputs.values(), reverse, 1e-10, 1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck(reverse):
    inputs = make_inputs(1, 5, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, dt, A, B, C, D, z, dt_bias, add: selective_scan(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, add=add, reverse=reverse
        ),
        list(inputs.values()),
    )


# The CPU kernel.


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.sampled_from([1, 2, 31, 32, 33, 64, 100]),
    channels=st.integers(1, 70),
    state=st.sampled_from([1, 3, 8, 16, 20, 64]),
    reverse=st.booleans(),
    without=st.sets(st.sampled_from(["z", "dt_bias", "add"])),
    threads=st.integers(1, 5),
)
def test_the_kernel_with_any_sizes_and_threads(batch, length, channels, state, reverse, without, threads):
    inputs = make_inputs(batch, length, channels, state, without=without)
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(cpu.selective_scan, naive_scan, inputs.values(), reverse)
        weight = torch.randn(channels, 1, 4).requires_grad_()
        assert_same(cpu.causal_conv1d, naive_conv, [inputs["x"], weight, inputs["D"]], reverse)
    finally:
        torch.set_num_threads(previous)


@needs_kernel
def test_the_kernel_over_a_long_sequence():
    inputs = {name: t.detach().requires_grad_() for name, t in make_inputs(1, 3000, 24, 16).items()}
    with torch.no_grad():
        inputs["dt"] -= 4  # long memory
    assert_same(cpu.selective_scan, BACKENDS["torch"].scan, inputs.values(), True)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_as_by_torch(dtype):
    """
    Of every 16-bit number, infinities and NaN among them; without scan the output is `D * x + add`. Below the smallest
    normal float32 the kernel has zeros only.
    """
    smallest = torch.finfo(torch.float32).tiny
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, -1, 64)
    ones, zeros = torch.ones(64), torch.zeros(1, x.shape[1], 1, dtype=dtype)
    A, dt, add = -torch.ones(64, 1), torch.full_like(x, -100.0), torch.zeros_like(x)
    finite = x.nan_to_num(0, 0, 0)
    y = cpu.selective_scan(finite, dt, A, zeros, zeros, 1.0009765625 * ones, None, None, add, False)
    expected = finite.float() * 1.0009765625
    assert torch.equal(y, expected.where(finite.float().abs() >= smallest, 0.0).to(dtype))
    y = cpu.selective_scan(add, dt, A, zeros, zeros, ones, None, None, x, False)
    x = x.where(~(x.float().abs() < smallest), 0.0)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


@needs_kernel
def test_states_and_gradients_decay_to_zero():
    """And not to numbers below the smallest normal one, which take a processor many times as long."""
    length, channels = 400, 32
    x, dt, B, C = torch.zeros(1, length, channels), torch.zeros(1, length, channels), *torch.ones(2, 1, length, 8)
    x[:, 0] = 1
    x.requires_grad_()
    y = cpu.selective_scan(x, dt, -torch.ones(channels, 8), B, C, torch.zeros(channels), None, None, None, False)
    y[:, -1].sum().backward()
    for decayed in (y.detach(), x.grad):
        assert ((decayed == 0) | (decayed >= torch.finfo(torch.float32).tiny)).all() and (decayed == 0).any()
    number = torch.tensor(1e-39)
    assert (number * 0.5).item() > 0, "PyTorch's own arithmetic is left alone"


@needs_kernel
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "add", "A", "D", "dt_bias"])
def test_a_nan_is_not_hidden(name):
    inputs = {key: tensor.detach() for key, tensor in make_inputs(1, 40, 20, 16).items()}
    inputs[name][(0,) * inputs[name].ndim] = float("nan")
    assert cpu.selective_scan(*inputs.values(), False).isnan().any()


@needs_kernel
def test_gradients_are_the_same_each_time():
    inputs = list(make_inputs(1, 200, 70, 16).values())
    first, *others = (torch.autograd.grad(cpu.selective_scan(*inputs, True).sum(), inputs) for _ in range(4))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@needs_kernel
def test_inference_keeps_nothing_and_training_no_states():
    length, channels, state = 16 * cpu.CHUNK_SIZE, 8, 16
    inputs, saved = make_inputs(2, length, channels, state), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        cpu.selective_scan(*inputs.values(), False)
    assert saved and max(saved) <= 2 * length * state
    with torch.no_grad():
        kept = torch.ops.videomamba.cpu_selective_scan(*inputs.values(), False, False)
    assert [tensor.numel() for tensor in kept] == [2 * length * channels, 0, 0]


@pytest.fixture
def fresh_library():
    """Kernels are looked for anew, in this test and after it."""

    def forget():
        library.load_library.cache_clear()
        library.kernels.cache_clear()

    forget()
    yield
    forget()


def test_the_kernel_of_another_version_is_refused(monkeypatch, fresh_library):
    monkeypatch.setattr(library, "VERSION", -1)
    reason = cpu.unavailable_reason("cpu")
    assert "another version" in reason or "was not compiled" in reason


def test_without_the_kernel_the_reference_runs_and_says_so(monkeypatch, fresh_library):
    monkeypatch.setattr(library.Path, "glob", lambda self, pattern: iter(()))
    module._warn_of_slow_scan.cache_clear()
    with pytest.warns(UserWarning, match=r"plain PyTorch.*cpu: the compiled kernel can't be loaded.*C\+\+20"):
        call(make_inputs())
    assert not selective_scan_backends()["cpu"].usable


# The contract, and the choice of a backend.


def call(inputs, **kwargs):
    positional = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D")]
    optional = {name: inputs[name] for name in ("z", "dt_bias", "add")}
    return selective_scan(*positional, **optional, **kwargs)


@pytest.mark.parametrize("reverse", [False, True])
def test_autocast_leaves_the_scan_in_float32(backend, inputs_of, reverse):
    inputs = list(inputs_of(1, 12, 3, 4).values())
    expected = backend.scan(*inputs, reverse)
    with torch.autocast(expected.device.type, torch.bfloat16):
        actual = backend.scan(*inputs, reverse)
        grads = torch.autograd.grad(actual.square().sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for grad, exact in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        assert (grad - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_the_operators_fulfil_the_contract_of_torch():
    def check(operator, arguments):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}

    x, dt, A, B, C, D, z, dt_bias, add = make_inputs(2, 40, 3, 4).values()
    check(torch.ops.videomamba.reference_scan.default, (x, dt, A, B, C, True))
    if cpu.unavailable_reason("cpu") is None:
        for optional in ((z, dt_bias, add), (None, None, add), (z, None, None)):
            arguments = (x, dt, A, B, C, D, *optional, True, True)
            check(torch.ops.videomamba.cpu_selective_scan.default, arguments)
        weight = torch.randn(3, 4).requires_grad_()
        check(torch.ops.videomamba.cpu_causal_conv1d.default, (x, weight, D, True))


def test_a_second_copy_of_the_code_has_operators_of_its_own():
    """As code from a Hub repository beside the installed package has: the first keeps working."""
    inputs = make_inputs()
    expected = call(inputs)
    spec = importlib.util.spec_from_file_location("modeling_videomamba.second", reference.__file__)
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    copy = BACKENDS["torch"].scan(*inputs.values(), False)
    torch.testing.assert_close(second.selective_scan(*inputs.values(), False), copy)
    torch.testing.assert_close(call(inputs), expected)
    assert second.reference_scan._opoverload is not reference.reference_scan._opoverload


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "add"])
def test_a_shape_that_does_not_fit_is_named(name):
    inputs = make_inputs()
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"`{'dt' if name == 'A' else name}`|`B`"):
        call(inputs)


def test_x_must_be_a_sequence_of_floats():
    inputs = make_inputs()
    for x in (inputs["x"][0], inputs["x"][:, :0], inputs["x"].long()):
        with pytest.raises(ValueError, match="`x`"):
            call({**inputs, "x": x})
    with pytest.raises(ValueError, match=r"`weight` must be .* \(channels, 1, width\)"):
        causal_conv1d(inputs["x"], torch.randn(5, 4))


def test_backends_are_reported_with_reasons():
    report = selective_scan_backends()
    assert list(report) == ["triton", "mamba_ssm", "cpu", "torch"]
    assert report["torch"].usable and report["torch"].reason == ""
    assert all(bool(entry.reason) != entry.usable for entry in report.values())
    if not torch.cuda.is_available():
        assert "CUDA" in report["mamba_ssm"].reason and "cuda" in report["triton"].reason


def test_a_backend_can_be_forced(monkeypatch):
    inputs = make_inputs()
    for name, backend in selective_scan_backends().items():
        monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", name)
        if backend.usable:
            call(inputs)
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "mamba_ssm")
    with pytest.raises(RuntimeError, match="VIDEOMAMBA_SCAN_BACKEND='mamba_ssm'.*cpu"):
        call(inputs)
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"not usable for torch.float64 tensors on 'cpu': does not compute in"):
        call(make_inputs(dtype=torch.float64))
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="abacus.*triton, mamba_ssm, cpu, torch"):
        call(inputs)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_causal_conv1d_of_a_package_is_left_out_where_it_can_not_run(monkeypatch, mamba_ssm_twin, width):
    calls = []
    package = sys.modules["causal_conv1d"]
    package.causal_conv1d_fn = lambda *args, **kwargs: calls.append(1) or causal_conv1d_fn(*args, **kwargs)
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, width), torch.randn(3)
    actual = mamba_ssm.causal_conv1d(x, weight, bias, True)
    torch.testing.assert_close(actual, naive_conv(x, weight, bias, True))
    assert len(calls) == (width == 4)  # its kernels go from a width of 2 to 4
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    torch.testing.assert_close(mamba_ssm.causal_conv1d(x, weight, bias, True), actual)


def test_mamba_ssm_comes_from_the_hub_where_kernels_is_installed(monkeypatch):
    from transformers.integrations import hub_kernels

    def get_kernel(name, version):
        assert name == "kernels-community/mamba-ssm"
        interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
        return types.SimpleNamespace(ops=types.SimpleNamespace(selective_scan_interface=interface))

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    mamba_ssm.load_kernel.cache_clear()
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: False)
    assert "`kernels` is not installed" in mamba_ssm.load_kernel()[1]
    mamba_ssm.load_kernel.cache_clear()
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    assert mamba_ssm.load_kernel() == (selective_scan_fn, None)
    assert_same(mamba_ssm.selective_scan, naive_scan, make_inputs(1, 9, 3, 4).values(), True)
    mamba_ssm.load_kernel.cache_clear()
