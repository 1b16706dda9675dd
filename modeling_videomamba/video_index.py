"""Index of the frames of a video: how many there are, when each is shown, and where to seek to for each."""

import itertools
import operator
import re
from array import array
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from .video_messages import orientation_message
from .video_opening import BrokenVideoError, OpenedVideo
from .video_truncation import is_truncated

MISSING = np.iinfo(np.int64).min  # a timestamp or position that a packet doesn't have
HEAD = 64  # frames that are decoded to see whether they come in the order of their timestamps
MAX_REORDERED = 32  # no codec shows a frame so many later than it decodes it
# frames that are painted over the one before, where a file may have each of them marked as a keyframe
DELTA_CODECS = ("cinepak", "flashsv", "flic", "msrle", "msvideo1", "qtrle", "rpza", "smc", "svq1", "zmbv")
PROBED_HEAD, PROBES = 16, 3  # of so many frames at the start so many are decoded alone
THUMBNAIL = 64  # height and width in which these are compared
MIN_CONTRAST = 8  # standard deviation of the values of a picture that could not come out by chance
NOT_CODED = 8  # bytes: in MPEG-4 a smaller packet shows nothing, or a frame from before
RAW_RATE = 25  # the rate that FFmpeg gives raw streams
PLACEHOLDER = 2**30  # frames, in the header of an AVI that was written as a stream
END_OF_DIRAC = b"BBCD\x10"
NO_FRAMES = np.empty(0, np.int64)


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
        seeks (`np.ndarray` of shape `(keyframes,)`, int64): What to seek to for each of `keyframes`.
        label (`str`, *optional*):
            The attribute of a packet (`pts`, `dts`, `pos`) by which its frame is known. `None` where frames can only be
            counted, from the first one of the file.
        labels (`np.ndarray` of shape `(num_frames,)`, int64): Of each frame, empty without `label`.
        is_certain (`bool`): Whether decoding can't give the frames in another order.
    """

    num_frames: int
    timestamps: np.ndarray | None
    keyframes: np.ndarray
    time_base: Fraction
    rate: Fraction | None
    end: int | None = None
    seeks: np.ndarray = field(default_factory=lambda: NO_FRAMES)
    label: str | None = None
    labels: np.ndarray = field(default_factory=lambda: NO_FRAMES)
    is_certain: bool = True

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

    def window(self, start: float, end: float | None) -> tuple[int, int]:
        """
        The first frame of a window in seconds, and the one after its last: the frames that appear in it, else the frame
        on the screen at its start. Timestamps and bounds are rounded: a frame belongs to the window in which half of
        its usual duration has passed. Without `end` the window ends with the video.
        """
        end = self.duration if end is None else end
        first, last = np.searchsorted(self._middles, [start, end], side="right").tolist()
        if end >= self.duration:
            last = self.num_frames
        if first < last:
            return first, last
        shown = max(int(np.searchsorted(self.times, start, side="right")) - 1, 0)
        return shown, shown + 1

    @cached_property
    def _middles(self) -> np.ndarray:
        """When half of the usual duration of each frame has passed, or half of its own if that is shorter."""
        durations = np.diff(self.times, append=self.duration).clip(0)
        return self.times + np.minimum(durations, np.median(durations)) / 2

    @cached_property
    def times(self) -> np.ndarray:
        """Seconds from when the first frame is shown to when each one is, `(num_frames,)`, float64."""
        if self.timestamps is not None:
            return (self.timestamps - self.timestamps[0]) * float(self.time_base)
        return np.arange(self.num_frames) / float(self.rate or RAW_RATE)

    def number(self, label: int | None) -> int:
        """Number of the frame with a label, -1 if there is no such frame."""
        labels, numbers = self._sorted_labels
        place = int(np.searchsorted(labels, MISSING if label is None else label))
        return int(numbers[place]) if place < len(labels) and labels[place] == label else -1

    @cached_property
    def _sorted_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The labels, increasing, and the number of the frame of each."""
        numbers = np.argsort(self.labels)
        return self.labels[numbers], numbers

    def keyframe_before(self, index: int) -> int:
        """Number of the last keyframe that is not behind frame `index`, 0 where none is known."""
        behind = int(np.searchsorted(self.keyframes, index, side="right"))
        return int(self.keyframes[behind - 1]) if behind else 0

    def seek_to(self, keyframe: int) -> int:
        """What to seek to for a keyframe of this number."""
        return int(self.seeks[np.searchsorted(self.keyframes, keyframe)])

    def without_seeks(self) -> "FrameIndex":
        """The same where a seek doesn't lead to the frames that belong there: they are counted from the first one."""
        return replace(self, keyframes=NO_FRAMES, seeks=NO_FRAMES, label=None, labels=NO_FRAMES, is_certain=True)


@dataclass(frozen=True, eq=False)
class _Packets:
    """What the packets of a video say, in the order of the file, each an array of int64."""

    pts: np.ndarray
    dts: np.ndarray
    pos: np.ndarray
    size: np.ndarray
    duration: np.ndarray
    is_keyframe: np.ndarray
    turns_late: bool  # whether a packet behind the first one has another orientation for the frames that follow

    def __len__(self) -> int:
        return len(self.pts)


def read_index(video: OpenedVideo) -> FrameIndex:
    """
    Index of a video that stands at its first packet. Nothing is decoded where the timestamps of the packets tell the
    order of the frames, and all of the file where they don't.

    Raises:
        `BrokenVideoError`: if the file is truncated, empty, or damaged where it has to be decoded.
    """
    packets = _scan(video)
    index = _read_index(video, packets)
    return index.without_seeks() if packets.turns_late else index


def _read_index(video: OpenedVideo, packets: _Packets) -> FrameIndex:
    if _order_is_unknown(video, packets):
        return _index_by_decoding(video, packets)
    if _order_is_doubtful(video, packets):
        return _index_by_decoding(video, packets, HEAD)
    return _index_by_timestamps(video, packets, np.arange(len(packets)), not video.reorders or _is_reordered(packets))


def decode_index(video: OpenedVideo) -> FrameIndex:
    """Index by decoding the whole file in order, which leaves no doubt; raises as [`read_index`]."""
    video.restart()
    packets = _scan(video)
    index = _index_by_decoding(video, packets)
    return index.without_seeks() if packets.turns_late else index


def _scan(video: OpenedVideo) -> _Packets:
    """Reads all packets that give a frame. Raises `BrokenVideoError` for a truncated or empty file."""
    rows = array("q")  # a list would take ten times the memory
    num_packets, is_cut, is_damaged = 0, False, False
    first_message, turns_late, is_prefixed = None, False, (video.stream.codec_context.extradata or b"")[:1] == b"\1"
    format_name = video.container.format.name
    try:
        for packet in video.packets():
            is_cut = packet.is_corrupt and format_name != "mpegts"  # where it is one after a gap
            num_packets += 1
            if video.codec in ("h264", "hevc"):
                message = orientation_message(bytes(packet), video.codec, is_prefixed)
                first_message = message if num_packets == 1 else first_message
                turns_late |= message not in (None, first_message)
            if _gives_frame(video, packet):
                times = (MISSING if time is None else time for time in (packet.pts, packet.dts, packet.pos))
                rows.extend((*times, packet.size, packet.duration or 0, packet.is_keyframe))
    except BrokenVideoError as error:
        is_cut, is_damaged = True, not video.is_end(error.__cause__)
    pts, dts, pos, size, duration, is_keyframe = np.array(rows).reshape(-1, 6).T
    packets = _Packets(pts, dts, pos, size, duration, is_keyframe, turns_late)
    num_expected = 0 if format_name == "gxf" else len(video.stream.index_entries)  # GXF has one for each field
    if (is_short := is_truncated(video.file)) or is_cut or num_packets < num_expected:
        state = "damaged" if is_damaged and not is_short else "truncated"
        stated = video.stream.frames if len(packets) < video.stream.frames < PLACEHOLDER else "more"
        reason = f"{state}: {len(packets)} of {stated} frames can be read"
        raise BrokenVideoError(video.name, reason, len(packets))
    if len(packets) == 0:
        raise BrokenVideoError(video.name, "it has no frame, or is truncated before the first one")
    return packets


def _gives_frame(video: OpenedVideo, packet: Any) -> bool:
    if packet.is_discard:
        return False
    if video.codec == "vp8":  # it has frames that are not shown
        return bool(memoryview(packet)[0] & 0x10)
    return video.codec != "dirac" or bytes(packet)[:5] != END_OF_DIRAC


def _order_is_unknown(video: OpenedVideo, packets: _Packets) -> bool:
    """Whether only decoding all of the file tells which packets give a frame, and in which order."""
    if not _is_usable(packets.pts):  # as in a raw stream
        return True
    if video.codec == "mpeg4" and packets.size.min() < NOT_CODED:
        return True
    ranks = np.argsort(np.argsort(packets.pts))
    return bool(np.abs(ranks - np.arange(len(packets))).max() > MAX_REORDERED)  # time begins again within the file


def _order_is_doubtful(video: OpenedVideo, packets: _Packets) -> bool:
    """Whether decoding the first frames may show that they come in another order, or not all of them."""
    first_keyframe = packets.pts[packets.is_keyframe == 1][:1]
    if not packets.is_keyframe[0] or (packets.pts < first_keyframe).any():
        return True  # leading frames refer to others, which may be missing
    return video.reorders and video.stream.codec_context.has_b_frames and not _is_reordered(packets)


def _is_reordered(packets: _Packets) -> bool:
    """Whether the timestamps are those of presentation for sure, because they differ from the order of decoding."""
    return bool((np.diff(packets.pts) < 0).any())


def _is_usable(values: np.ndarray) -> bool:
    return MISSING not in values and len(np.unique(values)) == len(values)


def _index_by_decoding(video: OpenedVideo, packets: _Packets, head: int | None = None) -> FrameIndex:
    """Decodes all of the file in order, or its first `head` frames if their timestamps are right."""
    video.restart()
    numbers = itertools.count()
    first_keyframe = packets.pts[packets.is_keyframe == 1][:1]
    order: list[int] = []
    is_whole = True
    for number, _ in video.decoded(lambda packet: next(numbers) if _gives_frame(video, packet) else -1):
        if number is None or number < 0:
            continue
        order.append(number)
        if head is not None and len(order) >= head and (packets.pts[number] >= first_keyframe).all():
            is_whole = False
            break
    shown = packets.pts[order]
    if _is_usable(packets.pts) and (np.diff(shown) > 0).all() and (order or video.failure):
        if not is_whole or video.failure:
            order += np.flatnonzero(packets.pts > shown.max(initial=MISSING)).tolist()
        return _index_by_timestamps(video, packets, np.array(order), is_certain=is_whole)
    if not is_whole:
        return _index_by_decoding(video, packets)
    if video.failure or not order:
        reason = f"damaged: frame {len(order)} of {len(packets)} can't be decoded"
        raise BrokenVideoError(video.name, reason, len(order)) from video.failure
    return _index_by_order(video, packets, np.array(order))


def _index_by_timestamps(video: OpenedVideo, packets: _Packets, shown: np.ndarray, is_certain: bool) -> FrameIndex:
    """Frames known by their timestamps, of the packets with the numbers `shown`."""
    timestamps = np.sort(packets.pts[shown])
    seeks = np.sort(packets.pts[shown][packets.is_keyframe[shown] == 1])
    keyframes, seeks = _can_be_sought(video, len(timestamps), np.searchsorted(timestamps, seeks), seeks, "pts")
    return FrameIndex(
        num_frames=len(timestamps),
        timestamps=timestamps,
        keyframes=keyframes,
        time_base=video.stream.time_base,
        rate=video.stream.average_rate,
        end=_end(video, timestamps, (packets.pts + packets.duration.clip(0))[shown]),
        seeks=seeks,
        label="pts",
        labels=timestamps,
        is_certain=is_certain,
    )


def _index_by_order(video: OpenedVideo, packets: _Packets, order: np.ndarray) -> FrameIndex:
    """Frames in the order `order` of their packets, known by what no two of these have in common."""
    clocks = [clock for clock in (packets.pts, packets.dts) if _is_usable(clock[order]) and (np.diff(clock) > 0).all()]
    timestamps = np.sort(clocks[0][order]) if clocks else None
    label = next((name for name in ("pos", "dts", "pts") if _is_usable(getattr(packets, name)[order])), None)
    seeks = np.where(packets.dts == MISSING, packets.pts, packets.dts)[order]
    keyframes = np.flatnonzero((packets.is_keyframe[order] == 1) & (seeks != MISSING) & (label is not None))
    if _may_be_packed(video):
        keyframes = NO_FRAMES
    keyframes, seeks = _can_be_sought(video, len(order), keyframes, seeks[keyframes], label)
    return FrameIndex(
        num_frames=len(order),
        timestamps=timestamps,
        keyframes=keyframes,
        time_base=video.stream.time_base,
        rate=video.stream.average_rate,
        end=None if timestamps is None else _end(video, timestamps, (clocks[0] + packets.duration.clip(0))[order]),
        seeks=seeks,
        label=label,
        labels=NO_FRAMES if label is None else getattr(packets, label)[order],
    )


def _can_be_sought(
    video: OpenedVideo, num_frames: int, keyframes: np.ndarray, seeks: np.ndarray, label: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """The keyframes and what to seek to for each, none where a seek would not lead to the frames that belong there."""
    if not len(keyframes):
        return keyframes, seeks
    codec = video.stream.codec_context
    has_palette = codec.format is not None and codec.format.name == "pal8"  # `pix_fmt` can crash PyAV 17.1
    # in program streams the packets have other times after a seek, and palettes are not sent again
    if video.container.format.name == "mpeg" or has_palette:
        return NO_FRAMES, NO_FRAMES
    if len(keyframes) < num_frames or codec.codec.intra_only:
        return keyframes, seeks
    if label is None or video.codec in DELTA_CODECS or not _are_independent(video, seeks, label):
        return NO_FRAMES, NO_FRAMES
    return keyframes, seeks


def _may_be_packed(video: OpenedVideo) -> bool:
    """Whether a frame of MPEG-4 may share its packet with another one, whose keyframes only AVI marks right."""
    return video.codec == "mpeg4" and video.container.format.name != "avi"


def _are_independent(video: OpenedVideo, seeks: np.ndarray, label: str) -> bool:
    """
    Whether frames at the start are the same alone as in order. Raw streams, AVI without an index and MOV without a
    table of keyframes have each packet marked as a keyframe, also where a frame needs the one before.
    """
    video.restart()
    head = _thumbnails(video, label, PROBED_HEAD)
    contrasts = np.array([thumbnail.std() for _, thumbnail in head])
    numbers = {value: number for number, (value, _) in enumerate(head)}
    proven = 0
    for place in [place for place in np.argsort(-contrasts) if place > 0][:PROBES]:
        video.restart()  # a decoder that goes on has the frame before
        try:
            video.seek(int(seeks[place]))
        except BrokenVideoError:
            return False
        for value, alone in _thumbnails(video, label, 1):
            number = numbers.get(value, 0)
            if number == 0 or contrasts[number] < MIN_CONTRAST:  # the seek went elsewhere, or nothing is to be seen
                continue
            if not np.array_equal(alone, head[number][1]):
                return False
            proven += 1
    return proven > 0


def _thumbnails(video: OpenedVideo, label: str, number: int) -> list[tuple[int | None, np.ndarray]]:
    """Labels and pictures of the next frames."""
    size = {"width": THUMBNAIL, "height": THUMBNAIL}
    decoded = itertools.islice(video.decoded(operator.attrgetter(label)), number)
    with video.translated("damaged"):
        return [(value, frame.to_ndarray(format="rgb24", **size)) for value, frame in decoded]


def _end(video: OpenedVideo, timestamps: np.ndarray, packet_ends: np.ndarray) -> int:
    """When the last frame ends: by the packets, or by the header, else after as long as most frames are shown."""
    gap = int(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 1
    end = max(int(packet_ends.max()), round(_stated_seconds(video) / video.stream.time_base))
    return end if end > timestamps[-1] else int(timestamps[-1]) + gap


def _stated_seconds(video: OpenedVideo) -> float:
    """Length of the video by the header of a Matroska or FLV file, 0 where it does not tell."""
    container, stream = video.container, video.stream
    if not container.format.name.startswith(("matroska", "flv")):
        return 0.0
    if stated := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = stated.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    alone = len(container.streams) == 1  # sound may be longer
    return (container.duration or 0) / 1_000_000 if alone else 0.0
