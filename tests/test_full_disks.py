"""Full disks and damaged files in scripts that evaluate, index and label."""

import errno
import os
import re
import sys

import pytest
import torch
from datasets import Dataset

import classify
import evaluate_retrieval
import evaluate_video
import search_videos
from modeling_videomamba.training import settings, sources, teacher_cache
from modeling_videomamba.training.diagnosis import RunError
from tests.conftest import NANO, NANO_VIDEO_TEXT, forget_accelerator, limited_files

VIDEO = NANO / "example.mp4"


def assert_refused(message, place):
    room = r"[\d,.]+ of [\d,.]+ MB are free on the disk of /\S*"
    pattern = rf"error: {re.escape(str(place))}\S* can't be written: [^\n]+; {room}\. What was .* is still there"
    assert re.fullmatch(pattern, str(message)), message


@pytest.fixture
def call(monkeypatch):
    """Calls a script in this process; what it ends with, if it ends so."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, options)])
        try:
            script.main()
        except SystemExit as error:
            return error.code
        finally:
            forget_accelerator()

    return call


@pytest.fixture
def run(tmp_path):
    """Options of a script that tests a model on two videos."""
    rows = [f"{VIDEO},{label},a digit moves {label}\n" for label in ("up-right", "left")]
    (tmp_path / "val.csv").write_text("".join(["path,label,caption\n", *rows]))
    return ("--data", tmp_path, "--output-dir", tmp_path / "out", "--num-workers", 0, "--batch-size", 1)


@pytest.mark.parametrize(
    ("script", "model", "limit"),
    [
        *((evaluate_video, NANO, limit) for limit in (1_000, 10_000)),  # metrics, picture
        *((evaluate_retrieval, NANO_VIDEO_TEXT, limit) for limit in (3_000, 9_000)),  # vectors
    ],
)
def test_an_evaluation_ends_with_a_line_and_can_go_on(call, run, monkeypatch, tmp_path, script, model, limit):
    with monkeypatch.context() as patch, limited_files(limit):
        # the copy of the list on the disk grows with the length of this folder's name; it has a test below
        patch.setattr(sources, "_on_disk", lambda columns, features: Dataset.from_dict(columns, features))
        assert_refused(call(script, model, *run), tmp_path / "out")
    assert call(script, model, *run) is None
    assert (tmp_path / "out" / "metrics.json").exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if "writing" in path.name]


@pytest.mark.parametrize("limit", [100, 600, 2_000])
def test_an_index_ends_with_a_line_and_can_be_gone_on_with(call, tmp_path, limit):
    options = ("index", NANO, tmp_path / "out", "--model", NANO_VIDEO_TEXT, "--num-workers", 0)
    with limited_files(limit):
        assert_refused(call(search_videos, *options), tmp_path / "out")
    assert call(search_videos, *options) is None
    assert call(search_videos, "query", tmp_path / "out", "a digit") is None


@pytest.mark.parametrize("option", ["--csv", "--features", "--picture"])
def test_a_file_of_labels_ends_with_a_line(call, tmp_path, option):
    path = tmp_path / "labels.png"
    with limited_files(20):
        assert_refused(call(classify, VIDEO, option, path), path)


def test_a_teacher_s_answers_end_a_run_with_a_line(tmp_path):
    def teach(pixel_values):
        return pixel_values.mean((2, 3, 4)).view(1, 1, 2, 1), None

    batch = {
        "pixel_values": torch.rand(1, 2, 3, 4, 4),
        "indices": torch.tensor([7]),
        "names": ["a.mp4"],
        "valid": torch.tensor([True]),
    }
    cache = teacher_cache.TeacherCache(tmp_path / "cache", teach, {})
    with limited_files(20), pytest.raises(RunError) as error:
        cache(batch)
    assert_refused(f"error: {error.value}", tmp_path / "cache")
    features, _ = cache(batch)
    assert torch.equal(cache(batch)[0], features)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=rf"^{path} is damaged .*: remove it, and the teacher is asked again$"):
        cache(batch)


def test_a_disk_that_is_full_has_its_name_in_the_message(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError(f"Error in faiss: write error in {tmp_path}: 0 != 1 ({os.strerror(errno.ENOSPC)})")

    with monkeypatch.context() as patch, pytest.raises(RunError) as error:
        patch.setattr(settings.Path, "replace", refuse)
        settings.check_settings(tmp_path / "settings.json", {}, "mine")
    assert_refused(f"error: {error.value}", tmp_path)


def test_the_copy_of_a_list_ends_with_a_line(call, run, monkeypatch, tmp_path):
    monkeypatch.setattr(sources.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with limited_files(100):
        assert_refused(call(evaluate_retrieval, NANO_VIDEO_TEXT, *run), tmp_path / "cache")


# What others have damaged


def test_an_evaluation_ends_with_a_line_at_a_broken_video(call, run, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(VIDEO.read_bytes()[:500])
    with (tmp_path / "val.csv").open("a") as file:
        file.write(f"{tmp_path / 'bad.mp4'},left,a digit\n")
    message = call(evaluate_video, NANO, *run, "--on-broken-video", "raise")
    assert message.startswith(f"error: {tmp_path / 'bad.mp4'}: ") and "\n" not in message
    assert message.endswith("With --on-broken-video skip a run goes on without broken files")


@pytest.mark.parametrize("line", ["", "[1]", '{"index": null}', '{"video": 1}', '{"index": 1', "\udcff"])
def test_a_line_that_is_no_prediction_is_named(call, run, tmp_path, line):
    assert call(evaluate_video, NANO, *run) is None
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_bytes(path.read_bytes() + f"{line}\n".encode(errors="surrogateescape"))
    assert call(evaluate_video, NANO, *run) == f"error: {path}, line 3 is no prediction: remove the line"
    path.write_bytes(path.read_bytes()[:-5])  # as a kill does
