"""Index of the frames of a video, from its packets: how many there are, when each is shown, and where to seek to."""

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .video_opening import BrokenVideoError


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """
    What is needed to number, seek and time the frames of a video file without scanning it again: plain data.

    Args:
        num_frames (`int`): How many frames the decoder gives.
        timestamps (`np.ndarray` of shape `(num_frames,)`, int64, or `None`):
            When each frame is shown, in units of `time_base`, increasing. `None` where the file does not tell.
        keyframes (`np.ndarray` of shape `(keyframes,)`, int64): Numbers of the frames to seek to, increasing.
        time_base (`Fraction`): Seconds.
        rate (`Fraction` or `None`): Mean number of frames a second as the file states it.
        end (`int`, *optional*): When the last frame ends, in units of `time_base`. `None` without timestamps.
    """

    num_frames: int
    timestamps: np.ndarray | None
    keyframes: np.ndarray
    time_base: Fraction
    rate: Fraction | None
    end: int | None = None

    @property
    def duration(self) -> float:
        """Seconds from when the first frame is shown to when the last one ends."""
        return float(self._seconds)

    @property
    def fps(self) -> float:
        """Mean number of frames a second."""
        return float(self.num_frames / self._seconds)

    @property
    def _seconds(self) -> Fraction:
        rate = self.rate or Fraction(RAW_RATE)
        stated = self.num_frames / rate
        if self.timestamps is None or self.end is None:
            return stated
        seconds = (self.end - int(self.timestamps[0])) * self.time_base
        # timestamps are rounded; a stated rate is exact, or wrong
        return stated if self.rate and abs(stated - seconds) <= 1 / rate else seconds

    @property
    def times(self) -> np.ndarray:
        """Seconds from when the first frame is shown to when each one is, `(num_frames,)`, float64."""
        if self.timestamps is not None:
            return (self.timestamps - self.timestamps[0]) * float(self.time_base)
        return np.arange(self.num_frames) / float(self.rate or RAW_RATE)

    def timestamp(self, index: int) -> int:
        """What to seek to for frame `index`, in units of `time_base`."""
        assert self.timestamps is not None
        return int(self.timestamps[index])

    def number(self, timestamp: int | None) -> int:
        """Number of the frame of a timestamp, -1 if there is no such frame."""
        assert self.timestamps is not None
        if timestamp is None:
            return -1
        number = int(np.searchsorted(self.timestamps, timestamp))
        return number if number < self.num_frames and self.timestamps[number] == timestamp else -1

    def keyframe_before(self, index: int) -> int:
        """Number of the last keyframe that is not behind frame `index`, 0 where none is known."""
        behind = int(np.searchsorted(self.keyframes, index, side="right"))
        return int(self.keyframes[behind - 1]) if behind else 0


RAW_RATE = 25  # FFmpeg's own of raw streams


def read_index(name: str, container: Any, stream: Any) -> FrameIndex:
    r"""
    Reads all packets of a video stream, of which none is decoded.

    Args:
        name (`str`): What errors call the file.
        container (`av.container.InputContainer`): Just opened.
        stream (`av.video.stream.VideoStream`): Of the container.

    Returns:
        [`FrameIndex`]: Without timestamps, `num_frames` is the number of packets.

    Raises:
        `BrokenVideoError`: if the file is truncated.
    """
    frames, keyframes, num_packets, end, shown_end, damaged = [], [], 0, 0, 0, False
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_corrupt:
                continue
            num_packets += 1
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
            if not packet.is_discard:
                frames.append(packet.pts)
                shown_end = max(shown_end, (packet.pts or 0) + (packet.duration or 0))
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
    except MemoryError:
        raise
    except Exception:  # FFmpegError, and what else PyAV raises
        damaged = True
    # of Matroska and FLV files only the duration tells; the last frame may be a still one of any length
    missing = _stated_seconds(container, stream) - float(end * stream.time_base)
    gaps = [after - before for before, after in itertools.pairwise(sorted(filter(None, frames)))]
    still = 2 * float(max(gaps, default=0) * stream.time_base)
    if damaged or num_packets < len(stream.index_entries) or missing > max(0.5, still):
        reason = f"truncated: {len(frames)} of {stream.frames or 'more'} frames can be read"
        raise BrokenVideoError(name, reason, len(frames))
    usable = None not in frames and len(set(frames)) == len(frames)  # not those of a raw stream
    timestamps = np.array(sorted(frames) if usable else [], np.int64)
    return FrameIndex(
        num_frames=len(frames),
        timestamps=timestamps if usable else None,
        keyframes=np.searchsorted(timestamps, np.array(sorted(keyframes) if usable else [], np.int64)),
        time_base=stream.time_base,
        rate=stream.average_rate,
        end=_end(timestamps, shown_end, _stated_seconds(container, stream) / stream.time_base) if usable else None,
    )


def _end(timestamps: np.ndarray, packets_end: int, stated_end: Fraction | float) -> int:
    """When the last frame ends: by the packets, or by the header, else after as long as most frames are shown."""
    if len(timestamps) == 0:
        return 0
    gap = int(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 1
    end = max(packets_end, round(stated_end))
    return end if end > timestamps[-1] else int(timestamps[-1]) + gap


def _stated_seconds(container: Any, stream: Any) -> float:
    """Length of the video by the header of a Matroska or FLV file, 0 where it does not tell."""
    if not container.format.name.startswith(("matroska", "flv")):
        return 0.0
    if stated := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = stated.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    alone = len(container.streams) == 1  # sound may be longer
    return (container.duration or 0) / 1_000_000 if alone else 0.0
