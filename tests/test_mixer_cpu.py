"""The block as one function of the CPU kernels, with each variant that this processor has, against its modules."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_videomamba import modeling_videomamba as modeling
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from tests.conftest import needs_kernel, tiny_config

mixer_cpu = importlib.import_module("modeling_videomamba.mixer_cpu")
pytestmark = needs_kernel


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of the function."""
    made = []
    monkeypatch.setattr(modeling, "mixer", lambda *inputs: made.append(inputs) or mixer_cpu.mixer(*inputs))
    return made


def make_mixer(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    mixer = modeling.VideoMambaMixer(tiny_config(**changes))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer.to(dtype)


def outputs_and_gradients(mixer, hidden_states, grad):
    hidden_states = hidden_states.detach().requires_grad_()
    y = mixer(hidden_states)
    y.backward(grad.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    return {"y": y.detach(), "hidden_states": hidden_states.grad, **gradients}


def assert_same(mixer, hidden_states, tolerance):
    grad = torch.randn_like(hidden_states)
    actual = outputs_and_gradients(mixer, hidden_states, grad)
    exact = copy.deepcopy(mixer).double()
    exact.zero_grad()
    expected = outputs_and_gradients(exact, hidden_states.double(), grad)
    for name, tensor in expected.items():
        assert actual[name].dtype == hidden_states.dtype and actual[name].shape == tensor.shape
        if tensor.numel():
            scale = tensor.abs().max().clamp(min=1e-6)
            assert (actual[name].double() - tensor).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("scan_order", ["spatial_first", "spatiotemporal_v1"])
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 20, "state_size": 5, "conv_kernel": 3, "time_step_rank": 9}])
@pytest.mark.parametrize("length", [1, 5, 32, 103])
def test_parity_of_outputs_and_gradients(variant, calls, length, changes, scan_order):
    mixer = make_mixer(scan_order=scan_order, **changes)
    assert_same(mixer, torch.randn(2, length, mixer.in_proj.in_features), 1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(variant, calls, dtype):
    mixer = make_mixer(dtype)
    assert_same(mixer, torch.randn(2, 40, 32).to(dtype), 5e-2)
    assert len(calls) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 70), st.integers(1, 5), st.sampled_from([1, 4, 16]), st.integers(1, 5))
def test_any_sizes_and_threads(batch, length, threads, state_size, conv_kernel):
    mixer = make_mixer(state_size=state_size, conv_kernel=conv_kernel)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(mixer, torch.randn(batch, length, 32), 1e-4)
    finally:
        torch.set_num_threads(before)


def test_the_function_is_deterministic():
    mixer, hidden_states = make_mixer(), torch.randn(2, 90, 32)
    runs = []
    for _ in range(2):
        mixer.zero_grad()
        runs.append(outputs_and_gradients(mixer, hidden_states, torch.ones(2, 90, 32)))
        runs[-1] = {name: tensor.clone() for name, tensor in runs[-1].items()}
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_what_sees_operators_sees_those_of_the_modules(calls):
    mixer, hidden_states = make_mixer(), torch.randn(2, 20, 32, requires_grad=True)
    expected = mixer(hidden_states)
    assert len(calls) == 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixer(torch.randn(2, 20, 32)).shape == (2, 20, 32)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden_states), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_a_second_derivative_is_refused():
    mixer, hidden_states = make_mixer(), torch.randn(1, 20, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(hidden_states).square().sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_graph_can_be_used_twice():
    mixer, hidden_states = make_mixer(), torch.randn(2, 70, 32, requires_grad=True)
    loss = mixer(hidden_states).square().sum()
    first, second = (torch.autograd.grad(loss, hidden_states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_infinite_decay_forgets(variant):
    mixer = make_mixer()
    mixer.scans[0].A_log.data.fill_(200)  # exp(200) is infinite
    outputs = outputs_and_gradients(mixer, torch.randn(1, 40, 32), torch.ones(1, 40, 32))
    assert all(tensor.isfinite().all() for name, tensor in outputs.items() if name != "scans.0.A_log")


def test_only_what_the_backward_pass_cannot_compute_is_kept(monkeypatch):
    def kept_bytes(mixer):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = mixer(torch.randn(1, 500, 32))
        assert y.requires_grad
        return sum(sizes.values())

    as_one = kept_bytes(make_mixer())
    monkeypatch.setattr(modeling, "is_plain", lambda module: False)
    assert as_one < 0.6 * kept_bytes(make_mixer())


def test_the_products_are_counted_as_those_of_the_modules(monkeypatch):
    def count(mixer):
        hidden_states = torch.randn(1, 50, 32, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = mixer(hidden_states)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    as_one = count(make_mixer())
    monkeypatch.setattr(modeling, "is_plain", lambda module: False)
    assert as_one == count(make_mixer()) and as_one[0] > 0


def test_without_gradients_nothing_is_kept(calls):
    mixer, hidden_states = make_mixer(), torch.randn(1, 20, 32)
    with torch.no_grad():
        without = mixer(hidden_states)
    torch.testing.assert_close(without, mixer(hidden_states).detach(), rtol=0, atol=0)
    assert len(calls) == 2


def wrap(mixer):
    mixer.scans[0].x_proj = torch.nn.Sequential(mixer.scans[0].x_proj)


def parametrise(mixer):
    torch.nn.utils.parametrizations.weight_norm(mixer.out_proj)


@pytest.mark.parametrize(
    "change",
    [
        wrap,
        parametrise,
        lambda mixer: mixer.scans[1].conv1d.register_forward_hook(lambda *_: None),
        lambda mixer: mixer.in_proj.register_full_backward_hook(lambda *_: None),
        lambda mixer: mixer.scans[0].dt_proj.bfloat16(),
    ],
    ids=["adapter", "parametrisation", "hook", "backward hook", "another dtype"],
)
def test_modules_that_someone_changed_or_watches_are_called(calls, change):
    mixer, hidden_states = make_mixer(), torch.randn(1, 20, 32)
    expected = mixer(hidden_states)
    assert len(calls) == 1
    change(mixer)
    if mixer.scans[0].dt_proj.weight.dtype == torch.float32:
        torch.testing.assert_close(mixer(hidden_states), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            mixer(hidden_states)
    assert len(calls) == 1


def test_the_function_is_for_the_compiled_kernels_alone(calls, monkeypatch):
    mixer, hidden_states = make_mixer(), torch.randn(1, 20, 32)
    expected = mixer(hidden_states)
    permuted = mixer(hidden_states, torch.arange(20))  # as for scans in temporal order
    torch.testing.assert_close(permuted, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer(hidden_states).dtype == torch.bfloat16
    assert mixer.to("meta")(hidden_states.to("meta")).device.type == "meta"
    assert make_mixer().double()(hidden_states.double()).dtype == torch.float64
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    torch.testing.assert_close(make_mixer()(hidden_states), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
