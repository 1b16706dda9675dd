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
