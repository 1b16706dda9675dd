"""Opening of videos: paths, URLs and bytes become packets and frames of PyAV, or an error with the name of the file."""

import contextlib
import errno
import io
import os
import re
import string
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

from ._version import __version__
from .video_truncation import is_truncated, open_binary

VideoSource = str | os.PathLike | bytes | bytearray | memoryview | dict

# FFmpeg also opens playlists, with all that they name, and can be asked only then what it has opened.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,mxf,nut,wtv,dv,gxf,rm,swf,nsv,nuv,pva,dhav,kux,"
    "h261,h263,h264,hevc,vvc,av1,obu,ivf,m4v,mjpeg,vc1,vc1test,dirac,cavsvideo,yuv4mpegpipe"
)
HEADER = 2**22  # bytes at the start or the end of a file
CODEC = re.compile(
    rb"vide.{0,999}?stsd.{12}([ -~]{4})|strh.{4}vids([ -~]{4})|\x86[\x80-\xff](V_[A-Z0-9_/]+)", re.DOTALL
)
MAX_THREADS = 8  # each holds a frame of its own
USER_AGENT = f"modeling-videomamba/{__version__}"  # servers refuse Python's own


class BrokenVideoError(ValueError):
    """
    A file that is not a video, or from which not every frame can be read.

    Args:
        name (`str`): Path or URL of the file, or what it is.
        reason (`str`): What is wrong with it.
        num_readable_frames (`int`, defaults to 0): How many of its frames could be read.
    """

    def __init__(self, name: str, reason: str, num_readable_frames: int = 0):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.num_readable_frames = name, reason, num_readable_frames

    def __reduce__(self):  # workers of a data loader send their exceptions to the main process
        return type(self), (self.name, self.reason, self.num_readable_frames)


class OpenedVideo:
    """
    The video stream of a file, opened with PyAV: packets, and frames in the order in which the decoder gives them.

    Args:
        name (`str`): What errors call it.
        file (`str` or `io.BytesIO`): Path, or the bytes of the file.
        max_pixels (`int`, *optional*): A frame of more is not decoded.
        num_threads (`int`, *optional*): Threads of the decoder, by default at most 8, and no more than PyTorch uses.

    Raises:
        `BrokenVideoError`: if it is not a video, or without a video stream or a decoder for it.
        `OSError`: if the file can't be read.
        `ImportError`: if PyAV is missing.
    """

    def __init__(
        self, name: str, file: str | io.BytesIO, *, max_pixels: int | None = None, num_threads: int | None = None
    ):
        self.name, self.file, self.max_pixels, self.num_threads = name, file, max_pixels, num_threads
        self.failure: BrokenVideoError | None = None  # what ended the frames of `decoded` before the end of the file
        try:
            import av
        except ImportError as error:
            raise ImportError("Reading video files needs PyAV: `pip install av`.") from error
        self.av = av
        if isinstance(file, str):
            Path(file).open("rb").close()  # errors of the file system are not errors of the video
        try:
            self.restart()
        except BrokenVideoError as error:
            if is_truncated(file):
                raise BrokenVideoError(name, "truncated so that no frame can be read") from error
            raise

    def restart(self) -> None:
        """Opens the file again, which stands at its first packet then."""
        self.close()
        if isinstance(self.file, io.BytesIO):
            self.file.seek(0)
        # "file:" keeps FFmpeg from reading a path as one of its protocols
        source = f"file:{self.file}" if isinstance(self.file, str) else self.file
        options = {"format_whitelist": CONTAINERS}
        with self.translated("not a video, or truncated so that no frame can be read"):
            self.container = self.av.open(source, options=options, metadata_errors="ignore")
        try:
            self.stream = self._choose_stream()
            self.codec: str = self.stream.codec_context.codec.name
            self.stream.thread_type = "AUTO"
            self.stream.codec_context.thread_count = self.num_threads or _default_threads()
            if self.max_pixels is not None:
                self.stream.codec_context.options = {"max_pixels": str(self.max_pixels)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if container := getattr(self, "container", None):
            container.close()

    def _choose_stream(self) -> Any:
        """Of several the one that moves, then the one that is marked as the default, then the largest one."""
        flag = self.av.stream.Disposition
        streams = [
            stream
            for stream in self.container.streams.video
            if not stream.disposition & (flag.attached_pic | flag.timed_thumbnails)
        ]
        if not streams:
            raise BrokenVideoError(self.name, "it has no video stream")
        streams = [stream for stream in streams if stream.codec_context is not None]
        if not streams:
            raise BrokenVideoError(self.name, f"there is no decoder for its video codec{self._codec_in_header()}")
        return max(
            streams,
            key=lambda stream: (
                stream.frames != 1,  # the still picture in front of an animated AVIF
                bool(stream.disposition & flag.default),
                stream.codec_context.width * stream.codec_context.height,
            ),
        )

    def _codec_in_header(self) -> str:
        """Name of an unknown codec, which PyAV doesn't tell, from mp4, AVI or Matroska; empty where it isn't found."""
        with open_binary(self.file) as file:
            found = CODEC.search(file.read(HEADER))
            if found is None and file.seek(0, io.SEEK_END) > HEADER:
                file.seek(-HEADER, io.SEEK_END)
                found = CODEC.search(file.read())
        return f" {found[found.lastindex or 0].decode('ascii')!r}" if found else ""

    @property
    def reorders(self) -> bool:
        """Whether frames of this codec may be shown in another order than they are decoded in."""
        return self.stream.codec_context.codec.reorder

    @contextlib.contextmanager
    def translated(self, reason: str) -> Iterator[None]:
        """Whatever PyAV raises is a broken file: not only its own errors, but also an `IndexError`, say."""
        try:
            yield
        except BrokenVideoError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) and not isinstance(error, self.av.error.FFmpegError):
                raise
            detail = "" if self.is_end(error) else getattr(error, "strerror", None) or str(error)
            raise BrokenVideoError(self.name, f"{reason} ({detail})" if detail else reason) from error

    def is_end(self, error: BaseException | None) -> bool:
        """Whether an error of PyAV says no more than that the file is at its end."""
        return isinstance(error, self.av.error.EOFError) or getattr(error, "errno", None) == errno.EIO

    def packets(self) -> Iterator[Any]:
        """Packets from where the file stands. Raises `BrokenVideoError` where it can't be read further."""
        with self.translated("damaged or truncated"):
            for packet in self.container.demux(self.stream):
                if packet.size:  # an empty one repeats a picture, and is none
                    yield packet

    def seek(self, timestamp: int) -> None:
        """To a keyframe at this time, or before it. Raises `BrokenVideoError` if the file can't be sought."""
        with self.translated("can't be sought"):
            self.container.seek(timestamp, stream=self.stream)

    def decoded(self, label: Callable[[Any], int | None]) -> Iterator[tuple[int | None, Any]]:
        """
        Labels and frames from where the file stands. The label is the one of the packet that holds the frame. Ends
        where the file can't be decoded further, with the reason in `failure`.
        """
        self.failure = None
        has_begun = False
        try:
            for packet in self.packets():
                has_begun |= packet.is_keyframe
                packet.pts = label(packet)
                for frame in self._frames(packet, has_begun):
                    has_begun = True
                    yield frame.pts, frame
            for frame in self._frames(None, True):
                yield frame.pts, frame
        except BrokenVideoError as error:
            self.failure = error

    def _frames(self, packet: Any | None, has_begun: bool) -> list[Any]:
        try:
            with self.translated("damaged"):
                return self.stream.codec_context.decode(packet)
        except BrokenVideoError:
            if has_begun:  # what comes before the first keyframe may lack its headers
                raise
            return []


def _default_threads() -> int:
    """One in the workers of a data loader."""
    import torch  # in processes that only decode, its import would take seconds

    return min(torch.get_num_threads(), MAX_THREADS)


def open_source(video: VideoSource) -> tuple[str, str | io.BytesIO]:
    """A name for errors, and a path of an existing file or its bytes."""
    if isinstance(video, dict):
        path, data = video.get("path"), video.get("bytes")
        if path is None and data is None:
            raise ValueError("A video given as a dictionary needs `path` or `bytes`, got neither.")
        if data is not None:
            return str(path or "video from bytes"), io.BytesIO(data)
        video = str(path)
    if isinstance(video, bytes | bytearray | memoryview):
        return "video from bytes", io.BytesIO(video)
    path = os.fspath(video)
    if path.startswith(("http://", "https://")):
        return path, io.BytesIO(_download(path))
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a video file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    return path, path


def _download(url: str) -> bytes:
    try:
        request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": USER_AGENT})
        with urlopen(request, timeout=60) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url}: can't be downloaded ({error})") from error
