"""What can't be loaded is named in one line, in every script."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)

import app
import classify
import distill
import evaluate_retrieval
import evaluate_video
import finetune
import pretrain_umt
import pretrain_video_text
import push_to_hub
import search_videos
from modeling_videomamba import (
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaForVideoTextRetrieval,
    VideoMambaModel,
)
from modeling_videomamba.training.loading import load_model, load_pretrained, load_start
from modeling_videomamba.training.video_text_models import load_retrieval_model
from tests.conftest import NANO, NANO_VIDEO_TEXT
from tests.models import build

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4cac\nsize 5\n"


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.fixture
def model(tmp_path):
    shutil.copytree(NANO, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def video_text(tmp_path):
    shutil.copytree(NANO_VIDEO_TEXT, tmp_path / "video-text")
    return tmp_path / "video-text"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        rows = "".join(f"{NANO / 'example.mp4'},{label},a digit\n" for label in (0, 1))
        (folder / f"{split}.csv").write_text(f"path,label,caption\n{rows}")
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("model.safetensors", share) for share in (0.0, 0.0005, 0.1, 0.999)),
        ("model.safetensors", POINTER),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!"),
        ("config.json", 0.5),
        ("processor_config.json", 0.5),
        ("tokenizer_config.json", 0.5),
        ("tokenizer.json", 0.0),
        ("tokenizer.json", 0.5),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_file_is_named(video_text, name, content):
    path = video_text / name
    path.write_bytes(content) if isinstance(content, bytes) else cut(path, content)
    with pytest.raises(ValueError) as error:
        load_retrieval_model(str(video_text))
    assert str(error.value).startswith(f"{path} is damaged: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "model.safetensors.index.json"])
def test_damaged_shards_are_named(tmp_path, name):
    build().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    cut(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path / name} is damaged: "):
        load_model(VideoMambaForVideoClassification, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match=f"^{tmp_path} can't be loaded: [^\n]*$"):
        load_model(VideoMambaForVideoClassification, tmp_path)


def test_a_repository_that_was_downloaded_is_named_by_its_file(tmp_path, monkeypatch):
    """The cache of the Hub has one folder for each repository and, in it, one for each commit."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    (tmp_path / "models--org--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--model" / "refs" / "main").write_text("0" * 40)
    shutil.copytree(NANO, snapshot)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_model(VideoMambaForVideoClassification, "org/model").num_labels == 8
    cut(snapshot / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{snapshot / 'model.safetensors'} is damaged: "):
        load_model(VideoMambaForVideoClassification, "org/model")


def test_what_is_missing_or_of_another_shape_is_named(tmp_path):
    with pytest.raises(OSError, match=r"^nowhere/model: there is no such folder, and the Hub can't be reached$"):
        load_pretrained(VideoMambaModel, "nowhere/model")
    with pytest.raises(OSError, match=f"^{tmp_path} can't be loaded: [^\n]*$"):
        load_pretrained(VideoMambaModel, tmp_path)
    build(VideoMambaModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} has no weights for classifier.bias, classifier.weight$"):
        load_model(VideoMambaForVideoClassification, tmp_path)
    build(num_labels=7).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["id2label"].pop("6")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"classifier.\w+ must have the shape \(6,.*\), got \(7,.*\)$"):
        load_model(VideoMambaForVideoClassification, tmp_path)
    config["hidden_size"] = -1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{tmp_path} can't be loaded: [^\n]*hidden_size[^\n]*$"):
        load_model(VideoMambaForVideoClassification, tmp_path)


def test_weights_that_were_cut_end_every_script_with_one_line(model, video_text, data, tmp_path, exit_of):
    teacher = clip_teacher(tmp_path)
    for folder in (model, video_text, teacher):
        cut(folder / "model.safetensors")
    video, out = NANO / "example.mp4", tmp_path / "out"
    run = ("--data", data, "--output-dir", out, "--num-workers", 0, "--batch-size", 1)
    for damaged, script, *options in (
        (model, classify, video, "--model", model),
        (model, evaluate_video, model, *run),
        (model, app, "--model", model),
        (model, push_to_hub, model, "org/model", "--dry-run"),
        (model, finetune, "--model", model, *run),
        (model, distill, "--model", NANO, "--teacher", model, *run),
        (model, pretrain_umt, "--model", model, "--teacher", teacher, *run),
        (teacher, pretrain_umt, "--model", NANO, "--teacher", teacher, *run),
        (video_text, pretrain_video_text, "--model", video_text, *run),
        (model, pretrain_video_text, "--vision", model, "--text", video_text, *run),
        (video_text, evaluate_retrieval, video_text, *run),
        (video_text, search_videos, "index", NANO, out, "--model", video_text),
    ):
        message = exit_of(script, *options)
        name = f"{damaged / 'model.safetensors'} is damaged: "
        assert message.startswith("error: ") and name in message and "\n" not in message, (script, message)


def change(folder, weights=lambda tensors: tensors, **fields):
    """Other weights and fields of the configuration in a directory."""
    save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def with_nan(tensors):
    tensors["videomamba.norm.weight"][3] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        (lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()}, {}, "has no weights for"),
        (lambda tensors: {n: v for n, v in tensors.items() if "layers.1." not in n}, {}, "has no weights for"),
        (lambda tensors: {n: v for n, v in tensors.items() if "norm" not in n}, {}, "has no weights for"),
        (lambda tensors: {n: v for n, v in tensors.items() if "position" not in n}, {}, "has no weights for"),
        (lambda tensors: tensors, {"hidden_size": 64}, "must have the shape"),
        (lambda tensors: tensors, {"state_size": 8}, "must have the shape"),
        (lambda tensors: tensors, {"num_hidden_layers": 2}, "leaves no room for: videomamba.layers.2."),
        (with_nan, {}, "has weights that are not finite: videomamba.norm.weight"),
    ],
)
def test_an_encoder_is_the_checkpoint_s_or_it_is_refused(model, data, tmp_path, exit_of, weights, fields, message):
    """Only a head may be fresh."""
    change(model, weights, **fields)
    run = ("--data", data, "--output-dir", tmp_path / "out", "--num-workers", 0, "--batch-size", 1)
    for script, *options in (
        (classify, NANO / "example.mp4", "--model", model),
        (evaluate_video, model, *run),
        (finetune, "--model", model, *run),
        (distill, "--model", model, "--teacher", NANO, *run),
        (distill, "--model", NANO, "--teacher", model, *run),
        (pretrain_umt, "--model", model, "--teacher", clip_teacher(tmp_path), *run),
        (pretrain_video_text, "--vision", model, "--text", NANO_VIDEO_TEXT, *run),
    ):
        found = exit_of(script, *options)
        assert found.startswith("error: ") and str(model) in found and "\n" not in found, (script, found)
        assert message.replace("videomamba.", "") in found.replace("videomamba.", ""), (script, found)


def clip_teacher(tmp_path):
    folder = tmp_path / "teacher"
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder)
    return folder


def test_weights_of_other_modules_are_passed_over(model):
    build(VideoMambaForMaskedPreTraining, teacher_hidden_size=8).save_pretrained(model)
    _, fresh = load_start(VideoMambaForVideoClassification, model, ("classifier",), teacher_hidden_size=None)
    assert fresh == {"classifier"}
    build().save_pretrained(model)
    _, fresh = load_start(VideoMambaForMaskedPreTraining, model, ("alignment_decoders",))
    assert fresh == {"alignment_decoders"} and load_model(VideoMambaModel, model)


def test_a_model_of_another_type_is_refused(data, tmp_path, exit_of):
    ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model_type` must be 'videomamba', got 'resnet'"):
        VideoMambaModel.from_pretrained(tmp_path)
    run = ("--data", data, "--output-dir", tmp_path / "out")
    teacher = ("--teacher", clip_teacher(tmp_path))
    resnet, video_text = tmp_path / "config.json", NANO_VIDEO_TEXT / "config.json"
    refusal = "`model_type` must be '{}', got '{}'."
    for script, options, name, expected, found in (
        (finetune, ("--model", tmp_path), tmp_path, "videomamba", "resnet"),
        (finetune, ("--config", resnet), resnet, "videomamba", "resnet"),
        (finetune, ("--config", video_text), video_text, "videomamba", "videomamba_video_text"),
        (pretrain_umt, ("--model", tmp_path, *teacher), tmp_path, "videomamba", "resnet"),
        (pretrain_video_text, ("--config", resnet), resnet, "videomamba_video_text", "resnet"),
        (pretrain_video_text, ("--config", NANO / "config.json"), NANO, "videomamba_video_text", "videomamba"),
        (evaluate_video, (tmp_path,), tmp_path, "videomamba", "resnet"),
    ):
        message = exit_of(script, *options, *run)
        assert message.startswith(f"error: {name}"), message
        assert message.endswith(refusal.format(expected, found)), message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\xff", '{"hidden_size": -1}', '{"num_frames": 3, "tubelet_size": 2}']
)
def test_a_configuration_that_cannot_be_read_is_named(data, tmp_path, exit_of, content):
    path = tmp_path / "start.json"
    path.write_bytes(content.encode("latin-1"))
    for script in (finetune, pretrain_video_text):
        message = exit_of(script, "--config", path, "--data", data, "--output-dir", tmp_path / "out")
        if script is finetune or not content.startswith('{"'):
            assert message.startswith(f"error: {path}") and "\n" not in message, message


# Tokenizers


def test_a_model_without_its_tokenizer_is_refused(video_text, data, tmp_path, exit_of):
    (video_text / "tokenizer.json").unlink()
    reason = f"The tokenizer of {video_text} must know words, and knows only"
    with pytest.raises(ValueError, match=f"{reason}.*: tokenizer.json is missing there"):
        AutoProcessor.from_pretrained(video_text)
    with pytest.raises(ValueError, match=reason):
        pipeline("zero-shot-video-classification", str(video_text))
    out = tmp_path / "out"
    run = ("--data", data, "--output-dir", out, "--num-workers", 0, "--batch-size", 1)
    for script, *options in (
        (search_videos, "index", NANO, out, "--model", video_text),
        (evaluate_retrieval, video_text, *run),
        (pretrain_video_text, "--model", video_text, *run),
        (pretrain_video_text, "--config", video_text / "config.json", "--tokenizer", video_text, *run),
        (push_to_hub, video_text, "org/model", "--dry-run"),
    ):
        message = exit_of(script, *options)
        assert message.startswith("error: ") and reason in message and "\n" not in message, (script, message)


def test_a_query_with_a_model_that_lost_its_tokenizer_is_refused(video_text, tmp_path, exit_of, monkeypatch, capsys):
    index = ("index", NANO, tmp_path / "out", "--model", video_text, "--num-workers", 0)
    monkeypatch.setattr(sys, "argv", [search_videos.__file__, *map(str, index)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    search_videos.main()
    (video_text / "tokenizer.json").unlink()
    assert f"The tokenizer of {video_text} must know words" in exit_of(
        search_videos, "query", tmp_path / "out", "a dog"
    )
    assert f"The tokenizer of {video_text} must know words" in exit_of(app, "--index", tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(video_text):
    model = VideoMambaForVideoTextRetrieval.from_pretrained(video_text)
    model.resize_token_embeddings(60)
    model.save_pretrained(video_text)
    with pytest.raises(ValueError, match="the tokenizer knows 79 tokens, the model 60"):
        load_retrieval_model(str(video_text))
