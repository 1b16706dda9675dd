"""Products on matrix units; without such units here there is nothing to test but that PyTorch's are taken."""

import ctypes
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from modeling_videomamba.linear_and_norm import linear
from modeling_videomamba.selective_scan import BACKEND_VARIABLE

products = importlib.import_module("modeling_videomamba.matrix_product_cpu")
library = importlib.import_module("modeling_videomamba.cpu_library")

needs_units = pytest.mark.skipif(products.unavailable_reason() is not None, reason=str(products.unavailable_reason()))


def error(product, a, b):
    """The largest one, relative to the sums of absolute values."""
    a, b = a.double(), b.double()
    return ((product.double() - a @ b).abs() / (a.abs() @ b.abs()).clamp(min=1e-30)).max().item()


def matrix(rows, columns, layout):
    """A random matrix with rows, columns, or neither without gaps."""
    wide = torch.randn(rows, columns + 3) if layout != "columns" else torch.randn(columns, rows + 3)
    if layout == "neither":
        return torch.randn(rows, columns, 2)[..., 0]
    return wide[:, :columns] if layout == "rows" else wide[:, :rows].T


both_ways = pytest.mark.parametrize("in_steps", [False, True])


@pytest.fixture
def calls(monkeypatch):
    """The products that the matrix units are asked for."""
    done = []

    def record(a, b, c, memory, prepare=products.prepare):
        done.append((*a.shape, b.shape[1]))
        return prepare(a, b, c, memory)

    monkeypatch.setattr(products, "prepare", record)
    return done


@needs_units
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 900),
    st.integers(1, 600),
    *[st.sampled_from(["rows", "columns", "neither"])] * 2,
    st.integers(1, 17),
    st.booleans(),
)
def test_products_of_any_shape_and_layout_are_as_exact_as_float32(
    rows, inner, columns, a_layout, b_layout, threads, in_steps
):
    a, b = matrix(rows, inner, a_layout), matrix(inner, columns, b_layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = products.cpu_matrix_product(a, b, in_steps)
    finally:
        torch.set_num_threads(before)
    assert error(product, a, b) < 5e-7


@needs_units
@both_ways
def test_products_are_no_less_exact_than_those_of_torch(in_steps):
    torch.manual_seed(0)
    for rows, inner, columns in ((500, 32, 300), (700, 600, 600), (500, 1152, 300)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        assert error(products.cpu_matrix_product(a, b, in_steps), a, b) < 1.5 * error(a @ b, a, b)


@needs_units
@both_ways
def test_all_digits_of_float32_count(in_steps):
    a = torch.full((40, 64), 1 + 2.0**-23)
    b = torch.zeros(64, 40)
    b[5] = 1.0
    assert torch.equal(products.cpu_matrix_product(a, b, in_steps), torch.full((40, 40), 1 + 2.0**-23))
    assert torch.equal(products.cpu_matrix_product(b.T, a.T, in_steps), torch.full((40, 40), 1 + 2.0**-23))


@needs_units
@both_ways
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_large_and_small_values(scale, in_steps):
    a, b = torch.randn(70, 90) * scale, torch.randn(90, 50)
    assert error(products.cpu_matrix_product(a, b, in_steps), a, b) < 5e-7
    largest = torch.full((33, 1), torch.finfo(torch.float32).max)
    assert torch.equal(products.cpu_matrix_product(largest, torch.ones(1, 33), in_steps), largest.expand(33, 33))


@needs_units
@both_ways
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(value, in_steps):
    a, b = torch.randn(40, 64), torch.randn(64, 50)
    a[3, 7] = value
    is_finite = products.cpu_matrix_product(a, b, in_steps).isfinite()
    assert not is_finite[3].any() and is_finite[:3].all() and is_finite[4:].all()


@needs_units
@both_ways
@pytest.mark.parametrize("shape", [(0, 40, 50), (40, 0, 50), (40, 50, 0)])
def test_empty_products(shape, in_steps):
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    assert torch.equal(products.cpu_matrix_product(a, b, in_steps), a @ b)


@needs_units
def test_gradients_are_those_of_torch(calls):
    hidden_states = torch.randn(2, 300, 96, requires_grad=True)
    weight = torch.randn(128, 96, requires_grad=True)
    grad = torch.randn(2, 300, 128)
    actual = torch.autograd.grad(linear(hidden_states, weight), (hidden_states, weight), grad)
    assert len(calls) == 3
    expected = torch.autograd.grad(F.linear(hidden_states, weight), (hidden_states, weight), grad)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


@needs_units
def test_only_gradients_that_are_wanted_are_computed(calls):
    hidden_states, weight = torch.randn(300, 96), torch.randn(128, 96, requires_grad=True)
    linear(hidden_states, weight).sum().backward()
    assert len(calls) == 2 and weight.grad is not None
    weight.requires_grad_(False)
    linear(hidden_states.requires_grad_(), weight).sum().backward()
    assert len(calls) == 4


@needs_units
def test_the_operator_fulfils_the_contract_of_torch():
    a, b = torch.randn(40, 70, requires_grad=True), torch.randn(90, 70, requires_grad=True)
    result = torch.library.opcheck(torch.ops.videomamba.cpu_matrix_product.default, (a, b.T))
    assert set(result.values()) == {"SUCCESS"}


@needs_units
def test_the_counter_of_torch_counts_products():
    hidden_states, weight = torch.randn(300, 96), torch.randn(128, 96, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear(hidden_states, weight)
    assert counter.get_total_flops() == 2 * 300 * 96 * 128


@needs_units
@both_ways
def test_products_are_the_same_each_time(in_steps):
    a, b = torch.randn(500, 300), torch.randn(300, 200)
    first = products.cpu_matrix_product(a, b, in_steps)
    assert all(torch.equal(products.cpu_matrix_product(a, b, in_steps), first) for _ in range(4))


@needs_units
@both_ways
def test_products_of_torch_are_not_disturbed(in_steps):
    """PyTorch's own library uses the same units, with settings of its own, between our products."""
    a, b = torch.randn(300, 300).bfloat16(), torch.randn(300, 300).bfloat16()
    expected = a @ b
    for _ in range(3):
        products.cpu_matrix_product(a.float(), b.float(), in_steps)
        assert torch.equal(a @ b, expected)


@needs_units
def test_products_are_left_to_torch_where_it_is_asked_for(calls, monkeypatch):
    hidden_states, weight = torch.randn(300, 96), torch.randn(128, 96)
    linear(hidden_states, weight)
    assert calls == [(300, 96, 128)]
    linear(hidden_states[:4], weight)  # too little to do
    linear(hidden_states, weight[:16])
    linear(hidden_states.double(), weight.double())
    linear(hidden_states.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(hidden_states, weight).dtype == torch.bfloat16
    torch.compile(linear, fullgraph=True, backend="eager")(hidden_states, weight)
    linear(hidden_states.to("meta"), weight.to("meta"))
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    linear(hidden_states, weight)
    assert len(calls) == 1


@needs_units
@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch has no such setting")
@pytest.mark.parametrize(("precision", "taken"), [("none", 1), ("tf32", 1), ("ieee", 0), ("bf16", 0)])
def test_the_precision_that_torch_is_set_to_is_respected(calls, precision, taken):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        linear(torch.randn(300, 96), torch.randn(128, 96))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert len(calls) == taken


@pytest.fixture
def fresh_library():
    def forget():
        for function in (library.load_library, products.matrix_kernels, products.unavailable_reason):
            function.cache_clear()

    forget()
    yield
    forget()


def test_without_units_the_products_are_those_of_torch(monkeypatch, fresh_library):
    class Kernels:
        videomamba_version = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: library.VERSION)
        videomamba_has_matrix_units = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)

    monkeypatch.setattr(products, "load_library", lambda *variants: Kernels())
    assert "needs a processor with" in products.unavailable_reason()
    hidden_states, weight = torch.randn(300, 96), torch.randn(128, 96)
    assert torch.equal(linear(hidden_states, weight), F.linear(hidden_states, weight))
    with pytest.raises(ImportError, match="needs a processor with"):
        products.cpu_matrix_product(hidden_states, weight.T)


def test_without_the_kernel_the_products_are_those_of_torch(monkeypatch, fresh_library):
    monkeypatch.setattr(library.Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(products.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "was not compiled" in products.unavailable_reason()
    hidden_states, weight = torch.randn(300, 96), torch.randn(128, 96)
    assert torch.equal(products.linear(hidden_states, weight), F.linear(hidden_states, weight))
