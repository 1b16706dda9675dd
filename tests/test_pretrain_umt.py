"""pretrain_umt.py, called in this process and launched as two."""

import random
import shutil
import tarfile
import time
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

import pretrain_umt
import studies
from modeling_videomamba import VideoMambaForImageClassification, VideoMambaForMaskedPreTraining
from tests.conftest import NANO, tiny_config
from tests.launching import (
    assert_finished,
    call,
    call_as_process,
    last_weights,
    launch,
    launched,
    run,
    start,
    summary,
    wait_until,
    write_broken_videos,
)
from videomamba_arguments import PretrainingArguments

STUDENT = ("--config", NANO / "config.json", "--num-frames", 8, "--drop-path-rate", 0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """64 training clips of moving digits, 24 test clips, and a broken one beside each."""
    folder = tmp_path_factory.mktemp("clips")
    assert_finished(call("make_moving_digits.py", folder, "--train-clips", 63, "--test-clips", 24))
    broken = write_broken_videos(folder / "broken", folder / "test" / "up" / "00005.mp4")
    shutil.move(folder / "broken" / broken[0], folder / "train" / "left" / broken[0])
    shutil.move(folder / "broken" / broken[2], folder / "test" / "up" / broken[2])
    shutil.rmtree(folder / "broken")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What study_masked_pretraining.py leaves, at the smallest scale, and what it prints."""
    folder = tmp_path_factory.mktemp("study")
    options = ("--masks", "tube", "--seeds", 1, "--train-clips", 64, "--test-clips", 24, "--labels-per-class", 3)
    options += ("--teacher-steps", 300, "--epochs", 1, "--finetuning-epochs", 4)
    with mock.patch.object(studies.subprocess, "run", call_as_process):
        return folder, assert_finished(call("study_masked_pretraining.py", folder, *options))


@pytest.fixture(scope="module")
def teacher(study):
    """A small CLIP that has learnt something about digits."""
    return study[0] / "teacher"


def test_the_study_compares_masks(study):
    folder, text = study
    assert "| none (from scratch) |" in text and "| tube |" in text and "The teacher names" in text
    assert len((folder / "labels" / "train.csv").read_text().splitlines()) == 1 + 3 * 8
    assert summary(folder / "tube-0-finetuned")["evaluated"] == 24


@pytest.mark.slow
def test_two_processes_learn_what_one_does(clips, teacher, tmp_path):
    """The same masks and weights; the loss falls below that of the mean feature; the weights can be fine-tuned."""
    options = ("--data", clips, "--teacher", teacher, *STUDENT, "--epochs", 12, "--evaluation-epochs", 6)
    options += ("--on-broken-video", "skip", "--learning-rate", 4e-3, "--max-grad-norm", 1, "--probe-data", clips)
    options += ("--evaluation-examples", 20, "--tubelet-size", 2, "--report-to", "none")
    for processes, batch_size in ((1, 8), (2, 4)):
        output = tmp_path / f"{processes}"
        command = ("pretrain_umt.py", *options, "--output-dir", output, "--batch-size", batch_size)
        text = assert_finished(call(*command) if processes == 1 else launch(command[0], processes, *command[1:]))
        found = summary(output)
        metrics = found["metrics"]
        assert metrics["evaluation_loss"] < 0.8 * metrics["mean_feature_loss"]
        shown = f"{metrics['evaluation_loss']:.4f}, that of its mean feature {metrics['mean_feature_loss']:.4f}"
        assert f"distance from the teacher {shown}, on" in text and 0 <= metrics["knn_accuracy"] <= 1
        assert text.count("epoch 6: evaluation_loss") == 1 and found["steps"] == 96
        assert {path.rsplit("/", 1)[-1] for path in found["broken"]} == {"truncated.mp4", "text.mp4"}
        assert found["evaluated"] in (19, 20)
        for name in ("curves.png", "alignment.png"):
            with Image.open(output / name) as picture:
                assert len(picture.getcolors(10**6)) > 20
    one, two = last_weights(tmp_path / "1"), last_weights(tmp_path / "2")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)
    first, second = summary(tmp_path / "1")["metrics"], summary(tmp_path / "2")["metrics"]
    assert first["evaluation_loss"] == pytest.approx(second["evaluation_loss"], rel=1e-3)
    assert first["mean_feature_loss"] == pytest.approx(second["mean_feature_loss"], rel=1e-4)

    model = AutoModelForPreTraining.from_pretrained(tmp_path / "1" / "last")
    assert type(model) is VideoMambaForMaskedPreTraining and model.config.alignment_size == 64
    assert AutoVideoProcessor.from_pretrained(tmp_path / "1" / "last").num_frames == 8
    classifier = AutoModelForVideoClassification.from_pretrained(tmp_path / "1" / "last", num_labels=8)
    weight = model.videomamba.layers[0].mixer.in_proj.weight
    assert torch.equal(classifier.videomamba.layers[0].mixer.in_proj.weight, weight)
    card = ModelCard.load(tmp_path / "1" / "best" / "README.md")
    assert "Accuracy of the nearest neighbours" in card.text and str(tmp_path) not in card.text
    assert card.data.pipeline_tag == "feature-extraction"
    assert "knn_accuracy" in {result.metric_type for result in card.data.eval_results}

    options = ("--data", clips, "--model", tmp_path / "1" / "best", "--epochs", 1, "--on-broken-video", "skip")
    text = assert_finished(call("finetune.py", *options, "--num-workers", 0, "--output-dir", tmp_path / "finetuned"))
    assert "fresh weights in classifier:" in text and summary(tmp_path / "finetuned")["evaluated"] == 24


@pytest.mark.slow
def test_kills_change_nothing(clips, teacher, tmp_path):
    """Two processes with a cache of the teacher's features, which a kill can leave half filled."""
    options = ("--data", clips, "--teacher", teacher, *STUDENT[:-1], 0.2, "--epochs", 4, "--batch-size", 2)
    options += ("--on-broken-video", "skip", "--save-steps", 3, "--report-to", "none", "--resume")
    options += ("--probe-data", clips, "--probe", "linear", "--evaluation-epochs", 2)

    def command(name):
        folders = ("--output-dir", tmp_path / name, "--teacher-cache", tmp_path / f"{name}-cache")
        return launched("pretrain_umt.py", 2, *options, *folders)

    assert_finished(run(*command("whole")))
    assert len(list((tmp_path / "whole-cache").rglob("*.safetensors"))) == 63
    process, states = start(*command("killed")), tmp_path / "killed" / "states"
    wait_until(lambda: list(states.glob("step-*")), process)
    time.sleep(random.Random(0).uniform(0, 0.3))
    assert process.poll() is None, "the run has ended before it was killed"
    for one in (*psutil.Process(process.pid).children(recursive=True), process):  # each has a session of its own
        one.kill()
    process.communicate()
    assert "resumed after step" in assert_finished(run(*command("killed")))
    whole, killed = last_weights(tmp_path / "whole"), last_weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert summary(tmp_path / "whole")["metrics"] == summary(tmp_path / "killed")["metrics"]
    assert "linear_accuracy" in summary(tmp_path / "whole")["metrics"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """scikit-learn's digits as pictures in shards, without labels, and a list of some of them to evaluate on."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(load_digits().images[:60]):
        Image.fromarray((picture * 255 / 16).astype(np.uint8)).resize((32, 32)).save(folder / f"{index:03}.png")
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for index in range(shard, 48, 2):
                archive.add(folder / f"{index:03}.png", f"{index:03}.png")
    with tarfile.open(folder / "validation-0.tar", "w") as archive:
        for index in range(48, 60):
            archive.add(folder / f"{index:03}.png", f"{index:03}.png")
    for path in folder.glob("*.png"):
        path.unlink()
    return folder


def test_a_stream_of_images_with_everything_on(pictures, teacher, tmp_path):
    VideoMambaForImageClassification(tiny_config(num_frames=None, patch_size=8)).save_pretrained(tmp_path / "start")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "mask_type: frame_row\nmask_ratio: 0.6\nalignment_loss: smooth_l1\nnum_aligned_layers: 2\nflip: true\n"
        "min_crop_area: 0.5\nnum_sample: 2\nema_decay: 0.9\nmixed_precision: bf16\ngradient_checkpointing: true\n"
        "gradient_accumulation_steps: 2\ndrop_path_rate: 0.2\nbase_batch_size: 32\n"
    )
    options = ("--data", pictures, "--teacher", teacher, "--recipe", recipe, "--model", tmp_path / "start")
    options += ("--streaming", "--steps-per-epoch", 3)
    options += ("--epochs", 2, "--batch-size", 8, "--num-workers", 1, "--output-dir", tmp_path / "model")
    text = assert_finished(call("pretrain_umt.py", *options))
    assert "fresh weights in alignment_decoders" in text
    found = summary(tmp_path / "model")
    assert found["steps"] == 6 and found["evaluated"] == 12 and np.isfinite(found["best"])
    config = AutoModelForPreTraining.from_pretrained(tmp_path / "model" / "best").config
    assert (config.num_frames, config.aligned_layers, config.alignment_loss) == (None, [1, 2], "smooth_l1")
    assert any("alignment_decoders.1" in name for name in load_file(tmp_path / "model" / "best" / "model.safetensors"))


def test_what_is_wrong_is_explained(clips, pictures, teacher, tmp_path, exit_of):
    def fails(message, *options):
        assert message in exit_of(pretrain_umt, *options, "--output-dir", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    common = ("--data", clips, "--teacher", teacher, *STUDENT)
    cached = ("--teacher-cache", tmp_path / "cache", "--flip")
    fails("--teacher-cache is for clips that stay the same", *common, *cached)
    fails("error: ", "--data", clips, "--teacher", tmp_path / "nowhere", *STUDENT)
    fails("is too small for `num_aligned_layers` 4", *common, "--num-aligned-layers", 4)
    fails("must have a column `label`", *common, "--probe-data", pictures)
    for name in ("train/a/1", "train/b/2", "test/b/3"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    fails("must be videos, as the training data are", *common, "--probe-data", tmp_path / "images")
    (pictures / "validation-0.tar").unlink()
    streamed = ("--data", pictures, "--teacher", teacher, *STUDENT[:2], "--streaming", "--steps-per-epoch", 1)
    fails("must have a split validation or test to evaluate on", *streamed)


def test_values_out_of_range_are_explained():
    for name, value in (("mask_ratio", 1.0), ("num_aligned_layers", 0), ("evaluation_examples", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be at least .*, got {value}"):
            PretrainingArguments("teacher", **{name: value})


def test_the_options_are_documented(exit_of, capsys):
    assert exit_of(pretrain_umt, "--help") == "0"
    text = capsys.readouterr().out
    assert "{random,tube,clip_row,frame_row,attention}" in text and "scripts/recipes/umt" in text
