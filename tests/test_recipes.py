"""The recipes of released runs, and how arguments come from them and from the command line."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

import finetune
import pretrain_umt
import pretrain_video_text
from command_line import parse_dataclasses
from make_recipes import make_recipes
from modeling_videomamba.modeling_videomamba import VideoMambaLayer
from recipe_files import TEXT
from tests.conftest import GOLDEN, ROOT
from videomamba_arguments import (
    LabelledDataArguments,
)

RECIPES = ROOT / "scripts" / "recipes"
CLASSES = finetune.CLASSES
PUBLISHED = json.loads((GOLDEN / "recipes.json").read_text("utf-8"))
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PRETRAINING_NAMES = sorted(path.stem for path in (RECIPES / "umt").glob("*.yaml"))
VIDEO_TEXT_NAMES = sorted(path.stem for path in (RECIPES / "video-text").glob("*.yaml"))


def parse(monkeypatch, *words, classes=CLASSES, folder=RECIPES):
    monkeypatch.setattr("sys.argv", ["finetune.py", *words])
    return parse_dataclasses("", *classes, recipes=folder)


def test_the_recipes_are_those_of_the_released_runs():
    made = make_recipes(PUBLISHED)
    others = {f"umt/{name}" for name in PRETRAINING_NAMES} | {f"video-text/{name}" for name in VIDEO_TEXT_NAMES}
    assert set(made) == {*NAMES, *others} and len(NAMES) == 62
    assert len(made) == len(PUBLISHED["runs"]) + len(VIDEO_TEXT_NAMES)
    for name, text in made.items():
        assert (RECIPES / f"{name}.yaml").read_text("utf-8") == text, name


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid(monkeypatch, name):
    words = ["--recipe", name, "--data", "x", "--output-dir", "y", "--model", "m"]
    _, model, augmentation, optimization, _ = parse(monkeypatch, *words)
    assert model.size is None and optimization.mixed_precision == "bf16"
    assert augmentation.flip == (not name.startswith("ssv2"))
    assert (optimization.base_batch_size, model.num_frames is None) in ((512, True), (256, False))


def scaled(optimization, augmentation, gpus):
    views = optimization.batch_size * optimization.gradient_accumulation_steps * gpus * augmentation.num_sample
    return views, views / optimization.base_batch_size


@pytest.mark.parametrize(
    ("name", "gpus", "views", "rates", "epochs"),
    [
        # 64 clips x 2 views x 8 GPUs / 256 = 4 times the rates of the original, all of which it scales
        ("k400-tiny-f8x224", 8, 1024, (8e-4, 4e-6, 4e-6), (70, 5)),
        ("k400-mask-middle-f64x224to384", 16, 64, (1.25e-6, 2.5e-7, 2.5e-7), (6, 1)),
        # 512 x 8 / 512 = 8 times the highest rate, the others as they are
        ("in1k-tiny-224", 8, 4096, (4e-3, 1e-5, 1e-6), (300, 5)),
        # with three views of each image an epoch shows three times as much
        ("in1k-small-224", 8, 4104, (4e-3, 1e-5, 1e-6), (100, 5 / 3)),
        ("lvu-regression-trim", 8, 128, (2e-4, 5e-7, 5e-7), (70, 5)),
    ],
)
def test_rates_are_those_of_the_released_runs(monkeypatch, name, gpus, views, rates, epochs):
    words = ["--recipe", name, "--data", "x", "--output-dir", "y", "--model", "m"]
    _, _, augmentation, optimization, _ = parse(monkeypatch, *words)
    found, scale = scaled(optimization, augmentation, gpus)
    assert found == views
    names = ("learning_rate", "min_learning_rate", "warmup_learning_rate")
    assert [scale * getattr(optimization, name) for name in names] == pytest.approx(rates, rel=3e-3)
    assert (optimization.epochs, optimization.warmup_epochs) == pytest.approx(epochs)


@pytest.mark.parametrize("name", PRETRAINING_NAMES)
def test_recipes_of_masked_pretraining(monkeypatch, name):
    words = ["--recipe", name, "--data", "x", "--output-dir", "y", "--teacher", "t"]
    groups = parse(monkeypatch, *words, classes=pretrain_umt.CLASSES, folder=RECIPES / "umt")
    _, model, augmentation, optimization, _, pretraining = groups
    assert (model.size, model.num_frames, model.drop_path_rate) == ("middle", 8, 0.4)
    assert (pretraining.mask_type, pretraining.mask_ratio, pretraining.num_aligned_layers) == ("attention", 0.8, 1)
    assert (optimization.epochs, optimization.warmup_epochs, optimization.adam_beta2) == (800, 40, 0.95)
    views, scale = scaled(optimization, augmentation, 32)
    assert views == 2048 and scale * optimization.learning_rate == pytest.approx(1.2e-3)
    assert augmentation.flip and optimization.mixed_precision == "bf16"


@pytest.mark.parametrize("corpus", ["5m", "17m", "25m"])
def test_recipes_of_video_text_pretraining(monkeypatch, corpus):
    words = ["--data", "x", "--more-data", "y", "z", "--output-dir", "o"]
    masked = [*words, "--recipe", corpus, "--vision", "v", "--text", "b", "--teacher", "t"]
    unmasked = [*words, "--recipe", f"{corpus}-unmasked", "--model", "o/last"]
    expected = (
        (masked, 128, 4e-4, (10, 1), ("attention", 0.8), ("attention", 0.5)),
        (unmasked, 64, 8e-5, (1, 0.2), (None, 0.8), (None, 0.5)),
    )
    gpus = 16 if corpus == "5m" else 32
    for words, batch_size, rate, epochs, *masks in expected:
        groups = parse(monkeypatch, *words, classes=pretrain_video_text.CLASSES, folder=RECIPES / "video-text")
        data, model, augmentation, optimization, _, pretraining = groups
        views, scale = scaled(optimization, augmentation, gpus)
        assert (optimization.batch_size, views, scale) == (batch_size, batch_size * gpus, 1)
        assert (optimization.learning_rate, optimization.min_learning_rate) == pytest.approx((rate, rate / 100))
        assert (optimization.epochs, optimization.warmup_epochs) == epochs
        assert [pretraining.mask(kind) for kind in ("video", "image")] == masks
        assert (pretraining.mlm_probability, pretraining.max_text_length, model.drop_path_rate) == (0.5, 32, 0.25)
        assert data.more_data == ["y", "z"] and augmentation.flip


def test_the_command_line_goes_before_the_recipe(monkeypatch):
    words = ["--recipe", "in1k-tiny-224", "--data", "x", "--output-dir", "y"]
    _, model, _, optimization, _ = parse(monkeypatch, *words)
    assert (model.size, optimization.epochs, optimization.max_grad_norm) == ("tiny", 300, 5.0)
    _, model, augmentation, optimization, _ = parse(
        monkeypatch, *words, "--model", "m", "--epochs", "20", "--mixup", "0.1"
    )
    assert (model.model, model.size, optimization.epochs, augmentation.mixup) == ("m", None, 20, 0.1)


def test_a_recipe_of_ones_own(monkeypatch, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"size": "base", "epochs": 3, "learning_rate": 1e-8}))
    _, model, _, optimization, _ = parse(monkeypatch, "--recipe", str(path), "--data", "x", "--output-dir", "y")
    assert (model.size, optimization.epochs, optimization.learning_rate) == ("base", 3, 1e-8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "nothing", "--model", "m"), "--recipe nothing: neither a file nor one of breakfast"),
        (("--recipe", "{mine}", "--model", "m"), "this script has no colour, frames"),
        ((), "pass one of --model, --config and --size, got none"),
        (("--model", "m", "--size", "tiny"), "got model and size"),
        (("--size", "huge"), "--size must be one of tiny, small, middle, base, got huge"),
        (("--model", "m", "--epochs", "1", "--warmup-epochs", "2"), "`warmup_epochs`"),
        (("--model", "m", "--save-steps", "0"), "--save-steps must be at least 1, got 0"),
        (("--model", "m", "--clip-seconds", "-1"), "--clip-seconds must be positive"),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, tmp_path, words, message):
    mine = tmp_path / "mine.yaml"
    mine.write_text("frames: 3\ncolour: blue\n")
    words = [word.format(mine=mine) for word in words]
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, "--data", "x", "--output-dir", "y", *words)
    assert message in str(error.value)


WRONG = [
    *((f"flip: {value}", "flip must be true or false, got ") for value in ("maybe", '"false"', "1", "0", "null", "[]")),
    *((f"epochs: {value}", "epochs must be a number, got ") for value in ("many", "yes", "null", "[3]", "2020-01-01")),
    *((f"batch_size: {value}", "batch_size must be a whole number, got ") for value in ("3.0", '"3"', "true", "{}")),
    *((f"clip_seconds: {value}", "clip_seconds must be a number or null, got ") for value in ("long", "false")),
    *((f"num_frames: {value}", "num_frames must be a whole number or null, got ") for value in ("8.0", "all")),
    *((f"report_to: {value}", "report_to must be a text, in quotes if it ") for value in ("no", "3", '""', "[a]")),
    *((f"mixed_precision: {value}", "mixed_precision must be a text, in quotes if it ") for value in ("no", "16")),
    *((f"label_file: {value}", "label_file must be a text, in quotes if it ") for value in ("3", '""', "[a]", "true")),
    *((f"on_broken_video: {value}", "on_broken_video must be skip or raise, got ") for value in ("skp", "null", "1")),
    ("epochs: 3\nflip: true\nepochs: 4", "epochs is there twice, in lines 1 and 3"),
    ("1: 2\nx: 3", "this script has no 1, x"),
    *((text, "must have lines of `name: value`, got ") for text in ("", "# nothing\n", "- a\n", "text", "3", "null")),
    *((text, "not YAML: ") for text in ("a: [", "a: b: c", "\tflip: true", "a: &b\n- *c", "--- a\n--- b\n", "a: \0")),
    (b"data: caf\xe9", "must be text in UTF-8, got the byte 0xe9 (byte 10 of the file)"),
    (b"\xff\xfef\0", "must be text in UTF-8, got the byte 0xff (byte 1 of the file)"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_wrong_recipe_is_one_line(monkeypatch, tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, "--recipe", str(path), "--data", "x", "--output-dir", "y", "--model", "m")
    assert error.value.code.startswith(f"error: --recipe {path}: {message}") and "\n" not in error.value.code


@pytest.mark.parametrize(
    ("name", "value"), [("mask_type", "tubes"), ("alignment_loss", "l3"), ("probe", "svm"), ("more_data", "a")]
)
def test_choices_and_lists_of_a_recipe_are_checked(monkeypatch, tmp_path, name, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{name}: {value}\n")
    script = pretrain_video_text if name == "more_data" else pretrain_umt
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, "--recipe", str(path), classes=script.CLASSES)
    allowed = {
        "mask_type": "random, tube, clip_row, frame_row or attention",
        "alignment_loss": "l2, mse, smooth_l1 or null",
        "probe": "knn or linear",
        "more_data": f"a list, each item {TEXT}",
    }
    assert error.value.code == f"error: --recipe {path}: {name} must be {allowed[name]}, got '{value}'"


def test_what_a_recipe_may_have(monkeypatch, tmp_path):
    """YAML takes 1e-3 for a text."""
    path = tmp_path / "mine.yaml"
    path.write_text("flip: yes\nlearning_rate: 1e-3\nclip_seconds: null\nepochs: 3\nlabel_file: a/b\nnum_frames: 4\n")
    data, model, augmentation, optimization, _ = parse(
        monkeypatch, "--recipe", str(path), "--data", "x", "--output-dir", "y", "--model", "m"
    )
    assert augmentation.flip is True and (optimization.learning_rate, optimization.epochs) == (1e-3, 3)
    assert (data.clip_seconds, data.label_file, model.num_frames) == (None, Path("a/b"), 4)
    path.write_text("more_data: [a, b]\nvision: v\ntext: t")
    words = ("--recipe", str(path), "--data", "x", "--output-dir", "y")
    assert parse(monkeypatch, *words, classes=pretrain_video_text.CLASSES)[0].more_data == ["a", "b"]


def test_unknown_options_are_refused(monkeypatch):
    with pytest.raises((SystemExit, ValueError)):
        parse(monkeypatch, "--data", "x", "--output-dir", "y", "--model", "m", "--epoch", "3", "--nonsense", "1")


def test_label_names_are_lines(tmp_path):
    (tmp_path / "names").write_text("a b\nc\n")
    assert LabelledDataArguments("x", label_file=Path(tmp_path / "names")).label_names() == ["a b", "c"]


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", "MULTI_GPU"), ("ddp", "MULTI_GPU"), ("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")]
)
def test_configurations_of_accelerate(name, kind):
    config = load_config_from_file(str(ROOT / "scripts" / "launch" / f"{name}.yaml"))
    assert config.distributed_type == DistributedType[kind]
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == VideoMambaLayer.__name__
