"""finetune.py, distill.py and evaluate_video.py, called in this process and launched as several."""

import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, AutoModelForVideoClassification, pipeline

import finetune
from modeling_videomamba import VideoMambaForImageClassification, VideoMambaForVideoClassification
from modeling_videomamba.training import run as run_module
from modeling_videomamba.training.classification import ClassificationRun, LabelledArguments
from tests.conftest import NANO, forget_accelerator, moving_square, tiny_config, write_video
from tests.launching import (
    SCRIPTS,
    assert_finished,
    call,
    last_weights,
    launch,
    launched,
    run,
    start,
    summary,
    wait_until,
    write_broken_videos,
)
from videomamba_arguments import (
    LabelledAugmentationArguments,
    LabelledDataArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
)

TINY_CONFIG = ("--config", NANO / "config.json")
KILLS = int(os.environ.get("VIDEOMAMBA_TEST_KILLS", 3))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """60 training clips of moving digits and 33 test clips; 4 broken files beside the former, 1 beside the latter."""
    folder = tmp_path_factory.mktemp("digits")
    assert_finished(call("make_moving_digits.py", folder, "--train-clips", 60, "--test-clips", 33))
    clip = folder / "test" / "up" / "00005.mp4"
    assert clip.exists()
    broken = write_broken_videos(folder / "train" / "left", clip)
    (folder / "test" / "up" / "bad.mp4").write_text("no video")
    return folder, [
        *(str(folder / "train" / "left" / name) for name in broken),
        str(folder / "test" / "up" / "bad.mp4"),
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_does(digits, tmp_path):
    """The same weights, each test clip once, every broken file named."""
    data, broken = digits
    options = ("--data", data, *TINY_CONFIG, "--epochs", 1, "--on-broken-video", "skip", "--learning-rate", 1e-4)
    for processes, batch_size in ((1, 8), (2, 4)):
        output = tmp_path / f"{processes}"
        command = ("finetune.py", *options, "--output-dir", output, "--batch-size", batch_size)
        text = assert_finished(call(*command) if processes == 1 else launch(command[0], processes, *command[1:]))
        assert text.count("epoch 1: accuracy") == 1 and "waited for data" in text and "loss=" in text
        assert "5 broken files" in text and all(name in text for name in broken)
        found = summary(output)
        assert json.loads((output / "arguments.json").read_text("utf-8"))["processes"] == processes
        assert set(found["broken"]) == set(broken) and found["evaluated"] == 33 and found["skipped_steps"] == 0
        for name in ("curves.png", "confusion_matrix.png"):
            with Image.open(output / name) as picture:
                assert len(picture.getcolors(10**6)) > 20
        assert list((output / "logs").rglob("events*"))
    one, two = last_weights(tmp_path / "1"), last_weights(tmp_path / "2")
    start = VideoMambaForVideoClassification.from_pretrained(tmp_path / "1" / "best").state_dict()
    assert one.keys() == start.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
    assert summary(tmp_path / "1")["metrics"] == pytest.approx(summary(tmp_path / "2")["metrics"])

    classifier = pipeline("video-classification", model=str(tmp_path / "2" / "best"))
    labels = {item["label"] for item in classifier(str(NANO / "example.mp4"), top_k=8)}
    assert labels == {path.name for path in (data / "train").iterdir()}
    card = ModelCard.load(tmp_path / "1" / "best" / "README.md")
    accuracy = {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"]
    assert accuracy == summary(tmp_path / "1")["best"] and card.data.pipeline_tag == "video-classification"
    card_text = card.text
    assert "5 broken files were left out" in card_text and str(tmp_path) not in card_text


def test_a_broken_training_clip_stops_the_run_with_its_path(digits, tmp_path):
    data, _ = digits
    result = call("finetune.py", "--data", data, *TINY_CONFIG, "--output-dir", tmp_path / "model", "--epochs", 1)
    assert result.returncode == 1
    assert any(f"{name}.mp4: " in result.stderr for name in ("truncated", "empty", "text", "sound", "bad"))


# Images, all augmentation, self-distillation


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """scikit-learn's digits 0 to 2 as pictures."""
    folder, data = tmp_path_factory.mktemp("images"), load_digits(n_class=3)
    for index, (picture, target) in enumerate(zip(data.images[:120], data.target[:120], strict=True)):
        path = folder / ("train" if index < 80 else "test") / f"digit {target}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255 / 16).astype(np.uint8)).resize((32, 32)).save(path)
    return folder


@pytest.mark.slow
def test_images_with_everything_on_then_a_larger_student(images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "min_crop_area: 0.5\nrand_augment_ops: 2\nrandom_erasing: 0.25\nmixup: 0.8\ncutmix: 1.0\nlabel_smoothing: 0.1\n"
        "num_sample: 2\nlayer_decay: 0.8\nema_decay: 0.9\nmax_grad_norm: 1.0\nmixed_precision: bf16\n"
        "gradient_checkpointing: true\ngradient_accumulation_steps: 2\ndrop_path_rate: 0.2\nbase_batch_size: 32\n"
    )
    VideoMambaForImageClassification(tiny_config(num_frames=None)).save_pretrained(tmp_path / "start")
    common = ("--data", images, "--recipe", recipe, "--epochs", 2, "--batch-size", 8, "--num-workers", 0)
    teacher = tmp_path / "teacher"
    result = call("finetune.py", *common, "--model", tmp_path / "start", "--output-dir", teacher)
    assert "has none that fit these 3 classes" in assert_finished(result)
    found = summary(teacher)
    assert found["evaluated"] == 40 and found["steps"] == 10
    answer = pipeline("image-classification", model=str(teacher / "best"))(str(next(images.rglob("*.png"))), top_k=3)
    assert {item["label"] for item in answer} == {"digit 0", "digit 1", "digit 2"}

    config = tmp_path / "student.json"
    config.write_text(json.dumps({"image_size": 32, "patch_size": 16, "hidden_size": 48, "num_hidden_layers": 3}))
    options = ("--config", config, "--teacher", teacher / "best", "--output-dir", tmp_path / "student")
    assert_finished(launch("distill.py", 2, *common, *options, "--ema-decay", 0.5))
    lines = (tmp_path / "student" / "metrics.jsonl").read_text("utf-8").splitlines()
    record = next(json.loads(line) for line in lines if "distillation_loss" in line)
    assert record["loss"] == pytest.approx(record["task_loss"] + record["distillation_loss"])
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "student" / "best")
    assert isinstance(student, VideoMambaForImageClassification)
    assert student.config.teacher_hidden_size is None and student.distillation_head is None
    assert not any("distillation" in name for name in load_file(tmp_path / "student" / "best" / "model.safetensors"))


def test_a_teacher_that_sees_other_tokens_is_refused(images, tmp_path):
    VideoMambaForImageClassification(tiny_config(num_frames=None, patch_size=8)).save_pretrained(tmp_path / "teacher")
    options = ("--data", images, "--teacher", tmp_path / "teacher", "--size", "tiny", "--output-dir", tmp_path / "out")
    result = call("distill.py", *options)
    assert result.returncode == 1 and "--teacher has `patch_size` 8, the student 16" in result.stderr
    assert not (tmp_path / "out").exists()


# Regression, lists of files, windows


def test_regression_on_windows_of_long_videos(tmp_path):
    data = tmp_path / "data"
    (data / "clips").mkdir(parents=True)
    for name, rows in (("train", 6), ("val", 5)):
        lines = []
        for index in range(rows):
            path = data / "clips" / f"{name}{index}.mp4"
            write_video(path, np.minimum(moving_square(40) + 10 * index, 255).astype(np.uint8))
            lines.append(f"{path.name},{index}\n")
        (data / f"{name}.csv").write_text("path,label\n" + "".join(lines))
    windows = ("--data-root", data / "clips", "--clip-seconds", 2, "--clip-stride-seconds", 1, "--regression")
    options = ("--data", data, *windows, *TINY_CONFIG, "--epochs", 1, "--batch-size", 4, "--num-frames", 4)
    options += ("--num-workers", 0)
    text = assert_finished(call("finetune.py", *options, "--output-dir", tmp_path / "model"))
    assert "epoch 1: mse" in text
    found = summary(tmp_path / "model")
    assert found["evaluated"] == 5 and found["steps"] == 6 * 3 // 4  # windows to train on, videos to test on
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "model" / "best")
    assert (model.config.num_labels, model.config.problem_type, model.config.num_frames) == (1, "regression", 4)

    output = tmp_path / "test"
    test = ("--data", data, *windows[:-1], "--num-clips", 2, "--output-dir", output, "--num-workers", 0)
    assert "Mean squared error" in assert_finished(call("evaluate_video.py", tmp_path / "model" / "best", *test))
    metrics = json.loads((output / "metrics.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert metrics["videos"] == 5 and len(lines) == 15 and [line["index"] for line in lines] == list(range(15))
    values = np.array([line["scores"][0] for line in lines]).reshape(5, 3).mean(1)
    assert metrics["mse"] == pytest.approx(np.square(values - np.arange(5)).mean(), rel=1e-3)


# Streams, and runs that are stopped


@pytest.mark.slow
def test_a_stream_on_two_processes_goes_on_after_sigterm(digits, tmp_path):
    data, _ = digits
    clips = sorted(path for path in (data / "train").rglob("0*.mp4"))
    labels = sorted({path.parent.name for path in clips})
    for shard in range(4):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for index, clip in enumerate(clips[shard::4]):
                (tmp_path / "cls").write_text(str(labels.index(clip.parent.name)))
                archive.add(clip, f"{shard}-{index}.mp4")
                archive.add(tmp_path / "cls", f"{shard}-{index}.cls")
    shutil.copy(tmp_path / "train-0.tar", tmp_path / "test-0.tar")
    (tmp_path / "labels").write_text("\n".join(labels))
    options = ("--data", tmp_path, "--streaming", "--label-file", tmp_path / "labels", *TINY_CONFIG, "--epochs", 2)
    options += ("--steps-per-epoch", 10, "--batch-size", 2, "--num-workers", 2, "--log-steps", 1)
    assert_finished(launch("finetune.py", 2, *options, "--output-dir", tmp_path / "whole"))

    stopped = start(*launched("finetune.py", 2, *options, "--output-dir", tmp_path / "cut"))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text("utf-8").splitlines()) >= 3, stopped)
    stopped.send_signal(signal.SIGTERM)
    text = stopped.communicate(timeout=120)[0].decode()
    assert stopped.returncode != 0 and "stopped by SIGTERM after step" in text, text[-6000:]
    result = launch("finetune.py", 2, *options, "--output-dir", tmp_path / "cut", "--resume")
    assert "resumed after step" in assert_finished(result)
    whole, cut = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in metrics.read_text("utf-8").splitlines() if "loss" in line]
    assert steps == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_change_nothing(digits, tmp_path):
    data, _ = digits
    epochs = 3 + KILLS // 2
    options = ("--data", data, *TINY_CONFIG, "--epochs", epochs, "--batch-size", 4, "--on-broken-video", "skip")
    options += ("--save-steps", 4, "--report-to", "none", "--drop-path-rate", 0.1, "--mixup", 0.5, "--resume")
    command = (sys.executable, SCRIPTS / "finetune.py", *options, "--output-dir")
    assert_finished(run(*command, tmp_path / "whole"))
    rng, kills, states = random.Random(0), 0, tmp_path / "killed" / "states"
    while kills < KILLS:
        process = start(*command, tmp_path / "killed")
        before = {path.name for path in states.glob("step-*")}
        # at any moment: while it starts, or some time after it has got further than the run before it
        if kills % 4:
            wait_until(lambda before=before: {path.name for path in states.glob("step-*")} - before, process)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(1, 6))
        assert process.poll() is None, "the run has ended before it was killed often enough"
        process.kill()
        process.communicate()
        kills += 1
    assert_finished(run(*command, tmp_path / "killed"))
    whole, killed = last_weights(tmp_path / "whole"), last_weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    records = [(tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines() for name in ("whole", "killed")]
    evaluations = [[json.loads(line) for line in lines if "accuracy" in line] for lines in records]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == epochs


# evaluate_video.py


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was(digits, tmp_path):
    data, broken = digits
    options = (NANO, "--data", data, "--num-clips", 2, "--num-crops", 3, "--on-broken-video", "skip", "--batch-size", 3)
    text = assert_finished(call("evaluate_video.py", *options, "--output-dir", tmp_path / "one"))
    assert "33 videos" in text and f"broken: {broken[-1]}" in text
    lines = (tmp_path / "one" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 34
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text("utf-8"))
    assert metrics["videos"] == 33 and metrics["accuracy"] > 0.9 and set(metrics["broken"]) == {broken[-1]}

    # what a run that was killed leaves: parts of two processes, the last line cut
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "settings.json", tmp_path / "two")
    (tmp_path / "two" / "predictions-0000.jsonl").write_text("\n".join(lines[:12:2]) + "\n" + lines[12][:20])
    (tmp_path / "two" / "predictions-0001.jsonl").write_text("\n".join(lines[1:12:2]) + "\n")
    assert_finished(launch("evaluate_video.py", 2, *options, "--output-dir", tmp_path / "two"))
    again = (tmp_path / "two" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert again[:12] == lines[:12] and len(again) == 34
    for first, second in zip(map(json.loads, lines), map(json.loads, again), strict=True):
        assert first.pop("scores", []) == pytest.approx(second.pop("scores", []), abs=1e-5)
        assert first == second

    other = (NANO, "--data", data, "--num-clips", 4, "--output-dir", tmp_path / "one")
    result = call("evaluate_video.py", *other)
    assert result.returncode == 1
    assert "predictions of another run, with other settings: num_clips 2 -> 4" in result.stderr


# Where a run starts from, and what is wrong


def test_finetuning_goes_on_from_a_trained_model(digits, tmp_path):
    data, _ = digits
    options = ("--data", data, "--model", NANO, "--epochs", 1, "--learning-rate", 1e-6, "--on-broken-video", "skip")
    text = assert_finished(call("finetune.py", *options, "--num-workers", 0, "--output-dir", tmp_path / "model"))
    assert float(text.split("epoch 1: accuracy ")[1].split(",")[0]) >= 0.97
    assert "fresh" not in text


def test_finetuning_from_an_image_model_gets_a_new_head(digits, tmp_path):
    data, _ = digits
    student = tiny_config(num_frames=None, teacher_hidden_size=8, num_labels=8)  # as many labels, but others
    VideoMambaForVideoClassification(student).save_pretrained(tmp_path / "image")
    options = ("--data", data, "--model", tmp_path / "image", "--epochs", 1, "--num-frames", 4, "--image-size", 48)
    options += ("--on-broken-video", "skip", "--warmup-epochs", 0)
    text = assert_finished(call("finetune.py", *options, "--num-workers", 0, "--output-dir", tmp_path / "model"))
    assert "fresh weights in classifier" in text
    config = AutoModelForVideoClassification.from_pretrained(tmp_path / "model" / "best").config
    assert (config.num_frames, config.image_size, config.num_labels) == (4, 48, 8)
    assert config.teacher_hidden_size is None


def test_finetuning_explains_what_it_lacks(digits, tmp_path, exit_of):
    data, _ = digits

    def fails(message, *options):
        assert message in exit_of(finetune, *options, "--output-dir", tmp_path / "model")

    fails("pass one of --model, --config and --size, got none", "--data", data)
    fails("error: ", "--data", tmp_path / "nowhere", *TINY_CONFIG)
    fails("fewer training examples (64) than one step takes (100)", "--data", data, *TINY_CONFIG, "--batch-size", 100)
    fails("error: ", "--data", data, "--model", tmp_path / "nowhere")
    for option, value in (("--num-frames", 10**9), ("--num-frames", 0), ("--image-size", 10**6), ("--image-size", -16)):
        fails(f"error: {option} {value}: ", "--data", data, *TINY_CONFIG, option, value)
    for option, value in (("--num-frames", 3), ("--image-size", 17)):  # of a model with tubelets and patches
        config = tmp_path / "tubelets.json"
        config.write_text(json.dumps(tiny_config(tubelet_size=2).to_dict()))
        message = exit_of(
            finetune, "--data", data, "--config", config, option, value, "--output-dir", tmp_path / "model"
        )
        assert message.startswith("error: ") and "\n" not in message and str(value) in message
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.csv").write_text("x.mp4,0\n")
    fails("has no split validation or test", "--data", tmp_path / "lists", *TINY_CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "arguments.json").write_text(json.dumps({"epochs": 3}))
    fails("has a run in it: pass --resume or another folder", "--data", data, *TINY_CONFIG)
    fails("goes on with the arguments of the run, but:", "--data", data, *TINY_CONFIG, "--resume")


def test_the_best_model_is_uploaded(images, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            assert not calls and exist_ok  # before anything is computed
            calls.append(repo_id)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append((repo_id, sorted(name for name in allow_patterns if not name.endswith(".py"))))

    checked = []
    monkeypatch.setattr(run_module, "check_card", lambda api, repo_id, text: checked.append((repo_id, text[:4])))
    monkeypatch.setattr(run_module, "HfApi", Api)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_frames=None).to_dict()))
    args = LabelledArguments(
        LabelledDataArguments(str(images), num_workers=0),
        ModelArguments(config=tmp_path / "config.json"),
        LabelledAugmentationArguments(),
        OptimizationArguments(epochs=1, batch_size=40),
        RunArguments(tmp_path / "model", report_to="none", push_to_hub="org/model"),
    )
    training = ClassificationRun(args)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / "best").mkdir(parents=True)
    (tmp_path / "model" / "best" / "link.png").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "best" / ".hidden").write_text("hidden")
    training.train()
    forget_accelerator()
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert calls == ["org/model", ("org/model", files)]
    assert checked == [("org/model", ""), ("org/model", "---\n")]
    card = ModelCard.load(tmp_path / "model" / "best" / "README.md")
    assert 'pipeline("image-classification", model="org/model"' in card.text
