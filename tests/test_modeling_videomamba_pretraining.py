"""Masked pretraining: parity with the original implementation, and what masks do to the models."""

import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from modeling_videomamba import VideoMambaForMaskedPreTraining, VideoMambaForVideoClassification, VideoMambaModel
from modeling_videomamba.conversion import convert_checkpoint, rename
from modeling_videomamba.embeddings import temporal_first
from modeling_videomamba.modeling_videomamba import SCANS
from modeling_videomamba.modeling_videomamba_pretraining import alignment_loss, sinusoidal_positions, take_visible
from tests.conftest import load_golden, strip_prefix, tiny_config
from tests.models import assert_equal, build, video

PRETRAINING = {"num_hidden_layers": 4, "alignment_size": 24}


def build_pretraining(**changes):
    return build(VideoMambaForMaskedPreTraining, **{**PRETRAINING, **changes})


def random_mask(batch=2, tokens=16, hidden=10, seed=0):
    noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1) < hidden


# Parity with the original


@pytest.mark.parametrize("name", ["masked_pretraining", "masked_pretraining_multilayer"])
def test_masked_pretraining_is_that_of_the_original(tmp_path, name):
    tensors, _ = load_golden(name)
    torch.save({"model": strip_prefix(tensors, "state_dict.")}, tmp_path / "checkpoint.pth")
    convert_checkpoint(tmp_path / "checkpoint.pth").save_pretrained(tmp_path)
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(model) is VideoMambaForMaskedPreTraining
    pixel_values, hidden = tensors["input.pixel_values"].transpose(1, 2), tensors["input.mask"][:, 1:]
    outputs = model(pixel_values, hidden, teacher_features=tensors["input.target"])
    torch.testing.assert_close(outputs.aligned_features, tensors["output.aligned"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, tensors["output.loss"][0], rtol=0, atol=1e-4)
    outputs.loss.backward()
    expected = {rename(key): grad for key, grad in strip_prefix(tensors, "grad.").items()}
    assert expected.keys() == {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = expected[key].reshape(parameter.shape)
            assert (parameter.grad - grad).abs().max() <= 1e-3 * grad.abs().max(), key
    with torch.no_grad():
        features = model.eval()(pixel_values, hidden).aligned_features
    torch.testing.assert_close(features, tensors["output.aligned"], rtol=0, atol=1e-4)
    table = sinusoidal_positions(hidden.shape[1] + 1, 48, hidden.device)
    torch.testing.assert_close(table, tensors["aux.decoder_position_table"][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_frozen_is_what_no_loss_reaches(layers):
    model = build_pretraining(num_aligned_layers=layers).train()
    model(video(), random_mask(), teacher_features=torch.rand(layers, 2, 7, 24)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.freeze_unaligned()
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Only visible tokens enter the layers


@pytest.mark.parametrize("scan_order", list(SCANS))
@pytest.mark.parametrize("grad", [False, True])
def test_a_mask_that_hides_nothing_changes_nothing(scan_order, grad):
    model = build(VideoMambaModel, scan_order=scan_order)
    with torch.set_grad_enabled(grad):
        masked = model(video(), torch.zeros(2, 16, dtype=torch.bool), output_hidden_states=True)
        outputs = model(video(), output_hidden_states=True)
    assert_equal(masked.last_hidden_state, outputs.last_hidden_state)
    for one, other in zip(masked.hidden_states, outputs.hidden_states, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("scan_order", ["spatial_first", "temporal_first"])
def test_visible_tokens_are_a_sequence_of_their_own(scan_order):
    model, hidden = build(VideoMambaModel, scan_order=scan_order), random_mask()
    tokens, _ = model.embeddings(video())
    for row in range(2):
        order = temporal_first(4, 4, tokens.device)[0] if scan_order == "temporal_first" else torch.arange(17)
        visible = [index for index in order.tolist() if index == 0 or not hidden[row, index - 1]]
        stream = tokens[row : row + 1, visible]
        for layer in model.layers:
            stream = layer(stream)
        expected = torch.zeros(17, 32)
        expected[visible] = model.norm(stream)[0]
        expected = expected[[0] + [1 + index for index in range(16) if not hidden[row, index]]]
        with torch.no_grad():
            assert_equal(model(video(), hidden).last_hidden_state[row], expected)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(list(SCANS)),
    st.floats(0, 0.99),
    st.integers(1, 2),
)
def test_any_shape_and_any_share_of_hidden_tokens(frames, rows, columns, scan_order, share, layers):
    model = build_pretraining(scan_order=scan_order, num_aligned_layers=layers, alignment_interval=2)
    tokens = frames * rows * columns
    hidden = random_mask(tokens=tokens, hidden=int(share * tokens))
    length = 1 + tokens - int(share * tokens)
    pixel_values = video(frames=frames, height=16 * rows, width=16 * columns)
    outputs = model(pixel_values, hidden, output_hidden_states=True)
    assert outputs.aligned_features.shape == (layers, 2, length, 24)
    assert [state.shape for state in outputs.hidden_states] == [(2, length, 32)] * 5
    assert_equal(outputs.aligned_features.norm(dim=-1), torch.ones(layers, 2, length))
    with torch.no_grad():  # in pieces, which write over the streams that nobody holds
        assert_equal(model(pixel_values, hidden).aligned_features, outputs.aligned_features)
        alone = model(pixel_values[1:], hidden[1:]).aligned_features
    assert_equal(alone, outputs.aligned_features[:, 1:])


def test_images_are_masked_too():
    model = build_pretraining(num_frames=None)
    assert model(video()[:, 0], random_mask(tokens=4, hidden=3)).aligned_features.shape == (1, 2, 2, 24)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 16), r"boolean and of shape \(batch, T'P\) = \(2, 16\), got torch.float32 \(2, 16\)"),
        (torch.zeros(2, 17, dtype=torch.bool), r"got torch.bool \(2, 17\)"),
        (torch.zeros(1, 16, dtype=torch.bool), r"got torch.bool \(1, 16\)"),
        (torch.ones(2, 16, dtype=torch.bool).tril(3), "same number of tokens of each sample, got 4 to 5"),
    ],
)
def test_a_mask_that_does_not_fit_is_explained(mask, message):
    for model in (build(VideoMambaModel), build_pretraining()):
        with pytest.raises(ValueError, match=message):
            model(video(), mask)


def test_an_empty_batch_is_no_error():
    model = build_pretraining()
    assert model(video()[:0], torch.ones(0, 16, dtype=torch.bool)).aligned_features.shape[:2] == (1, 0)


# Losses and features


def test_losses_compare_directions():
    torch.manual_seed(0)
    student, teacher = F.normalize(torch.randn(2, 2, 3, 5, 8), dim=-1)
    cosine = (student * teacher).sum(-1)
    assert_equal(alignment_loss(student, teacher), (2 - 2 * cosine).mean((0, 2)))
    assert_equal(alignment_loss(student, teacher, "mse"), (2 - 2 * cosine).mean((0, 2)) / 8)
    assert_equal(alignment_loss(student, teacher, "smooth_l1").mean(), F.smooth_l1_loss(student, teacher))
    with pytest.raises(
        ValueError, match=r"must be of shape \(2, 3, 5, 8\) like `aligned_features`, got \(1, 3, 5, 8\)"
    ):
        alignment_loss(student, teacher[:1])
    with pytest.raises(ValueError, match="`kind` must be l2, mse or smooth_l1, got l1"):
        alignment_loss(student, teacher, "l1")


@pytest.mark.parametrize("kind", ["l2", "mse", "smooth_l1"])
def test_the_loss_of_the_configuration_is_used(kind):
    model, hidden = build_pretraining(alignment_loss=kind), random_mask()
    teacher = F.normalize(torch.randn(1, 2, 17, 24), dim=-1)
    visible = take_visible(teacher, hidden)
    for row in range(2):
        kept = [0] + [1 + index for index in range(16) if not hidden[row, index]]
        assert torch.equal(visible[:, row], teacher[:, row, kept])
    outputs = model(video(), hidden, teacher_features=visible)
    assert_equal(outputs.loss, alignment_loss(outputs.aligned_features, visible, kind).mean())


def test_a_configuration_without_so_many_layers_is_refused():
    with pytest.raises(StrictDataclassError, match="too small for `num_aligned_layers` 3 with `alignment_interval` 2"):
        tiny_config(num_hidden_layers=4, num_aligned_layers=3, alignment_interval=2)
    assert tiny_config(num_hidden_layers=5, num_aligned_layers=3, alignment_interval=2).aligned_layers == [0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build_pretraining(num_aligned_layers=2)
    expected = model(video(), random_mask()).aligned_features
    with torch.autocast("cpu", dtype):
        features = model(video(), random_mask()).aligned_features
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=3e-2)
    torch.testing.assert_close(model.to(dtype)(video(), random_mask()).aligned_features, expected, rtol=0, atol=3e-2)


def test_gradient_checkpointing_changes_nothing():
    model, hidden = build_pretraining().train(), random_mask()
    loss = model(video(), hidden, teacher_features=torch.ones(1, 2, 7, 24)).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(video(), hidden, teacher_features=torch.ones(1, 2, 7, 24)).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


# What is saved


def test_the_weights_load_into_a_classifier_and_an_encoder_with_one_call(tmp_path, caplog):
    model = build_pretraining()
    model.save_pretrained(tmp_path)
    assert "alignment_decoders.0.head.weight" in load_file(tmp_path / "model.safetensors")
    classifier, info = VideoMambaForVideoClassification.from_pretrained(
        tmp_path, num_labels=7, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    encoder, info = VideoMambaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.videomamba.state_dict().items():
        assert torch.equal(classifier.videomamba.state_dict()[name], tensor)
        assert torch.equal(encoder.state_dict()[name], tensor)
    assert "AutoModelForPreTraining" in json.loads((tmp_path / "config.json").read_text("utf-8"))["auto_map"]
    classifier.save_pretrained(tmp_path / "classifier")
    saved = json.loads((tmp_path / "classifier" / "config.json").read_text("utf-8"))
    assert "AutoModelForPreTraining" not in saved["auto_map"]
