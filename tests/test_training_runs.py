"""Runs in this process, and the folders that they write: mount points, full disks, other runs, older files."""

import errno
import json
import os
import re
import runpy
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from accelerate.utils import other as accelerate_saving
from PIL import Image
from torch._utils import ExceptionWrapper
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import finetune
import pretrain_umt
import pretrain_video_text
from modeling_videomamba.training import checkpoints, classification, output, run
from modeling_videomamba.training.cards import was_edited
from modeling_videomamba.training.checkpoints import list_checkpoints
from modeling_videomamba.training.data import BrokenImageError, BrokenVideoError, MissingCaptionError, broken_file
from modeling_videomamba.training.output import lock, replace_files
from tests.conftest import forget_accelerator, limited_files, tiny_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two training pictures and two test pictures of each of two classes, and the configuration of a small model."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        path = folder / ("train" if number < 4 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 30 * number, np.uint8)).save(path)
    config = folder / "config.json"
    config.write_text(json.dumps(tiny_config(num_frames=None, num_hidden_layers=1).to_dict()))
    return folder


@pytest.fixture
def train(pictures, monkeypatch, capsys):
    """Runs a script in this process; what it has printed, and what it ends with, an error or nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(run, "draw_curves", lambda records, path: path.write_text("curves"))  # which take a second
    monkeypatch.setattr(classification, "draw_confusion_matrix", lambda *_: None)

    def call(folder, *options, script=finetune):
        command = ("--data", pictures, "--config", pictures / "config.json", "--num-workers", 0, "--epochs", 3)
        command += ("--batch-size", 4, "--report-to", "none", "--output-dir", folder, *options)
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, command)])
        code = None
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            forget_accelerator()
        return "".join(capsys.readouterr()), code

    return call


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def times(folder):
    """When files were written last, but for metrics.jsonl, to which a run adds."""
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder) if name != "metrics.jsonl"}


# Where a run writes


def test_a_run_writes_nothing_outside_its_folder(train, tmp_path, monkeypatch):
    """So that the folder may be a mount point, whose files can't be renamed to or from its parent."""
    folder, moved = tmp_path / "mounted", []
    folder.mkdir()

    def same_device(real):
        def rename(source, target):
            inside = [folder in path.parents for path in (Path(source), Path(target))]
            if inside[0] != inside[1]:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))
            moved.append(target)
            return real(source, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, same_device(getattr(os, name)))
    text, code = train(folder, "--save-steps", 1)
    assert code is None, (text, code)
    assert len(moved) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]
    assert not [path for path in folder.rglob("*") if "writing" in path.name]


def test_what_a_killed_run_left_is_removed(train, tmp_path):
    for folder in (tmp_path, tmp_path / "best"):
        left = folder / f"{output.WRITING}x"
        left.mkdir(parents=True)
        (left / "README.md").write_text("half")
    _, code = train(tmp_path)
    assert code is None and not [name for name in files(tmp_path) if output.WRITING in name]


def test_files_are_replaced_whole(tmp_path):
    replace_files(tmp_path / "best", lambda folder: (folder / "a").write_text("old"))

    def write_and_die(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_files(tmp_path / "best", write_and_die)
    assert (tmp_path / "best" / "a").read_text() == "old"
    replace_files(tmp_path / "best", lambda folder: (folder / "a").write_text("new"))
    assert files(tmp_path) == ["best/a"] and (tmp_path / "best" / "a").read_text() == "new"


def unwritable(tmp_path):
    """Folders that can't be made or written, and what is said of each."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return {
        tmp_path / "file": "it is no folder",
        tmp_path / "file" / "out": "Not a directory",
        tmp_path / "link": "it is no folder",
        Path("/proc/out"): "No such file or directory",
        Path("/proc/self"): "No such file or directory",
        tmp_path / ("x" * 300): "File name too long",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_cannot_be_written_is_refused_with_a_line(train, tmp_path):
    for folder, reason in unwritable(tmp_path).items():
        _, code = train(folder)
        assert re.fullmatch(rf"error: {folder} can't be written: .*{reason}.* MB are free on the disk of /.*", code), (
            code
        )
    assert (tmp_path / "file").read_text() == "mine" and files(tmp_path) == ["file"]


def test_a_parent_without_permission_is_refused_with_a_line(train, tmp_path, monkeypatch):
    real = Path.mkdir

    def mkdir(path, *args, **kwargs):
        if path.name == "out":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    _, code = train(tmp_path / "out")
    assert code.startswith(f"error: {tmp_path / 'out'} can't be written: [Errno 13] Permission denied: ")


def test_a_run_that_is_refused_leaves_no_folder(train, tmp_path):
    _, code = train(tmp_path / "new" / "out", "--batch-size", 100)
    assert code == "error: fewer training examples (4) than one step takes (100)"
    assert list(tmp_path.iterdir()) == []


# Other runs in the same folder


def test_two_runs_do_not_write_one_folder(train, tmp_path, monkeypatch):
    """Whether the other run has begun before this one starts, or while it loads its data."""
    with lock(tmp_path / "out"), monkeypatch.context() as patch:
        patch.setattr(classification, "load_classifier", lambda *_, **__: pytest.fail("it began to load"))
        for options in ((), ("--resume",)):
            _, code = train(tmp_path / "out", *options)
            assert code == f"error: another run is writing {tmp_path / 'out'}: wait for its end"
    assert files(tmp_path) == ["out/lock"]

    real, others = classification.load_classifier, ExitStack()

    def load(*args, **kwargs):
        others.enter_context(lock(tmp_path / "late"))
        return real(*args, **kwargs)

    with others, monkeypatch.context() as patch:
        patch.setattr(classification, "load_classifier", load)
        _, code = train(tmp_path / "late")
        assert code == f"error: another run is writing {tmp_path / 'late'}: wait for its end"
    assert files(tmp_path / "late") == ["lock"] and train(tmp_path / "late")[1] is None


def test_a_run_that_began_and_ended_while_this_one_loaded_is_kept(train, tmp_path, monkeypatch):
    real, folder = classification.load_classifier, tmp_path / "out"

    def load(*args, **kwargs):
        folder.mkdir()
        (folder / "arguments.json").write_text("{}")
        return real(*args, **kwargs)

    monkeypatch.setattr(classification, "load_classifier", load)
    _, code = train(folder)
    assert code == f"error: --output-dir {folder} has a run in it: pass --resume or another folder"
    assert files(folder) == ["arguments.json", "lock"]


# What a run finds in its folder


def test_a_folder_with_a_run_is_recognised_by_each_of_its_files(train, tmp_path):
    assert train(tmp_path / "out", "--save-steps", 1)[1] is None
    for kept in ("arguments.json", "states", "last"):
        folder = tmp_path / kept
        shutil.copytree(tmp_path / "out", folder)
        for path in folder.iterdir():
            if path.name != kept:
                output.remove(path)
        before = files(folder)
        _, code = train(folder)
        assert code == f"error: --output-dir {folder} has a run in it: pass --resume or another folder"
        assert files(folder) == before


@pytest.mark.parametrize("content", ["", '{"seed": 0, "epo', "[]", "null", "\xff\x00"])
def test_half_a_file_of_arguments_is_reported_and_written_again(train, tmp_path, content):
    assert train(tmp_path, "--save-steps", 1)[1] is None
    whole = (tmp_path / "arguments.json").read_text()
    (tmp_path / "arguments.json").write_text(content, "latin-1")
    text, code = train(tmp_path, "--resume")
    assert code is None and text.count(f"warning: {tmp_path / 'arguments.json'} ") == 1
    assert "It is written again, without a comparison of the arguments" in text and "resumed after step 3" in text
    assert (tmp_path / "arguments.json").read_text() == whole


def test_resuming_without_a_state(train, tmp_path):
    """A run that was killed before its first state begins again; one that has ended is not replaced."""
    text, code = train(tmp_path / "out", "--resume")
    line = f"--resume: {tmp_path / 'out' / 'states'} has no state yet, so the run begins at its first step"
    assert code is None and text.count(line) == 1
    shutil.rmtree(tmp_path / "out" / "states")
    before = files(tmp_path / "out")
    _, code = train(tmp_path / "out", "--resume")
    expected = f"the run in {tmp_path / 'out'} has ended and its states are gone: pass another folder"
    assert code == f"error: --resume: {expected}" and files(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out" / "last")
    text, code = train(tmp_path / "out", "--resume")
    assert code is None and text.count(line) == 1


def test_ctrl_c_before_the_first_step_ends_with_a_line(train, tmp_path, monkeypatch, sigint):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(classification, "load_classifier", interrupted)
    text, code = train(tmp_path / "out")
    assert code == 130 and text.endswith("interrupted: go on with --resume\n")


# Full disks


NO_SPACE = os.strerror(errno.ENOSPC)
FULL = {
    "": OSError(errno.ENOSPC, NO_SPACE),
    "safetensors": safetensors.SafetensorError(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 667264 vs 667152"),
}


def refusal(folder, code, reason=NO_SPACE):
    """Whether a run has ended with a line that names the folder, the reason and the disk."""
    room = r"[\d,.]+ of [\d,.]+ MB are free on the disk of /"
    return re.fullmatch(
        rf"error: {folder}\S* can't be written: .*{reason}.*; {room}.*\. What was .* is still there", code
    )


@pytest.mark.parametrize(
    ("owner", "name", "kind"),
    [
        (torch, "save", "torch"),
        (accelerate_saving, "safe_save_file", "safetensors"),
        (checkpoints, "_finish", ""),
        (output.tempfile, "TemporaryDirectory", ""),
        (classification.ClassificationRun, "save_model", "safetensors"),
        (classification.ClassificationRun, "report", ""),
        (Path, "open", ""),
    ],
)
def test_a_full_disk_ends_a_run_with_a_line(train, tmp_path, monkeypatch, owner, name, kind):
    """It fills after the first state; what was saved stays, nothing half written does, and the run can go on."""
    folder, kept = tmp_path / "out", {}
    real = getattr(owner, name)

    def write(*args, **kwargs):
        if not list_checkpoints(folder / "states"):
            return real(*args, **kwargs)
        kept.update({name: time for name, time in times(folder).items() if output.WRITING not in name})
        raise FULL[kind]

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, write)
        text, code = train(folder, "--save-steps", 1)
    assert refusal(folder, code), (code, text)
    assert times(folder) == kept and len(kept) > 8
    text, code = train(folder, "--save-steps", 1, "--resume")
    assert code is None and "resumed after step" in text and "warning" not in text


@pytest.mark.parametrize("limit", [3_000, 10_000, 40_000, 90_000])
def test_writes_that_really_fail(train, tmp_path, limit):
    folder = tmp_path / "out"
    assert train(folder, "--epochs", 1)[1] is None
    before = {name: (folder / name).read_bytes() for name in files(folder) if name != "metrics.jsonl"}
    with limited_files(limit):
        _, code = train(tmp_path / "more")
        _, again = train(folder, "--epochs", 1, "--resume")
    assert refusal(tmp_path / "more", code, "") and "\n" not in code, code
    assert refusal(folder, again, ""), again
    assert {name: (folder / name).read_bytes() for name in before} == before


# Nothing to evaluate on, and which model is the best


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_readable_example_ends_a_run_before_its_first_step(pictures, train, tmp_path, split):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = sorted((data / split).rglob("*.png"))
    for path in broken:
        path.write_text("no picture")
    _, code = train(tmp_path / "out", "--data", data, "--on-broken-video", "skip")
    shown = re.escape(str(broken[0]))
    expected = f"error: no example of the {split} split can be read: 4 broken files, the first: "
    assert re.fullmatch(rf"{expected}{shown}: not a picture, or truncated \(.*\)", code), code
    assert not (tmp_path / "out").exists()
    shutil.copy(pictures / "test" / "b" / "7.png", broken[-1])  # one is enough
    text, code = train(tmp_path / "out", "--data", data, "--on-broken-video", "skip")
    assert code is None and "3 broken files" in text


def test_examples_that_can_no_longer_be_read_end_a_run_with_a_line(pictures, train, tmp_path, monkeypatch):
    shutil.copytree(pictures, tmp_path / "data")
    monkeypatch.setattr(classification.ClassificationRun, "check_readable", lambda *_: None)
    for path in (tmp_path / "data" / "test").rglob("*.png"):
        path.write_text("no picture")
    _, code = train(tmp_path / "out", "--data", tmp_path / "data", "--on-broken-video", "skip")
    assert code.startswith("error: no example of the test split can be read: 4 broken files, the first: ")


def test_a_broken_file_ends_a_run_with_a_line(pictures, train, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    path = tmp_path / "data" / "test" / "b" / "7.png"
    path.write_text("no picture")
    _, code = train(tmp_path / "out", "--data", tmp_path / "data")
    assert code.startswith(f"error: {path}: not a picture") and "\n" not in code
    assert code.endswith(". With --on-broken-video skip a run goes on without broken files")


@pytest.mark.parametrize(
    "error",
    [
        BrokenVideoError("a: b.mp4", "no video"),
        BrokenImageError("a: b.mp4: no video"),
        MissingCaptionError("a: b.mp4: no video"),
        ValueError("a: b.mp4: no video"),
    ],
)
def test_a_broken_file_is_found_behind_the_traceback_of_a_worker(error):
    try:
        raise error
    except ValueError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises((ValueError, RuntimeError)) as raised:
        wrapper.reraise()
    expected = None if type(error) is ValueError else "a: b.mp4: no video"
    assert broken_file(raised.value) == broken_file(error) == expected


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    widths = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPVisionConfig(**widths, image_size=32, patch_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("split", ["train", "test", "probe's train", "probe's test"])
def test_masked_pretraining_without_a_readable_example(pictures, train, tmp_path, clip, split):
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    for path in (broken / split.split()[-1]).rglob("*.png"):
        path.write_text("no picture")
    options = ("--teacher", clip, "--on-broken-video", "skip", "--evaluation-examples", 2)
    options += ("--probe-data" if "probe" in split else "--data", broken)
    _, code = train(tmp_path / "out", *options, script=pretrain_umt)
    count = 2 if split == "test" else 4
    assert code.startswith(
        f"error: no example of the {split} split can be read: {count} broken files, the first: {broken}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_pretraining_with_texts_without_a_readable_example(train, tmp_path, split):
    data, text = tmp_path / "data", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": 60, "max_position_embeddings": 32}
    values = {"vision_config": tiny_config(num_frames=4).to_diff_dict(), "text_config": text, "fusion_layer": 1}
    for name in ("train", "test"):
        (data / name).mkdir(parents=True)
        paths = [f"{name}/{number}.png" for number in range(4)]
        (data / f"{name}.json").write_text(json.dumps([{"image": path, "caption": "a picture"} for path in paths]))
        for path in paths:
            Image.new("RGB", (32, 32)).save(data / path)
            if name == split:
                (data / path).write_text("no picture")
    (tmp_path / "config.json").write_text(json.dumps({**values, "projection_dim": 8}))
    options = ("--data", data, "--config", tmp_path / "config.json", "--on-broken-video", "skip")
    _, code = train(tmp_path / "out", *options, script=pretrain_video_text)
    name = "train (images)" if split == "train" else "test"
    assert code.startswith(f"error: no example of the {name} split can be read: 4 broken files, the first: {data}"), (
        code
    )


# What a card says


def test_a_card_says_nothing_of_this_machine(pictures, train, tmp_path):
    folder = tmp_path / "alice" / "out"
    _, code = train(folder, f"--config={pictures / 'config.json'}", f"--label-file={tmp_path / 'alice' / 'labels.txt'}")
    assert code is not None
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "labels.txt").write_text("a\nb\n")
    _, code = train(folder, f"--config={pictures / 'config.json'}", f"--label-file={tmp_path / 'alice' / 'labels.txt'}")
    assert code is None
    for path in (folder / "best").rglob("*"):
        assert b"alice" not in path.read_bytes() and bytes(pictures.parent) not in path.read_bytes(), path
    card = (folder / "best" / "README.md").read_text()
    assert f"finetune.py --data {pictures.name} --config config.json" in card and "--label-file=labels.txt" in card
    assert not was_edited(card, "") and was_edited(card.replace("finetune", "Finetune"), "")
