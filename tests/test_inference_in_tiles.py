"""Inference on a CPU in tiles of the tokens changes nothing, and is left where something would miss the modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_videomamba import VideoMambaModel, layer_cpu
from modeling_videomamba import modeling_videomamba as modeling
from modeling_videomamba.layer_cpu import inference_buffers
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from tests.conftest import needs_kernel
from tests.models import assert_equal, build, video


@pytest.fixture
def small_tiles(monkeypatch):
    """Inference in many tiles; the lengths of what was scanned."""
    monkeypatch.setattr(layer_cpu, "TILE_SIZE", 1)
    monkeypatch.setattr(layer_cpu, "MIN_TILE_LENGTH", 4)
    lengths = []

    def recording(function):
        def record(*args, **kwargs):
            x = kwargs["x"] if "x" in kwargs else next(each for each in args if isinstance(each, torch.Tensor))
            lengths.append(x.shape[1])
            return function(*args, **kwargs)

        return record

    monkeypatch.setattr(modeling, "selective_scan", recording(modeling.selective_scan))
    monkeypatch.setattr(layer_cpu, "scan", recording(layer_cpu.scan))
    monkeypatch.setattr(layer_cpu.TiledScan, "__call__", recording(layer_cpu.TiledScan.__call__))
    return lengths


@needs_kernel
@pytest.mark.parametrize("scan_order", ["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"])
@pytest.mark.parametrize("is_image", [False, True])
def test_inference_in_tiles_changes_nothing(small_tiles, scan_order, is_image):
    model = build(VideoMambaModel, image_size=48, scan_order=scan_order)
    pixels = torch.randn(2, 3, 48, 48) if is_image else torch.randn(2, 4, 3, 48, 48)
    expected = model(pixels).last_hidden_state.detach()  # with gradients: whole
    length = 10 if is_image else 37
    assert set(small_tiles) == {length}
    small_tiles.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    in_tiles = scan_order == "spatial_first"  # the others scan permuted tokens
    assert max(small_tiles) < length if in_tiles else set(small_tiles) == {length}


@needs_kernel
def test_inference_in_tiles_is_left_to_modules_that_can(small_tiles):
    class Adapter(torch.nn.Module):
        """As parameter-efficient fine-tuning wraps a linear layer."""

        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    model, pixels = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        assert max(small_tiles) < 17
        for name in ("in_proj", "out_proj", "scans.0.x_proj", "scans.0.dt_proj"):
            wrapped = copy.deepcopy(model)
            for layer in wrapped.layers:
                layer.mixer.set_submodule(name, Adapter(layer.mixer.get_submodule(name)))
            small_tiles.clear()
            assert_equal(wrapped(pixels).last_hidden_state, expected)
            assert set(small_tiles) == {17}


@needs_kernel
def test_inference_in_tiles_is_not_for_modules_that_hooks_watch(small_tiles):
    model, pixels, seen = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32), {}
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        small_tiles.clear()
        projection = model.layers[1].mixer.out_proj
        projection.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, output=output))
        assert_equal(model(pixels).last_hidden_state, expected)
        assert small_tiles.count(17) == 2 and len(small_tiles) > 2  # both scans of that layer
        assert_equal(seen["output"], F.linear(seen["inputs"][0], projection.weight))


@needs_kernel
def test_inference_in_tiles_is_not_for_hooks_that_watch_everything(small_tiles):
    model, pixels = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with torch.no_grad():
            model(pixels)
    finally:
        handle.remove()
    assert set(small_tiles) == {17}


@needs_kernel
@pytest.mark.parametrize("watched", ["embeddings", "layers.0", "layers.1", "layers.2"])
def test_the_residual_stream_is_not_overwritten_where_a_hook_has_seen_it(small_tiles, watched):
    model, pixels, seen = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32), []
    hidden_states = model(pixels, output_hidden_states=True).hidden_states  # with gradients: nothing is overwritten
    with torch.no_grad():
        for one, two in zip(model(pixels, output_hidden_states=True).hidden_states, hidden_states, strict=True):
            assert_equal(one, two)
        module = model.get_submodule(watched)
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(pixels)
    before, after = seen[0], seen[1] if watched != "embeddings" else seen[1][0]
    index = 0 if watched == "embeddings" else int(watched[-1]) + 1
    assert_equal(after, hidden_states[index])
    if index:
        assert_equal(before, hidden_states[index - 1])
    else:
        assert torch.equal(before, pixels)


@needs_kernel
def test_inference_in_tiles_is_left_to_weights_that_are_there(small_tiles):
    model, pixels = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32)
    for layer in model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.mixer.in_proj)
    with torch.no_grad():
        model(pixels)
    assert set(small_tiles) == {17}


@needs_kernel
def test_inference_in_tiles_is_not_for_layers_elsewhere_or_in_training(small_tiles):
    model, pixels = build(VideoMambaModel), torch.randn(1, 4, 3, 32, 32)
    model.layers[1].train()
    with torch.no_grad():
        model(pixels)
        assert {17} < set(small_tiles)
        layer, tokens = model.layers[0], torch.randn(1, 17, model.config.hidden_size)
        buffers = inference_buffers(tokens)
        assert layer.to("meta")(tokens.to("meta"), None, buffers).device.type == "meta"


@needs_kernel
def test_inference_in_tiles_is_not_for_what_records_operators(small_tiles):
    model, pixels = build(VideoMambaModel, return_dict=False), torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, pixels, check_trace=False)
        assert set(map(int, small_tiles)) == {17}
        other = torch.randn_like(pixels)
        assert_equal(traced(other)[0], model(other)[0])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(pixels))[0].shape == (1, 17, model.config.hidden_size)


@needs_kernel
def test_inference_in_tiles_under_autocast_and_in_bfloat16(small_tiles):
    model = build(VideoMambaModel)
    pixels = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(pixels).last_hidden_state
        half = model.bfloat16()(pixels).last_hidden_state
    for actual in (autocast, half):
        assert (actual.float() - expected).norm() <= 3e-2 * expected.norm()


def test_long_videos_are_embedded_in_tiles():
    model, pixels = build(VideoMambaModel), video(frames=20)
    expected = model.embeddings(pixels)[0].detach()
    with torch.no_grad():
        assert_equal(model.embeddings(pixels)[0], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens[:, :9],
        lambda tokens: torch.cat([tokens, tokens], dim=1),
        lambda tokens: tokens[:1],
        lambda tokens: tokens.bfloat16(),
        lambda tokens: tokens.double(),
        lambda tokens: torch.stack([tokens, tokens], dim=-1)[..., 0],
        lambda tokens: tokens.mT.contiguous().mT,
        lambda tokens: tokens[:1].expand_as(tokens),
    ],
    ids=["fewer tokens", "more tokens", "fewer samples", "bfloat16", "float64", "apart", "transposed", "expanded"],
)
@torch.no_grad()
def test_a_hook_can_put_other_tokens_in_the_place_of_those_of_a_layer(change, monkeypatch):
    model = build(VideoMambaModel)
    model.layers[0].register_forward_hook(lambda module, inputs, tokens: change(tokens))
    actual = model(video()).last_hidden_state
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    torch.testing.assert_close(actual, model(video()).last_hidden_state, rtol=1e-4, atol=1e-4)
