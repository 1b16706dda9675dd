"""Frames of a video by index, from a path, a URL, bytes or a decoder: PyAV, or torchcodec where that works."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .video_index import FrameIndex, read_index
from .video_opening import CONTAINERS, BrokenVideoError, VideoSource, open_source

if TYPE_CHECKING:  # processes that only decode do without them: their import takes seconds
    import torch
    from transformers.video_utils import VideoMetadata

MAX_THREADS = 8  # each holds a frame of its own


def is_video_source(video: Any) -> bool:
    """Whether `read_frames` takes it: a path, URL, bytes, a `datasets` `Video` value or a torchcodec decoder."""
    return isinstance(video, VideoSource) or _is_torchcodec_decoder(video)


def read_frames(
    video: VideoSource, sample_indices: Callable[[VideoMetadata], Iterable[int]] | None = None
) -> tuple[torch.Tensor, VideoMetadata]:
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
        `tuple[torch.Tensor, VideoMetadata]`: RGB frames `(len(indices), 3, height, width)`, uint8, upright, and the
        metadata, with the indices in `frames_indices`.

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
            metadata = reader.metadata
            indices = _wanted(metadata, sample_indices)
            decoded = _decode_with_torchcodec(reader, indices)
            frames = reader.frames(indices) if decoded is None else decoded
    metadata.height, metadata.width = frames.shape[-2:]  # those of a turned video are swapped
    return frames, metadata


def read_metadata(video: VideoSource) -> VideoMetadata:
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
        self.name, self.file, self.max_pixels, self.num_threads = name, file, max_pixels, num_threads
        try:
            import av
        except ImportError as error:
            raise ImportError("Reading video files needs PyAV: `pip install av`.") from error
        self.av = av
        self.reformatter = av.video.reformatter.VideoReformatter()  # one for all frames: each is costly to set up
        self._open()
        try:
            self.index = index or self._read_index()
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def _open(self) -> None:
        if isinstance(self.file, io.BytesIO):
            self.file.seek(0)
        # "file:" keeps FFmpeg from reading a path as one of its protocols
        source = f"file:{self.file}" if isinstance(self.file, str) else self.file
        try:
            options = {"format_whitelist": CONTAINERS}
            self.container = self.av.open(source, options=options, metadata_errors="ignore")
        except self.av.error.ArgumentError as error:
            raise BrokenVideoError(self.name, "not a video, or in no container of videos") from error
        except self.av.error.FFmpegError as error:
            if isinstance(error, OSError) and isinstance(self.file, str):  # no permission, say
                raise
            reason = f"not a video, or truncated so that no frame can be read ({error.strerror})"
            raise BrokenVideoError(self.name, reason) from error
        cover = self.av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            self.container.close()
            raise BrokenVideoError(self.name, "it has no video stream")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.thread_count = self.num_threads or _default_threads()
        if self.max_pixels is not None:
            self.stream.codec_context.options = {"max_pixels": str(self.max_pixels)}

    def _read_index(self) -> FrameIndex:
        index = read_index(self.name, self.container, self.stream)
        if index.timestamps is None:
            self.index = index  # frames are counted by it
            self._restart()
            index = dataclasses.replace(index, num_frames=sum(1 for _ in self._decoded()))
        if index.num_frames == 0:
            raise BrokenVideoError(self.name, "it has no frame")
        return index

    @cached_property
    def metadata(self) -> VideoMetadata:
        from transformers.video_utils import VideoMetadata

        return VideoMetadata(
            total_num_frames=self.index.num_frames,
            fps=self.index.fps,
            duration=self.index.duration,
            video_backend="pyav",
        )

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
        decoded: Iterator[tuple[int, Any]] = iter(())
        position, shape = -1, None
        for index, repeats in itertools.groupby(indices):
            if position < 0 or self._keyframe_before(index) > position + 1:
                decoded = self._seek(index)
            frame = _find(decoded, index)
            if frame is None:  # it may be the seek that has lost it
                self._restart()
                decoded = self._decoded()
                frame = _find(decoded, index)
            if frame is None:
                reason = f"damaged: frame {index} of {self.index.num_frames} can't be decoded"
                raise BrokenVideoError(self.name, reason, index)
            position, image = index, self._to_rgb(frame)
            shape = shape or image.shape
            if image.shape != shape:
                sizes = sorted({shape[:2], image.shape[:2]})
                raise BrokenVideoError(self.name, f"its frames have several sizes: {sizes}")
            yield from (image for _ in repeats)

    def _to_rgb(self, frame: Any) -> np.ndarray:
        """`(height, width, 3)`, uint8, turned upright as the file asks (videos of phones are stored lying)."""
        rgb = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, k=round(frame.rotation / 90)))

    def _keyframe_before(self, index: int) -> int:
        """Number of the last keyframe that is not behind frame `index` and can be sought, 0 where none is known."""
        if self.container.format.name == "mpeg":  # of program streams the frames have other times after a seek
            return 0
        return self.index.keyframe_before(index)

    def _seek(self, index: int) -> Iterator[tuple[int, Any]]:
        """Numbers and frames from the keyframe of frame `index` on, or from an earlier one."""
        keyframe = self._keyframe_before(index)
        for _ in range(2):  # in MPEG-TS a seek often ends behind its keyframe, and then that to the one before does not
            if keyframe <= 0:
                break
            try:
                self.container.seek(self.index.timestamp(keyframe), stream=self.stream)
            except self.av.error.FFmpegError:  # not every container can
                break
            decoded = self._decoded()
            first = next(decoded, None)
            if first is not None and 0 <= first[0] <= index:
                return itertools.chain([first], decoded)
            keyframe = self._keyframe_before(keyframe - 1)
        self._restart()  # nothing to seek to, or the seek went too far
        return self._decoded()

    def _restart(self) -> None:
        self.container.close()
        self._open()

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """Numbers and frames from where the container stands; ends where the file can't be decoded further."""
        try:
            for count, frame in enumerate(self.container.decode(self.stream)):
                yield count if self.index.timestamps is None else self.index.number(frame.pts), frame
        except self.av.error.FFmpegError:
            return


def _default_threads() -> int:
    """One in the workers of a data loader."""
    import torch

    return min(torch.get_num_threads(), MAX_THREADS)


def _find(decoded: Iterator[tuple[int, Any]], index: int) -> Any | None:
    """The frame of this number, if it comes before any later one."""
    number, frame = next((item for item in decoded if item[0] >= index), (-1, None))
    return frame if number == index else None


def _wanted(metadata: VideoMetadata, sample_indices) -> list[int]:
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


def _torchcodec_metadata(decoder) -> VideoMetadata:
    from transformers.video_utils import VideoMetadata

    metadata = decoder.metadata
    return VideoMetadata(
        total_num_frames=metadata.num_frames,
        fps=metadata.average_fps,
        duration=metadata.duration_seconds,
        video_backend="torchcodec",
    )


def _torchcodec_frames(decoder, indices: Sequence[int]) -> torch.Tensor:
    frames = decoder.get_frames_at(indices=list(indices)).data
    return frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)


def _decode_with_torchcodec(reader: VideoFile, indices: Sequence[int]) -> torch.Tensor | None:
    """`None` where torchcodec is missing, can't read the file or counts its frames differently."""
    decoder_class = _torchcodec_decoder_class()
    # from other containers (AVI with B-frames, MPEG-TS) it returns wrong frames without an error
    if decoder_class is None or not reader.container.format.name.startswith(("mov,", "matroska,")):
        return None
    try:
        source = reader.file if isinstance(reader.file, str) else reader.file.getvalue()
        decoder = decoder_class(source, stream_index=reader.stream.index)
        if decoder.metadata.num_frames != reader.index.num_frames:
            return None
        frames = _torchcodec_frames(decoder, indices)
    except Exception:  # PyAV has the last word, and says what is wrong
        return None
    reader.metadata.video_backend = "torchcodec"
    return frames


__all__ = ["BrokenVideoError", "is_video_source", "read_frames"]
