"""Video files that are decoded in a process with limits."""

import json
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from modeling_videomamba import BrokenVideoError
from modeling_videomamba.training import guarded_video
from modeling_videomamba.training.guarded_video import GuardedVideo
from modeling_videomamba.video_decoding import VideoFile
from tests.conftest import write_video

LIMITS = {"max_pixels": 4096**2, "max_seconds": 60, "max_memory": 150 << 20}
TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def open_guarded(path, **limits):
    return GuardedVideo("mine.mp4", path, **LIMITS | limits)


def test_frames_are_those_of_the_file(video):
    indices = [0, 3, 3, 44]
    with VideoFile("video", str(video)) as reader, open_guarded(video) as guarded:
        assert (guarded.num_frames, guarded.seconds, guarded.width, guarded.height) == (45, 4.5, 48, 48)
        for _ in range(2):
            expected = list(reader.decode(indices))
            assert np.array_equal(list(guarded.decode(indices)), expected)
    assert guarded.process.returncode is not None


# Files that take more memory than they should


def with_count(data, count):
    """The boxes of an MP4 file that states so many samples, of a byte each."""
    boxes, start = [], 0
    tables = {
        b"stts": struct.pack(">4I", 0, 1, count, 1),
        b"stsz": struct.pack(">3I", 0, 1, count),
        b"stsc": struct.pack(">5I", 0, 1, 1, count, 1),
        b"stco": struct.pack(">3I", 0, 1, 48),
    }
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        content = data[start + 8 : start + size]
        content = tables.get(kind, with_count(content, count) if kind in TABLES else content)
        if kind not in (b"ctts", b"stss"):
            boxes.append(struct.pack(">I4s", len(content) + 8, kind) + content)
        start += size
    return b"".join(boxes)


def animated_png(side):
    """Two black frames."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    compressor = zlib.compressobj(1)
    pixels = b"".join(compressor.compress(bytes(1 + 3 * side)) for _ in range(side)) + compressor.flush()
    frames = [
        chunk(b"fcTL", struct.pack(">5I2H2B", 2 * number, side, side, 0, 0, 1, 10, 0, 0))
        + (chunk(b"fdAT", struct.pack(">I", 1) + pixels) if number else chunk(b"IDAT", pixels))
        for number in range(2)
    ]
    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)) + chunk(b"acTL", struct.pack(">2I", 2, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(frames) + chunk(b"IEND", b"")


@pytest.fixture
def peak(monkeypatch):
    """A list of the most bytes that children have had."""

    class Watched(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            threading.Thread(target=self.watch, daemon=True).start()

        def watch(self):
            with suppress(OSError):  # until it has ended
                while True:
                    status = Path(f"/proc/{self.pid}/status").read_text()
                    peaks.extend(int(found) << 10 for found in re.findall(r"VmHWM:\s*(\d+) kB", status))
                    time.sleep(0.001)

    peaks: list[int] = []
    monkeypatch.setattr(guarded_video.subprocess, "Popen", Watched)
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="the test reads /proc")
@pytest.mark.parametrize("kind", ["index", "picture"])
def test_memory_is_bounded(video, tmp_path, peak, kind):
    path = tmp_path / "small"
    path.write_bytes(with_count(video.read_bytes(), 2**26) if kind == "index" else animated_png(9000))
    assert path.stat().st_size < 3 << 20
    with pytest.raises(BrokenVideoError, match=r"^mine\.mp4: reading it takes more than 150 MB of memory$"):
        open_guarded(path)
    assert 130 << 20 < max(peak) < 300 << 20


# Children that fail


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Has other code run in the child."""

    def replace(code):
        path = tmp_path / "child.py"
        path.write_text(f"import json, os, sys, time\nsys.stdin.readline()\n{code}\n")
        monkeypatch.setattr(guarded_video, "CHILD", path)

    return replace


INFO = '{"num_frames": 2, "seconds": 1.0, "width": 8, "height": 8}'


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(os.getpid(), 11)",
        "print('no JSON')",
        "print('[1]')",
        "print('[' * 10**5)",
        "print('x' * 10**7)",
        "print('{}')",
        f"print('{INFO}'.replace('2', '-2'))",
        f"print('{INFO}'.replace('2', '1e400'))",
        f"print('{INFO}'.replace('1.0', 'NaN'))",
        f"print('{INFO}'.replace('8', 'true'))",
        f"print('{INFO}'.replace('8', '\"8\"'))",
    ],
)
def test_a_child_that_fails_is_a_broken_file(child, tmp_path, code):
    child(code)
    with pytest.raises(BrokenVideoError, match=r"^mine\.mp4: damaged so that the decoder crashes$"):
        open_guarded(tmp_path / "any.mp4")


@pytest.mark.parametrize("size", [(8, 9), (0, 8), (10**6, 10**6), (-8, -8)])
def test_frames_are_checked(child, tmp_path, size):
    sizes = [dict(zip(("height", "width"), both, strict=True)) for both in ((8, 8), size)]
    write = "sys.stdout.flush(); sys.stdout.buffer.write(bytes(192)); sys.stdout.buffer.flush()"
    answer = f"for size in {sizes}:\n  print(json.dumps(size)); {write}"
    child(f"print('{INFO}', flush=True)\nsys.stdin.readline()\n{answer}")
    with open_guarded(tmp_path / "any.mp4") as guarded:
        frames = guarded.decode([0, 1])
        assert next(frames).shape == (8, 8, 3)
        with pytest.raises(BrokenVideoError, match="the decoder crashes"):
            next(frames)


@pytest.mark.parametrize("after", ["", f"print('{INFO}', flush=True); "])
def test_time_is_limited(child, tmp_path, after):
    child(f"{after}time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^mine\.mp4: reading it takes longer than 0\.3 s$"):
        list(open_guarded(tmp_path / "any.mp4", max_seconds=0.3).decode([0]))
    assert time.monotonic() - began < 10


def test_what_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"^mine\.mp4: No such file"):
        open_guarded(tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(BrokenVideoError, match=r"^mine\.mp4: not a video"):
        open_guarded(tmp_path / "text.mp4")
    path = write_video(tmp_path / "large.mp4", np.zeros((2, 64, 64, 3), np.uint8))
    with open_guarded(path, max_pixels=64 * 63) as guarded, pytest.raises(BrokenVideoError, match="frame 0 of 2"):
        next(guarded.decode([0]))


def test_a_child_ends_with_its_parent(video):
    """Also where the parent was killed, and so only its pipes are closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, guarded_video.CHILD], **pipes) as process:
        process.stdin.write(json.dumps({"path": str(video), **LIMITS}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["num_frames"] == 45
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def test_a_child_starts_without_pytorch():
    """Its import would take seconds and hundreds of megabytes for each video."""
    code = (
        f"import sys; sys.path.insert(0, {str(guarded_video.CHILD.parent)!r})\n"
        "import guarded_video_child; guarded_video_child.import_decoding()\n"
        "import av; assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
