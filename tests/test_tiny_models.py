"""Models of which any size can be 1: the kernels of a CPU compute what the modules do in float64."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_videomamba import VideoMambaForMaskedPreTraining, VideoMambaForVideoClassification, layer_cpu
from modeling_videomamba import modeling_videomamba as modeling
from tests.conftest import needs_kernel, tiny_config

SIZES = {
    "hidden_size": [1, 2, 8, 16, 17, 33],
    "num_hidden_layers": [1, 2],
    "state_size": [1, 2, 16],
    "conv_kernel": [1, 2, 4, 5],
    "expand": [1, 2],
    "time_step_rank": ["auto", 1, 3],
    "num_channels": [1, 2, 3],
    "num_labels": [1, 3],
    "num_frames": [None, 1, 2, 4],
    "patch_size": [1, 2],
    "image_size": [2, [2, 4]],
    "scan_order": list(modeling.SCANS),
}
configs = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SIZES.items()})


def model_and_pixels(changes, batch, model_class=VideoMambaForVideoClassification):
    torch.manual_seed(0)
    config = tiny_config(**changes)
    model = model_class(config).eval()
    return model, torch.randn(batch, config.num_frames or 1, config.num_channels, *config.input_size)


def assert_same(actual, expected, tolerance):
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        assert (actual[name] - tensor).abs().max() <= tolerance * tensor.abs().max().clamp(min=0.1), name


def outputs_and_gradients(model, pixels):
    with torch.no_grad():
        inference = model(pixels).logits
    logits = model(pixels).logits
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"inference": inference, "logits": logits.detach(), **gradients}


@needs_kernel
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs, st.sampled_from([1, 1, 2]))
def test_inference_and_gradients_of_any_size(monkeypatch, changes, batch):
    model, pixels = model_and_pixels(changes, batch)
    expected = outputs_and_gradients(copy.deepcopy(model).double(), pixels.double())
    with monkeypatch.context() as patch:
        patch.setattr(layer_cpu, "TILE_SIZE", 3)
        patch.setattr(layer_cpu, "MIN_TILE_LENGTH", 1)
        assert_same(outputs_and_gradients(model, pixels), expected, 1e-3)


@needs_kernel
@settings(max_examples=15, deadline=None)
@given(changes=configs, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_of_any_size(changes, dtype):
    model, pixels = model_and_pixels(changes, 1)
    expected = outputs_and_gradients(copy.deepcopy(model).double(), pixels.double())
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert_same({"inference": model(pixels).logits}, {"inference": expected["inference"]}, 0.2)
    assert_same(outputs_and_gradients(model.to(dtype), pixels), expected, 0.5)


@needs_kernel
@settings(max_examples=10, deadline=None)
@given(changes=configs)
def test_masked_pretraining_of_any_size(changes):
    changes = {**changes, "alignment_size": 2}
    model, pixels = model_and_pixels(changes, 2, VideoMambaForMaskedPreTraining)
    num_tokens = pixels.shape[1] * model.config.grid_size[0] * model.config.grid_size[1]
    mask = torch.arange(num_tokens).expand(2, -1) > 0  # one token is left
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(pixels.double(), mask)
        actual = model(pixels, mask)
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(actual[name], tensor.float(), rtol=1e-3, atol=1e-3)
