"""Frames are turned and mirrored as the file asks."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from modeling_videomamba.video_decoding import VideoFile
from tests.test_video_order import CASES, decode_in_order, encode, pictures

# a, b, c, d of the display matrix; (x, y) is shown at (ax + cy, bx + dy), as FFmpeg shows it
ORIENTATIONS = {
    (1, 0, 0, 1): lambda frame: frame,
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (0, -1, 1, 0): lambda frame: np.rot90(frame),
    (0, -1, -1, 0): lambda frame: frame[::-1, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_display_matrices(tmp_path, matrix):
    path = encode(tmp_path / "video.mp4", "h264 with B-frames")
    data, (a, b, c, d) = bytearray(path.read_bytes()), (65536 * value for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = [ORIENTATIONS[matrix](frame) for frame in decode_in_order(path)]
    with VideoFile("video", str(path)) as reader:
        assert reader.is_turned() == (matrix != (1, 0, 0, 1))
        assert np.array_equal(list(reader.decode(range(30))), expected)
        for index in (0, 17, 29):
            assert np.array_equal(next(reader.decode([index])), expected[index])


def test_an_orientation_that_is_said_once_holds_for_all_frames(tmp_path):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "8", "keyint_min": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures(30)]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        # a message in front of the first frame: a quarter turn against the clock
        first = av.Packet(bytes.fromhex("00000001 062f03 080009 80") + bytes(packets[0]))
        first.pts, first.dts, first.time_base = packets[0].pts, packets[0].dts, packets[0].time_base
        first.stream, first.is_keyframe = stream, True
        container.mux([first, *packets[1:]])
    expected = [np.rot90(frame) for frame in decode_in_order(path)]
    with VideoFile("video", str(path)) as reader:
        assert len(reader.index.keyframes) == 4 and reader.is_turned()
    for index in (29, 8, 0, 13):
        with VideoFile("video", str(path)) as reader:
            assert np.array_equal(next(reader.decode([index])), expected[index])
            assert np.array_equal(list(reader.decode(range(index, 30))), expected[index:])


# display orientation messages of H.264: a quarter turn against the clock, a half turn
QUARTER, HALF = bytes.fromhex("00000001062f0308000980"), bytes.fromhex("00000001062f0310000980")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ({16: HALF}, {16: 2}),
        ({19: HALF}, {19: 2}),
        ({0: QUARTER, 16: HALF}, {0: 1, 16: 2}),
        ({0: HALF, 16: HALF}, {0: 2}),
    ],
)
def test_an_orientation_that_comes_later_holds_from_there(tmp_path, suffix, messages, turns):
    path, number = tmp_path / f"video.{suffix}", 30
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "8", "keyint_min": "8", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(64, 64) for p in pictures(number)]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for index, packet in enumerate(packets):
            copy = av.Packet(messages.get(index, b"") + bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream, copy.is_keyframe = stream, packet.is_keyframe
            container.mux(copy)
    expected, turned = decode_in_order(path), 0
    for index in range(number):
        turned = turns.get(index, turned)
        expected[index] = np.rot90(expected[index], turned)
    with VideoFile("video", str(path)) as reader:
        assert np.array_equal(list(reader.decode(range(number))), expected)
    for index in (29, 20, 17, 12, 3):
        with VideoFile("video", str(path)) as reader:
            assert np.array_equal(next(reader.decode([index])), expected[index]), index


@pytest.mark.parametrize("suffix", ["avi", "mov", "mkv", "mjpeg"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 6])
def test_pictures_of_a_camera(tmp_path, suffix, orientation):
    """With EXIF, which PyAV does not know."""
    path, exif = tmp_path / f"video.{suffix}", Image.Exif()
    exif[0x10F] = "Maker of a camera"
    if orientation is not None:
        exif[0x112] = orientation
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, picture in enumerate(pictures(20)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "jpeg", exif=exif)
            packet = av.Packet(file.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    turned = {2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 6: (0, 1, -1, 0)}.get(orientation, (1, 0, 0, 1))
    expected = [ORIENTATIONS[turned](frame) for frame in decode_in_order(path)]
    with VideoFile("video", str(path)) as reader:
        assert np.array_equal(list(reader.decode(range(20))), expected)
        assert np.array_equal(next(reader.decode([13])), expected[13])


def test_a_file_of_ffmpeg():
    path = CASES / "rot_sei.mp4"
    expected = [np.rot90(frame) for frame in decode_in_order(path)]
    with VideoFile("video", str(path)) as reader:
        assert np.array_equal(list(reader.decode(range(20))), expected)
        assert np.array_equal(next(reader.decode([19])), expected[19])
