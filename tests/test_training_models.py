import json

import pytest
import torch
from accelerate.state import PartialState

from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.training.models import load_classifier, load_pretraining_model, load_processor
from tests.conftest import tiny_config
from tests.models import build
from videomamba_arguments import ModelArguments

NAMES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def processes():
    """What says something once for all processes wants to know them."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def save(folder, model_class=VideoMambaForVideoClassification, names=NAMES, **changes):
    config = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, **changes}
    model = build(model_class, **{"num_labels": len(names), **config})
    model.save_pretrained(folder)
    return model


def test_the_head_is_kept_for_the_same_labels_and_fresh_for_others(tmp_path):
    saved = save(tmp_path)
    same = load_classifier(ModelArguments(str(tmp_path)), "video", NAMES)
    assert torch.equal(same.classifier.weight, saved.classifier.weight)
    for names in (["x", "y", "z"], ["c", "b", "a"], ["a", "b"], None):
        other = load_classifier(ModelArguments(str(tmp_path)), "video", names)
        assert len(other.classifier.weight) == len(names or "1")
        assert other.config.problem_type == ("single_label_classification" if names else "regression")
        rows = min(len(other.classifier.weight), 3)
        assert not torch.equal(other.classifier.weight[:rows], saved.classifier.weight[:rows])
        for name, tensor in other.videomamba.state_dict().items():
            assert torch.equal(tensor, saved.videomamba.state_dict()[name])


def test_frames_and_resolution_change_with_their_position_embeddings(tmp_path):
    saved = save(tmp_path)
    with torch.no_grad():
        saved.videomamba.embeddings.temporal_position_embeddings.normal_()
    saved.save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path), num_frames=8, image_size=64, drop_path_rate=0.3)
    model = load_classifier(args, "video", NAMES)
    expected = VideoMambaForVideoClassification.from_pretrained(tmp_path).resize_position_embeddings(64, 8)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (model.config.num_frames, model.config.image_size, model.config.drop_path_rate) == (8, 64, 0.3)
    assert model.videomamba.layers[-1].drop_path.rate == 0.3
    assert load_processor(args, model, "video").num_frames == 8


def test_an_image_model_is_inflated_for_videos(tmp_path):
    save(tmp_path, VideoMambaForImageClassification, num_frames=None)
    VideoMambaImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path), num_frames=4, tubelet_size=2)
    model = load_classifier(args, "video", NAMES)
    assert (model.config.num_frames, model.config.tubelet_size) == (4, 2)
    processor = load_processor(args, model, "video")
    assert isinstance(processor, VideoMambaVideoProcessor) and list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.resample == VideoMambaVideoProcessor.resample  # not that of images
    image = load_classifier(ModelArguments(str(tmp_path), image_size=64), "image", NAMES)
    assert isinstance(image, VideoMambaForImageClassification) and image.config.image_size == 64
    with pytest.raises(ValueError, match="the data are images"):
        load_classifier(args, "image", NAMES)


@pytest.mark.parametrize("image_size", [None, 64])
def test_all_that_is_trained_gets_a_gradient_from_images_too(tmp_path, image_size):
    save(tmp_path)
    model = load_classifier(ModelArguments(str(tmp_path), image_size=image_size), "image", NAMES)
    size = model.config.image_size
    model(torch.randn(2, 3, size, size)).logits.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"videomamba.embeddings.temporal_position_embeddings"}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == without


def test_what_a_token_spans_does_not_change(tmp_path):
    save(tmp_path)
    assert load_classifier(ModelArguments(str(tmp_path), tubelet_size=1), "video", NAMES).config.tubelet_size == 1
    with pytest.raises(ValueError, match="--tubelet-size 2: .* has 1"):
        load_classifier(ModelArguments(str(tmp_path), tubelet_size=2), "video", NAMES)


def test_models_from_scratch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    model = load_classifier(
        ModelArguments(config=tmp_path / "config.json", num_frames=2, image_size=64), "video", NAMES
    )
    assert (model.config.num_frames, model.config.image_size, model.num_labels) == (2, 64, 3)
    model = load_classifier(ModelArguments(config=tmp_path / "config.json"), "image", None, drop_path_rate=0.1)
    assert (model.config.num_frames, model.num_labels, model.config.drop_path_rate) == (None, 1, 0.1)
    model = load_classifier(ModelArguments(config=tmp_path / "config.json", tubelet_size=2), "video", NAMES)
    assert model.config.tubelet_size == 2
    with torch.device("meta"):
        assert load_classifier(ModelArguments(size="small"), "image", NAMES).config.hidden_size == 384


def test_decoders_stay_with_their_layers(tmp_path, caplog):
    saved = build(VideoMambaForMaskedPreTraining, num_aligned_layers=2, alignment_size=24, alignment_loss="mse")
    saved.save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path))
    model = load_pretraining_model(args, "video", alignment_size=24)
    assert (model.config.aligned_layers, model.config.alignment_loss) == ([1, 2], "mse") and not caplog.text
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    other = load_pretraining_model(args, "video", alignment_size=24, num_aligned_layers=1)
    assert "fresh weights in alignment_decoders" in caplog.text and len(other.alignment_decoders) == 1
    for decoder in saved.alignment_decoders:
        assert not torch.equal(other.alignment_decoders[0].head.weight, decoder.head.weight)
    weight = saved.videomamba.layers[0].mixer.in_proj.weight
    assert torch.equal(other.videomamba.layers[0].mixer.in_proj.weight, weight)
    wider = load_pretraining_model(args, "video", alignment_size=32)
    assert wider.alignment_decoders[0].head.out_features == 32
