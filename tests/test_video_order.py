"""Frames of a video have numbers in the order in which the decoder gives them, and are the same alone as in order."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from modeling_videomamba import video_index
from modeling_videomamba.video_decoding import VideoFile, read_frames
from modeling_videomamba.video_opening import OpenedVideo

CASES = Path(__file__).parent / "data" / "cases"
X264 = "scenecut=0:b-adapt=0:keyint=8:min-keyint=8"
X265 = "scenecut=0:b-adapt=0:keyint=8:min-keyint=8:log-level=none"
OPEN, CLOSED = ":open-gop=1", ":open-gop=0"

# name: encoder, its options, containers
STREAMS = {
    "h264": ("libx264", {"x264-params": X264 + ":bframes=0"}, "avi mp4 mkv ts"),
    "h264 with B-frames": ("libx264", {"x264-params": X264 + ":bframes=3" + CLOSED}, "avi mp4 mkv ts flv h264 nut"),
    "h264 with B-frames and open GOPs": ("libx264", {"x264-params": X264 + ":bframes=2" + OPEN}, "avi mp4 mkv ts h264"),
    "hevc with B-frames": ("libx265", {"x265-params": X265 + ":bframes=3" + CLOSED}, "mp4 mkv ts hevc"),
    "hevc with B-frames and open GOPs": ("libx265", {"x265-params": X265 + ":bframes=3" + OPEN}, "mp4 mkv ts"),
    "mpeg4": ("mpeg4", {"g": "8"}, "avi mp4"),
    "mpeg4 with B-frames": ("mpeg4", {"g": "8", "bf": "2"}, "avi mp4 mkv m4v nut"),
    "mpeg2 with B-frames": ("mpeg2video", {"g": "8", "bf": "2"}, "avi mpg ts vob mkv mxf m2v"),
    "mpeg1 with B-frames": ("mpeg1video", {"g": "8", "bf": "2"}, "avi mpg mkv m1v"),
    "vp8": ("libvpx", {"g": "8"}, "webm ivf"),
    "vp9": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "8"}, "webm mp4"),
    "wmv2": ("wmv2", {"g": "8"}, "wmv avi"),
    "msmpeg4": ("msmpeg4", {"g": "8"}, "avi"),
    "flv1": ("flv", {"g": "8"}, "flv"),
    "mjpeg": ("mjpeg", {}, "avi mov mjpeg"),
    "gif": ("gif", {}, "gif"),
    "apng": ("apng", {}, "apng"),
    "qtrle": ("qtrle", {}, "mov"),
    "dirac": ("vc2", {"strict": "-2", "b": "20000000"}, "drc mkv"),
}
FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24", "qtrle": "rgb24"}


def pictures(num_frames: int) -> np.ndarray:
    """Frames `(num_frames, 48, 64, 3)` of a pattern that moves, each of another brightness."""
    pattern = np.random.default_rng(0).integers(0, 96, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(pattern, index, 1) + np.uint8(index * 150 // num_frames) for index in range(num_frames)])


def encode(path: Path, stream: str, num_frames: int = 30) -> Path:
    codec, options, _ = STREAMS[stream]
    with av.open(str(path), "w") as container:
        output = container.add_stream(codec, rate=25, options=options)
        output.width, output.height, output.pix_fmt = 64, 48, FORMATS.get(stream, "yuv420p")
        for picture in pictures(num_frames):
            container.mux(output.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(output.encode())
    return path


def copy(source: Path, target: Path, decoding_times: bool = False, first: int = 0) -> Path:
    """Copies the packets, from number `first` on; with their presentation times, or these lost as in AVI."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        output = writer.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in reader.demux(stream) if packet.size):
            if decoding_times:
                packet.pts = packet.dts = round(Fraction(number, 25) / stream.time_base)
            packet.stream = output
            if number >= first:
                writer.mux(packet)
    return target


def decode_in_order(path: Path) -> list[np.ndarray]:
    """What FFmpeg shows, in the order in which it does."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        frames = [frame for packet in packets for frame in packet.decode()]
        return [frame.to_ndarray(format="rgb24") for frame in frames + stream.codec_context.decode(None)]


def check_frames(path: Path, reader: VideoFile, num_frames: int) -> None:
    """Holds each frame alone, and some orders, against decoding everything."""
    expected = decode_in_order(path)
    assert (len(expected), reader.index.num_frames) == (num_frames, num_frames)
    for index in np.random.default_rng(1).permutation(num_frames):
        assert np.array_equal(next(reader.decode([index])), expected[index]), index
    for indices in (range(num_frames), range(0, num_frames, 5), range(num_frames - 3, num_frames)):
        assert np.array_equal(list(reader.decode(indices)), [expected[index] for index in indices])
    assert len(reader.index.times) == num_frames and (np.diff(reader.index.times) > 0).all()


MATRIX = [(stream, suffix) for stream, (_, _, suffixes) in STREAMS.items() for suffix in suffixes.split()]


@pytest.mark.parametrize(("stream", "suffix"), MATRIX)
def test_each_frame_alone_is_the_one_in_order(tmp_path, stream, suffix):
    path = encode(tmp_path / f"video.{suffix}", stream)
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 30)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "nut"])
@pytest.mark.parametrize("stream", [stream for stream in STREAMS if "B-frames" in stream])
def test_presentation_times_that_equal_decoding_times(tmp_path, stream, suffix):
    """As in a stream that was copied out of AVI."""
    path = copy(encode(tmp_path / "video.mkv", stream), tmp_path / f"copied.{suffix}", decoding_times=True)
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 30)
        assert np.allclose(reader.index.times, np.arange(30) / 25, atol=1e-3)
        if stream.startswith(("h264", "hevc")) and suffix == "mp4":
            assert len(reader.index.keyframes) == 4  # it can be sought


@pytest.mark.parametrize(
    ("codec", "suffix"), [("rawvideo", "mov"), ("rawvideo", "avi"), ("smc", "mov"), ("msrle", "avi")]
)
def test_palettes(tmp_path, codec, suffix):
    """They come once, in front of the first frame."""
    path, palette = tmp_path / f"video.{suffix}", np.random.default_rng(2).integers(0, 256, (256, 4), np.uint8)
    with av.open(str(path), "w") as container:
        output = container.add_stream(codec, rate=25)
        output.width, output.height, output.pix_fmt = 64, 48, "pal8"
        for picture in pictures(30):
            container.mux(output.encode(av.VideoFrame.from_ndarray((picture[..., 0], palette), format="pal8")))
        container.mux(output.encode())
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 30)
        assert next(reader.decode([15])).std() > 50


@pytest.mark.parametrize("codec", ["rpza", "qtrle", "png"])
def test_frames_that_are_all_marked_as_keyframes(tmp_path, codec):
    """Which frames of differences are not."""
    source, path = tmp_path / "source.mov", tmp_path / "video.mov"
    with av.open(str(source), "w") as container:
        output = container.add_stream(codec, rate=25)
        output.width, output.height, output.pix_fmt = 64, 48, "rgb555le" if codec == "rpza" else "rgb24"
        for picture in pictures(30):
            picture[:40] = 0  # what does not change
            container.mux(output.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(output.encode())
    data = source.read_bytes()
    path.write_bytes(data.replace(b"stss", b"free"))  # without the table of keyframes
    with VideoFile("video", str(path)) as reader:
        assert len(reader.index.keyframes) == (30 if codec == "png" else 0)
        check_frames(path, reader, 30)


# encoder, its options, its pixels, containers; whether each frame is one to begin with
MARKED = [
    *((codec, {"g": "8"}, "yuv420p", "avi", False) for codec in ("msmpeg4", "wmv1", "wmv2", "flv", "mpeg4", "snow")),
    *((codec, {"g": "8"}, "yuv420p", "mov", False) for codec in ("mpeg4", "h263")),
    ("msmpeg4", {"g": "8"}, "yuv420p", "mkv", False),
    ("flv", {"g": "8"}, "yuv420p", "flv", False),
    *((codec, {"g": "8"}, "yuv420p", "wmv", False) for codec in ("wmv1", "wmv2")),
    *((codec, {"g": "8"}, "yuv420p", codec, False) for codec in ("h261", "h263")),
    *(("libx264", {"g": "1"}, "yuv420p", suffix, True) for suffix in ("mp4", "mkv", "avi")),
    ("mpeg2video", {"g": "1"}, "yuv420p", "mkv", True),
    ("ffv1", {"g": "1"}, "yuv420p", "mkv", True),
    ("png", {}, "rgb24", "mov", True),
    ("prores", {}, "yuv422p10le", "mov", True),
]


@pytest.mark.parametrize("begins_black", [False, True])
@pytest.mark.parametrize(("codec", "options", "pixels", "suffix", "is_true"), MARKED)
def test_every_packet_is_marked_as_a_keyframe(tmp_path, codec, options, pixels, suffix, is_true, begins_black):
    path, size = tmp_path / f"video.{suffix}", (176, 144) if codec.startswith("h26") else (64, 48)
    with av.open(str(path), "w") as container:
        output = container.add_stream(codec, rate=25, options={**options, "strict": "-2"})
        (output.width, output.height), output.pix_fmt = size, pixels
        for number, picture in enumerate(pictures(30)):
            picture = 0 * picture if begins_black and number < 5 else picture
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(*size)
            for packet in output.encode(frame):
                packet.is_keyframe = True
                container.mux(packet)
        for packet in output.encode():
            packet.is_keyframe = True
            container.mux(packet)
    with VideoFile("video", str(path)) as reader:
        assert (len(reader.index.keyframes) == 30) == is_true
        check_frames(path, reader, 30)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "nut", "ts", "avi"])
def test_packed_b_frames_of_xvid(tmp_path, suffix):
    """Whose empty packets are marked as keyframes."""
    path = copy(CASES / "xvid_packed.mp4", tmp_path / f"video.{suffix}")
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 47)


@pytest.mark.parametrize(("name", "num_frames"), [("bframes_h264.avi", 75), ("bframes_copied.mp4", 75)])
def test_files_of_ffmpeg(name, num_frames):
    with VideoFile("video", str(CASES / name)) as reader:
        check_frames(CASES / name, reader, num_frames)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_an_order_that_only_reading_shows(tmp_path, monkeypatch, suffix):
    """As where the B-frames begin late."""
    monkeypatch.setattr(video_index, "HEAD", 1)
    path = encode(tmp_path / "video.mp4", "h264 with B-frames")
    path = copy(path, tmp_path / f"copied.{suffix}", decoding_times=True)
    expected = decode_in_order(path)
    for index in (0, 1, 2, 8, 9, 17, 29):
        with VideoFile("video", str(path)) as reader:
            assert not reader.index.is_certain
            assert np.array_equal(next(reader.decode([index])), expected[index]), index
            assert reader.index.is_certain
    with VideoFile("video", str(path)) as reader:
        assert np.array_equal(list(reader.decode(range(30))), expected)


def write_hidden_frames(path: Path) -> Path:
    """VP8 with three frames that are not shown, as encoders make them for others to refer to."""
    source = encode(path.with_name("source.webm"), "vp8")
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        output = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= ~0x10 if number in (3, 11, 20) else 0xFF
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.stream, hidden.is_keyframe = output, packet.is_keyframe
            writer.mux(hidden)
    return path


@pytest.mark.parametrize("suffix", ["webm", "avi"])
def test_frames_that_are_not_shown(tmp_path, suffix):
    path = write_hidden_frames(tmp_path / f"video.{suffix}")
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 27)


def test_a_number_of_frames_that_only_reading_shows(tmp_path, monkeypatch):
    path = write_hidden_frames(tmp_path / "video.webm")
    monkeypatch.setattr(video_index, "_gives_frame", lambda *_: True)
    with VideoFile("video", str(path)) as reader:
        assert reader.index.num_frames == 30
    frames, metadata = read_frames(path)
    assert metadata.total_num_frames == metadata.index.num_frames == 27
    assert np.array_equal(frames.permute(0, 2, 3, 1), decode_in_order(path))


def test_packed_b_frames(tmp_path):
    """XviD and DivX put a B-frame into the packet of the frame before it, and nothing into its own."""
    source, path = tmp_path / "source.avi", tmp_path / "packed.avi"
    with av.open(str(source), "w") as writer:
        output = writer.add_stream("mpeg4", rate=25, options={"g": "8", "bf": "1"})
        output.width, output.height, output.pix_fmt = 64, 48, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures(30)]
        for frame in [*frames, None]:
            writer.mux(output.encode(frame))
    start, mark = b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        parts = [bytes(packet) for packet in reader.demux(video=0) if packet.size]
        kinds = [part[part.index(start) + 4] >> 6 for part in parts]  # 0: keyframe, 2: B-frame
        assert kinds.count(2) > 5
        output = writer.add_stream_from_template(reader.streams.video[0])
        for number, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
            part = part.replace(start, mark + start) if kind == 0 else part
            part = part + parts[number + 1] if kinds[number + 1 : number + 2] == [2] else part
            packet = av.Packet(start + b"\x50\x00\x7f" if kind == 2 else part)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = output.time_base, output, kind == 0
            writer.mux(packet)
    assert np.array_equal(decode_in_order(path), decode_in_order(source))
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 30)


@pytest.mark.parametrize("stream", ["h264 with B-frames", "mpeg2 with B-frames"])
def test_recordings_one_after_the_other(tmp_path, stream):
    """Where time begins again."""
    path = encode(tmp_path / "video.ts", stream)
    path.write_bytes(path.read_bytes() * 2)
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, 60)


def test_an_index_can_be_taken_again(tmp_path, monkeypatch):
    path = encode(tmp_path / "video.avi", "h264 with B-frames and open GOPs")
    with VideoFile("video", str(path)) as reader:
        index = reader.index
    monkeypatch.setattr(OpenedVideo, "packets", None)
    reader = VideoFile("video", str(path), index=index)
    monkeypatch.undo()
    with reader:
        check_frames(path, reader, 30)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_right_timestamps_are_believed_without_decoding(tmp_path, monkeypatch, suffix):
    path = encode(tmp_path / f"video.{suffix}", "h264 with B-frames")
    monkeypatch.setattr(OpenedVideo, "decoded", None)
    with VideoFile("video", str(path)) as reader:
        assert reader.index.num_frames == 30 and reader.index.is_certain


# Leading frames

CUTS = {
    "h264 with B-frames and open GOPs": "ts mkv mp4",
    "hevc with B-frames and open GOPs": "ts mkv mp4",
    "mpeg2 with B-frames": "ts mkv mp4 mpg",
    "mpeg1 with B-frames": "ts mkv mpg",
}


@pytest.mark.parametrize(("name", "num_frames"), [("cut.ts", 27), ("live.ts", 125)])
def test_leading_frames_of_files_of_ffmpeg(name, num_frames):
    with VideoFile("video", str(CASES / name)) as reader:
        check_frames(CASES / name, reader, num_frames)


def keyframe_packets(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return [number for number, packet in enumerate(packets) if packet.is_keyframe]


@pytest.mark.parametrize("cut", ["before a keyframe", "within a GOP"])
@pytest.mark.parametrize(("stream", "suffix"), [(name, suffix) for name in CUTS for suffix in CUTS[name].split()])
def test_leading_frames_that_cannot_be_decoded_do_not_count(tmp_path, stream, suffix, cut):
    source = encode(tmp_path / "video.ts", stream)
    first = keyframe_packets(source)[1] - (3 if cut == "within a GOP" else 0)
    path = copy(source, tmp_path / f"cut.{suffix}", first=first)
    num_frames = len(decode_in_order(path))
    assert 20 < num_frames < 30 - first
    with VideoFile("video", str(path)) as reader:
        check_frames(path, reader, num_frames)
