"""Video files from strangers, decoded in a process with limits of memory and time."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..video_decoding import BrokenVideoError
from .guarded_video_child import OUT_OF_MEMORY

CHILD = Path(__file__).with_name("guarded_video_child.py")
MAX_LINE = 2**16  # bytes


class GuardedVideo:
    r"""
    A video file that a child process opens and decodes. A file of a few kilobytes can make FFmpeg take gigabytes of
    memory before it can be asked for anything, or crash; the child then ends, and this process goes on. What the child
    sends is numbers, a text and pixels, which are checked.

    Where Python can't measure memory (Windows), only time and pixels are limited.

    Args:
        name (`str`): Name of the file in errors.
        path (`Path`): Path of the file.
        max_pixels (`int`): Most pixels of a frame that is decoded.
        max_seconds (`float`): Most time for opening and decoding together.
        max_memory (`int`): Most bytes of memory of the child.

    Attributes: `num_frames`, `seconds` (duration), `width` and `height` (as the file states them).

    Raises:
        `BrokenVideoError`: if the file isn't a video, is damaged or needs more memory, here or in `decode`.
        `TimeoutError`: after `max_seconds`, here or in `decode`.
        `OSError`: if the file can't be read.
    """

    def __init__(self, name: str, path: Path, *, max_pixels: int, max_seconds: float, max_memory: int):
        self.name, self.max_pixels, self.max_seconds, self.max_memory = name, max_pixels, max_seconds, max_memory
        self.timed_out = False
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.timer = threading.Timer(max_seconds, self._time_out)
        self.timer.daemon = True
        self.timer.start()
        try:
            limits = {"max_pixels": max_pixels, "max_seconds": max_seconds, "max_memory": max_memory}
            self._ask({"path": str(path.absolute()), **limits})
            answer = self._answer()
            self.num_frames, self.width, self.height = (
                self._check(answer.get(key), int) for key in ("num_frames", "width", "height")
            )
            self.seconds = self._check(answer.get("seconds"), float)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GuardedVideo":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
        self.answers.close()
        self._close_requests()

    def decode(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """RGB frames `(height, width, 3)`, uint8, upright, all of one size. `indices` must not decrease."""
        self._ask(list(map(int, indices)))
        size = None
        for _ in indices:
            answer = self._answer()
            height, width = (self._check(answer.get(key), int) for key in ("height", "width"))
            size = size or (height, width)
            if (height, width) != size or not 0 < height * width <= self.max_pixels:
                self._fail()
            frame = np.empty((height, width, 3), np.uint8)
            if self._read_into(frame.data.cast("B")) < frame.nbytes:
                self._fail()
            yield frame

    def _time_out(self) -> None:
        self.timed_out = True
        self.process.kill()

    def _ask(self, request: Any) -> None:
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline(MAX_LINE)
        try:
            answer = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self._fail()
        if "unreadable" in answer:
            raise OSError(f"{self.name}: {answer['unreadable']}")
        if "broken" in answer:
            raise BrokenVideoError(self.name, str(answer["broken"]))
        return answer

    def _read_into(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and (count := self.answers.readinto(buffer[filled:])):  # type: ignore[attr-defined]
            filled += count
        return filled

    def _check(self, value: Any, kind: type) -> Any:
        """A number that is neither negative nor too large to be computed with."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            self._fail()
        return kind(value)

    def _fail(self) -> NoReturn:
        """Raises the reason why the child sends no answer, or a wrong one."""
        self.answers.close()
        self._close_requests()  # without its pipes it ends, if it hasn't ended
        code = self.process.wait()
        if self.timed_out:
            raise TimeoutError(f"{self.name}: reading it takes longer than {self.max_seconds:g} s")
        if code == OUT_OF_MEMORY:
            raise BrokenVideoError(self.name, f"reading it takes more than {self.max_memory >> 20} MB of memory")
        raise BrokenVideoError(self.name, "damaged so that the decoder crashes")

    def _close_requests(self) -> None:
        with suppress(BrokenPipeError):  # a request that the child has not read
            self.requests.close()
