"""The models: parity with the original implementation, and what Transformers' common model tests cover."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification

from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
)
from modeling_videomamba.conversion import convert_checkpoint, rename
from modeling_videomamba.embeddings import VideoMambaEmbeddings, resize_spatial_positions, resize_temporal_positions
from modeling_videomamba.modeling_videomamba import SCANS, VideoMambaDropPath
from modeling_videomamba.training.distillation import DistillationRun
from modeling_videomamba.training.losses import classification_loss, distillation_loss
from tests.conftest import load_golden, needs_kernel, strip_prefix, tiny_config
from tests.models import MODEL_CLASSES, assert_equal, build, main_output, video
from videomamba_arguments import DistillationArguments

# Parity with the original


def convert_golden(tmp_path, tensors, prefix):
    torch.save({"model": strip_prefix(tensors, prefix)}, tmp_path / "checkpoint.pth")
    convert_checkpoint(tmp_path / "checkpoint.pth").save_pretrained(tmp_path)
    return tmp_path


def assert_same_gradients(model, tensors, tolerance=1e-3):
    expected = {rename(name): grad for name, grad in strip_prefix(tensors, "grad.").items()}
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        grad = expected[name].reshape(parameter.shape)
        assert (parameter.grad - grad).abs().max() <= tolerance * grad.abs().max(), name


@pytest.mark.parametrize("name", ["video_classification", "video_classification_tubelet"])
def test_video_models_are_those_of_the_original(tmp_path, name):
    tensors, metadata = load_golden(name)
    model = AutoModelForVideoClassification.from_pretrained(convert_golden(tmp_path, tensors, "state_dict."))
    outputs = model(
        tensors["input.pixel_values"].transpose(1, 2), labels=tensors["input.labels"], output_hidden_states=True
    )
    torch.testing.assert_close(outputs.logits, tensors["output.logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, tensors["output.loss"][0], rtol=0, atol=1e-4)
    for layer in range(metadata["args"]["depth"]):
        residual, mixed = (tensors[f"output.layer{layer}.{part}"] for part in ("residual", "mixer_out"))
        torch.testing.assert_close(outputs.hidden_states[layer], residual, rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs.hidden_states[layer + 1], residual + mixed, rtol=0, atol=1e-4)
    outputs.loss.backward()
    assert_same_gradients(model, tensors)

    base = AutoModel.from_pretrained(tmp_path)
    pooled = base(tensors["input.pixel_values"].transpose(1, 2)).pooler_output
    torch.testing.assert_close(pooled, tensors["output.cls_feature"], rtol=0, atol=1e-4)


def test_image_models_are_those_of_the_original(tmp_path):
    tensors, _ = load_golden("image_classification")
    model = AutoModelForImageClassification.from_pretrained(convert_golden(tmp_path, tensors, "state_dict."))
    outputs = model(tensors["input.pixel_values"], labels=tensors["input.labels"])
    torch.testing.assert_close(outputs.logits, tensors["output.logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, tensors["output.loss"][0], rtol=0, atol=1e-4)
    outputs.loss.backward()
    assert_same_gradients(model, tensors)


def test_self_distillation_is_that_of_the_original(tmp_path):
    tensors, _ = load_golden("self_distillation")
    (tmp_path / "student").mkdir()
    (tmp_path / "teacher").mkdir()
    student = AutoModelForImageClassification.from_pretrained(convert_golden(tmp_path / "student", tensors, "student."))
    teacher = AutoModel.from_pretrained(convert_golden(tmp_path / "teacher", tensors, "teacher."))
    pixel_values = tensors["input.pixel_values"]
    with torch.no_grad():
        teacher_features = teacher(pixel_values).last_hidden_state
    normalised = F.normalize(teacher_features, dim=-1)
    torch.testing.assert_close(normalised, tensors["output.teacher_features"], rtol=0, atol=1e-4)
    outputs = student(pixel_values, labels=tensors["input.labels"])
    torch.testing.assert_close(outputs.logits, tensors["output.logits"], rtol=0, atol=1e-4)
    features = outputs.distillation_features
    torch.testing.assert_close(features, tensors["output.student_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, tensors["output.loss_classification"][0], rtol=0, atol=1e-4)
    distance = distillation_loss(features, teacher_features).mean()
    torch.testing.assert_close(distance, tensors["output.loss_distillation"][0], rtol=0, atol=1e-4)
    (outputs.loss + distance).backward()
    assert_same_gradients(student, tensors)

    # and so is what scripts/distill.py minimises
    labels = F.one_hot(tensors["input.labels"], student.config.num_labels).float()
    run = SimpleNamespace(
        mix=lambda batch: (pixel_values, labels),
        loss=classification_loss,
        teacher=teacher,
        accelerator=SimpleNamespace(autocast=nullcontext),
        distillation=DistillationArguments("teacher"),
    )
    student.zero_grad()
    losses = DistillationRun.objective(run, student, {})
    torch.testing.assert_close(losses["loss"].mean(), outputs.loss + distance)
    losses["loss"].mean().backward()
    assert_same_gradients(student, tensors)


def test_position_embeddings_are_resized_as_in_the_original():
    tensors, _ = load_golden("position_embedding_resize")
    cases = {key.rsplit(".", 1)[0] for key in tensors}
    for case in cases:
        before, after = tensors[f"{case}.input"], tensors[f"{case}.output"]
        kind, old, new = case.split("_")[0], int(case.split("_")[1]), int(case.split("_")[3])
        if kind == "spatial":
            resized = resize_spatial_positions(before, (old, old), (new, new))
        else:
            resized = resize_temporal_positions(before, new)
        assert torch.equal(resized, after), case
    assert len(cases) == 4


# Sizes


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7), ("small", 26), ("middle", 74), ("base", 98)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = VideoMambaForImageClassification(
            VideoMambaConfig(num_frames=None, num_labels=1000, **VIDEOMAMBA_SIZES[size])
        )
    assert round(model.num_parameters() / 1e6) == millions


def test_initialisation_is_that_of_mamba():
    torch.manual_seed(0)
    model = VideoMambaModel(tiny_config(hidden_size=128, initializer_range=0.02))
    mixer = model.layers[0].mixer
    for scan in mixer.scans:
        torch.testing.assert_close(scan.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
        assert torch.equal(scan.D, torch.ones(256))
        dt = F.softplus(scan.dt_bias)
        assert dt.min() * 1.001 >= 0.001 and dt.max() <= 0.1 * 1.001 and dt.log().std() > 1
        assert scan.dt_proj.weight.abs().max() <= 8**-0.5
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.1)
    assert model.embeddings.temporal_position_embeddings.abs().max() == 0


# What every Transformers model does


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("num_frames", [4, None])
def test_saving_and_loading_keeps_outputs_and_writes_safetensors_only(tmp_path, model_class, num_frames):
    model = build(model_class, num_frames=num_frames)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert_equal(main_output(loaded(video())), main_output(model(video())))


def test_a_sharded_checkpoint_loads(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = VideoMambaForVideoClassification.from_pretrained(tmp_path)
    assert_equal(loaded(video()).logits, model(video()).logits)


def test_the_encoder_and_a_new_head_load_from_a_classifier(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert_equal(base(video()).last_hidden_state, model.videomamba(video()).last_hidden_state)
    other = AutoModelForVideoClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert other(video()).logits.shape == (2, 9)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_hidden_states(model_class):
    model = build(model_class)
    outputs = model(video(), output_hidden_states=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 1 + 4 * 4, 32)] * 4
    base = model.base_model
    torch.testing.assert_close(base.norm(outputs.hidden_states[-1]), base(video()).last_hidden_state)
    assert model(video()).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(video()).hidden_states) == 4


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_tuples_equal_model_outputs(model_class):
    model = build(model_class)
    for tensor, other in zip(model(video(), return_dict=False), model(video()).to_tuple(), strict=True):
        assert_equal(tensor, other)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_outputs_are_deterministic_and_batching_equals_one_by_one(model_class):
    model = build(model_class)
    together = main_output(model(video(3)))
    assert_equal(together, main_output(model(video(3))))
    for index in range(3):
        alone = main_output(model(video(3)[index : index + 1]))
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-4, atol=1e-5)


def train_step(model, pixel_values):
    torch.manual_seed(0)
    loss = model(pixel_values, labels=torch.tensor([1, 3])).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    plain, checkpointed = build(drop_path_rate=0.5).train(), build(drop_path_rate=0.5).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    loss, grads = train_step(plain, video())
    other_loss, other_grads = train_step(checkpointed, video())
    torch.testing.assert_close(other_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_class", [VideoMambaForVideoClassification, VideoMambaForImageClassification])
def test_every_parameter_is_trained(model_class):
    is_image = model_class is VideoMambaForImageClassification
    model = build(model_class, num_frames=None if is_image else 4)
    _, grads = train_step(model, video()[:, 0] if is_image else video())
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    unused = [name for name, grad in grads.items() if grad.abs().sum() == 0]
    # the head reads the class token, where the last forward scan begins: its decay has nothing to act on there
    assert unused == ["videomamba.layers.2.mixer.scans.0.A_log"]


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        (None, 5, torch.tensor([1, 3]), F.cross_entropy),
        ("single_label_classification", 5, torch.tensor([1, 3]), F.cross_entropy),
        ("multi_label_classification", 5, torch.eye(5)[:2], F.binary_cross_entropy_with_logits),
        ("regression", 1, torch.tensor([0.5, 2.0]), lambda logits, y: F.mse_loss(logits.squeeze(-1), y)),
        ("regression", 5, torch.randn(2, 5), F.mse_loss),
    ],
)
def test_the_loss_follows_the_problem_type(problem_type, num_labels, labels, loss):
    model = build(problem_type=problem_type, num_labels=num_labels)
    outputs = model(video(), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


def test_left_out_arguments():
    outputs = build()(pixel_values=video())
    assert outputs.loss is None and outputs.distillation_features is None and list(outputs) == ["logits"]
    with pytest.raises(TypeError, match="pixel_values"):
        build()()
    with pytest.raises(TypeError, match="output_attentions"):
        build()(video(), output_attentions=True)


def test_the_input_embeddings_are_the_patch_embeddings():
    model = build()
    assert model.get_input_embeddings() is model.videomamba.embeddings.patch_embeddings
    assert model.videomamba.get_input_embeddings() is model.get_input_embeddings()


def test_drop_path_rates_grow_with_depth_and_the_expectation_is_kept():
    model = build(drop_path_rate=0.4)
    assert [round(layer.drop_path.rate, 6) for layer in model.videomamba.layers] == [0.0, 0.2, 0.4]
    assert_equal(model(video()).logits, build()(video()).logits)  # not in evaluation
    assert build(drop_path_rate=0.3, num_hidden_layers=1).videomamba.layers[0].drop_path.rate == 0.3
    torch.manual_seed(0)
    drop_path = VideoMambaDropPath(0.25).train()
    dropped = drop_path(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert (dropped.amax((1, 2)) == dropped.amin((1, 2))).all()  # whole samples


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scan_order", ["spatial_first", "spatiotemporal_v2"])
def test_half_precision(tmp_path, dtype, scan_order):
    model = build(scan_order=scan_order)
    model.save_pretrained(tmp_path)
    half = VideoMambaForVideoClassification.from_pretrained(tmp_path, dtype=dtype)
    logits, reference = half(video()).logits, model(video()).logits
    assert logits.dtype == dtype
    assert (logits.float() - reference).abs().max() <= 3e-2 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_in_half_precision(dtype):
    model = build().train()
    with torch.autocast("cpu", dtype=dtype):
        loss, grads = train_step(model, video())
    reference, _ = train_step(build().train(), video())
    assert (loss - reference).abs() <= 3e-2 * reference.abs()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


def test_device_map(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    loaded = VideoMambaForVideoClassification.from_pretrained(tmp_path, device_map="auto")
    assert_equal(loaded(video()).logits.cpu(), model(video()).logits)
    layers = {f"videomamba.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    others = dict.fromkeys(["videomamba.embeddings", "videomamba.norm", "classifier"], "cpu")
    split = VideoMambaForVideoClassification.from_pretrained(
        tmp_path, device_map={**layers, **others}, offload_folder=tmp_path / "offload"
    )
    assert_equal(split(video()).logits, model(video()).logits)


# Compilation


@pytest.mark.parametrize("scan_order", list(SCANS))
def test_torch_compile_needs_no_graph_break(scan_order):
    model = build(scan_order=scan_order, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video()).logits, model(video()).logits, rtol=1e-4, atol=1e-5)
    images = video()[:, 0]
    torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_torch_compile_with_inductor_trains():
    model = build(num_hidden_layers=1).train()
    _, expected = train_step(model, video())
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.zero_grad()
    _, grads = train_step(torch.compile(model, fullgraph=True), video())
    for name, grad in expected.items():
        actual = dict(model.named_parameters())[name].grad
        assert (actual - grad).abs().max() <= 1e-3 * grad.abs().max(), name
    assert len(grads) == len(expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_torch_export(model_class):
    model = build(model_class)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (video(2),), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    for size in (1, 2, 5):
        torch.testing.assert_close(
            main_output(program.module()(video(size))), main_output(model(video(size))), rtol=1e-4, atol=1e-5
        )


# Any size of input


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 5).map(lambda steps: 2 * steps),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    scan_order=st.sampled_from(list(SCANS)),
)
def test_any_number_of_frames_and_any_resolution(frames, rows, columns, scan_order):
    model = build(tubelet_size=2, num_hidden_layers=1, scan_order=scan_order)
    outputs = model.videomamba(video(1, frames, 16 * rows, 16 * columns))
    assert outputs.last_hidden_state.shape == (1, 1 + frames // 2 * rows * columns, 32)
    assert outputs.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("image_size", [48, (32, 64)])
def test_resizing_position_embeddings_makes_the_resizing_on_the_fly_permanent(tmp_path, image_size):
    model = build()
    torch.nn.init.normal_(model.videomamba.embeddings.temporal_position_embeddings)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixel_values = video(1, 6, height, width)
    expected = model(pixel_values).logits
    assert model.resize_position_embeddings(image_size=image_size, num_frames=6) is model
    assert (model.config.image_size, model.config.num_frames) == (image_size, 6)
    assert model.videomamba.embeddings.temporal_position_embeddings.shape == (1, 6, 32)
    torch.testing.assert_close(model(pixel_values).logits, expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForVideoClassification.from_pretrained(tmp_path)(pixel_values).logits, expected)


def test_resizing_to_a_wrong_size_is_refused_and_changes_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StrictDataclassError, match="image_size.*50"):
        model.resize_position_embeddings(image_size=50)
    assert model.config.image_size == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_image_is_a_video_of_one_frame_without_temporal_position():
    model = build()
    torch.nn.init.normal_(model.videomamba.embeddings.temporal_position_embeddings)
    image = video(2, 1)
    still = model(image[:, 0]).logits
    assert not torch.allclose(still, model(image).logits)
    torch.nn.init.zeros_(model.videomamba.embeddings.temporal_position_embeddings)
    torch.testing.assert_close(still, model(image).logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 32), "shape"),
        ((2, 3, 4, 32, 32), "3 channels"),
        ((2, 1, 32, 32), "3 channels"),
        ((2, 3, 3, 32, 32), "frames.*tubelet_size.*2.*got 3"),
        ((2, 0, 3, 32, 32), "frames.*got 0"),
        ((2, 4, 3, 40, 32), "patch_size.*16.*40 x 32"),
        ((2, 4, 3, 32, 0), "patch_size.*16.*32 x 0"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(shape, message):
    with pytest.raises(ValueError, match=message):
        build(tubelet_size=2)(torch.zeros(shape))


# From images to videos


@pytest.mark.parametrize("tubelet_size", [1, 2, 3])
def test_an_image_model_becomes_a_video_model(tmp_path, tubelet_size):
    image_model = build(VideoMambaForImageClassification, num_frames=None)
    image_model.save_pretrained(tmp_path)
    kernel = image_model.get_input_embeddings().projection.weight.detach().clone()
    frames = 4 * tubelet_size
    model = VideoMambaForVideoClassification.from_pretrained(tmp_path).inflate(frames, tubelet_size)
    assert (model.config.num_frames, model.config.tubelet_size) == (frames, tubelet_size)
    inflated = model.get_input_embeddings().projection.weight
    assert inflated.shape == (32, 3, tubelet_size, 16, 16)
    torch.testing.assert_close(inflated[:, :, tubelet_size // 2], kernel[:, :, 0])
    assert inflated.abs().sum().item() == pytest.approx(kernel.abs().sum().item(), rel=1e-5)
    assert model.videomamba.embeddings.temporal_position_embeddings.abs().max() == 0
    torch.testing.assert_close(model(video()[:, 0]).logits, image_model(video()[:, 0]).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "video")
    loaded = AutoModelForVideoClassification.from_pretrained(tmp_path / "video")
    torch.testing.assert_close(loaded(video(1, frames)).logits, model(video(1, frames)).logits)
    with pytest.raises(ValueError, match="inflate.*num_frames"):
        model.inflate(8)


# Scan orders


def by_hand(model, pixel_values):
    """The model with the tokens of the temporal scans permuted by loops, outside the mixer."""
    config, base = model.config, model.videomamba
    hidden_states, num_steps = base.embeddings(pixel_values)
    num_patches = (hidden_states.shape[1] - 1) // num_steps
    order = [0]
    for patch in range(num_patches):
        for step in range(num_steps):
            order.append(1 + step * num_patches + patch)
    for layer in base.layers:
        x, z = layer.mixer.in_proj(layer.norm(hidden_states)).chunk(2, dim=-1)
        total = torch.zeros_like(x)
        for (kind, reverse), scan in zip(SCANS[config.scan_order], layer.mixer.scans, strict=True):
            sequence = torch.stack([x[:, i] for i in (order if kind == "temporal" else range(x.shape[1]))], dim=1)
            forward_scan = copy.deepcopy(scan)
            forward_scan.reverse = forward_scan.conv1d.reverse = False
            sequence = sequence.flip(1) if reverse else sequence
            y = forward_scan(sequence)
            y = y.flip(1) if reverse else y
            for position, token in enumerate(order if kind == "temporal" else range(x.shape[1])):
                total[:, token] += y[:, position]
        hidden_states = hidden_states + layer.mixer.out_proj(total * F.silu(z))
    return base.norm(hidden_states)


@pytest.mark.parametrize("scan_order", list(SCANS))
def test_each_scan_order_is_a_permutation_of_tokens(scan_order):
    model = build(scan_order=scan_order)
    with torch.no_grad():
        expected = by_hand(model, video(2, 4, 32, 48))
        actual = model.videomamba(video(2, 4, 32, 48)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_scan_orders_differ_with_the_same_weights():
    outputs = {}
    for order in ("spatial_first", "temporal_first", "spatiotemporal_v1"):
        outputs[order] = build(scan_order=order)(video()).logits
    orders = list(outputs)
    for index, order in enumerate(orders):
        for other in orders[index + 1 :]:
            assert (outputs[order] - outputs[other]).abs().max() > 1e-3
    assert len(build(scan_order="spatiotemporal_v2").videomamba.layers[0].mixer.scans) == 4
    image = video()[:, 0]  # with one frame all orders are the same
    for order in orders[1:]:
        torch.testing.assert_close(build(scan_order=order)(image).logits, build(scan_order=orders[0])(image).logits)


def test_tokens_are_the_class_token_and_then_the_patches_frame_by_frame():
    torch.manual_seed(0)
    embeddings = VideoMambaEmbeddings(tiny_config())
    for parameter in embeddings.parameters():
        torch.nn.init.normal_(parameter)
    pixel_values = video(1, 4)
    tokens, num_steps = embeddings(pixel_values)
    kernel, bias = embeddings.patch_embeddings.projection.weight, embeddings.patch_embeddings.projection.bias
    positions, times = embeddings.position_embeddings[0], embeddings.temporal_position_embeddings[0]
    assert num_steps == 4
    torch.testing.assert_close(tokens[0, 0], embeddings.cls_token[0, 0] + positions[0])
    for frame in range(4):
        for patch in range(4):
            row, column = 16 * (patch // 2), 16 * (patch % 2)
            pixels = pixel_values[0, frame, :, row : row + 16, column : column + 16]
            expected = (kernel[:, :, 0] * pixels).sum((1, 2, 3)) + bias + positions[1 + patch] + times[frame]
            torch.testing.assert_close(tokens[0, 1 + 4 * frame + patch], expected, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_is_no_error():
    with torch.no_grad():
        assert build(VideoMambaModel)(torch.empty(0, 4, 3, 32, 32)).last_hidden_state.shape[:2] == (0, 17)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_kernel)])
@pytest.mark.parametrize("sizes", [(1.0, 1.0), (0.1, 1.0)])  # both scans too large, or the last one alone
def test_scans_beyond_float16_train_under_autocast(monkeypatch, backend, sizes):
    """Before the gate the scans exceed float16, after it they don't; the gradient of the gate needs the former."""
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", backend)
    model, labels = build(), torch.tensor([0, 1])
    with torch.no_grad():
        model.videomamba.embeddings.position_embeddings[..., 0] = 30.0
        for layer in model.videomamba.layers:
            x, z = layer.mixer.in_proj.weight.chunk(2)
            x[:, 0], z[:, 0] = 5.0, -2.0
            for scan, size in zip(layer.mixer.scans, sizes, strict=True):
                scan.dt_bias.fill_(1.0)
                scan.x_proj.weight.mul_(size)
    model.train()
    reference = model(video(), labels=labels).loss
    with torch.autocast("cpu", torch.float16):
        loss = model(video(), labels=labels).loss
    (loss * 128).backward()
    assert (loss - reference).abs() <= 3e-2 * reference.abs()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
