"""Hits for people: their times, whether any fits, and small files of them."""

import av
import numpy as np
import pytest
import torch

from modeling_videomamba.training.previews import clock_time, write_preview
from modeling_videomamba.training.search import Hit, warn_of
from modeling_videomamba.training.windows import VideoWindow
from modeling_videomamba.video_decoding import VideoFile, read_frames
from tests.conftest import write_video

WINDOW = VideoWindow("a.mp4", 1, 1, 0.0, 2.0, 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3599.5, "1:00:00"),
        (6450, "1:47:30"),
        (36000, "10:00:00"),
    ],
)
def test_times_have_hours(seconds, text):
    assert clock_time(seconds) == text


def test_the_times_of_a_hit():
    window = WINDOW._replace(start=6440.0, end=6450.0)
    assert Hit(window, 0.5).time == "1:47:20\N{EN DASH}1:47:30"
    assert Hit(window._replace(start=0.0, end=None), 0.5).time == "0:00\N{EN DASH}end"


@pytest.mark.parametrize(
    ("probabilities", "text"),
    [
        ([0.012, 0.004, None], "nothing fits well: the best match has a probability of 0.012"),
        ([0.5, 0.004], ""),
        ([0.99, None], ""),
        ([None, None], ""),  # not judged
        ([], ""),
    ],
)
def test_hits_that_do_not_match_are_told(probabilities, text):
    assert warn_of([Hit(WINDOW, 0.9, probability) for probability in probabilities]) == text


@pytest.mark.parametrize(("size", "expected"), [((72, 66), (72, 66)), ((720, 40), (360, 20))])
def test_a_preview_shows_the_window(size, expected, tmp_path):
    """In frames that get brighter, each second by 50."""
    levels = np.arange(40) * 5
    video = np.broadcast_to(levels[:, None, None, None], (40, *size, 3)).astype(np.uint8)
    path = write_video(tmp_path / "source.mp4", video, crf="1")
    with VideoFile(str(path), str(path)) as reader:
        write_preview(reader, 1.0, 3.0, tmp_path / "preview.mp4")
    frames, metadata = read_frames(tmp_path / "preview.mp4")
    assert frames.shape == (20, 3, *expected) and metadata.fps == 10
    torch.testing.assert_close(frames.float().mean((1, 2, 3)), torch.arange(50.0, 150.0, 5), rtol=0, atol=3)
    with av.open(str(tmp_path / "preview.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264" and not container.streams.audio


def test_a_preview_of_a_long_window_leaves_frames_out(tmp_path):
    path = write_video(tmp_path / "video.mp4", np.zeros((700, 16, 16, 3), np.uint8), "mpeg4")
    with VideoFile(str(path), str(path)) as reader:
        write_preview(reader, 0.0, None, tmp_path / "preview.mp4")
        seconds = reader.index.duration
    frames, metadata = read_frames(tmp_path / "preview.mp4")
    assert len(frames) == 300 and metadata.duration == pytest.approx(seconds, rel=0.01)
