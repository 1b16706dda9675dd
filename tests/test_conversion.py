import argparse
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoProcessor, BertTokenizer, CLIPVisionModelWithProjection

from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaForVideoTextRetrieval,
    VideoMambaModel,
)
from modeling_videomamba.conversion import CheckpointError, convert_checkpoint
from modeling_videomamba.conversion_vim import has_middle_class_token
from modeling_videomamba.labels import load_labels
from modeling_videomamba.training.loading import load_model
from tests.conftest import NANO, load_golden, strip_prefix
from tests.launching import call

KINDS = {
    "video_classification": ("state_dict.", "video"),
    "video_classification_tubelet": ("state_dict.", "video"),
    "image_classification": ("state_dict.", "image"),
    "self_distillation": ("student.", "student"),
    "masked_pretraining": ("state_dict.", "masked-pretraining"),
    "masked_pretraining_multilayer": ("state_dict.", "masked-pretraining"),
}


def original(name="video_classification"):
    tensors, _ = load_golden(name)
    return strip_prefix(tensors, KINDS[name][0])


def save(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_kind_and_configuration_come_from_the_tensors(tmp_path, name):
    _, metadata = load_golden(name)
    args = metadata.get("args") or metadata["student_args"]
    converted = convert_checkpoint(save(tmp_path, original(name)))
    config = converted.model.config
    assert converted.kind == KINDS[name][1]
    assert config.image_size == args["img_size"] and config.patch_size == args["patch_size"]
    assert config.hidden_size == args["embed_dim"] and config.num_hidden_layers == args["depth"]
    assert config.num_frames == args.get("num_frames") and config.tubelet_size == args.get("kernel_size", 1)
    assert config.teacher_hidden_size == args.get("teacher_embed_dim")
    if converted.kind == "masked-pretraining":
        assert type(converted.model) is VideoMambaForMaskedPreTraining
        names = ("num_aligned_layers", "alignment_size")
        assert [getattr(config, name) for name in names] == [args["clip_return_layer"], args["clip_output_dim"]]
        return
    assert config.num_labels == args["num_classes"]
    assert (config.state_size, config.conv_kernel, config.expand) == (16, 4, 2)
    is_video = converted.kind == "video"
    assert type(converted.model) is (VideoMambaForVideoClassification if is_video else VideoMambaForImageClassification)
    assert dict(converted.processor.crop_size) == {"height": args["img_size"], "width": args["img_size"]}


PREFIXES = ["", "module.", "backbone.", "encoder.", "module.backbone.", "_orig_mod.", "module._orig_mod."]


@pytest.mark.parametrize("wrap", ["top", "model", "module", "model in module"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_and_prefixes(tmp_path, wrap, prefix):
    state_dict = {prefix + name: tensor for name, tensor in original().items()}
    content = {
        "top": state_dict,
        "model": {"model": state_dict, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
        "module": {"module": state_dict, "optimizer": {"state": {}}},
        "model in module": {"module": {"model": state_dict}},
    }[wrap]
    converted = convert_checkpoint(save(tmp_path, content))
    expected = convert_checkpoint(save(tmp_path, original()))
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(converted.model.state_dict()[name], tensor)


def test_a_checkpoint_without_head_becomes_the_encoder(tmp_path):
    state_dict = {name: tensor for name, tensor in original().items() if not name.startswith("head.")}
    converted = convert_checkpoint(save(tmp_path, state_dict))
    assert type(converted.model) is VideoMambaModel
    whole = convert_checkpoint(save(tmp_path, original())).model.videomamba
    pixel_values = torch.randn(1, 4, 3, 48, 48)
    expected = whole(pixel_values).pooler_output
    torch.testing.assert_close(converted.model(pixel_values).pooler_output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["extra", "layers.0.mixer.extra", "layers.some.extra"])
def test_a_tensor_without_a_place_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"no place for.*{name.split('.')[-1]}"):
        convert_checkpoint(save(tmp_path, {**original(), name: torch.zeros(3)}))


def test_names_of_parts_that_were_compiled(tmp_path):
    """`torch.compile` of each layer leaves its mark in the middle of a name."""
    tensors = {re.sub(r"^(layers\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in original().items()}
    assert sum("_orig_mod" in name for name in tensors) > 20
    converted, expected = (convert_checkpoint(save(tmp_path, content)) for content in (tensors, original()))
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(converted.model.state_dict()[name], tensor)


@pytest.mark.parametrize("args", [argparse.Namespace(model="vim_tiny_patch16_224"), {"model": "vim_small_patch16"}])
def test_a_checkpoint_of_vim_is_refused_by_its_arguments(tmp_path, args):
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: a checkpoint of Vim, by the arguments.*class token"):
        convert_checkpoint(save(tmp_path, {"model": original("image_classification"), "args": args}))
    args = argparse.Namespace(model="videomamba_tiny")
    convert_checkpoint(save(tmp_path, {"model": original("image_classification"), "args": args}))


def trained_positions(side, width, smoothness, seed=0):
    """The class token's embedding and those of patches, neighbours alike as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(1, width, side, side, generator=generator)
    for _ in range(smoothness):
        grid = F.avg_pool2d(F.pad(grid, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    patches = 0.02 * F.normalize(grid, dim=1).flatten(2).transpose(1, 2) * width**0.5
    return torch.cat([0.02 * torch.randn(1, 1, width, generator=generator) + 0.01, patches + 0.01], 1)


@pytest.mark.parametrize("smoothness", [0, 1, 2, 4])
@pytest.mark.parametrize("side", [7, 14, 28])
@pytest.mark.parametrize("width", [192, 576])
def test_position_embeddings_tell_vim(side, width, smoothness):
    for seed in range(5):
        positions = trained_positions(side, width, smoothness, seed)
        assert not has_middle_class_token(positions)
        first, patches = positions[:, :1], positions[:, 1:]
        middle = side * side // 2
        vim = torch.cat([patches[:, :middle], first, patches[:, middle:]], 1)
        assert has_middle_class_token(vim) == (smoothness > 0)  # those of no training can't be told


def test_a_checkpoint_of_vim_is_refused_by_its_position_embeddings(tmp_path):
    tensors = original("image_classification")
    width = tensors["cls_token"].shape[-1]
    patches = trained_positions(14, width, 2)
    tensors["pos_embed"] = torch.cat([patches[:, 1:99], patches[:, :1], patches[:, 99:]], 1)
    with pytest.raises(CheckpointError, match="of Vim, by its position embeddings.*class token in the middle"):
        convert_checkpoint(save(tmp_path, tensors))
    tensors["pos_embed"] = patches
    assert convert_checkpoint(save(tmp_path, tensors)).kind == "image"


def test_names_that_collide_without_their_prefix_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="prefix"):
        convert_checkpoint(save(tmp_path, {**original(), "module.cls_token": torch.zeros(1, 1, 48)}))


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    state_dict = {**original(), "pos_embed": torch.zeros(10)}
    with pytest.raises(CheckpointError, match="not a VideoMamba checkpoint: `pos_embed` is"):
        convert_checkpoint(save(tmp_path, state_dict))
    state_dict = original()
    del state_dict["layers.1.mixer.out_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks.*layers\.1\.mixer\.out_proj\.weight"):
        convert_checkpoint(save(tmp_path, state_dict))
    state_dict = original()
    state_dict["layers.1.mixer.D"] = state_dict["layers.1.mixer.D"][:-1]
    with pytest.raises(CheckpointError, match=r"layers\.1.*scans\.0\.D.*\(95,\) instead of \(96,\)"):
        convert_checkpoint(save(tmp_path, state_dict))


def test_another_model_is_refused_by_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="not a VideoMamba checkpoint: it lacks `cls_token`, `pos_embed`"):
        convert_checkpoint(save(tmp_path, {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}))


def test_layers_between_aligned_ones_are_an_argument(tmp_path):
    path = save(tmp_path, original("masked_pretraining_multilayer"))
    assert convert_checkpoint(path, alignment_interval=3).model.config.aligned_layers == [0, 3]
    with pytest.raises(CheckpointError, match="too small for `num_aligned_layers` 2 with `alignment_interval` 4"):
        convert_checkpoint(path, alignment_interval=4)


def test_an_argument_for_another_kind_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="`text_num_attention_heads` is for a video-text checkpoint, this is a v"):
        convert_checkpoint(save(tmp_path, original()), text_num_attention_heads=4)
    for path, kind in ((original(), "video"), (clip_state_dict(), "CLIP visual encoder")):
        with pytest.raises(CheckpointError, match=f"`alignment_interval` is for masked pretraining, this is a {kind}"):
            convert_checkpoint(save(tmp_path, path), alignment_interval=1)
    with pytest.raises(CheckpointError, match="`num_attention_heads` is for a CLIP visual encoder, this is a video"):
        convert_checkpoint(save(tmp_path, original()), num_attention_heads=4)
    with pytest.raises(CheckpointError, match="`labels` has 2 names, the checkpoint has 0 classes"):
        convert_checkpoint(save(tmp_path, clip_state_dict()), ["a", "b"])


def test_a_decoder_too_many_or_too_few_is_named(tmp_path):
    state_dict = original("masked_pretraining_multilayer")
    del state_dict["clip_decoder.1.head.bias"]
    with pytest.raises(CheckpointError, match=r"lacks: `alignment_decoders\.1\.head\.bias`"):
        convert_checkpoint(save(tmp_path, state_dict))
    state_dict = {**original("masked_pretraining"), "clip_decoder.0.mask_token": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"no place for: `alignment_decoders\.0\.mask_token`"):
        convert_checkpoint(save(tmp_path, state_dict))
    state_dict = {**original("masked_pretraining"), "norm_f.weight": torch.zeros(48)}
    with pytest.raises(CheckpointError, match="two of its tensors have one place"):
        convert_checkpoint(save(tmp_path, state_dict))


# CLIP's visual encoders


def clip_state_dict():
    return strip_prefix(load_golden("clip_teacher")[0], "state_dict.")


def test_a_visual_encoder_of_clip(tmp_path):
    state_dict = clip_state_dict()
    converted = convert_checkpoint(save(tmp_path, state_dict), num_attention_heads=4)
    config = converted.model.config
    assert (config.image_size, config.patch_size, config.num_hidden_layers, config.projection_dim) == (64, 16, 3, 24)
    assert converted.kind == "CLIP visual encoder" and dict(converted.processor.crop_size) == {
        "height": 64,
        "width": 64,
    }
    half = {name: tensor.half() for name, tensor in state_dict.items()}  # as they are distributed
    half["conv1.weight"] = half["conv1.weight"].squeeze(2)
    other = convert_checkpoint(save(tmp_path, half), num_attention_heads=4).model
    assert other.dtype == torch.float32
    for name, tensor in converted.model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=2e-3, atol=1e-4)
    converted.save_pretrained(tmp_path / "clip")
    assert CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").config.num_attention_heads == 4
    assert convert_checkpoint(save(tmp_path, state_dict)).model.config.num_attention_heads == 1  # of 64 channels


def test_a_visual_encoder_that_does_not_fit_is_refused(tmp_path):
    state_dict = clip_state_dict()
    with pytest.raises(CheckpointError, match="`num_attention_heads` must divide the width 64, got 5"):
        convert_checkpoint(save(tmp_path, state_dict), num_attention_heads=5)
    with pytest.raises(CheckpointError, match="no place for: `extra`"):
        convert_checkpoint(save(tmp_path, {**state_dict, "extra": torch.zeros(1)}))
    del state_dict["transformer.resblocks.1.attn.in_proj_bias"]
    with pytest.raises(CheckpointError, match=r"lacks.*layers\.1\.self_attn\.k_proj\.bias"):
        convert_checkpoint(save(tmp_path, state_dict))


# Videos and texts


def video_text_state_dict():
    return strip_prefix(load_golden("video_text_retrieval")[0], "state_dict.")


def test_a_video_text_checkpoint(tmp_path):
    converted = convert_checkpoint(save(tmp_path, {"model": video_text_state_dict()}), text_num_attention_heads=4)
    config, text_config = converted.model.config, converted.model.config.text_config
    assert converted.kind == "video-text" and type(converted.model) is VideoMambaForVideoTextRetrieval
    frames = torch.zeros(2, 3, 60, 100, dtype=torch.uint8)
    frames[..., :20] = frames[..., 80:] = 255  # which a crop would cut off
    pixels = converted.processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"][0, 0, 0, 0]
    assert pixels[0] == pixels[-1] == pixels.max() > pixels[len(pixels) // 2]
    assert (config.fusion_layer, config.projection_dim, text_config.num_hidden_layers) == (2, 32, 4)
    assert (text_config.vocab_size, text_config.intermediate_size, text_config.num_attention_heads) == (120, 96, 4)
    assert config.temperature == pytest.approx(0.07) and config.tie_word_embeddings
    assert (config.vision_config.num_frames, config.vision_config.image_size) == (4, 48)
    assert converted.processor.num_frames == 4 and converted.teacher is None
    assert (
        convert_checkpoint(save(tmp_path, video_text_state_dict())).model.config.text_config.num_attention_heads == 12
    )


def test_a_head_of_other_words_than_the_embeddings_is_kept(tmp_path):
    state_dict = video_text_state_dict()
    decoder = state_dict["text_encoder.cls.predictions.decoder.weight"] + 1
    state_dict["text_encoder.cls.predictions.decoder.weight"] = decoder
    model = convert_checkpoint(save(tmp_path, state_dict)).model
    model.save_pretrained(tmp_path / "model")
    loaded = VideoMambaForVideoTextRetrieval.from_pretrained(tmp_path / "model")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.masked_lm_head.predictions.decoder.weight, decoder)


def test_a_video_text_checkpoint_that_does_not_fit_is_refused(tmp_path):
    state_dict = video_text_state_dict()
    layer = "text_encoder.bert.encoder.layer"
    for change, message in (
        ({"extra": torch.zeros(1)}, "no place for: `extra`"),
        ({"vision_encoder.extra": torch.zeros(1)}, "no place for: `extra`"),
        ({"text_encoder.bert.embeddings.position_ids": torch.arange(1, 65)}, "no place for.*position_ids"),
        ({f"{layer}.0.crossattention.self.key.weight": torch.zeros(1)}, "layers of BERT must attend to the video"),
        ({"video_projection.bias": torch.zeros(32)}, "two of its tensors have one place"),
        ({"vision_proj.bias": torch.zeros(31)}, r"`video_projection\.bias` has shape \(31,\) instead of \(32,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(save(tmp_path, {**state_dict, **change}))
    for missing, message in (
        ("temp", "not a video-text checkpoint: it lacks `temp`"),
        ("vision_encoder.cls_token", "not a VideoMamba checkpoint: it lacks `cls_token`"),
        ("itm_head.bias", r"lacks: `matching_head\.bias`"),
        (f"{layer}.3.output.dense.bias", r"lacks: `fusion_layers\.1\.output\.dense\.bias`"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(save(tmp_path, {name: value for name, value in state_dict.items() if name != missing}))
    for heads in (5, 0):
        with pytest.raises(CheckpointError, match=f"`text_num_attention_heads` must divide the width 48, got {heads}"):
            convert_checkpoint(save(tmp_path, state_dict), text_num_attention_heads=heads)
    with pytest.raises(CheckpointError, match="alignment_interval"):
        convert_checkpoint(save(tmp_path, state_dict), alignment_interval=0)
    with pytest.raises(CheckpointError, match="`labels` has 2 names, the checkpoint has 0 classes"):
        convert_checkpoint(save(tmp_path, state_dict), ["a", "b"])


def test_the_clip_teacher_in_a_video_text_checkpoint(tmp_path):
    teacher = clip_state_dict()
    state_dict = video_text_state_dict() | {f"clip_teacher.{name}": tensor for name, tensor in teacher.items()}
    path = save(tmp_path, state_dict)
    converted = convert_checkpoint(path, num_attention_heads=4, text_num_attention_heads=4)
    expected = convert_checkpoint(save(tmp_path, teacher), num_attention_heads=4).model.state_dict()
    assert all(torch.equal(converted.teacher.model.state_dict()[name], expected[name]) for name in expected)
    path = save(tmp_path, state_dict)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "walk"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    options = ("--text-num-attention-heads", 4, "--num-attention-heads", 4, "--tokenizer", tmp_path / "tokenizer")
    result = run_script(path, tmp_path / "model", *options, "--clip-teacher", tmp_path / "clip")
    assert "video-text checkpoint" in result.stdout and "VideoMambaProcessor" in result.stdout, result.stderr
    assert CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").config.num_attention_heads == 4
    assert AutoProcessor.from_pretrained(tmp_path / "model")(text="walk")["input_ids"] == [2, 5, 3]
    assert "its CLIP teacher is left out" in run_script(path, tmp_path / "model", *options).stdout
    path = save(tmp_path, video_text_state_dict())
    result = run_script(path, tmp_path / "other", "--clip-teacher", tmp_path / "clip")
    assert result.returncode == 1 and "contains no CLIP for --clip-teacher" in result.stderr
    result = run_script(save(tmp_path, original()), tmp_path / "other", "--tokenizer", tmp_path / "tokenizer")
    assert result.returncode == 1 and "`tokenizer` is for a video-text checkpoint" in result.stderr


class Malicious:
    def __reduce__(self):
        return os.system, ("touch malicious",)


FOREIGN = {
    "code": ({"model": {}, "extra": Malicious()}, r"tensors \(it holds (posix|nt).system\): refused, because"),
    "module": ({"model": torch.nn.Linear(2, 2)}, r"tensors \(it holds torch.nn.modules.linear.Linear\): refused"),
    "path": ({"model": {}, "folder": Path("a")}, r"tensors \(it holds pathlib\.\w+\): refused"),
    "pickle": (pickle.dumps(Malicious()), r"tensors \(it holds more than PyTorch writes for tensors\): refused"),
    "text": (b"hello world", "damaged, or not a checkpoint of PyTorch: KeyError$"),
    "empty": (b"", "damaged, or not a checkpoint of PyTorch: EOFError$"),
    "zip": (b"PK\x03\x04" + bytes(500), "damaged, or not a checkpoint of PyTorch: .*zip archive"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_in_one_line_and_not_run(name, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    content, message = FOREIGN[name]
    path = tmp_path / "strange.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "weights_only" not in text
    assert not (tmp_path / "malicious").exists() and not list(recwarn)


@pytest.mark.parametrize("name", [*FOREIGN, "arguments", "list", "numbers"])
def test_foreign_weights_of_a_directory_are_refused_in_one_line_and_not_run(name, tmp_path, monkeypatch):
    """PyTorch's advice is to run what is in there."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(NANO / "config.json", tmp_path)
    others = {"arguments": {"args": argparse.Namespace(a=1)}, "list": [1, 2], "numbers": {1: torch.zeros(1)}}
    content, message = FOREIGN.get(name) or (others[name], "Namespace" if name == "arguments" else "")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message or None) as error:
        load_model(VideoMambaForVideoClassification, tmp_path)
    text = str(error.value)
    assert str(path if message else tmp_path) in text and "\n" not in text and "weights_only" not in text
    assert not (tmp_path / "malicious").exists()


ODD_NAMES = [{1: 0}, {1: 0, "a": 1}, {None: 0}, {(1, "a"): 0}, {b"a": 0}, {"model": {1: 0}}, {"model": {1.5: 0}, 3: 4}]


@pytest.mark.parametrize("names", ODD_NAMES)
def test_names_that_are_no_text_are_refused(names, tmp_path):
    def tensors(names):
        return {key: tensors(value) if isinstance(value, dict) else torch.zeros(1) for key, value in names.items()}

    path = save(tmp_path, tensors(names))
    with pytest.raises(CheckpointError, match=f"^{path}: names of tensors must be text, got `"):
        convert_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": torch.zeros(1), "b": "text"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="state dict"):
        convert_checkpoint(save(tmp_path, content))


def test_a_missing_or_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        convert_checkpoint(tmp_path / "no.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk\n" * 100)
    with pytest.raises(CheckpointError, match=r"junk\.pth"):
        convert_checkpoint(tmp_path / "junk.pth")


def test_known_labels():
    counts = {"imagenet-1k": 1000, "kinetics400": 400, "something-something-v2": 174}
    for name, count in counts.items():
        assert len(set(load_labels(name))) >= count - 2  # ImageNet has two pairs of classes of one name
        assert len(load_labels(name)) == count
    assert load_labels("kinetics400")[0] == "abseiling" and load_labels("imagenet-1k")[0] == "tench"


def test_label_files(tmp_path):
    names = ["walk", "run", "jump"]
    (tmp_path / "lines.txt").write_text("walk\nrun\n\njump\n")
    (tmp_path / "list.json").write_text(json.dumps(names))
    (tmp_path / "object.json").write_text(json.dumps({"1": "run", "0": "walk", "2": "jump"}))
    (tmp_path / "reversed.json").write_text(json.dumps({"walk": "0", "jump": "2", "run": "1"}))
    for file in ("lines.txt", "list.json", "object.json", "reversed.json"):
        assert load_labels(str(tmp_path / file)) == names
    (tmp_path / "wrong.json").write_text(json.dumps({"0": "walk", "2": "jump"}))
    with pytest.raises(ValueError, match=r"wrong\.json"):
        load_labels(str(tmp_path / "wrong.json"))
    with pytest.raises(FileNotFoundError, match="kinetics700.*known data set"):
        load_labels("kinetics700")


def test_labels_must_fit_the_head(tmp_path):
    path = save(tmp_path, original())
    model = convert_checkpoint(path, list("abcdefg")).model
    assert model.config.id2label == dict(enumerate("abcdefg")) and model.config.label2id["c"] == 2
    with pytest.raises(CheckpointError, match="3 names.*7 classes"):
        convert_checkpoint(path, list("abc"))


def run_script(*arguments):
    return call("convert_checkpoint.py", *arguments)


def test_the_script(tmp_path):
    path = save(tmp_path, {"model": original()})
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    result = run_script(path, tmp_path / "out", "--labels", tmp_path / "labels.txt")
    assert result.returncode == 0, result.stderr
    assert "video checkpoint" in result.stdout and "all 59 tensors used" in result.stdout
    assert {"config.json", "model.safetensors", "video_preprocessor_config.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label[6] == "g"
    result = run_script(path, tmp_path / "out2", "--labels", "kinetics400")
    assert result.returncode == 1 and result.stderr.startswith("error: `labels` has 400 names")
    assert not (tmp_path / "out2").exists()
    save(tmp_path, clip_state_dict())
    result = run_script(path, tmp_path / "clip", "--num-attention-heads", 4)
    assert "CLIP visual encoder checkpoint" in result.stdout and "CLIPImageProcessor" in result.stdout, result.stderr
    save(tmp_path, original("masked_pretraining_multilayer"))
    result = run_script(path, tmp_path / "out3", "--alignment-interval", 4)
    assert result.returncode == 1 and "alignment_interval" in result.stderr and "Traceback" not in result.stderr
