"""
What is particular to the Triton kernels: chunks, blocks, and the compiler. On a GPU if there is one, else under the
interpreter of Triton (see conftest.py). The parity of all backends is in test_selective_scan.py.
"""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_videomamba.selective_scan_naive import causal_conv1d as naive_conv
from modeling_videomamba.selective_scan_naive import selective_scan as naive_scan
from tests.scan_inputs import DEVICE, SMALL_BLOCKS, assert_same, make_inputs

pytest.importorskip("triton")
convolution = importlib.import_module("modeling_videomamba.causal_conv1d_triton")
kernels = importlib.import_module("modeling_videomamba.selective_scan_triton")
triton_kernels = importlib.import_module("modeling_videomamba.triton_kernels")

make_inputs = functools.partial(make_inputs, device=DEVICE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of channels, several tiles in a chunk, several chunks, several groups of chunks."""
    for constant, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(kernels, constant, value)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "state", "without", "reverse"),
    [
        (1, 19, 6, 4, (), False),
        (1, 1, 3, 16, ("z",), True),
        (1, 5, 5, 3, ("add",), True),
        (2, 13, 1, 8, ("z", "add"), False),
        (1, 8, 4, 64, ("dt_bias",), True),
        (1, 9, 2, 1, ("z", "dt_bias", "add"), False),
    ],
)
def test_outputs_and_gradients_are_those_of_the_recurrence(batch, length, channels, state, without, reverse):
    inputs = make_inputs(batch, length, channels, state, without=without)
    assert_same(kernels.selective_scan, naive_scan, inputs.values(), reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_chunk_is_enough(monkeypatch, reverse):
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 1)
    launched, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda kernel, *args, **kwargs: launched.append(kernel))
    kernels.selective_scan(*make_inputs(length=19).values(), reverse)
    assert launched == [kernels._scan_kernel]
    monkeypatch.setattr(kernels, "launch", launch)
    assert_same(kernels.selective_scan, naive_scan, make_inputs(length=19).values(), reverse)


def test_blocks_as_large_as_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    inputs = make_inputs(1, 67, 33, 16)
    assert_same(kernels.selective_scan, naive_scan, inputs.values(), True)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_chunks_may_be_empty(monkeypatch, reverse):
    """Eleven steps in eight chunks are two each, and none for the last two."""
    monkeypatch.setattr(kernels, "MIN_CHUNK_STEPS", 1)
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 8)
    assert kernels._num_chunks(1, 11, 3) == 8
    assert_same(kernels.selective_scan, naive_scan, make_inputs(1, 11, 3, 2).values(), reverse)


@pytest.mark.parametrize(("most", "channels"), [(16, 2), (4, 1)])
def test_many_states_leave_room_for_few_channels(monkeypatch, most, channels):
    monkeypatch.setattr(kernels, "BLOCK_STATES", most)
    assert kernels._block(3, 5) == {"N": 8, "E": channels, "num_warps": 1}
    assert_same(kernels.selective_scan, naive_scan, make_inputs(1, 7, 3, 5).values(), False)


def test_sequences_of_several_dtypes_under_autocast():
    inputs = make_inputs(1, 9, 3, 4)
    for name, dtype in (("x", torch.bfloat16), ("B", torch.float16), ("D", torch.bfloat16), ("add", torch.bfloat16)):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(kernels.selective_scan, naive_scan, inputs.values(), False, 3e-2, 3e-2)


def test_small_time_steps_keep_their_digits():
    """`softplus(-16)` is 1e-7; by way of `log(1 + 1e-7)` it would be 1.2e-7."""
    inputs = [tensor.detach().abs() for tensor in list(make_inputs(1, 9, 2, 2).values())[:6]]
    inputs[1] = torch.linspace(-16, 4, 18, device=DEVICE).reshape(1, 9, 2)
    inputs[2], inputs[5] = -inputs[2], 0 * inputs[5]
    actual = kernels.selective_scan(*inputs, None, None, None, False)
    expected = naive_scan(*(tensor.double() for tensor in inputs), None, None, None, False)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "channels", "width", "with_bias"), [(35, 5, 4, True), (1, 3, 3, True), (6, 70, 1, False)]
)
def test_convolution(length, channels, width, with_bias, reverse):
    x = make_inputs(2, length, channels)["x"]
    weight = torch.randn(channels, 1, width, device=DEVICE).requires_grad_()
    bias = torch.randn(channels, device=DEVICE).requires_grad_() if with_bias else None
    assert_same(convolution.causal_conv1d, naive_conv, [x, weight, bias], reverse)


def test_nothing_is_kept_but_what_the_backward_pass_needs(monkeypatch):
    inputs, saved = make_inputs(1, 64, 4, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        monkeypatch.setattr(kernels, "MIN_CHUNK_STEPS", 32)
        kernels.selective_scan(*inputs.values(), False)
    assert len(saved) == 10 and max(saved) <= 64 * 16  # `add` is not among them
    with torch.no_grad():
        tensors = inputs.values()
        save = kernels.triton_selective_scan(*tensors, False, False)
    assert [tensor.numel() for tensor in save] == [64 * 4, 0, 0]


def test_gradients_are_the_same_each_time():
    inputs = list(make_inputs(1, 9, 3, 2).values())
    first, second = (torch.autograd.grad(kernels.selective_scan(*inputs, True).sum(), inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("without", [(), ("z", "dt_bias", "add")])
def test_as_operators_they_fulfil_the_contract_of_torch(without):
    inputs = list(make_inputs(1, 9, 3, 2, without=without).values())
    assert set(torch.library.opcheck(kernels.triton_selective_scan, (*inputs, True, True)).values()) == {"SUCCESS"}
    weight = torch.randn(3, 1, 2, device=DEVICE).requires_grad_()
    convolve = convolution.triton_causal_conv1d
    assert set(torch.library.opcheck(convolve, (inputs[0], weight, None, False)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("without", [(), ("z", "dt_bias", "add")])
def test_gradients_have_the_shapes_and_strides_that_are_promised(without):
    inputs = [
        tensor if tensor is None else tensor.detach() for tensor in make_inputs(1, 9, 3, 2, without=without).values()
    ]
    *tensors, add = inputs
    y, ungated, starts = kernels.triton_selective_scan(*inputs, True, True)
    backward = (kernels.triton_selective_scan_backward, (y, *tensors, ungated, starts, True, add is not None))
    weight, bias = torch.randn(3, 1, 2, device=DEVICE), torch.randn(3, device=DEVICE)
    convolution_backward = (convolution.triton_causal_conv1d_backward, (y, inputs[0], weight, bias, True))
    for operator, arguments in (backward, convolution_backward):
        assert torch.library.opcheck(operator, arguments, test_utils="test_faketensor") == {
            "test_faketensor": "SUCCESS"
        }


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_without_graph_breaks(backend, dynamic):
    def function(weight, inputs, reverse):
        x = convolution.causal_conv1d(inputs[0], weight, None, reverse)
        return kernels.selective_scan(x, *inputs[1:], reverse)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    weight = torch.randn(5, 1, 4, device=DEVICE).requires_grad_()
    for length in (9, 14):
        inputs = list(make_inputs(1, length, 5, 2).values())
        results = []
        for run in (function, compiled):
            y = run(weight, inputs, True)
            results.append([y, *torch.autograd.grad(y.sum(), [weight, *inputs])])
        torch.testing.assert_close(*results)


def test_exported_with_any_batch_and_length():
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return kernels.selective_scan(*inputs, False)

    def detached(*sizes):
        return tuple(tensor.detach() for tensor in make_inputs(*sizes).values())

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = tuple({0: batch, 1: length} if tensor.ndim == 3 else None for tensor in detached())
    with torch.no_grad():
        program = torch.export.export(Scan(), detached(), dynamic_shapes=(shapes,))
        inputs = detached(3, 7)
        torch.testing.assert_close(program.module()(*inputs), kernels.selective_scan(*inputs, False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    inputs = list(make_inputs(1, 9, 3, 2).values())
    expected = torch.autograd.grad(kernels.selective_scan(*inputs, True).sum(), inputs)
    checkpoint(kernels.selective_scan, *inputs, True, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close([tensor.grad for tensor in inputs], list(expected))


def test_it_says_why_it_can_not_run(monkeypatch):
    assert "CUDA" in triton_kernels.unavailable_reason("cpu")
    if not torch.cuda.is_available():
        assert "cuda" in triton_kernels.unavailable_reason("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_kernels.unavailable_reason("cuda") is None
    monkeypatch.setattr(triton_kernels, "IMPORT_ERROR", ImportError("No module named 'triton'"))
    assert "No module named 'triton'" in triton_kernels.unavailable_reason("cuda")


def run_script(script, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(
        command, env={**environment, **variables}, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_can_be_imported_without_triton():
    script = """
import sys, torch
sys.modules["triton"] = None
from modeling_videomamba import triton_kernels
torch.cuda.is_available = lambda: True
print(triton_kernels.unavailable_reason("cuda"))
"""
    assert "`triton` can't be imported" in run_script(script)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from modeling_videomamba import causal_conv1d_triton as convolution
from modeling_videomamba import selective_scan_triton as kernels

class Driver:
    def __init__(self, *target):
        self.get_current_target = lambda: GPUTarget(*target)
        self.get_current_device = lambda: target  # any key for the compiled kernels
        self.get_current_stream = lambda device: 0

def compile_only(kernel, num_programs, *arguments, **options):
    compiled = kernel.warmup(*arguments, grid=(num_programs,), **options)
    print(compiled.metadata.target.backend + kernel.__name__)

convolution.launch = kernels.launch = compile_only
for target, dtype, channels, state, optional in (
    (("cuda", 80, 32), torch.bfloat16, 40, 16, True), (("hip", "gfx942", 64), torch.float32, 1, 1, False)
):
    triton.runtime.driver.set_active(Driver(*target))
    x, dt, z, add = (torch.randn(1, 200, channels, dtype=dtype, requires_grad=True) for _ in range(4))
    B, C = (torch.randn(1, 200, state, dtype=dtype) for _ in range(2))
    A, D, dt_bias = torch.randn(channels, state), torch.randn(channels), torch.randn(channels)
    x = convolution.causal_conv1d(x, torch.randn(channels, 1, 4), dt_bias if optional else None, True)
    others = (z, dt_bias, add) if optional else (None, None, None)
    kernels.selective_scan(x, dt, A, B, C, D, *others, True).sum().backward()
"""


def test_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    """The interpreter takes more than the compiler does: types that change in a loop, for example."""
    names = {
        "_convolution_kernel", "_convolution_gradient_kernel", "_chunk_kernel", "_carry_kernel", "_scan_kernel",
        "_adjoint_kernel",
    }  # fmt: skip
    compiled = run_script(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert set(compiled) == {target + name for target in ("cuda", "hip") for name in names}
