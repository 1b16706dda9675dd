"""Moments of videos as files that browsers play, and their times for people."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..video_decoding import VideoFile

MAX_FRAMES, MAX_HEIGHT = 300, 360


def clock_time(seconds: float) -> str:
    """`0:07`, `12:05` or `1:47:30`: hours, if there are any, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def write_preview(reader: VideoFile, start: float, end: float | None, path: Path) -> None:
    r"""
    Writes a window of a video, small and without sound, as H.264 in MP4.

    Args:
        reader ([`VideoFile`]): The video, in any format.
        start (`float`), end (`float`, *optional*): Seconds; without `end` all of the video.
        path (`Path`): File to write.

    Raises:
        `BrokenVideoError`: if a frame is damaged.
    """
    first, last = reader.index.window(start, end)
    indices = np.unique(np.linspace(first, last - 1, min(last - first, MAX_FRAMES)).round().astype(int))
    seconds = (reader.index.duration if end is None else end) - start
    rate = Fraction(len(indices) / max(seconds, 0.1)).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        for number, image in enumerate(reader.decode(indices.tolist())):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if number == 0:
                half = min(1.0, MAX_HEIGHT / frame.height) / 2  # because H.264 wants even sides
                stream.width, stream.height = (2 * max(1, round(half * side)) for side in (frame.width, frame.height))
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p")))
        container.mux(stream.encode())
