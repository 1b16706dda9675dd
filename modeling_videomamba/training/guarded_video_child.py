"""
The child process of [`GuardedVideo`], a script: reads requests, lines of JSON, and answers with lines of JSON and the
pixels of frames. It imports neither PyTorch nor the package, because that takes seconds and memory for each video.
"""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY, OUT_OF_TIME = 3, 4  # exit codes
NUM_THREADS = 2  # each decodes a frame of its own


def main() -> None:
    del sys.path[0]  # the folder of this file, whose names may be those of other modules
    request = json.loads(sys.stdin.buffer.readline())
    limits = request["max_memory"], time.monotonic() + request["max_seconds"]
    threading.Thread(target=watch, args=limits, daemon=True).start()
    try:
        serve(request["path"], request["max_pixels"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (BrokenPipeError, KeyboardInterrupt):  # the parent has ended
        os._exit(1)


def watch(max_memory: int, end: float) -> None:
    """Ends the process at one of the limits. FFmpeg runs without the interpreter's lock, and so beside this thread."""
    while True:
        if resident_memory() > max_memory:
            os._exit(OUT_OF_MEMORY)
        if time.monotonic() > end:  # for a parent that was killed
            os._exit(OUT_OF_TIME)
        time.sleep(0.005)


def resident_memory() -> int:
    """Bytes of memory that this process has; 0 where that can't be measured."""
    if sys.platform == "linux":  # where `ru_maxrss` begins with the parent's memory
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def import_decoding() -> Any:
    """`video_decoding` without `__init__` of the package."""
    package = ModuleType(PACKAGE.name)
    package.__path__ = [str(PACKAGE)]
    sys.modules[PACKAGE.name] = package
    return importlib.import_module(f"{PACKAGE.name}.video_decoding")


def serve(path: str, max_pixels: int) -> None:
    decoding = import_decoding()
    try:
        with decoding.VideoFile(path, path, max_pixels=max_pixels, num_threads=NUM_THREADS) as reader:
            send(
                {
                    "num_frames": reader.index.num_frames,
                    "seconds": reader.index.duration,
                    "width": reader.stream.width,
                    "height": reader.stream.height,
                }
            )
            for line in sys.stdin.buffer:
                for image in reader.decode(json.loads(line)):
                    send({"height": image.shape[0], "width": image.shape[1]}, image.data)
    except decoding.BrokenVideoError as error:
        send({"broken": error.reason})
    except OSError as error:
        send({"unreadable": error.strerror or str(error)})


def send(answer: dict[str, Any], data: Any = b"") -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
