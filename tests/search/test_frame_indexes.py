"""The frame indexes of long videos that are kept with the index of a search."""

import dataclasses
from fractions import Fraction
from functools import partial

import gradio
import numpy as np
import pytest

import page
from modeling_videomamba import video_decoding
from modeling_videomamba.training import windows as windows_module
from modeling_videomamba.training.collection import Collection
from modeling_videomamba.training.frame_indexes import FrameIndexes
from modeling_videomamba.training.search import load_search
from modeling_videomamba.training.windows import Source, VideoWindow, find_files
from modeling_videomamba.video_decoding import VideoFile
from modeling_videomamba.video_index import MISSING, FrameIndex
from moving_digits import FPS, write_mp4
from tests.conftest import moving_square, write_video
from tests.search.helpers import OPTIONS, TEXT, ask, counts, draw, rows, write_shard

VIDEO = Source("a.mp4", 5, 7)
TICKS = np.array([-9, 0, 2**40])
INDEXES = [
    FrameIndex(
        3, TICKS, np.array([0, 2]), Fraction(1, 90000), Fraction(30000, 1001), 2**41, TICKS[[0, 2]], "pts", TICKS
    ),
    FrameIndex(3, None, np.empty(0, np.int64), Fraction(1, 25), None, is_certain=False),
    FrameIndex(2, None, np.array([0]), Fraction(1, 25), None, None, np.array([MISSING]), "pos", np.array([MISSING, 3])),
]


def assert_equal(one, other):
    for field in dataclasses.fields(one):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(found, expected) and type(found) is type(expected), field.name


@pytest.mark.parametrize("index", INDEXES)
def test_what_is_written_is_read(tmp_path, index):
    frames = FrameIndexes(tmp_path / "frames")
    assert frames.read(VIDEO) is None
    frames.write(VIDEO, index)
    assert_equal(FrameIndexes(tmp_path / "frames").read(VIDEO), index)
    for other in (VIDEO._replace(path="b.mp4"), VIDEO._replace(size=6), VIDEO._replace(mtime=None)):
        assert frames.read(other) is None


def test_only_whole_files_of_wanted_videos_are_kept(tmp_path):
    frames = FrameIndexes(tmp_path)
    other = VIDEO._replace(path="b.mp4")
    frames.write(VIDEO, INDEXES[0])
    frames.write(other, INDEXES[1])
    (tmp_path / ".1.writing").touch()
    frames.keep([VIDEO])
    assert list(tmp_path.iterdir()) == [frames.path(VIDEO)]
    data = frames.path(VIDEO).read_bytes()
    for damaged in (b"", b"no index", data[:-50], data[:200] + bytes(50) + data[250:]):
        frames.path(other).write_bytes(damaged)
        assert FrameIndexes(tmp_path).read(other) is None
        frames.path(other).unlink()
    windows = [VideoWindow(*VIDEO, float(start), start + 1.0, 2) for start in range(2)]
    assert frames.complete(windows) == {VIDEO} and not frames.complete(windows[:1])
    frames.keep([])
    assert not frames.complete(windows) and frames.complete([VideoWindow(*other, 0.0, 1.0, 1)]) == {other}


def test_an_index_is_small(tmp_path):
    """Three hours of 30 frames a second."""
    ticks = np.arange(324_000) * 3000
    frames = FrameIndexes(tmp_path)
    frames.write(
        VIDEO, FrameIndex(len(ticks), ticks, ticks[::250], Fraction(1, 90000), None, 0, ticks[::250], "pts", ticks)
    )
    assert frames.path(VIDEO).stat().st_size < 50_000


@pytest.fixture
def scanned(monkeypatch):
    """The names of the videos that are scanned."""
    names, read_index = [], video_decoding.read_index
    monkeypatch.setattr(
        video_decoding, "read_index", lambda video: (names.append(video.name.split("/")[-1]), read_index(video))[1]
    )
    return names


def test_a_query_does_not_scan_long_videos(search, model_folder, collection, scanned):
    folder, out = collection
    write_shard(folder / "a.tar", {"long.mp4": folder / "long.mp4"})
    index = partial(search, "index", folder, out, "--model", model_folder, *OPTIONS)
    assert counts(index()) == [3, 1, 8, 0, 0, 1]
    kept = {path.name for path in (out / "frames").iterdir()}
    assert len(kept) == 2
    scanned.clear()
    hits = ask(search, out, TEXT, "--top-k", 20)["hits"]
    assert len(hits) == 13 and len(scanned) == 7 and not {"long.mp4", "a.tar::long.mp4"} & set(scanned)

    # an index of an earlier version: long videos are scanned, and not embedded again
    for path in (out / "frames").iterdir():
        path.unlink()
    scanned.clear()
    again = ask(search, out, TEXT, "--top-k", 20)["hits"]
    assert again == hits and scanned.count("long.mp4") == scanned.count("a.tar::long.mp4") == 3
    assert counts(index()) == [0, 0, 9, 0, 0, 1] and search.embedded == 0
    assert {path.name for path in (out / "frames").iterdir()} == kept

    write_mp4(folder / "long.mp4", draw(8, 6 * FPS))
    (folder / "a.tar").unlink()
    assert counts(index()) == [3, 1, 7, 1, 1, 1]
    assert len({path.name for path in (out / "frames").iterdir()} - kept) == len(list((out / "frames").iterdir())) == 1


def test_playing_a_hit_does_not_scan_a_long_video(collection, scanned):
    folder, out = collection
    write_shard(folder / "a.tar", {"long.mp4": folder / "long.mp4"})
    search, _, _ = load_search(out, "embedding")
    windows = [VideoWindow(**row) for row in search.rows if row["path"] == "long.mp4"]
    shard = Source("a.tar::long.mp4", *find_files([str(folder / "a.tar")])[0][1:])
    search.frames.write(shard, search.frames.read(windows[0].video))
    windows += [VideoWindow(*shard, *window[3:]) for window in windows]
    scanned.clear()
    for chosen in range(len(windows)):
        (played,) = page.play(search, windows, chosen)
        assert played.visible
    assert len(windows) == 6 and scanned == []
    write_mp4(folder / "long.mp4", draw(8, 4 * FPS))  # the kept index is of other frames
    with pytest.raises(gradio.Error, match=r"long\.mp4: changed since it was indexed"):
        next(page.play(search, windows, 2))


def test_windows_of_another_cut_are_replaced(search, model_folder, collection, monkeypatch):
    """Earlier versions took the mean rate for the length of a video."""
    folder, out = collection
    index = partial(search, "index", folder, out, "--model", model_folder, *OPTIONS)
    write_mp4(folder / "long.mp4", draw(8, 6 * FPS))
    cut = windows_module.cut_video
    with monkeypatch.context() as patch:
        patch.setattr(windows_module, "cut_video", lambda video, duration, seconds: cut(video, 5 * duration / 6, 2))
        index()
    before = [start for path, start in rows(out) if path == "long.mp4"]
    Collection(out).frames.keep([])
    assert counts(index())[0] == 3
    after = [start for path, start in rows(out) if path == "long.mp4"]
    assert before != after == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("kind", ["mp4-libx264", "mkv-libx264", "avi-mpeg4", "ts-libx264"])
def test_frames_by_a_kept_index_are_those_of_the_file(tmp_path, monkeypatch, kind):
    suffix, codec = kind.split("-")
    path, frames = write_video(tmp_path / f"a.{suffix}", moving_square(60), codec), FrameIndexes(tmp_path / "frames")
    with VideoFile("a", str(path)) as reader:
        frames.write(VIDEO, reader.index)
        expected = list(reader.decode([3, 45]))
    monkeypatch.setattr(video_decoding, "read_index", lambda _: pytest.fail("the file is scanned"))
    with VideoFile("a", str(path), index=FrameIndexes(tmp_path / "frames").read(VIDEO)) as reader:
        for _ in range(2):
            assert np.array_equal(list(reader.decode([3, 45])), expected)
