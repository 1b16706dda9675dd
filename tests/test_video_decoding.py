import functools
import gc
import http.server
import io
import pickle
import re
import shutil
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_videomamba import BrokenVideoError, __version__, video_decoding
from modeling_videomamba.video_decoding import VideoFile, read_frames
from modeling_videomamba.video_opening import OpenedVideo
from tests.conftest import ROOT, moving_square, write_video
from tests.test_video_order import CASES


def all_frames(path):
    """Every frame, decoded from the first to the last."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def sampler(*indices):
    return lambda metadata: indices


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 44), min_size=1, max_size=12))
def test_frames_are_those_of_decoding_everything(video, without_torchcodec, indices):
    frames, metadata = read_frames(video, sampler(*indices))
    assert torch.equal(frames, all_frames(video)[indices])
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (45, 10.0, 4.5)
    assert (metadata.height, metadata.width, metadata.frames_indices) == (48, 48, indices)
    assert metadata.video_backend == "pyav"


def test_without_a_sampler_all_frames_are_read(video, without_torchcodec):
    assert torch.equal(read_frames(video)[0], all_frames(video))


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "bytearray", "memoryview", "dict of path", "dict of bytes"])
def test_every_kind_of_source(video, kind):
    data = video.read_bytes()
    source = {
        "str": str(video),
        "Path": video,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "dict of path": {"path": str(video), "bytes": None},
        "dict of bytes": {"path": "somewhere.mp4", "bytes": data},
    }[kind]
    assert torch.equal(read_frames(source, sampler(3, 30))[0], all_frames(video)[[3, 30]])


@pytest.fixture
def server(video):
    """The folder of `video` on a port of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=video.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_url_is_downloaded(video, server):
    frames, _ = read_frames(f"{server}/{video.name}", sampler(7))
    assert torch.equal(frames, all_frames(video)[[7]])
    shutil.copy(video, video.with_name("vidéo 1.mp4"))
    assert len(read_frames(f"{server}/vidéo 1.mp4")[0]) == 45
    with pytest.raises(OSError, match=r"nowhere\.mp4: can't be downloaded.*404"):
        read_frames(f"{server}/nowhere.mp4")
    with pytest.raises(OSError, match="http://: can't be downloaded"):
        read_frames("http://")


def test_servers_see_who_asks(video):
    agents = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            agents.append(self.headers["User-Agent"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(video.read_bytes())

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.handle_request, daemon=True).start()
        read_frames(f"http://127.0.0.1:{running.server_port}/video.mp4", sampler(0))
    assert agents == [f"modeling-videomamba/{__version__}"]


def write_streams(path, *sizes, default=None):
    """One of 8 frames for each size, those with the numbers `default` marked as the default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in sizes]
        for number, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            if default is not None:
                stream.disposition = av.stream.Disposition.default if number in default else 0
        for stream, (width, height) in zip(streams, sizes, strict=True):
            for frame in (*moving_square(8, 64)[:, :height, :width], None):
                frame = frame if frame is None else av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
                container.mux(stream.encode(frame))
    return path


@pytest.mark.parametrize(
    ("suffix", "sizes", "default", "expected"),
    [
        ("mkv", [(32, 16), (64, 48), (48, 48)], [2], (48, 48)),
        ("mkv", [(64, 48), (32, 16)], [1], (32, 16)),
        ("mkv", [(32, 16), (64, 48)], [0], (32, 16)),
        ("mp4", [(32, 16), (64, 48), (48, 48)], [0, 1, 2], (64, 48)),
        ("ts", [(32, 16), (64, 48), (48, 48)], None, (64, 48)),
        ("avi", [(64, 48), (32, 16)], None, (64, 48)),
    ],
)
def test_of_several_streams_the_default_or_largest_is_read(tmp_path, suffix, sizes, default, expected):
    path = write_streams(tmp_path / f"video.{suffix}", *sizes, default=default)
    frames, metadata = read_frames(path)
    assert (*frames.shape, metadata.total_num_frames) == (8, 3, expected[1], expected[0], 8)


def test_a_file_of_ffmpeg_with_two_streams():
    assert read_frames(CASES / "two.mkv")[0].shape == (20, 3, 48, 64)


def test_an_animated_avif_has_all_its_frames(tmp_path):
    """Its first stream is a still picture."""
    path = tmp_path / "video.avif"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=10, options={"preset": "12", "svtav1-params": "lp=1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in (*moving_square(8, 64), None):
            container.mux(stream.encode(frame if frame is None else av.VideoFrame.from_ndarray(frame)))
    frames, metadata = read_frames(path)
    assert len(frames) == metadata.total_num_frames == 8
    assert (frames.float().mean((1, 2, 3)).diff() > 10).all()


def test_few_frames_of_a_long_video_are_sought(tmp_path, without_torchcodec, monkeypatch):
    path = write_video(tmp_path / "long.mp4", moving_square(300))
    decoded = []
    decode = OpenedVideo.decoded

    def counting(self, label):
        for item in decode(self, label):
            decoded.append(item)
            yield item

    monkeypatch.setattr(OpenedVideo, "decoded", counting)
    indices = [20, 150, 283]
    frames, _ = read_frames(path, sampler(*indices))
    assert torch.equal(frames, all_frames(path)[indices])
    assert len(decoded) < 60  # of 284 up to the last one


def test_frames_in_order_are_read_without_seeks(video, monkeypatch):
    seeks, seek = [], VideoFile._seek
    monkeypatch.setattr(VideoFile, "_seek", lambda reader, index: (seeks.append(index), seek(reader, index))[1])
    with VideoFile("video", str(video)) as reader:
        assert len(reader.index.keyframes) > 2 and torch.equal(reader.frames(range(45)), all_frames(video))
    assert seeks == [0]


def test_the_decoder_takes_few_threads(video, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for num_threads, expected in ((None, 8), (2, 2)):
        with VideoFile("video", str(video), num_threads=num_threads) as reader:
            assert reader.stream.codec_context.thread_count == expected


@pytest.mark.parametrize("suffix", ["ts", "vob"])
def test_seeks_that_go_too_far(tmp_path, without_torchcodec, monkeypatch, suffix):
    """In MPEG-TS behind the keyframe; in VOB, where frames have other times afterwards, there is none."""
    path = write_video(tmp_path / f"video.{suffix}", moving_square(240), "mpeg2video", bf="2", g="12")
    expected, restarts = all_frames(path), []
    restart = VideoFile._restart
    monkeypatch.setattr(VideoFile, "_restart", lambda reader: (restarts.append(reader), restart(reader)))
    indices = [50, 100, 150, 200]
    assert torch.equal(read_frames(path, sampler(*indices))[0], expected[indices])
    assert len(restarts) == {"ts": 0, "vob": 1}[suffix]  # one to begin with


def test_no_frame_is_an_error(video, without_torchcodec):
    with pytest.raises(ValueError, match="`indices` must name at least one frame"):
        read_frames(video, sampler())


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264"), ("webm", "libvpx"), ("h264", "libx264")],
)
def test_other_containers(tmp_path, suffix, codec):
    path = write_video(
        tmp_path / f"video.{suffix}", moving_square(25), codec, **({"bf": "2"} if suffix == "avi" else {})
    )
    expected = all_frames(path)
    assert len(expected) == 25
    assert torch.equal(read_frames(path, sampler(24, 3, 11))[0], expected[[24, 3, 11]])


def test_turned_videos_come_upright(without_torchcodec):
    # stored lying, with a rotation of 90 degrees, as by a phone held upright; players show the bright half on the left
    frames, metadata = read_frames(Path(__file__).parent / "data" / "turned.mp4")
    assert frames.shape == (4, 3, 64, 32) and (metadata.height, metadata.width) == (64, 32)
    assert frames[..., 16:].float().mean() < 100 < 150 < frames[..., :16].float().mean()


def test_torchcodec_reads_the_same_frames(video, tmp_path):
    if video_decoding._torchcodec_decoder_class() is None:
        pytest.skip("torchcodec is not usable here: it is optional and needs an FFmpeg of the system")
    for suffix in ("mp4", "mkv"):
        path = write_video(tmp_path / f"video.{suffix}", moving_square(25))
        frames, metadata = read_frames(path, sampler(24, 3, 3))
        assert metadata.video_backend == "torchcodec"
        assert torch.equal(frames, all_frames(path)[[24, 3, 3]])


class Decoder:
    """What a torchcodec decoder, the value of a decoded `datasets` column, looks like."""

    class metadata:  # noqa: N801
        num_frames, average_fps, duration_seconds = 6, 10.0, 0.6

    def __init__(self, channels_last):
        self.channels_last = channels_last

    def get_frames_at(self, indices):
        data = torch.stack([torch.full((3, 8, 10), index, dtype=torch.uint8) for index in indices])
        return type("Batch", (), {"data": data.permute(0, 2, 3, 1) if self.channels_last else data})


Decoder.__module__ = "torchcodec.decoders._video_decoder"


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_decoder_from_datasets(channels_last):
    frames, metadata = read_frames(Decoder(channels_last), sampler(5, 0))
    assert frames.shape == (2, 3, 8, 10) and frames[:, 0, 0, 0].tolist() == [5, 0]
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (6, 8, 10)


def test_a_decoder_from_datasets_is_read_anew_from_its_file(video):
    decoder = Decoder(channels_last=False)
    decoder._hf_encoded = {"path": str(video), "bytes": None}
    assert torch.equal(read_frames(decoder, sampler(3))[0], all_frames(video)[[3]])


# What can't be read


@pytest.mark.parametrize(
    ("suffix", "codec", "known", "unknown"),
    [
        ("mp4", "libx264", "avc1", "xyz1"),
        ("avi", "mpeg4", "FMP4", "xyz1"),
        ("mkv", "mpeg4", "V_MPEG4/ISO/ASP", "V_NOBODY/KNOWS1"),
    ],
)
def test_a_codec_without_a_decoder(tmp_path, suffix, codec, known, unknown):
    path = write_video(tmp_path / f"video.{suffix}", moving_square(8), codec)
    path.write_bytes(path.read_bytes().replace(known.encode(), unknown.encode()))
    with pytest.raises(
        BrokenVideoError, match=rf"video\.{suffix}: there is no decoder for its video codec '{unknown}'"
    ):
        read_frames(path)


def test_a_file_cut_within_its_header(tmp_path):
    path = write_video(tmp_path / "video.mp4", moving_square(45))
    front = tmp_path / "front.mp4"
    with av.open(str(path)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in (packet for packet in source.demux(video=0) if packet.size):
            packet.stream = stream
            target.mux(packet)
    data = front.read_bytes()
    for end in range(data.index(b"moov") + 4, data.index(b"mdat"), 16):
        with pytest.raises(BrokenVideoError, match="video from bytes: truncated"):
            read_frames(data[:end])


def test_files_of_ffmpeg_that_cannot_be_read():
    with pytest.raises(BrokenVideoError, match=r"unknown_fourcc\.mp4: there is no decoder for its video codec 'xyz1'"):
        read_frames(CASES / "unknown_fourcc.mp4")
    with pytest.raises(BrokenVideoError, match=r"h264-ts-225-flips\.ts: damaged: 27 of more frames"):
        read_frames(CASES / "h264-ts-225-flips.ts")


@pytest.mark.parametrize(
    "error",
    [IndexError("list index out of range"), AttributeError("no"), ValueError("no"), OSError(5, "no"), EOFError()],
)
@pytest.mark.parametrize("where", ["open", "demux", "decode"])
def test_whatever_pyav_raises_is_a_broken_file(video, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    if where == "open":
        monkeypatch.setattr(av, "open", fail)
    else:
        restart = OpenedVideo.restart

        def restart_with_failure(self):
            restart(self)
            parts = {"demux": self.container.demux, "decode": self.stream.codec_context.decode, where: fail}
            self.container = SimpleNamespace(**parts, format=self.container.format, close=self.container.close)
            self.stream = SimpleNamespace(
                codec_context=SimpleNamespace(
                    **parts, codec=self.stream.codec_context.codec, has_b_frames=True, extradata=b""
                ),
                frames=45,
                index_entries=[],
            )

        monkeypatch.setattr(OpenedVideo, "restart", restart_with_failure)
    with pytest.raises(BrokenVideoError, match=r"square\.mp4: "):
        read_frames(video)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_other_errors_are_not_those_of_the_file(video, monkeypatch, error):
    monkeypatch.setattr(av, "open", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        read_frames(video)


def test_a_file_that_may_not_be_read(video, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
        read_frames(video)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        read_frames(tmp_path / "nowhere.mp4")
    with pytest.raises(IsADirectoryError, match="folder"):
        read_frames(tmp_path)
    with pytest.raises(ValueError, match="`path` or `bytes`"):
        read_frames({"path": None, "bytes": None})


@pytest.mark.parametrize("name", ["text.mp4", "text.txt", "empty.mp4", "picture.mp4", "picture.png"])
def test_not_a_video(tmp_path, name):
    path = tmp_path / name
    if name.startswith("picture"):
        picture = io.BytesIO()
        Image.new("RGB", (32, 32)).save(picture, "png")
        path.write_bytes(picture.getvalue())
    else:
        path.write_text("no video\n" * (100 if name.startswith("text") else 0))
    with pytest.raises(BrokenVideoError, match=f"{name}: not a video") as raised:
        read_frames(path)
    assert raised.value.num_readable_frames == 0
    with pytest.raises(BrokenVideoError, match="video from bytes: not a video"):
        read_frames(path.read_bytes())


def write_sound(path, codec="aac"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_no_video_stream(tmp_path):
    write_sound(tmp_path / "sound.mp4")
    with pytest.raises(BrokenVideoError, match=r"sound\.mp4: it has no video stream"):
        read_frames(tmp_path / "sound.mp4")


def test_no_frame(tmp_path):
    path = tmp_path / "nothing.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    with pytest.raises(BrokenVideoError, match=r"nothing\.mkv: (it has no frame|not a video)"):
        read_frames(path)


def test_a_truncated_file_says_how_many_frames_can_be_read(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", moving_square(45))
    # with its index at the front, as on the web, a truncated file still opens
    path = tmp_path / "truncated.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BrokenVideoError, match=r"truncated\.mp4: truncated: \d+ of 45 frames can be read") as raised:
        read_frames(path, sampler(0))
    assert 0 < raised.value.num_readable_frames < 45
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.num_readable_frames) == (str(raised.value), raised.value.num_readable_frames)

    shutil.copy(whole, path)
    path.write_bytes(path.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(BrokenVideoError, match=r"truncated\.mp4: truncated so that no frame can be read"):
        read_frames(path)


@pytest.mark.parametrize("suffix", ["mkv", "flv"])
def test_a_truncated_file_without_a_count_of_frames_is_found_by_its_length(tmp_path, suffix):
    path = write_video(tmp_path / f"video.{suffix}", moving_square(45), "libx264" if suffix == "mkv" else "flv")
    assert len(read_frames(path)[0]) == 45
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BrokenVideoError, match=r"truncated: \d+ of more frames can be read"):
        read_frames(path)


@pytest.mark.parametrize(("start", "seconds", "frames"), [(0, 2.0, 20), (1, 3.5, 35), (1, 2.0, 20)])
def test_a_trimmed_video_is_not_truncated(tmp_path, start, seconds, frames):
    path = write_video(tmp_path / "trimmed.mp4", moving_square(45), bf="0")
    expected = all_frames(path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12  # duration (1/1000 s), first time (in ticks of the track), speed
    ticks = 10240 * start  # PyAV writes 10 frames a second in a time base of 1/10240
    struct.pack_into(">Ii", data, entry, round(seconds * 1000), struct.unpack_from(">i", data, entry + 4)[0] + ticks)
    path.write_bytes(data)
    assert torch.equal(read_frames(path)[0], all_frames(path))
    assert torch.equal(all_frames(path), expected[10 * start : 10 * start + frames])


def test_lists_of_other_files_are_not_videos(video, tmp_path):
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{video.name}'\n")
    shutil.copy(video, tmp_path)
    with pytest.raises(BrokenVideoError, match="not a video"):
        read_frames(tmp_path / "list.ffconcat")
    with pytest.raises(BrokenVideoError, match="not a video"):
        read_frames((tmp_path / "list.ffconcat").read_bytes())


def test_damage_inside_a_file_is_an_error(tmp_path, without_torchcodec):
    path = write_video(tmp_path / "damaged.mp4", moving_square(45), "mpeg4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + len(data) // 4
    data[start : start + len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(BrokenVideoError, match=r"damaged\.mp4"):
        read_frames(path)


def test_frames_are_freed_without_the_garbage_collector(video):
    """A video of 4K would take 12 MB for each frame until it runs."""
    gc.collect()
    gc.disable()
    try:
        with VideoFile("video", str(video)) as reader:
            held = [
                sum(type(each) is av.VideoFrame for each in gc.get_objects())
                for _ in reader.decode(range(reader.index.num_frames))
            ]
    finally:
        gc.enable()
    assert len(held) == 45 and max(held) < 12


def test_the_lowest_pyav_is_one_that_reads_flv_and_vob():
    """PyAV 17.0 ends the process at whole files of these containers."""
    lowest = re.search(r'"av>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert lowest and tuple(map(int, lowest[1].split("."))) >= (17, 1)
