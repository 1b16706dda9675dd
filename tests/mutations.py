"""
Damaged copies of small videos of many containers: reading one gives frames or [`BrokenVideoError`], nothing else.

    python -m tests.mutations 6000
"""

import collections
import io
import json
import resource
import subprocess
import sys
from functools import cache

import av
import numpy as np

from modeling_videomamba import BrokenVideoError
from modeling_videomamba.video_decoding import VideoFile
from tests.conftest import moving_square

KINDS = [
    *("mp4-libx264", "mov-mpeg4", "mkv-libx264", "webm-libvpx", "avi-mpeg4", "ts-libx264", "mpg-mpeg2video"),
    *("flv-flv", "wmv-wmv2", "gif-gif", "nut-mpeg4", "ivf-libvpx", "h264-libx264", "mxf-mpeg2video"),
    *("apng-apng", "avi-huffyuv", "avi-mjpeg"),
]
CHUNK, SECONDS, MEMORY = 100, 300, 4 << 30  # seeds of a process, and its limits
FORMATS = {"mkv": "matroska", "ts": "mpegts", "wmv": "asf", "mpg": "vob"}


@cache
def whole(kind: int) -> bytes:
    suffix, codec = KINDS[kind].split("-")
    file = io.BytesIO()
    with av.open(file, "w", format=FORMATS.get(suffix, suffix)) as container:
        stream = container.add_stream(codec, rate=10 if suffix not in ("mpg", "mxf") else 25)
        formats = [form.name for form in av.Codec(codec, "w").video_formats or ()]
        stream.pix_fmt = next(name for name in ("yuvj420p", "yuv420p", formats[0]) if name in formats)
        stream.width = stream.height = 48
        stream.codec_context.gop_size = 10
        for frame in moving_square(25):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes, half of them near an end of the file, where the headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(changed)
        head = rng.random() < 0.5
        at = int(rng.integers(min(size, 1500))) if head else int(rng.integers(size))
        at = size - 1 - at if rng.random() < 0.3 else at
        length = int(rng.integers(1, max(2, min(200, size - at))))
        change = rng.integers(6)
        if change == 0:
            changed[at] ^= 1 << rng.integers(8)
        elif change == 1:
            for place in rng.integers(size, size=rng.integers(1, 30)):
                changed[place] = rng.integers(256)
        elif change == 2:
            changed[at : at + length] = bytes(length)
        elif change == 3:
            changed[at : at + length] = b"\xff" * length
        elif change == 4:
            other = int(rng.integers(size))
            changed[at : at + length], changed[other : other + length] = (
                changed[other : other + length],
                changed[at : at + length],
            )
        else:
            del changed[max(at, 20) :]
    return bytes(changed)


def read_mutation(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return read(mutate(whole(seed % len(KINDS)), rng), rng)


def read(data: bytes, rng: np.random.Generator) -> str:
    """Reads all frames or some of them; returns `"frames"`, or the first word of the reason why the file is broken."""
    try:
        with VideoFile("damaged", io.BytesIO(data), max_pixels=2**20, num_threads=1) as reader:
            total = reader.index.num_frames
            wanted = sorted({0, total // 2, total - 1}) if rng.random() < 0.5 else range(min(total, 200))
            frames = sum(1 for _ in reader.decode(wanted))
            assert frames == len(wanted) and reader.metadata.duration > 0 and reader.metadata.fps > 0
            first, last = reader.index.window(0.5, 1.0)
            assert 0 <= first < last <= reader.index.num_frames
    except BrokenVideoError as error:
        assert str(error).startswith("damaged: ") and error.reason
        return error.reason.split(" ", 1)[0].rstrip(":,")
    return "frames"


def outcomes(first: int, last: int) -> dict[str, list[int]]:
    """The seeds of each outcome."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for seed in range(first, last):
        try:
            found[read_mutation(seed)].append(seed)
        except Exception as error:
            found[f"{type(error).__name__}: {error}"].append(seed)
    return found


def outcomes_of_child(first: int, last: int) -> dict[str, list[int]]:
    """As [`outcomes`], by a process of its own, whose crash is an outcome too."""
    command = [sys.executable, "-m", "tests.mutations", str(first), str(last)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # noqa: E731
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, preexec_fn=limit, check=True)
        return json.loads(done.stdout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        if last - first == 1:
            return {f"{type(error).__name__} {getattr(error, 'returncode', '')}": [first]}
        middle = (first + last) // 2
        halves = [outcomes_of_child(first, middle), outcomes_of_child(middle, last)]
        return {name: [seed for half in halves for seed in half.get(name, [])] for name in {**halves[0], **halves[1]}}


def main() -> None:
    numbers = [int(number) for number in sys.argv[1:]]
    if len(numbers) == 2:
        print(json.dumps(outcomes(*numbers)))
        return
    found: dict[str, list[int]] = collections.defaultdict(list)
    for first in range(0, numbers[0], CHUNK):
        for name, seeds in outcomes_of_child(first, min(first + CHUNK, numbers[0])).items():
            found[name] += seeds
    for name, seeds in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):5} {name}, e.g. seeds {seeds[:5]}")


if __name__ == "__main__":
    main()
