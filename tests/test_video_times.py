"""Times of frames: from timestamps, in files whose frames have other distances than the mean, or that state no rate."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba.training.data import cut_into_windows, decode_clips
from modeling_videomamba.training.windows import Source, cut_video
from modeling_videomamba.video_decoding import read_frames, read_metadata
from modeling_videomamba.video_index import FrameIndex

CASES = Path(__file__).parent / "data" / "cases"
# ten frames a second, then one a second, then a still picture
TIMES = [*(frame / 10 for frame in range(30)), *range(3, 13), 20]
KINDS = [
    *(("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx"), ("live.webm", "libvpx")),
    *(("flv", "flv"), ("ts", "libx264"), ("nut", "mpeg4"), ("ogv", "libtheora"), ("ivf", "libvpx"), ("wmv", "wmv2")),
]


def write_frames(path, codec, times, rate=10):
    """Frames that show their number in black and white, with these times."""
    options = {"live": "1", "cluster_time_limit": "1000"} if path.name.endswith("live.webm") else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 96, 16
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, rate)
        stream.codec_context.gop_size = 10
        for number, at in enumerate(times):
            digits = np.array([number >> digit & 1 for digit in range(6)], np.uint8) * 255
            image = np.broadcast_to(digits.repeat(16)[:, None], (16, 96, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = round(at * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames):
    columns = frames.float().mean((1, 2)).unflatten(-1, (6, 16)).mean(-1) > 127
    return (columns.long() @ (2 ** torch.arange(6))).tolist()


def shown(times, start, end):
    """The frames that appear in a window, else the frame that is on the screen."""
    found = [number for number, at in enumerate(times) if start <= at < end]
    return found or [max(number for number, at in enumerate(times) if at <= start)]


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_windows_have_the_frames_that_are_shown_then(tmp_path, suffix, codec):
    try:
        path = write_frames(tmp_path / f"a.{suffix}", codec, TIMES)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no {codec}")
    metadata = read_metadata(path)
    np.testing.assert_allclose(metadata.index.times, TIMES, atol=2e-3)
    assert metadata.total_num_frames == len(TIMES) and 20 < metadata.duration < 20.2
    assert metadata.fps == pytest.approx(len(TIMES) / metadata.duration)
    for start, end in ((0, 3), (2, 5), (2.97, 4), (5, 9), (4.5, 4.8), (13, 16), (15, 20), (12, 20.5), (19, 100)):
        media = {"path": str(path), "bytes": None}
        first, last = metadata.index.window(start, end)
        assert list(range(first, last)) == shown(TIMES, start, end)
        (clip,) = decode_clips({"video": media, "start": float(start), "end": float(end)}, last - first)
        assert set(numbers(clip)) <= set(range(first, last)) and numbers(clip)[0] == first
    frames, metadata = read_frames(path, lambda metadata: [3, 35])
    assert numbers(frames) == [3, 35] and metadata.timestamps == pytest.approx([0.3, 8], abs=2e-3)


def test_real_files():
    vfr, dropped = (read_metadata(CASES / name) for name in ("vfr.mp4", "dropped.ogv"))
    assert (vfr.total_num_frames, vfr.duration) == (150, 59.1) and vfr.fps == pytest.approx(150 / 59.1)
    assert vfr.index.window(20, 30) == (110, 120)  # a frame a second
    assert (dropped.total_num_frames, dropped.duration, dropped.fps) == (388, 40.0, 9.7)
    first, last = dropped.index.window(20, 30)
    assert dropped.index.times[[first, last - 1, last]] == pytest.approx([20.0, 29.9, 30.0]) and last - first < 100
    cut = cut_into_windows(split_of(CASES / "vfr.mp4"), 20.0, 10.0)
    assert [(row["start"], row["end"]) for row in cut] == [(0.0, 20.0), (10.0, 30.0), (20.0, 40.0), (30.0, 50.0)]


def split_of(path):
    media = Dataset.from_dict({"video": [{"path": str(path), "bytes": None}], "label": [0]})
    return media.cast_column("video", Video(decode=False))


def windows_of(index, clip_seconds):
    """With the frames of each."""
    windows = cut_video(Source("a", 1, 2), index.duration, clip_seconds)
    return [(window, index.window(window.start, window.end)) for window in windows]


def test_a_still_picture_is_in_each_of_its_windows(tmp_path):
    path = write_frames(tmp_path / "a.mkv", "libx264", [0, 0.1, 0.2, 25, 25.1])
    found = windows_of(read_metadata(path).index, 5.04)
    assert [frames for _, frames in found] == [(0, 3), (2, 3), (2, 3), (2, 3), (3, 5)]


steps = st.one_of(st.integers(1, 3), st.integers(100, 5000))


@given(st.lists(steps, max_size=60), st.integers(1, 3000), st.integers(100, 9000))
@settings(max_examples=100, deadline=None)
def test_windows_that_meet_have_all_frames_and_share_few(steps, last, clip):
    """A frame is in two windows only if it is the only one of the later window."""
    timestamps = 77 + np.cumsum([0, *steps])
    index = FrameIndex(
        len(timestamps), timestamps, np.zeros(1, np.int64), Fraction(1, 1000), None, int(timestamps[-1]) + last
    )
    assert index.duration == pytest.approx((sum(steps) + last) / 1000)
    found = [frames for _, frames in windows_of(index, clip / 1000)]
    assert found[0][0] == 0 and found[-1][1] == len(timestamps)
    assert all(first < last for first, last in found)
    for (_, end), after in pairwise(found):
        assert after[0] == end or after == (end - 1, end)


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(30), Fraction(24000, 1001), Fraction(30000, 1001)])
@pytest.mark.parametrize("base", [Fraction(1, 1000), Fraction(1, 90000), None])
def test_a_constant_rate_gives_the_frames_of_that_rate(rate, base):
    """Though timestamps are rounded."""
    total, base = 950, base or 1 / rate
    timestamps = np.array([round(number / rate / base) for number in range(total)])
    index = FrameIndex(total, timestamps, np.zeros(1, np.int64), base, rate, round(total / rate / base))
    assert (index.duration, index.fps) == (float(total / rate), float(rate))
    for clip_seconds in (0.7, 1.0, 2.0, 10.0):
        for window, (first, last) in windows_of(index, clip_seconds):
            for found, at in ((first, window.start), (last, window.end)):
                assert abs(found - at * rate) <= 0.5 + float(base * rate)
