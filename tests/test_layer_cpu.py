"""A layer as one function of the CPU kernels, with each variant that this processor has, against its modules."""

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

layer_cpu = importlib.import_module("modeling_videomamba.layer_cpu")
pytestmark = needs_kernel


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of the function."""
    made = []

    def record(*inputs, **settings):
        made.append(inputs)
        return layer_cpu.fused_layer(*inputs, **settings)

    monkeypatch.setattr(modeling, "fused_layer", record)
    return made


def make_layer(dtype=torch.float32, drop_path_rate=0.0, **changes):
    torch.manual_seed(0)
    layer = modeling.VideoMambaLayer(tiny_config(**changes), drop_path_rate)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def outputs_and_gradients(layer, hidden_states, grad):
    hidden_states = hidden_states.detach().requires_grad_()
    y = layer(hidden_states)
    y.backward(grad.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "hidden_states": hidden_states.grad, **gradients}


def assert_same(layer, hidden_states, tolerance):
    grad = torch.randn_like(hidden_states)
    torch.manual_seed(1)  # of the paths that are dropped
    actual = outputs_and_gradients(layer, hidden_states, grad)
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    torch.manual_seed(1)
    expected = outputs_and_gradients(exact, hidden_states.double(), grad)
    for name, tensor in expected.items():
        dtype = torch.float32 if name in ("y", "hidden_states") else layer.norm.weight.dtype
        assert actual[name].dtype == dtype and actual[name].shape == tensor.shape
        if tensor.numel():
            scale = tensor.abs().max().clamp(min=1e-6)
            assert (actual[name].double() - tensor).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("scan_order", ["spatial_first", "spatiotemporal_v1"])
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 20, "state_size": 5, "conv_kernel": 3, "time_step_rank": 9}])
@pytest.mark.parametrize("length", [1, 5, 32, 103])
def test_parity_of_outputs_and_gradients(variant, calls, length, changes, scan_order):
    layer = make_layer(scan_order=scan_order, **changes)
    assert_same(layer, torch.randn(2, length, layer.mixer.in_proj.in_features), 1e-4)
    assert len(calls) == 1


def test_parity_where_paths_are_dropped(calls):
    layer, hidden_states = make_layer(drop_path_rate=0.5), torch.randn(8, 20, 32)
    assert_same(layer, hidden_states, 1e-4)
    torch.manual_seed(1)
    is_dropped = (layer(hidden_states) == hidden_states).flatten(1).all(1)
    assert is_dropped.any() and not is_dropped.all()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(variant, calls, dtype):
    assert_same(make_layer(dtype), torch.randn(2, 40, 32), 5e-2)
    assert len(calls) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 70), st.integers(1, 5), st.sampled_from([1, 4, 16]), st.integers(1, 5))
def test_any_sizes_and_threads(batch, length, threads, state_size, conv_kernel):
    layer = make_layer(state_size=state_size, conv_kernel=conv_kernel)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(layer, torch.randn(batch, length, 32), 1e-4)
    finally:
        torch.set_num_threads(before)


def test_the_function_is_deterministic():
    layer, hidden_states = make_layer(), torch.randn(2, 90, 32)
    runs = []
    for _ in range(2):
        layer.zero_grad()
        runs.append(outputs_and_gradients(layer, hidden_states, torch.ones(2, 90, 32)))
        runs[-1] = {name: tensor.clone() for name, tensor in runs[-1].items()}
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_what_sees_operators_sees_those_of_the_modules(calls):
    layer, hidden_states = make_layer(), torch.randn(2, 20, 32, requires_grad=True)
    expected = layer(hidden_states)
    assert len(calls) == 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(2, 20, 32)).shape == (2, 20, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden_states), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_a_second_derivative_is_refused():
    layer, hidden_states = make_layer(), torch.randn(1, 20, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(hidden_states).square().sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_graph_can_be_used_twice():
    layer, hidden_states = make_layer(), torch.randn(2, 70, 32, requires_grad=True)
    loss = layer(hidden_states).square().sum()
    first, second = (torch.autograd.grad(loss, hidden_states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_infinite_decay_forgets(variant):
    layer = make_layer()
    layer.mixer.scans[0].A_log.data.fill_(200)  # exp(200) is infinite
    outputs = outputs_and_gradients(layer, torch.randn(1, 40, 32), torch.ones(1, 40, 32))
    assert all(tensor.isfinite().all() for name, tensor in outputs.items() if name != "mixer.scans.0.A_log")


def test_only_what_the_backward_pass_cannot_compute_is_kept(monkeypatch):
    def kept_bytes(layer):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(torch.randn(1, 500, 32))
        assert y.requires_grad
        return sum(sizes.values())

    as_one = kept_bytes(make_layer())
    monkeypatch.setattr(modeling, "can_fuse", lambda *_: False)
    assert as_one < 0.6 * kept_bytes(make_layer())


def test_the_products_are_counted_as_those_of_the_modules(monkeypatch):
    def count(layer):
        hidden_states = torch.randn(1, 50, 32, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = layer(hidden_states)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    as_one = count(make_layer())
    monkeypatch.setattr(modeling, "can_fuse", lambda *_: False)
    assert as_one == count(make_layer()) and as_one[0] > 0


def test_without_gradients_nothing_is_kept(calls):
    layer, hidden_states = make_layer(), torch.randn(1, 20, 32)
    with torch.no_grad():
        without = layer(hidden_states)
    torch.testing.assert_close(without, layer(hidden_states).detach(), rtol=0, atol=0)
    assert len(calls) == 2


def wrap(layer):
    layer.mixer.scans[0].x_proj = torch.nn.Sequential(layer.mixer.scans[0].x_proj)


def replace(layer):
    """By a linear layer with a bias, which is zero here."""
    weight = layer.mixer.in_proj.weight
    layer.mixer.in_proj = torch.nn.Linear(*reversed(weight.shape))
    layer.mixer.in_proj.weight = weight
    torch.nn.init.zeros_(layer.mixer.in_proj.bias)


def parametrise(layer):
    torch.nn.utils.parametrizations.weight_norm(layer.mixer.out_proj)


@pytest.mark.parametrize(
    "change",
    [
        wrap,
        replace,
        parametrise,
        lambda layer: layer.mixer.scans[1].conv1d.register_forward_hook(lambda *_: None),
        lambda layer: layer.mixer.in_proj.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.mixer.scans[0].dt_proj.bfloat16(),
    ],
    ids=["adapter", "bias", "parametrisation", "hook", "backward hook", "another dtype"],
)
def test_modules_that_someone_changed_or_watches_are_called(calls, change):
    layer, hidden_states = make_layer(), torch.randn(1, 20, 32)
    expected = layer(hidden_states)
    assert len(calls) == 1
    change(layer)
    if layer.mixer.scans[0].dt_proj.weight.dtype == torch.float32:
        torch.testing.assert_close(layer(hidden_states), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            layer(hidden_states)
    assert len(calls) == 1


def test_a_forward_that_is_replaced_on_a_class_is_called(calls, monkeypatch):
    layer, hidden_states = make_layer(), torch.randn(1, 20, 32)
    expected, own = layer(hidden_states), modeling.VideoMambaScan.forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling.VideoMambaScan, "forward", lambda self, *args: 2 * own(self, *args))
        changed = layer(hidden_states)
        assert len(calls) == 1 and not torch.allclose(changed, expected)
    assert torch.equal(layer(hidden_states), expected)


def test_the_function_is_for_the_compiled_kernels_alone(calls, monkeypatch):
    layer, hidden_states = make_layer(), torch.randn(1, 20, 32)
    expected = layer(hidden_states)
    permuted = layer(hidden_states, torch.arange(20))  # as for scans in temporal order
    torch.testing.assert_close(permuted, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(hidden_states).dtype == torch.float32
        assert layer.mixer(hidden_states).dtype == torch.bfloat16
    assert layer.to("meta")(hidden_states.to("meta")).device.type == "meta"
    assert make_layer().double()(hidden_states.double()).dtype == torch.float64
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    torch.testing.assert_close(make_layer()(hidden_states), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_what_exceeds_float16_inside_the_layer_does_not_make_gradients_infinite(calls):
    """The sum of the scans before the gate is beyond 65504 here; outputs and gradients are not."""
    layer = make_layer(torch.float16)
    with torch.no_grad():
        for scan in layer.mixer.scans:
            scan.D.fill_(6e4)
            scan.conv1d.bias.fill_(2.0)
        layer.mixer.in_proj.weight[64:].mul_(1e-3)  # z, and the gate with it
        layer.mixer.out_proj.weight.mul_(1e-3)
    hidden_states, grad = torch.randn(1, 20, 32), torch.randn(1, 20, 32)
    expected = outputs_and_gradients(copy.deepcopy(layer).double(), hidden_states.double(), grad)
    actual = outputs_and_gradients(layer, hidden_states, grad)
    assert len(calls) == 1
    for name, tensor in expected.items():
        assert tensor.abs().max() < 65504, name
        assert (actual[name] - tensor).abs().max() <= 5e-3 * tensor.abs().max(), name
