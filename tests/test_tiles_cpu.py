"""Steps of inference in tiles, with each variant of the kernels that this processor has."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from modeling_videomamba import selective_scan
from modeling_videomamba.matrix_product_cpu import GrowingBuffer
from modeling_videomamba.selective_scan import causal_conv1d, has_compiled_kernels
from modeling_videomamba.tiles_cpu import (
    Queue,
    TiledConvolution,
    TiledLinear,
    TiledScan,
    norm_into,
    sum_into,
)
from tests.conftest import needs_kernel
from tests.scan_inputs import make_inputs

tiles_cpu = importlib.import_module("modeling_videomamba.tiles_cpu")
pytestmark = needs_kernel


@pytest.fixture
def queue(variant):
    return Queue()


def ordered(parts, reverse):
    return list(parts)[::-1] if reverse else list(parts)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("rank", [1, 12])
def test_a_sequence_can_be_scanned_in_tiles(queue, reverse, count, rank):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 47, 19, 16).items()}
    dt_low, dt_proj = torch.randn(2, 47, rank), torch.randn(19, rank)
    expected = selective_scan(**inputs | {"dt": dt_low @ dt_proj.T}, reverse=reverse)
    out = inputs["add"].clone()
    parameters = (inputs["A"], inputs["D"], inputs["dt_bias"], dt_proj)
    scan = TiledScan(*parameters, queue, batch=2, reverse=reverse)
    tensors = (inputs["x"], dt_low, inputs["B"], inputs["C"], out, inputs["z"], out)
    for piece in ordered(zip(*(tensor.tensor_split(count, dim=1) for tensor in tensors), strict=True), reverse):
        scan(*piece)
    assert torch.equal(out, inputs["add"])  # nothing has run so far
    queue.run()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_sequence_can_be_convolved_in_tiles(queue, reverse, count, with_bias):
    x, weight, bias = torch.randn(2, 47, 19), torch.randn(19, 1, 4), torch.randn(19) if with_bias else None
    out = torch.empty_like(x)
    convolution = TiledConvolution(weight, bias, queue, reverse=reverse)
    for piece in ordered(zip(x.tensor_split(count, 1), out.tensor_split(count, 1), strict=True), reverse):
        convolution(*piece)
    queue.run()
    torch.testing.assert_close(out, causal_conv1d(x, weight, bias, reverse=reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 15, 16, 40, 192])
def test_norm_and_sum_are_those_of_torch(queue, dtype, width):
    stream, mixed = 3 * torch.randn(2, 9, width)[:, 2:8], torch.randn(2, 6, width).to(dtype)
    weight, normed, total = torch.rand(width).to(dtype), torch.empty(2, 6, width, dtype=dtype), torch.empty(2, 6, width)
    norm_into(normed, stream, weight, 1e-5, queue)
    sum_into(total, stream, mixed, queue)
    queue.run()
    expected = F.rms_norm(stream, (width,), weight.float(), 1e-5)
    torch.testing.assert_close(normed, expected.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert torch.equal(total, stream + mixed.float())


def test_a_norm_of_large_and_of_no_values_is_finite(queue):
    stream, normed = torch.stack([torch.zeros(1, 40), torch.full((1, 40), 1e15)], 1), torch.empty(1, 2, 40)
    norm_into(normed, stream, torch.ones(40), 1e-5, queue)
    queue.run()
    assert torch.equal(normed[0, 0], torch.zeros(40))
    torch.testing.assert_close(normed[0, 1], torch.ones(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", [(200, 1), (1, 130), (400, 2)])
def test_a_linear_layer_takes_pieces(queue, dtype, strides):
    x, weight = torch.randn(1, 700, 200, dtype=dtype), torch.randn(52000, dtype=dtype).as_strided((130, 200), strides)
    out = torch.empty(1, 700, 130, dtype=dtype)
    linear = TiledLinear(weight, GrowingBuffer(), queue)
    for piece in zip(x.tensor_split(2, 1), out.tensor_split(2, 1), strict=True):
        linear(*piece)
    queue.run()
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_an_empty_piece_changes_nothing_around_it(queue):
    memory = torch.full((3, 5, 19), 7.0)
    empty, stream = memory[:0], torch.randn(0, 5, 19)
    TiledConvolution(torch.randn(19, 1, 4), None, queue, reverse=False)(stream, empty)
    norm_into(empty, stream, torch.ones(19), 1e-5, queue)
    sum_into(empty, stream, stream, queue)
    parameters = (torch.randn(19, 4), torch.randn(19), torch.randn(19), torch.randn(19, 2))
    scan = TiledScan(*parameters, queue, batch=0, reverse=False)
    scan(stream, torch.randn(0, 5, 2), torch.randn(0, 5, 4), torch.randn(0, 5, 4), empty)
    queue.run()
    assert (memory == 7).all()


def test_what_steps_need_is_kept_until_they_have_run(queue):
    total = torch.empty(1, 1000, 500)
    sum_into(total, torch.ones(1, 1000, 500), torch.full((1, 1000, 500), 2.0), queue)
    others = [torch.zeros(1, 1000, 500) for _ in range(4)]  # would take the place of what is gone
    queue.run()
    assert (total == 3).all() and all((other == 0).all() for other in others)


def test_memory_that_grows_leaves_steps_what_they_need(queue):
    memory, x = GrowingBuffer(), torch.randn(1, 700, 200)
    weights = [torch.randn(columns, 200) for columns in (130, 600)]
    outs = [torch.empty(1, 700, len(weight)) for weight in weights]
    for weight, out in zip(weights, outs, strict=True):
        TiledLinear(weight, memory, queue)(x, out)
    queue.run()
    for weight, out in zip(weights, outs, strict=True):
        torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_pieces_are_checked():
    assert has_compiled_kernels("cpu", torch.float32) and not has_compiled_kernels("cpu", torch.float64)
    queue = Queue()
    A, D, dt_bias, dt_proj = torch.randn(3, 4), torch.randn(3), torch.randn(3), torch.randn(3, 2)
    for name, wrong in {"D": torch.randn(4), "dt_bias": torch.randn(1, 3), "dt_proj": torch.randn(4, 2)}.items():
        parameters = {"D": D, "dt_bias": dt_bias, "dt_proj": dt_proj} | {name: wrong}
        with pytest.raises(ValueError, match=f"`{name}` must have shape"):
            TiledScan(A, **parameters, queue=queue, batch=1, reverse=False)
    scan = TiledScan(A, D, dt_bias, dt_proj, queue, batch=1, reverse=False)
    x, dt, B, C, out = (torch.randn(1, 5, width) for width in (3, 2, 4, 4, 3))
    for piece, message in [
        ((x, dt, B.double(), C, out), "`B` must have .*float32.* got .*float64"),
        ((x, x, B, C, out), r"`dt` must have shape \(1, 5, 2\)"),
        ((x, dt, B, C, torch.empty(1, 3, 5).mT), r"`y` must have .* rows without gaps, got .* strides \(15, 1, 5\)"),
        ((x, dt, B, C, out, x[:, :4]), r"`z` must have shape \(1, 5, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            scan(*piece)
    convolution = TiledConvolution(torch.randn(3, 1, 4), torch.randn(3), queue, reverse=False)
    convolution(x[:, :2], out[:, :2])
    with pytest.raises(ValueError, match=r"`the tile before` must have shape \(1, 3, 3\)"):
        convolution(x[:, 2:], out[:, 2:])
    with pytest.raises(ValueError, match="`hidden_states` must have .*float32"):
        norm_into(out, x.double(), D, 1e-5, queue)
    with pytest.raises(ValueError, match=r"`mixed` must have shape \(1, 5, 3\)"):
        sum_into(out, x, dt, queue)
