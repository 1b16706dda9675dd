"""What the public operators take and refuse, whatever lies in memory, with each backend of a CPU."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba import selective_scan, selective_scan_backends
from modeling_videomamba.linear_and_norm import linear, rms_norm
from modeling_videomamba.selective_scan import BACKEND_VARIABLE, causal_conv1d
from tests.conftest import needs_kernel
from tests.scan_inputs import make_inputs

products = importlib.import_module("modeling_videomamba.matrix_product_cpu")
cpu = importlib.import_module("modeling_videomamba.selective_scan_cpu")

BACKENDS = [name for name in ("cpu", "torch") if selective_scan_backends()[name].usable]
FUNCTIONS = {
    "selective_scan": selective_scan,
    "causal_conv1d": causal_conv1d,
    "rms_norm": lambda hidden_states, weight: rms_norm(hidden_states, weight, 1e-5),
    "linear": linear,
}
TENSORS = {
    "selective_scan": ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "add"),
    "causal_conv1d": ("x", "weight", "bias"),
    "rms_norm": ("hidden_states", "weight"),
    "linear": ("hidden_states", "weight"),
}
ARGUMENTS = [(function, name) for function, names in TENSORS.items() for name in names]


# Dimensions that no other tensor has.
FREE_DIMENSIONS = {
    ("causal_conv1d", "x"): [0, 1],
    ("causal_conv1d", "weight"): [2],
    ("rms_norm", "hidden_states"): [0, 1],
    ("linear", "hidden_states"): [0, 1],
    ("linear", "weight"): [0],
}


def arguments(function, batch=2, length=7, channels=5, size=4):
    """Arguments of a function; `size` is the state, the width of a kernel, or the rows of a weight."""
    if function == "selective_scan":
        inputs = make_inputs(batch, length, channels, size)
        return {name: tensor.detach() for name, tensor in inputs.items()}
    torch.manual_seed(0)
    sequence = torch.randn(batch, length, channels)
    if function == "causal_conv1d":
        return {"x": sequence, "weight": torch.randn(channels, 1, size), "bias": torch.randn(channels)}
    weight = torch.randn(channels) if function == "rms_norm" else torch.randn(size, channels)
    return {"hidden_states": sequence, "weight": weight}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)


def of_other_sizes(tensor, function, name):
    """The tensor with a dimension that doesn't fit the other arguments, or with one dimension too many or too few."""
    free = FREE_DIMENSIONS.get((function, name), [])
    for dimension in set(range(tensor.ndim)) - set(free):
        if tensor.shape[dimension] > 1:
            yield tensor.narrow(dimension, 0, 1)
            yield tensor.narrow(dimension, 0, tensor.shape[dimension] - 1)
            yield tensor.narrow(dimension, 0, 0)
        yield torch.cat([tensor, tensor], dimension)
    if name != "hidden_states":  # which can have any number of dimensions
        yield tensor.unsqueeze(0)
    yield tensor.flatten() if tensor.ndim > 1 else tensor[0]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_a_tensor_of_another_shape_dtype_or_device_is_refused(backend, function, name):
    inputs = arguments(function)
    wrong = [*of_other_sizes(inputs[name], function, name)]
    wrong += [inputs[name].to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64)]
    wrong.append(inputs[name].to("meta"))
    for tensor in wrong:
        with pytest.raises(ValueError, match="must be"):
            FUNCTIONS[function](**{**inputs, name: tensor})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_dtype_in_which_nothing_computes_is_refused(function):
    inputs = {name: tensor.to(torch.float8_e5m2) for name, tensor in arguments(function).items()}
    with pytest.raises(RuntimeError, match="No backend computes in torch.float8_e5m2"):
        FUNCTIONS[function](**inputs)


# The same values in memory in every way that PyTorch has.


def laid_out(tensor, layout):
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "apart":
        wide = torch.full((*tensor.shape, 2), float("nan"))
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "transposed":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "part":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    # dimensions of one entry have any stride
    tensor = tensor.contiguous()
    strides = [7 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


LAYOUTS = ("expanded", "apart", "transposed", "part", "odd strides")


def outputs_and_gradients(function, inputs, needs_gradient):
    inputs = {name: tensor.detach().requires_grad_(name in needs_gradient) for name, tensor in inputs.items()}
    y = FUNCTIONS[function](**inputs)
    if not needs_gradient:
        assert not y.requires_grad
        return [y]
    grad = torch.full((), 0.5).expand(y.shape)  # strides of 0, as from `sum`
    return [y.detach(), *torch.autograd.grad(y, [inputs[name] for name in needs_gradient], grad)]


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sizes_layouts_and_gradients(function, data):
    """Sizes of 1 above all, where strides mean nothing, and 0 for the batch."""
    size = st.sampled_from([1, 1, 2, 17, 33])
    sizes = data.draw(st.tuples(st.sampled_from([0, 1, 1, 3]), size, size, st.sampled_from([1, 2, 5])))
    inputs = arguments(function, *sizes)
    layouts = {name: data.draw(st.sampled_from(LAYOUTS), name) for name in inputs}
    laid = {name: laid_out(tensor, layouts[name]) for name, tensor in inputs.items()}
    inputs = {name: tensor.double() for name, tensor in laid.items()}
    needs_gradient = sorted(data.draw(st.sets(st.sampled_from(TENSORS[function]))))
    expected = outputs_and_gradients(function, inputs, needs_gradient)
    actual = outputs_and_gradients(function, laid, needs_gradient)
    for one, two in zip(actual, expected, strict=True):
        assert one.shape == two.shape and one.dtype == torch.float32
        if one.numel():
            assert (one - two).abs().max() <= 2e-4 * two.abs().max().clamp(min=1e-2)


@needs_kernel
def test_the_operators_of_the_kernels_check_what_they_are_given():
    """As somebody calls them who goes past the functions."""
    inputs = arguments("selective_scan")
    for name, tensor in inputs.items():
        wrong = {**inputs, name: tensor[..., :-1]}
        with pytest.raises(ValueError, match="must have shape"):
            torch.ops.videomamba.cpu_selective_scan(*wrong.values(), False, False)
    y, ungated, checkpoints = torch.ops.videomamba.cpu_selective_scan(*inputs.values(), False, True)
    *tensors, _ = inputs.values()
    for kept in ((ungated[:, 1:], checkpoints), (ungated, checkpoints[:0])):
        with pytest.raises(ValueError, match="`(ungated|checkpoints)` must have shape"):
            torch.ops.videomamba.cpu_selective_scan_backward(y, *tensors, *kept, False)
    x, weight, bias = arguments("causal_conv1d").values()
    with pytest.raises(ValueError, match=r"`bias` must have shape \(5,\)"):
        torch.ops.videomamba.cpu_causal_conv1d(x, weight.squeeze(1), bias[:2], False)
    with pytest.raises(ValueError, match=r"`grad_y` must have shape \(2, 7, 5\)"):
        torch.ops.videomamba.cpu_causal_conv1d_backward(x[:, 1:], x, weight.squeeze(1), bias, False)


def test_products_check_what_they_are_given():
    a, b, c = torch.randn(6, 5), torch.randn(5, 4), torch.randn(6, 4)
    for wrong, message in [
        ((a, b[1:], c), r"`b` must have shape \(5, 4\)"),
        ((a.double(), b, c), "`a` must have .*float32.* got .*float64"),
        ((a, b, c[:, :3]), r"`c` must have shape \(6, 4\)"),
        ((a, b, torch.randn(4, 6).T), "`c` must have .*rows without gaps"),
        ((a, b.to("meta"), c), "`b` must have .*device cpu.* got .*meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            products.prepare(*wrong, None)
