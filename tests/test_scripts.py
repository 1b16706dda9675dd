"""classify.py and make_moving_digits.py: called in this process, and run as a user runs them."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification, pipeline

import classify as classify_script
from modeling_videomamba import VideoMambaModel, VideoMambaVideoProcessor
from tests.conftest import NANO
from tests.launching import SCRIPTS, call, run
from tests.test_video_order import CASES

BROKEN = [CASES / name for name in ("unknown_fourcc.mp4", "h264-ts-225-flips.ts", "half_wmv.wmv")]


def classify(*arguments):
    return call("classify.py", *arguments)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Clips that no training has seen: another seed, test digits, made by the script."""
    folder = tmp_path_factory.mktemp("digits")
    options = ("--train-clips", 32, "--test-clips", 160, "--seed", 1234)
    result = call("make_moving_digits.py", folder, *options)
    assert result.returncode == 0, result.stderr
    return folder


# classify.py


def test_the_example_of_the_readme_is_classified_right():
    result = run(sys.executable, SCRIPTS / "classify.py", NANO / "example.mp4", "--json", "--top-k", 3)
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)
    assert len(report["labels"]) == 3
    assert report["labels"][0]["label"] == "up-right" and report["labels"][0]["score"] > 0.9


def test_the_table_shows_every_video(digits):
    videos = sorted((digits / "test" / "left").glob("*.mp4"))[:3]
    result = classify(*videos, "--top-k", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("left") >= 3
    assert "videos" in result.stderr and "100%" in result.stderr  # the progress bar
    assert "Loading weights" not in result.stderr and "Warning" not in result.stderr


def test_the_picture_shows_frames_beside_bars(tmp_path):
    result = classify(NANO / "example.mp4", "--picture", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] >= 1200 and len(picture.getcolors(10**6)) > 100


def test_features_are_the_pooled_outputs(tmp_path):
    result = classify(NANO / "example.mp4", "--features", tmp_path / "features.safetensors")
    assert result.returncode == 0, result.stderr
    features = load_file(tmp_path / "features.safetensors")[str(NANO / "example.mp4")]
    model = AutoModelForVideoClassification.from_pretrained(NANO)
    processor = VideoMambaVideoProcessor.from_pretrained(NANO)
    with torch.no_grad():
        expected = model.videomamba(**processor(NANO / "example.mp4", return_tensors="pt")).pooler_output[0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_unreadable_videos_are_reported_and_counted_and_the_rest_goes_on(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    videos = tmp_path / "nowhere.mp4", NANO / "example.mp4", tmp_path / "text.mp4", *BROKEN
    result = classify(*videos, "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert [("labels" in item, "error" in item) for item in report] == [(True, False), *[(False, True)] * 5]
    assert "nowhere.mp4: no such video file" in result.stderr and "text.mp4: not a video" in result.stderr
    assert "unknown_fourcc.mp4: there is no decoder for its video codec" in result.stderr
    assert "h264-ts-225-flips.ts: damaged" in result.stderr and "half_wmv.wmv: truncated" in result.stderr
    assert "5 of 6 videos could not be read" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def folder_of_videos(tmp_path):
    """Videos at two depths, a broken one, and what is no video."""
    folder = tmp_path / "videos"
    for name in ("b.mp4", "a.mp4", "sub/deep/c.MP4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(NANO / "example.mp4", folder / name)
    (folder / "sub" / "broken.webm").write_text("no video")
    (folder / "notes.txt").write_text("no video either")
    return folder


def test_a_folder_is_labelled_into_a_table(folder_of_videos, tmp_path, exit_of, capsys):
    table, extra = tmp_path / "labels.csv", NANO / "example.mp4"
    end = exit_of(classify_script, extra, folder_of_videos, "--csv", table, "--top-k", 2)
    printed = capsys.readouterr()
    assert end == "1 of 5 videos could not be read" and "broken.webm: not a video" in printed.err
    assert printed.out == f"labels of 4 videos: {table}\n"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [str(folder_of_videos / name) for name in ("a.mp4", "b.mp4", "sub/broken.webm", "sub/deep/c.MP4")]
    assert [row["video"] for row in rows if row["rank"] != "2"] == [str(extra), *names]
    assert [row["label"] for row in rows if row["rank"] == "1"] == ["up-right"] * 4
    assert all(float(row["score"]) > 0.9 for row in rows if row["rank"] == "1")
    assert [(row["video"], row["label"]) for row in rows if row["error"]] == [(names[2], "")]
    assert len(rows) == 2 * 4 + 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("form", ["table", "json", "csv", "picture", "features"])
def test_a_name_that_is_not_text_is_a_video_that_cannot_be_read(form, tmp_path, monkeypatch):
    """In a folder, and given; the output may have such a name."""
    folder = tmp_path / "videos"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for name in (b"videos/\xff.mp4", b"videos/z.mp4", b"caf\xe9.mp4"):
        shutil.copyfile(NANO / "example.mp4", os.fsdecode(name))
    out = Path("out.png" if form == "picture" else os.fsdecode(b"\xfe.out"))
    options = {"table": (), "json": ("--json",)}.get(form, (f"--{form}", out))
    result = classify(folder, os.fsdecode(b"caf\xe9.mp4"), *options)
    names = [f"{folder}/\\xff.mp4", "caf\\xe9.mp4"]
    failed = [(name, f"{name}: its name is not UTF-8, rename it") for name in names]
    assert result.returncode == 1 and result.stderr.endswith("2 of 3 videos could not be read\n")
    reported = [line for line in result.stderr.splitlines() if "rename it" in line]
    assert reported == [f"error: {reason}" for _, reason in failed]
    if form == "json":
        report = json.loads(result.stdout)
        assert "labels" in report[0] and [(one["video"], one["error"]) for one in report[1:]] == failed
    elif form == "csv":
        rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
        assert [(row["video"], row["error"]) for row in rows if row["error"]] == failed
        assert len(rows) == 5 + 2 and "\\xfe.out" in result.stdout
    elif form == "features":
        assert list(safetensors.torch.load(out.read_bytes())) == [str(folder / "z.mp4")]
    else:
        assert "z.mp4" in result.stdout and "up-right" in result.stdout and out.exists() == (form == "picture")


@pytest.mark.parametrize("other", ["a.mp4", "./a.mp4", "sub/../a.mp4", "link/a.mp4", "{folder}/a.mp4", ".", "sub/.."])
def test_one_file_by_two_paths_is_given_twice(other, tmp_path, exit_of, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "a.mp4").write_text("no video")
    monkeypatch.chdir(tmp_path)
    message = exit_of(classify_script, "a.mp4", other.format(folder=tmp_path))
    assert re.fullmatch(r"error: a video is given twice: \S*a\.mp4", message)


def test_what_is_wrong_with_folders_is_explained(folder_of_videos, tmp_path, exit_of):
    (tmp_path / "empty").mkdir()
    assert "error: " + str(tmp_path / "empty") in exit_of(classify_script, tmp_path / "empty")
    twice = exit_of(classify_script, folder_of_videos, folder_of_videos / "sub" / "deep" / "c.MP4")
    assert twice == f"error: a video is given twice: {folder_of_videos / 'sub' / 'deep' / 'c.MP4'}"
    many = [folder_of_videos / f"{index}.mp4" for index in range(51)]
    many = exit_of(classify_script, *many, "--picture", tmp_path / "a.png")
    assert many == "error: --picture takes at most 50 videos, got 51"


def test_names_with_markup_are_shown_as_they_are(tmp_path):
    path = tmp_path / "clip [bold] [id] $x$.mp4"
    path.write_bytes((NANO / "example.mp4").read_bytes())
    result = run(sys.executable, SCRIPTS / "classify.py", path.name, "--picture", "p.png", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert path.name in result.stdout


def test_views_of_the_processor_are_averaged(tmp_path):
    shutil.copytree(NANO, tmp_path / "model")
    processor = VideoMambaVideoProcessor.from_pretrained(NANO, num_clips=2, num_crops=3)
    processor.save_pretrained(tmp_path / "model")
    result = classify(NANO / "example.mp4", "--model", tmp_path / "model", "--json", "--top-k", 8)
    (report,) = json.loads(result.stdout)
    model = AutoModelForVideoClassification.from_pretrained(NANO)
    with torch.no_grad():
        views = model(**processor(NANO / "example.mp4", return_tensors="pt")).logits.softmax(-1)
    assert views.shape == (6, 8)
    expected = {model.config.id2label[index]: score for index, score in enumerate(views.mean(0).tolist())}
    assert {item["label"]: item["score"] for item in report["labels"]} == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    VideoMambaModel.from_pretrained(NANO).save_pretrained(tmp_path)
    VideoMambaVideoProcessor.from_pretrained(NANO).save_pretrained(tmp_path)
    result = classify(NANO / "example.mp4", "--model", tmp_path)
    assert result.returncode == 1 and "no weights for classifier.bias, classifier.weight" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.mp4", "--picture", "a.gif"), "--picture a.gif: must end in"),
        (("x.mp4", "--features", "no/folder/a.safetensors"), "no such folder"),
        (("x.mp4", "--model", "no/such/folder"), "--model no/such/folder"),
        (("x.mp4", "--top-k", "0"), "--top-k"),
        (("x.mp4", "--features", "a", "--picture", "b.png"), "pass one of them"),
        (("x.mp4", "x.mp4"), "twice"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    result = classify(*arguments)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr


# The model that comes along


def test_the_nano_model_is_small():
    assert (NANO / "model.safetensors").stat().st_size < 1_000_000


def test_the_nano_model_reaches_its_accuracy_on_clips_it_never_saw(digits):
    videos = sorted((digits / "test").glob("*/*.mp4"))
    classifier = pipeline("video-classification", model=str(NANO))
    correct = sum(classifier(str(video), top_k=1)[0]["label"] == video.parent.name for video in videos)
    assert len(videos) == 160
    stated = float(re.search(r"(\d+\.\d+) % of the 800 test clips", (NANO / "README.md").read_text("utf-8"))[1]) / 100
    assert stated >= 0.99
    standard_error = (stated * (1 - stated) / len(videos)) ** 0.5
    assert correct / len(videos) >= stated - 3 * standard_error


# make_moving_digits.py


def test_the_clips_are_a_videofolder(digits):
    labels = sorted(path.name for path in (digits / "train").iterdir())
    assert labels == ["down", "down-left", "down-right", "left", "right", "up", "up-left", "up-right"]
    assert len(list((digits / "train").glob("*/*.mp4"))) == 32
