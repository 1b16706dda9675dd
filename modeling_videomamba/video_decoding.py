"""Frames of a video by index, from a path, a URL, bytes or a decoder: PyAV, or torchcodec where that works."""

from __future__ import annotations

import contextlib
import io
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .video_index import FrameIndex, decode_index, read_index
from .video_opening import BrokenVideoError, OpenedVideo, VideoSource, open_source

if TYPE_CHECKING:  # processes that only decode do without them: their import takes seconds
    import torch

    from .video_metadata import TimedVideoMetadata

Frame = tuple[Any, "np.ndarray | None"]  # `av.video.frame.VideoFrame` and its display matrix


def is_video_source(video: Any) -> bool:
    """Whether `read_frames` takes it: a path, URL, bytes, a `datasets` `Video` value or a torchcodec decoder."""
    return isinstance(video, VideoSource) or _is_torchcodec_decoder(video)


def read_frames(
    video: VideoSource, sample_indices: Callable[[TimedVideoMetadata], Iterable[int]] | None = None
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    r"""
    Decodes frames of a video, and no others than it must: it seeks where the next wanted frame is behind a keyframe.

    Args:
        video (`str`, `os.PathLike`, `bytes`, `dict` or `torchcodec.decoders.VideoDecoder`):
            A path, an http(s) URL, the bytes of a file, or a value of the `Video` feature of `datasets`: a dictionary
            with `path` or `bytes`, or a decoder.
        sample_indices (`Callable`, *optional*):
            From the metadata of the video to the indices of the wanted frames, in any order, also repeated. Without it
            all frames are read.

    Returns:
        `tuple[torch.Tensor, TimedVideoMetadata]`: RGB frames `(len(indices), 3, height, width)`, uint8, upright, and
        the metadata, with the indices in `frames_indices`.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`: if there is no such file.
        `OSError`: if it can't be read or downloaded.
        `BrokenVideoError`: if it is not a video, has no video stream or no frame, is truncated or can't be decoded.
        `ImportError`: if PyAV is missing.
    """
    if _is_torchcodec_decoder(video):
        video = getattr(video, "_hf_encoded", video)  # `datasets` keeps the path or bytes: read those, with all checks
    if _is_torchcodec_decoder(video):
        metadata = _torchcodec_metadata(video)
        try:
            frames = _torchcodec_frames(video, _wanted(metadata, sample_indices))
        except RuntimeError as error:
            raise BrokenVideoError("torchcodec decoder", str(error)) from error
    else:
        name, file = open_source(video)
        with VideoFile(name, file) as reader:
            frames, metadata = _sample(reader, sample_indices)
    metadata.height, metadata.width = frames.shape[-2:]  # those of a turned video are swapped
    return frames, metadata


def _sample(reader: VideoFile, sample_indices) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """Frames and metadata; once more where reading has shown that the frames have other numbers."""
    while True:
        index, metadata = reader.index, reader.metadata
        indices = _wanted(metadata, sample_indices)
        frames = _decode_with_torchcodec(reader, indices)
        metadata.video_backend = "pyav" if frames is None else "torchcodec"
        try:
            frames = reader.frames(indices) if frames is None else frames
        except BrokenVideoError:
            if reader.index is index:
                raise
        else:
            if reader.index is index:
                return frames, metadata


def read_metadata(video: VideoSource) -> TimedVideoMetadata:
    """Number, rate and duration of the frames of a video, of which none is decoded; raises as [`read_frames`] does."""
    name, file = open_source(video)
    with VideoFile(name, file) as reader:
        return reader.metadata


class VideoFile:
    """
    A video file opened with PyAV, its frames numbered in the order in which they are shown.

    Args:
        name (`str`): What errors call it.
        file (`str` or `io.BytesIO`): Path, or the bytes of the file.
        index ([`FrameIndex`], *optional*): Of this file, from an earlier `VideoFile`: the file is not scanned again.
        max_pixels (`int`, *optional*): A frame of more is not decoded, and so damaged.
        num_threads (`int`, *optional*): Threads of the decoder, by default at most 8, and no more than PyTorch uses.

    Raises:
        `BrokenVideoError`, `OSError`, `ImportError`: as [`read_frames`].
    """

    def __init__(
        self,
        name: str,
        file: str | io.BytesIO,
        *,
        index: FrameIndex | None = None,
        max_pixels: int | None = None,
        num_threads: int | None = None,
    ):
        self.name, self.file = name, file
        self.video = OpenedVideo(name, file, max_pixels=max_pixels, num_threads=num_threads)
        self.reformatter = self.video.av.video.reformatter.VideoReformatter()  # one for all: each is costly to set up
        self._is_recounted, self._position = False, -1
        self._decoded: Iterator[tuple[int, Frame]] = iter(())
        try:
            self.index = index or read_index(self.video)
        except BaseException:
            self.video.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_) -> None:
        self.video.close()

    @property
    def stream(self) -> Any:
        """The `av.video.stream.VideoStream` that is read."""
        return self.video.stream

    @property
    def metadata(self) -> TimedVideoMetadata:
        from .video_metadata import TimedVideoMetadata

        return TimedVideoMetadata.of(self.index, "pyav")

    def is_turned(self) -> bool:
        """Whether the frames are shown in another orientation than they are stored in."""
        self._position = -1
        _, matrix = self._frame(0)
        return matrix is not None and not np.array_equal(np.sign(matrix), np.eye(2))

    def frames(self, indices: Sequence[int]) -> torch.Tensor:
        """RGB frames `(len(indices), 3, height, width)`, uint8, upright. Raises `ValueError` for no indices."""
        if len(indices) == 0:
            raise ValueError("`indices` must name at least one frame, got none.")
        wanted, rows = np.unique(indices, return_inverse=True)
        images = self.decode(wanted.tolist())
        first = next(images)
        frames = np.empty((len(indices), *first.shape), np.uint8)
        for number, image in enumerate(itertools.chain([first], images)):
            frames[rows == number] = image
        import torch

        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def decode(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """
        RGB frames `(height, width, 3)`, uint8, upright, one after the other, so that not all of a large video have to
        be held. `indices` must not decrease. Raises `BrokenVideoError` at a frame that can't be decoded.
        """
        self._position, shape = -1, None
        for index, repeats in itertools.groupby(indices):
            image = self._to_rgb(*self._frame(index))
            shape = shape or image.shape
            if image.shape != shape:
                sizes = sorted({shape[:2], image.shape[:2]})
                raise BrokenVideoError(self.name, f"its frames have several sizes: {sizes}")
            yield from (image for _ in repeats)

    def _to_rgb(self, frame: Any, matrix: np.ndarray | None) -> np.ndarray:
        """`(height, width, 3)`, uint8, as the file asks (videos of phones are stored lying, or mirrored)."""
        with self.video.translated("damaged"):
            rgb = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        return np.ascontiguousarray(rgb if matrix is None else _turn(rgb, matrix))  # its rows may have padding

    def _frame(self, index: int) -> Frame:
        while True:
            try:
                if self._position < 0 or self.index.keyframe_before(index) > self._position + 1:
                    self._seek(index)
                frame = _find(self._decoded, index)
                if frame is None:  # it may be the seek that has lost it
                    self._restart()
                    frame = _find(self._decoded, index)
            except _MisnumberedError:
                self._renumber()
                continue
            if frame is None:
                reason = f"damaged: frame {index} of {self.index.num_frames} can't be decoded"
                raise BrokenVideoError(self.name, reason, index) from self.video.failure
            self._position = index
            return frame

    def _renumber(self) -> None:
        """Counts the frames of a file whose timestamps are wrong, and reads one where seeks are from its start."""
        self.index = self.index.without_seeks() if self._is_recounted else decode_index(self.video)
        self._is_recounted, self._position = True, -1

    def _seek(self, index: int) -> None:
        """Lets `_decoded` begin at the keyframe of frame `index`, or at an earlier one."""
        keyframe = self.index.keyframe_before(index)
        for _ in range(2):  # in MPEG-TS a seek often ends behind its keyframe, and then that to the one before does not
            if keyframe <= 0:
                break
            try:
                matrix = self._first_matrix
                self.video.seek(self.index.seek_to(keyframe))
            except BrokenVideoError:  # not every container can
                break
            decoded = self._numbered(keyframe, matrix)
            first = next(decoded, None)
            if first is not None and first[0] <= index and first[0] == self.index.keyframe_before(first[0]):
                self._decoded = itertools.chain([first], decoded)
                return
            keyframe = self.index.keyframe_before(keyframe - 1)
        self._restart()  # nothing to seek to, or the seek went too far

    def _restart(self) -> None:
        self.video.restart()
        self._decoded = self._numbered(0)

    def _numbered(self, first: int, matrix: np.ndarray | None = None) -> Iterator[tuple[int, Frame]]:
        """
        Numbers and frames from where the file stands, without those before frame `first`; ends where the file can't be
        decoded further. Raises [`_MisnumberedError`] if the numbers are not consecutive.
        """
        held: list[tuple[int, Frame]] = []  # a frame is in doubt until the next one has come
        expected = None
        for number, frame in self._known_frames(matrix):
            if number < first:
                continue
            if number != expected and expected is not None:
                raise _MisnumberedError
            expected = number + 1
            held.append((number, frame))
            if self.index.is_certain or len(held) > 1:
                yield held.pop(0)
        is_short = expected not in (None, self.index.num_frames) and self.video.failure is None
        if is_short and self.index.label:
            raise _MisnumberedError
        yield from held

    def _known_frames(self, matrix: np.ndarray | None) -> Iterator[tuple[int, Frame]]:
        """Numbers and frames; a display matrix holds until a frame has another one."""
        label = self.index.label
        decoded = self.video.decoded(operator.attrgetter(label) if label else lambda _: None)
        for count, (value, frame) in enumerate(decoded):
            matrix = matrix if (own := self._display_matrix(frame)) is None else own
            yield self.index.number(value) if label else count, (frame, matrix)

    @cached_property
    def _first_matrix(self) -> np.ndarray | None:
        """Display matrix of the first frame, where the codec may say it once for all frames."""
        if self.video.codec not in ("h264", "hevc", "vvc"):
            return None
        self.video.seek(int(self.index.seeks[0]))
        _, frame = next(self.video.decoded(lambda _: None), (None, None))
        return None if frame is None else self._display_matrix(frame)

    def _display_matrix(self, frame: Any) -> np.ndarray | None:
        """Where a point of a frame is shown: `(x, y) @ matrix`, `(2, 2)`."""
        # `frame.side_data` makes a reference cycle: frames would stay in memory until the garbage collector runs
        container_class = self.video.av.sidedata.sidedata.SideDataContainer
        side_data = container_class.__new__(container_class)
        with contextlib.suppress(
            ValueError
        ):  # of a kind that PyAV doesn't know, such as EXIF, which follows the matrix
            side_data.__init__(frame)
        matrix = side_data.get("DISPLAYMATRIX")
        return None if matrix is None else np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].copy()


def _turn(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A picture `(height, width, 3)` mirrored and turned by multiples of 90 degrees."""
    sizes = np.abs(matrix.astype(np.int64))
    if np.trace(sizes) < sizes.sum() / 2:
        image, matrix = image.swapaxes(0, 1), matrix[::-1]
    return image[:: -1 if matrix[1, 1] < 0 else 1, :: -1 if matrix[0, 0] < 0 else 1]


class _MisnumberedError(Exception):
    """Frames come in another order than the index has them."""


def _find(decoded: Iterator[tuple[int, Frame]], index: int) -> Frame | None:
    """The frame of this number, if it comes before any later one."""
    number, frame = next((item for item in decoded if item[0] >= index), (-1, None))
    return frame if number == index else None


def _wanted(metadata: TimedVideoMetadata, sample_indices) -> list[int]:
    indices = range(metadata.total_num_frames) if sample_indices is None else sample_indices(metadata)
    metadata.frames_indices = [int(index) for index in indices]
    return metadata.frames_indices


# torchcodec: optional, faster on many files, in need of an FFmpeg of the system.


def _torchcodec_decoder_class():
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception:  # without FFmpeg its import fails with a RuntimeError
        return None
    return VideoDecoder


def _is_torchcodec_decoder(video: Any) -> bool:
    return type(video).__module__.startswith("torchcodec.")


def _torchcodec_metadata(decoder) -> TimedVideoMetadata:
    from .video_metadata import TimedVideoMetadata

    metadata = decoder.metadata
    fps = metadata.average_fps
    rate = Fraction(fps).limit_denominator(1001) if fps else None
    index = FrameIndex(metadata.num_frames, None, np.empty(0, np.int64), Fraction(1), rate)
    return TimedVideoMetadata.of(index, "torchcodec")


def _torchcodec_frames(decoder, indices: Sequence[int]) -> torch.Tensor:
    frames = decoder.get_frames_at(indices=list(indices)).data
    return frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)


def _decode_with_torchcodec(reader: VideoFile, indices: Sequence[int]) -> torch.Tensor | None:
    """`None` where torchcodec is missing, can't read the file, or might take other frames than these."""
    decoder_class, index = _torchcodec_decoder_class(), reader.index
    # from other containers (AVI with B-frames, MPEG-TS) it returns wrong frames without an error
    if decoder_class is None or not reader.video.container.format.name.startswith(("mov,", "matroska,")):
        return None
    # it goes by the timestamps, always seeks, and knows no mirrors
    if not (index.is_certain and index.label == "pts" and len(index.keyframes)) or reader.is_turned():
        return None
    try:
        source = reader.file if isinstance(reader.file, str) else reader.file.getvalue()
        decoder = decoder_class(source, stream_index=reader.video.stream.index)
        if decoder.metadata.num_frames != reader.index.num_frames:
            return None
        frames = _torchcodec_frames(decoder, indices)
    except Exception:  # PyAV has the last word, and says what is wrong
        return None
    return frames


__all__ = ["BrokenVideoError", "is_video_source", "read_frames"]
