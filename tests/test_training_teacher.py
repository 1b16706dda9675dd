"""The CLIP teacher, what it keeps on disk, and the probes of what the student has learnt from it."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from sklearn.datasets import make_blobs
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip import CLIPConfig

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.conversion import convert_checkpoint
from modeling_videomamba.training.diagnosis import RunError
from modeling_videomamba.training.evaluation import Predictions
from modeling_videomamba.training.probing import probe_accuracy, probe_features
from modeling_videomamba.training.teacher import ClipTeacher, load_teacher
from modeling_videomamba.training.teacher_cache import TeacherCache, digest
from tests.conftest import load_golden, strip_prefix, tiny_config
from tests.models import assert_equal, video
from tests.test_modeling_videomamba_pretraining import build_pretraining

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "image_size": 32,
    "patch_size": 16,
    "initializer_factor": 4.0,
}


@pytest.fixture(autouse=True)
def processes():
    """What says something once for all processes wants to know them."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def clip(**changes):
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, **changes})).eval()


def student(**changes):
    return tiny_config(**{"alignment_size": 24, **changes})


@pytest.mark.parametrize("layers", [1, 2])
def test_the_teacher_is_that_of_the_original(tmp_path, layers):
    tensors, _ = load_golden("clip_teacher")
    torch.save(strip_prefix(tensors, "state_dict."), tmp_path / "clip.pth")
    convert_checkpoint(tmp_path / "clip.pth", num_attention_heads=4).model.save_pretrained(tmp_path / "clip")
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    teacher = ClipTeacher(model, student(image_size=64, num_aligned_layers=layers))
    features, attention = teacher(tensors["input.pixel_values"].transpose(1, 2), output_attention=True)
    torch.testing.assert_close(features, tensors[f"output.features_last{layers}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(attention.flatten(0, 1), tensors["output.cls_attention"], rtol=0, atol=1e-4)


def expected_features(model, frames, layers, **options):
    """With nothing but what Transformers offers: of frames `(frames, 3, height, width)`."""
    outputs = model.vision_model(frames, output_hidden_states=True, **options)
    found = []
    for layer in layers:
        states = outputs.hidden_states[layer + 1]
        tokens = torch.cat([states[:, :1].mean(0), states[:, 1:].flatten(0, 1)])
        found.append(F.normalize(model.visual_projection(tokens), dim=-1))
    return torch.stack(found)


@torch.no_grad()
def test_layers_and_attention_are_those_of_transformers():
    model, pixel_values = clip(), video()
    teacher = ClipTeacher(model, student(num_aligned_layers=2, alignment_interval=2))
    features, attention = teacher(pixel_values, output_attention=True)
    assert teacher.layers == [0, 2] and features.shape == (2, 2, 17, 24) and attention.shape == (2, 4, 4)
    eager = clip()
    eager.set_attn_implementation("eager")
    for row in range(2):
        assert_equal(features[:, row], expected_features(model, pixel_values[row], [0, 2]))
        weights = eager.vision_model(pixel_values[row], output_attentions=True).attentions[-1]
        assert_equal(attention[row], weights.mean(1)[:, 0, 1:])
    assert teacher(pixel_values)[1] is None


@pytest.mark.parametrize("image_size", [28, 56])  # as many patches as the student has, and more
@torch.no_grad()
def test_pixels_are_resized_to_the_patches_of_the_student(image_size):
    """CLIP L/14 with the patches of 16 pixels of a student."""
    model, pixel_values = clip(patch_size=14, image_size=image_size), video(batch=1)
    features, _ = ClipTeacher(model, student())(pixel_values)
    small = F.interpolate(pixel_values[0], (28, 28), mode="bicubic", align_corners=False)
    expected = expected_features(model, small, [2], interpolate_pos_encoding=image_size != 28)
    assert_equal(features[:, 0], expected)


@torch.no_grad()
def test_images_and_tubelets():
    model, pixel_values = clip(), video(frames=6)
    image, _ = ClipTeacher(model, student(num_frames=None))(pixel_values[:, 0])
    assert_equal(image[:, 0], expected_features(model, pixel_values[0, :1], [2]))
    features, _ = ClipTeacher(model, student(num_frames=6, tubelet_size=3))(pixel_values)
    assert_equal(features[:, 1], expected_features(model, pixel_values[1, 1::3], [2]))


def test_it_is_frozen_and_stays_as_it_is_tested():
    teacher = ClipTeacher(clip(attention_dropout=0.5), student()).train()
    features, _ = teacher(video())
    assert not teacher.training and not teacher.model.training and not features.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(features, teacher(video())[0])
    with torch.autocast("cpu", torch.bfloat16):
        half, attention = teacher(video(), output_attention=True)
    assert half.dtype == attention.dtype == torch.float32
    torch.testing.assert_close(half, features, rtol=0, atol=3e-2)


def test_a_teacher_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="24 channels.*`alignment_size` is 32"):
        ClipTeacher(clip(), student(alignment_size=32))
    with pytest.raises(ValueError, match="3 layers, too few for `num_aligned_layers` 2 with `alignment_interval` 3"):
        ClipTeacher(clip(), student(num_hidden_layers=4, num_aligned_layers=2, alignment_interval=3))


@torch.no_grad()
def test_pixels_are_normalised_as_the_teacher_wants(tmp_path, caplog):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "eos_token_id": 8}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))  # of which it is a part
    whole.save_pretrained(tmp_path)
    processor = VideoMambaVideoProcessor.for_model(student())
    raw, mean, std = (
        torch.rand(2, 4, 3, 32, 32),
        *(torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)),
    )
    pixel_values = (raw - mean) / std
    features, _ = load_teacher(str(tmp_path), student(), processor)(pixel_values)
    assert "has no image processor" in caplog.text
    assert_equal(features[:, 0], expected_features(whole, pixel_values[0], [2]))

    # one width for both towers, also where the vision model's own configuration has another
    config = CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 512}, projection_dim=24)
    CLIPModel(config).save_pretrained(tmp_path / "other")
    assert load_teacher(str(tmp_path / "other"), student(), processor).model.visual_projection.out_features == 24

    clip_processor = CLIPImageProcessor()
    clip_processor.save_pretrained(tmp_path)
    features, _ = load_teacher(str(tmp_path), student(), processor)(pixel_values)
    own_mean, own_std = (
        torch.tensor(values).view(3, 1, 1) for values in (clip_processor.image_mean, clip_processor.image_std)
    )
    torch.testing.assert_close(
        features[:, 0], expected_features(whole, (raw[0] - own_mean) / own_std, [2]), rtol=1e-3, atol=1e-4
    )


def test_a_model_without_projection_is_no_teacher(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    processor = VideoMambaVideoProcessor.for_model(student())
    with pytest.raises(ValueError, match=r"has no weights for visual_projection\.weight"):
        load_teacher(str(tmp_path), student(), processor)


# The cache


def batch_of(indices, valid=None, seed=0):
    return {
        "pixel_values": video(len(indices), seed=seed),
        "indices": torch.tensor(indices),
        "names": [f"{index}.mp4" for index in indices],
        "valid": torch.tensor([True] * len(indices) if valid is None else valid),
    }


@pytest.mark.parametrize("with_attention", [False, True])
def test_what_the_teacher_said_is_not_asked_again(tmp_path, with_attention):
    teacher, asked = ClipTeacher(clip(), student(num_aligned_layers=2)), []

    def teach(pixel_values):
        asked.append(len(pixel_values))
        return teacher(pixel_values, output_attention=with_attention)

    cache = TeacherCache(tmp_path, teach, {"teacher": digest(teacher)})
    batch = batch_of([3, 2000, 5], [True, True, False])
    features, attention = teach(batch["pixel_values"])
    asked.clear()
    first = cache(batch)
    again = TeacherCache(tmp_path, teach, {"teacher": digest(teacher)})(batch)
    assert asked == [3]
    for one in (first, again):
        torch.testing.assert_close(one[0][:, :2], features[:, :2], rtol=0, atol=1e-3)
        assert one[0].shape == features.shape and one[0].dtype == torch.float32
        assert (one[1] is None) == (attention is None)
        if attention is not None:
            assert torch.equal(one[1][:2], attention[:2])
    assert torch.equal(first[0][:, :2], again[0][:, :2])
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"00000003.safetensors", "00002000.safetensors"}
    # one that is missing is asked about with all of its batch, and what was known stays
    cache(batch_of([3, 7], seed=1))
    assert asked == [3, 2] and torch.equal(cache(batch_of([3, 7]))[0][:, 0], first[0][:, 0]) and asked == [3, 2]
    nothing = cache(batch_of([8, 9], [False, False]))
    assert nothing[0].shape == (2, 2, 17, 24) and not list(tmp_path.rglob("*8.safetensors"))


def test_a_cache_of_something_else_is_refused(tmp_path):
    teacher = ClipTeacher(clip(), student())
    cache = TeacherCache(tmp_path, teacher, {"frames": 8})
    with pytest.raises(ValueError, match="is of another run, with other settings: frames 8 -> 16"):
        TeacherCache(tmp_path, teacher, {"frames": 16})
    cache(batch_of([1]))
    with pytest.raises(RunError, match=r"is of 1\.mp4, but clip 1 is other\.mp4: the data have changed"):
        cache({**batch_of([1]), "names": ["other.mp4"]})
    changed = ClipTeacher(clip(), student())
    assert digest(changed) == digest(teacher) == digest(teacher)
    assert digest(teacher, {"num_attention_heads": 4}) != digest(teacher, {"num_attention_heads": 2})
    changed.model.visual_projection.weight.data[0, 0] += 1
    assert digest(changed) != digest(teacher)


# Probes


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_probes_tell_groups_apart(probe):
    points, labels = make_blobs(200, n_features=8, centers=4, random_state=0)
    predictions = [
        Predictions(
            {index: torch.tensor(points[index]).float() for index in rows},
            {index: float(labels[index]) for index in rows},
        )
        for rows in (range(150), range(150, 200))
    ]
    assert probe_accuracy(probe, *predictions) == 1.0
    shuffled = Predictions(predictions[1].scores, {index: float((index * 7) % 4) for index in predictions[1].labels})
    assert probe_accuracy(probe, predictions[0], shuffled) < 0.6
    with pytest.raises(RunError, match="no example of the probe.s test split can be read"):
        probe_accuracy(probe, predictions[0], Predictions())


def test_features_of_clips_are_the_class_token_and_the_mean_of_the_others():
    model = build_pretraining()
    with torch.no_grad():
        features = probe_features(model, video(), 16)
        stream = model.videomamba(video(), output_hidden_states=True).hidden_states[-2]
    normed = stream / stream.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(features, torch.cat([normed[:, 0], normed[:, 1:].mean(1)], -1), rtol=1e-4, atol=1e-5)
