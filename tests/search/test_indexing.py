"""search_videos.py index, mostly in this process, which is faster than to launch it."""

import json
import os
import re
import shutil
import signal
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import search_videos
from modeling_videomamba import VideoMambaForVideoTextRetrieval, VideoMambaModel
from modeling_videomamba.training import windows as windows_module
from modeling_videomamba.training.collection import Collection
from modeling_videomamba.training.windows import Source, cut_video
from modeling_videomamba.video_decoding import BrokenVideoError
from moving_digits import write_mp4
from tests.conftest import tiny_config
from tests.launching import SCRIPTS, assert_finished, launch, start, wait_until
from tests.search.helpers import OPTIONS, TEXT, ask, counts, draw, rows, window_of, write_shard


def files_of(out):
    """Names in an index."""
    return {re.sub("^table-.*", "table-*", path.name) for path in out.iterdir()}


def test_two_processes_index_as_one_does_and_as_the_model_says(search, model_folder, oracle, clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    write_shard(folder / "a.tar", {path.name: path for path in (clips / "sub").iterdir()})
    common = ("--model", model_folder, "--clip-seconds", 2)
    text = assert_finished(launch("search_videos.py", 2, "index", folder, tmp_path / "2", *common, "--num-workers", 2))
    assert text.count("embedded 13 clips of 11 videos, kept 0, changed 0, removed 0, broken 1") == 1
    assert text.count(f"broken: {folder / 'bad.mp4'}: not a video") == 1 and "videos of this process" in text
    search("index", folder, tmp_path / "1", *common, "--num-workers", 0, "--batch-size", 3)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one.keys() == two.keys() and len(one) == 13
    assert [start for path, start in one if path == "long.mp4"] == [0.0, 2.0, 4.0]
    for key, row in one.items():
        np.testing.assert_allclose(row["embedding"], two[key]["embedding"], atol=1e-5)
        path = folder / row["path"].replace("a.tar::", "sub/")
        found = (folder / row["path"].split("::")[0]).stat()
        assert (row["size"], row["mtime"]) == (found.st_size, found.st_mtime_ns)
        expected = oracle.frame_embeds(oracle.pixels(path, *window_of(row))).mean(1)[0]
        np.testing.assert_allclose(row["embedding"], expected, atol=1e-5)
        np.testing.assert_allclose(row["direction"], F.normalize(expected, dim=0), atol=1e-5)
    assert files_of(tmp_path / "2") == {"current", "frames", "lock", "settings.json", "table-*"}


@pytest.mark.parametrize(
    ("duration", "clip_seconds"), [(6.0, 2), (6.1, 2), (0.5, 2), (7.3, 0.7), (3600.0, 10), (30.03, 10)]
)
def test_windows_cover_a_video(duration, clip_seconds):
    found = cut_video(Source("x.mp4", 1, 2), duration, clip_seconds)
    assert found[0].start == 0 and found[-1].end == duration
    assert all(one.end == other.start for one, other in pairwise(found))
    lengths = [window.end - window.start for window in found]
    assert max(lengths) <= 1.01 * clip_seconds and max(lengths) - min(lengths) < 1e-9
    assert {window.windows for window in found} == {len(found)}
    assert len(found) == 1 or duration / (len(found) - 1) > clip_seconds
    assert duration != 30.03 or len(found) == 3  # 900 frames at 29.97 a second


def test_only_what_is_new_or_changed_is_embedded(search, model_folder, collection):
    folder, out = collection
    before = rows(out)
    index = partial(search, "index", folder, out, "--model", model_folder, *OPTIONS)
    assert counts(index()) == [0, 0, 8, 0, 0, 1] and search.embedded == 0
    for seed in (10, 11, 12):
        write_mp4(folder / f"{seed}.MP4", draw(seed))
    write_mp4(folder / "0.mp4", draw(20))
    (folder / "sub" / "1.mp4").unlink()
    assert counts(index()) == [4, 4, 6, 1, 1, 1] and search.embedded == 4
    after = rows(out)
    assert after.keys() - before.keys() == {(f"{seed}.MP4", 0.0) for seed in (10, 11, 12)}
    assert before.keys() - after.keys() == {("sub/1.mp4", 0.0)}
    for key in before.keys() & after.keys():
        same = np.array_equal(before[key]["embedding"], after[key]["embedding"])
        assert same == (key[0] != "0.mp4")
    (folder / "2.mp4").write_text("no longer a video")
    os.utime(folder / "4.mp4", ns=(0, 0))
    assert counts(index()) == [1, 1, 8, 2, 0, 2] and search.embedded == 1
    assert ("2.mp4", 0.0) not in rows(out)


def test_a_killed_run_goes_on_with_what_is_missing(search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "many", tmp_path / "index"
    folder.mkdir()
    for number in range(40):
        shutil.copy(clips / "long.mp4", folder / f"{number:03}.mp4")
    command = ("index", folder, out, "--model", model_folder, *OPTIONS)
    process = start(sys.executable, SCRIPTS / "search_videos.py", *command, "--batch-size", 1)
    parts = out / "parts"
    wait_until(lambda: len(list(parts.glob("*.safetensors"))) > 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    places = Collection(out).parts.places()
    assert 10 < len(places) < 120 and not Collection(out).current.exists()
    kept = {tuple(json.loads(key)[i] for i in (0, 3)): place for key, place in places.items()}
    saved = {key: Collection(out).parts.read([place], "embedding")[0] for key, place in kept.items()}
    whole = sum((f"{number:03}.mp4", 4.0) in kept for number in range(40))
    assert counts(search(*command)) == [120 - len(places), 40 - whole, whole, 0, 0, 0]
    assert search.embedded == 120 - len(places)
    after = rows(out)
    assert len(after) == 120
    assert all(np.array_equal(after[key]["embedding"], embedding) for key, embedding in saved.items())


def test_a_kill_while_a_table_is_written_harms_nothing(search, model_folder, collection):
    folder, out = collection
    before = Collection(out).table_folder()
    (out / f"table-{'0' * 32}").mkdir()
    (out / "table-notes").mkdir()  # somebody's
    (out / "current.writing").write_text("table-unf")
    assert len(ask(search, out, TEXT, "--rerank", 0)["hits"]) == 10
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [0, 0, 8]
    assert Collection(out).table_folder() == before
    write_mp4(folder / "more.mp4", draw(30))
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [1, 1, 8]
    assert files_of(out) == {"current", "frames", "lock", "settings.json", "table-*"}
    assert {path.name for path in out.glob("table-*")} == {Collection(out).table_folder().name, "table-notes"}


def test_two_runs_do_not_write_one_index(exit_of, model_folder, clips, tmp_path):
    out = tmp_path / "index"
    with Collection(out).lock():
        message = exit_of(search_videos, "index", clips, out, "--model", model_folder, *OPTIONS)
    assert message == f"error: another run is writing {out}: wait for its end"
    assert files_of(out) == {"lock"}


def test_folders_are_walked_as_they_are_linked(search, exit_of, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(clips / "0.mp4", folder / "deep")
    (folder / "linked").symlink_to(clips / "sub")
    (folder / "deep" / "circle").symlink_to(folder)
    (folder / "deep" / "again").symlink_to(folder / "linked")
    (folder / "early").symlink_to(folder / "deep")  # the folder itself goes before
    assert counts(search("index", folder, out, "--model", model_folder, *OPTIONS))[:3] == [4, 4, 0]
    sub = "deep/again"  # which comes first
    assert {path for path, _ in rows(out)} == {"deep/0.mp4", f"{sub}/1.mp4", f"{sub}/3.mp4", f"{sub}/5.mp4"}


def test_a_folder_that_cannot_be_read_is_no_empty_one(exit_of, model_folder, clips, tmp_path, monkeypatch):
    def fails(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", fails)
    message = exit_of(search_videos, "index", clips, tmp_path / "index", "--model", model_folder, *OPTIONS)
    assert message == f"error: [Errno 13] Permission denied: '{clips / 'sub'}'"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_text_are_reported(search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    shutil.copy(clips / "0.mp4", folder)
    shutil.copy(clips / "2.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    write_shard(folder / "a.tar", {"na\udce9ve.mp4": clips / "4.mp4", "6.mp4": clips / "6.mp4"})
    shutil.copy(folder / "a.tar", os.fsencode(folder) + b"/\xe9.tar")
    text = search("index", folder, out, "--model", model_folder, *OPTIONS)
    assert counts(text) == [2, 2, 0, 0, 0, 4]
    for name in ("caf\\xe9.mp4", "a.tar::na\\xe9ve.mp4", "\\xe9.tar::6.mp4", "\\xe9.tar::na\\xe9ve.mp4"):
        assert f"broken: {name}: its name is not UTF-8, rename it" in text.splitlines()


def test_a_first_run_that_did_nothing_leaves_no_settings(exit_of, search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    shutil.copy(clips / "bad.mp4", folder)
    index = ("index", folder, out, "--model", model_folder, "--num-workers", 0, "--clip-seconds")
    assert exit_of(search_videos, *index, 3) == "error: no video could be read"
    shutil.copy(clips / "0.mp4", folder)
    assert counts(search(*index, 2)) == [1, 1, 0, 0, 0, 1]


def test_windows_beside_a_damaged_one_are_kept(search, model_folder, clips, tmp_path, monkeypatch):
    out, pixels = tmp_path / "index", windows_module.window_pixels
    index = partial(search, "index", clips, out, "--model", model_folder, *OPTIONS)

    def damaged(reader, begin, end, processor):
        if begin == 2.0:
            raise BrokenVideoError(reader.name, "damaged: frame 16 of 48 can't be decoded")
        return pixels(reader, begin, end, processor)

    with monkeypatch.context() as patch:
        patch.setattr(windows_module, "window_pixels", damaged)
        text = index()
    assert counts(text) == [9, 8, 0, 0, 0, 2] and f"broken: {clips / 'long.mp4'}: damaged: frame 16" in text
    assert [start for path, start in rows(out) if path == "long.mp4"] == [0.0, 4.0]
    assert counts(index()) == [1, 1, 7, 0, 0, 1] and search.embedded == 1
    assert [start for path, start in rows(out) if path == "long.mp4"] == [0.0, 2.0, 4.0]


def test_a_broken_video_may_stop_the_run(search, exit_of, model_folder, clips, tmp_path):
    out = tmp_path / "index"
    command = ("index", clips, out, "--model", model_folder, *OPTIONS, "--batch-size", 1)
    message = exit_of(search_videos, *command, "--on-broken-video", "raise")
    assert message.startswith(f"error: {clips / 'bad.mp4'}: not a video")
    done = len(Collection(out).parts.places())
    assert 0 < done < 10  # sorted by name, it comes in between
    assert counts(search(*command))[0] == 10 - done


# What is wrong


def test_wrong_runs_are_explained(exit_of, model_folder, clips, tmp_path):
    empty, out, other = tmp_path / "empty", tmp_path / "index", tmp_path / "other"
    empty.mkdir()
    VideoMambaModel(tiny_config()).save_pretrained(other)
    fails = partial(exit_of, search_videos)
    assert fails("query", out, TEXT) == f"error: {out} has no finished index"
    index = ("--model", model_folder, *OPTIONS)
    assert f"{empty}: there is no video" in fails("index", empty, out, *index)
    assert "nowhere: must be one folder, or shards" in fails("index", "nowhere", out, *index)
    assert "no.tar: no such shard" in fails("index", "no.tar", out, *index)
    assert "must be a model of videos and texts" in fails("index", clips, out, "--model", other)
    assert "error: nowhere: there is no such folder" in fails("index", clips, out, "--model", "nowhere")
    for option, value in (("--clip-seconds", 0), ("--clip-seconds", "nan"), ("--batch-size", 0), ("--num-workers", -1)):
        assert f"{option} must" in fails("index", clips, out, *index, option, value)
    assert not out.exists()
    (empty / "bad.mp4").write_text("no video")
    assert fails("index", empty, out, *index) == "error: no video could be read"


def test_another_model_or_other_settings_are_not_mixed(exit_of, search, model_folder, clips, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "index"
    shutil.copytree(model_folder, folder)
    search("index", clips, out, "--model", folder, *OPTIONS)
    fails = partial(exit_of, search_videos)
    message = fails("index", clips, out, "--model", folder, "--clip-seconds", 3)
    assert message == f"error: {out} is an index of another run, with other settings: clip_seconds 2.0 -> 3.0"
    model = VideoMambaForVideoTextRetrieval.from_pretrained(folder)
    with torch.no_grad():
        model.matching_head.bias.add_(1e-3)
    model.save_pretrained(folder)
    assert "other settings: weights" in fails("index", clips, out, "--model", folder, *OPTIONS)
    assert f"{folder} has other weights" in fails("query", out, TEXT)
    shutil.rmtree(folder)
    assert f"error: {folder}: there is no such folder" in fails("query", out, TEXT)
