"""A file that was cut off is an error; a whole one, whatever its end looks like, is not."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from modeling_videomamba import BrokenVideoError
from modeling_videomamba.video_decoding import VideoFile, read_frames
from tests.test_video_order import CASES, pictures

# container: encoder, its pixels, options of the container
FILES = {
    "mp4": ("libx264", "yuv420p", {}),
    "front.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "fragments.mp4": ("libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mjpeg", "yuvj420p", {}),
    "3gp": ("h263", "yuv420p", {}),
    "mkv": ("libx264", "yuv420p", {}),
    "webm": ("libvpx", "yuv420p", {}),
    "avi": ("mpeg4", "yuv420p", {}),
    "raw.avi": ("rawvideo", "bgr24", {}),
    "flv": ("flv", "yuv420p", {}),
    "wmv": ("wmv2", "yuv420p", {}),
    "asf": ("msmpeg4", "yuv420p", {}),
    "gif": ("gif", "rgb8", {}),
    "apng": ("apng", "rgb24", {}),
    "mpg": ("mpeg1video", "yuv420p", {}),
    "vob": ("mpeg2video", "yuv420p", {}),
    "mxf": ("mpeg2video", "yuv420p", {}),
    "ivf": ("libvpx", "yuv420p", {}),
    "swf": ("flv", "yuv420p", {}),
    "rm": ("rv20", "yuv420p", {}),
}
# what says neither how much there should be nor where a part ends
OPEN_ENDED = {
    "live.mkv": ("libx264", "yuv420p", {"live": "1"}),
    "ts": ("libx264", "yuv420p", {}),
    "nut": ("mpeg4", "yuv420p", {}),
    "h264": ("libx264", "yuv420p", {}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
    "nosize.flv": ("flv", "yuv420p", {"flvflags": "no_duration_filesize"}),
}


def write(path: Path, codec: str, pixels: str, options: dict[str, str], num_frames: int = 30) -> Path:
    size = (176, 144) if codec == "h263" else (64, 48)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        for picture in pictures(num_frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(*size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", [*FILES, *OPEN_ENDED])
def test_a_whole_file_is_read(tmp_path, name):
    path = write(tmp_path / f"video.{name}", *(FILES | OPEN_ENDED)[name])
    frames, metadata = read_frames(path)
    assert len(frames) == metadata.total_num_frames == 30


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_truncated(tmp_path, name):
    data = write(tmp_path / f"video.{name}", *FILES[name]).read_bytes()
    for share in (0.1, 0.29, 0.53, 0.71, 0.9, 0.97):
        path = tmp_path / f"cut.{name}"
        path.write_bytes(data[: round(len(data) * share)])
        with pytest.raises(BrokenVideoError, match="truncated") as raised:
            read_frames(path)
        assert "output error" not in str(raised.value) and 0 <= raised.value.num_readable_frames <= 30


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 3000, b"\xff" * 100, b"TAG a text that follows the file " * 20])
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"ivf", "swf"}))  # FFmpeg takes what follows for a frame
def test_what_follows_a_whole_file_is_no_part_of_it(tmp_path, name, tail):
    path = write(tmp_path / f"video.{name}", *FILES[name])
    path.write_bytes(path.read_bytes() + tail)
    assert len(read_frames(path)[0]) == 30


def test_bytes_are_checked_as_files_are(tmp_path):
    data = write(tmp_path / "video.gif", *FILES["gif"]).read_bytes()
    assert len(read_frames(data)[0]) == 30
    with pytest.raises(BrokenVideoError, match=r"^video from bytes: truncated: "):
        read_frames(data[: len(data) // 2])


@pytest.mark.parametrize(("name", "num_frames"), [("dropped.ogv", 388), ("screen.webm", 100)])
def test_whole_files_of_ffmpeg(name, num_frames):
    """With repeated frames, which are empty packets, and with a still picture of 20 seconds at the end."""
    with VideoFile("video", str(CASES / name)) as reader:
        assert sum(1 for _ in reader.decode(range(num_frames))) == reader.index.num_frames == num_frames
        assert np.array_equal(next(reader.decode([60])), list(reader.decode(range(61)))[60])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("name", ["dropped.ogv", "screen.webm"])
def test_cut_files_of_ffmpeg(name, share):
    data = (CASES / name).read_bytes()
    with pytest.raises(BrokenVideoError, match="truncated"):
        VideoFile("video", io.BytesIO(data[: round(len(data) * share)]))


def test_half_a_file_of_windows_media():
    with pytest.raises(BrokenVideoError, match=r"half_wmv\.wmv: truncated: 2\d of more frames can be read"):
        read_frames(CASES / "half_wmv.wmv")


@pytest.mark.parametrize("name", [*FILES, *OPEN_ENDED])
def test_mutated_files_raise_no_other_error(tmp_path, name):
    data = write(tmp_path / f"video.{name}", *(FILES | OPEN_ENDED)[name], num_frames=12).read_bytes()
    rng = np.random.default_rng(list(name.encode()))
    for _ in range(20):
        mutated = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, rng.integers(1, len(data)), rng.integers(1, 20))
        mutated[places] = rng.integers(0, 256, len(places), np.uint8)
        try:
            frames, metadata = read_frames(mutated.tobytes())
            assert len(frames) == metadata.total_num_frames > 0
        except BrokenVideoError as error:
            assert str(error).startswith("video from bytes: ")
