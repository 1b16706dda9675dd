"""
The windows of videos that lie in a folder or in shards, tar files of videos.

A video is known by its path, and by size and time of its file: where they are others, it is another video.
"""

import itertools
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import fsspec
import numpy as np
import torch
from fsspec.core import url_to_fs
from torch.utils.data import get_worker_info

from ..video_decoding import VideoFile, VideoSource, open_source
from ..video_index import FrameIndex
from ..video_processing_videomamba import VideoMambaVideoProcessor, sample_frame_indices
from .data import BROKEN, EvaluationViews, Examples, process_clips
from .files import VIDEO_SUFFIXES, TarMember, check_no_file_twice, legible, name_error, walk_files
from .frame_indexes import FrameIndexes

SHARD_SUFFIX = ".tar"
# what servers and stores say of the version of a file, and that there is none
VERSIONS = ("ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "updated", "mtime")
GONE = (404, 410)
HTTP_PATIENCE = 60  # seconds, for a connection and for the next bytes
PREPARED_BYTES = 2**25  # of frames that are prepared at once
Media = dict[str, Any]  # `path` and `bytes`, as the `Video` feature of `datasets` has them


class Source(NamedTuple):
    """
    A file or a video: its path, and the size and the time (ns) of the file; of one at an address a number for its
    version instead of the time. Both are none where they aren't known.
    """

    path: str
    size: int | None
    mtime: int | None


class VideoWindow(NamedTuple):
    """One of the `windows` equal parts of a video, in seconds; in earlier indexes `end` is `None` for a whole video."""

    path: str
    size: int | None
    mtime: int | None
    start: float
    end: float | None
    windows: int

    @property
    def video(self) -> Source:
        return Source(self.path, self.size, self.mtime)

    @property
    def cut(self) -> tuple[int, float | None]:
        """Number and length of the windows of the video."""
        return self.windows, None if self.end is None else round(self.end - self.start, 6)

    @property
    def file(self) -> Source:
        return Source(split_path(self.path)[0], self.size, self.mtime)


class ShardError(OSError):
    """A shard that can't be read."""


class Row(NamedTuple):
    """A video that can be opened as `media`; or one, or a shard, that can't be read, and the `error`."""

    video: Source
    media: Media | None
    error: str | None


class Share(NamedTuple):
    """The share of one of several readers in what all of them are to read."""

    reader: int
    readers: int

    def has(self, path: str) -> bool:
        """Whether what has this path is in the share."""
        return zlib.crc32(os.fsencode(path)) % self.readers == self.reader

    def split(self, worker: int, workers: int) -> "Share":
        """Of one of the workers of the reader."""
        return Share(self.reader * workers + worker, self.readers * workers)


def is_shard(path: str) -> bool:
    """Whether it is a shard and no video."""
    return path.lower().endswith(SHARD_SUFFIX)


def split_path(path: str) -> tuple[str, str | None]:
    """The file of a video, and its name in there if that is a shard."""
    found = re.fullmatch(r"(.+?\.tar)::(.+)", path, re.IGNORECASE | re.DOTALL)
    return (found[1], found[2]) if found else (path, None)


def find_files(data: list[str]) -> list[Source]:
    r"""
    Videos and shards, sorted by path.

    Args:
        data (`list[str]`): One folder, whose files with the suffix of a video or of a shard are found, their paths
            relative to it; or the paths and addresses of shards.

    Raises:
        `FileNotFoundError`: if there is no such folder or shard.
        [`ShardError`]: if an address can't be reached; where nothing is at one, this is reported when it is read.
        `ValueError`: if nothing is found, or what is given is no shard, or is given twice.
    """
    if len(data) == 1 and Path(data[0]).is_dir():
        root, suffixes = Path(data[0]), (*sorted(VIDEO_SUFFIXES), SHARD_SUFFIX)
        paths = walk_files(root, suffixes)
        if not paths:
            raise ValueError(f"{root}: there is no video, which would end in one of {', '.join(suffixes)}")
        return sorted(_source(path, path.relative_to(root).as_posix()) for path in paths)
    for name in data:
        if not is_shard(name):
            raise ValueError(f"{name}: must be one folder, or shards, which end in {SHARD_SUFFIX}")
        if "://" not in name and not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such shard")
    check_no_file_twice("shard", data)
    local = {name: Path(name).absolute() for name in data if "://" not in name}
    found = {_source(local[n], local[n].as_posix()) if n in local else find_remote(n) for n in data}
    return sorted(found, key=lambda file: file.path)


def find_remote(address: str) -> Source:
    """A shard at an address, with nothing known of it if it isn't there. Raises [`ShardError`] if none can tell."""
    try:
        system, path = url_to_fs(address, **_http_options(address))
        info = system.info(path)
    except Exception as error:  # each protocol has errors of its own
        reason = error.__cause__ or error
        is_offline = isinstance(reason, aiohttp.ClientConnectionError | TimeoutError)
        if isinstance(error, FileNotFoundError) and not is_offline and getattr(reason, "status", 404) in GONE:
            return Source(address, None, None)
        raise ShardError(f"{address}: can't be reached: {reason}") from error
    version = [str(info[name]) for name in VERSIONS if info.get(name)]
    return Source(address, info.get("size"), zlib.crc32("\n".join(version).encode()) if version else None)


def _source(path: Path, name: str) -> Source:
    try:
        found = path.stat()
    except OSError:  # a dangling link, say: reported when it is read
        return Source(name, None, None)
    return Source(name, found.st_size, found.st_mtime_ns)


def read_videos(files: list[Source], root: str, complete: Container[Source], share: Share) -> Iterator[Row]:
    r"""
    The videos of one of several readers: of files each n-th; of shards each n-th too, or where there are fewer of them
    than readers those videos whose paths fall to this one, without what is `complete`. So whose a video is doesn't
    depend on what anybody could read.

    Args:
        files (`list[Source]`): Of [`find_files`].
        root (`str`): What their paths are relative to.
        complete (`Container[Source]`): Videos of shards to leave out.
        share ([`Share`]): Of this reader.

    Returns:
        `Iterator[Row]`: a video, or a file and why it can't be read.
    """
    shards = [file for file in files if is_shard(file.path)]
    for file in [file for file in files if not is_shard(file.path)][share.reader :: share.readers]:
        if split_path(file.path)[1] is None:
            yield _row(file, {"path": locate(root, file.path), "bytes": None})
        else:
            yield Row(file, None, f"{file.path}: is named as a video in a shard is, rename it")
    whole = len(shards) >= share.readers
    for shard in shards[share.reader :: share.readers] if whole else shards:
        try:
            yield from _read_shard(shard, locate(root, shard.path), complete, Share(0, 1) if whole else share)
        except OSError as error:
            yield Row(shard, None, str(error))


def _row(video: Source, media: Media) -> Row:
    error = name_error(video.path)
    return Row(video, None if error else media, error)


def locate(root: str, path: str) -> str:
    """Where a file is, by its path in the collection."""
    return path if "://" in path else str(Path(root) / path)  # an absolute one stays as it is


def _read_shard(shard: Source, location: str, complete: Container[Source], share: Share) -> Iterator[Row]:
    seen: set[str] = set()
    with _open_shard(location) as archive:
        for member in archive:
            video = shard._replace(path=f"{shard.path}::{member.name}")
            if member.isdir() or Path(member.name).suffix.lower() not in VIDEO_SUFFIXES or not share.has(video.path):
                continue
            if member.name in seen:
                yield Row(video, None, f"{location}::{member.name}: another video of the shard has this name")
            elif not member.isfile():
                yield Row(video, None, f"{location}::{member.name}: is a link or no file, which shards can't have")
            elif video not in complete:
                yield _row(video, {"path": f"{location}::{member.name}", "bytes": _read_member(archive, member)})
            seen.add(member.name)


@contextmanager
def _open_shard(location: str) -> Iterator[tarfile.TarFile]:
    """
    The archive in a file. What is passed over is not read where that can be; what comes by HTTP is a stream, since not
    every server sends parts. Raises [`ShardError`] for all that goes wrong with it.
    """
    streamed = location.startswith(("http://", "https://"))
    try:
        with (
            _open_file(location, streamed) as opened,
            tarfile.open(fileobj=opened, mode="r|" if streamed else "r:", tarinfo=TarMember) as archive,
        ):
            yield archive
    except tarfile.TarError as error:
        raise ShardError(f"{location}: {error}") from error
    except Exception as error:
        if "://" not in location and not isinstance(error, OSError):
            raise
        # each protocol has errors of its own, of which not all tell the address
        raise ShardError(f"{location}: {type(error).__name__}: {error}") from error


def _open_file(location: str, streamed: bool) -> AbstractContextManager[Any]:
    if "://" not in location:
        return Path(location).open("rb")
    if not streamed:
        return fsspec.open(location, "rb")
    return fsspec.open(location, "rb", block_size=0, **_http_options(location))


def _http_options(address: str) -> dict[str, Any]:
    """Patience with a server; the time in all would count how long the model takes for what has come."""
    if not address.startswith(("http://", "https://")):
        return {}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=HTTP_PATIENCE, sock_read=HTTP_PATIENCE)
    return {"client_kwargs": {"timeout": limits}}


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # as it is of a member that is a file
    return file.read()


def read_media(root: str, path: str) -> Media:
    """A video by its path in the collection. Raises [`ShardError`] or, without such a member, `FileNotFoundError`."""
    name, wanted = split_path(path)
    location = locate(root, name)
    if wanted is None:
        return {"path": location, "bytes": None}
    with _open_shard(location) as archive:
        for member in archive:
            if member.name == wanted and member.isfile():
                return {"path": f"{location}::{wanted}", "bytes": _read_member(archive, member)}
    raise FileNotFoundError(f"{location}: has no {wanted}")


def open_video(video: VideoSource, index: FrameIndex | None = None) -> VideoFile:
    """
    A video of [`read_media`], or any other; it is not scanned where its `index` is known. Raises `BrokenVideoError` or
    `OSError` for what can't be read.
    """
    return VideoFile(*open_source(video), index=index)


def cut_video(video: Source, duration: float, clip_seconds: float) -> list[VideoWindow]:
    """As few equal windows as are no longer than `clip_seconds` (but for a hundredth), which leave nothing out."""
    count = max(1, math.ceil(duration / clip_seconds - 0.01))  # ten seconds at 29.97 frames a second are 10.01
    bounds = [index * duration / count for index in range(count)] + [duration]
    return [VideoWindow(*video, start, end, count) for start, end in itertools.pairwise(bounds)]


def window_pixels(
    reader: VideoFile, start: float, end: float | None, processor: VideoMambaVideoProcessor
) -> torch.Tensor:
    """
    What the model sees of a window, `(1, frames, 3, height, width)`. Raises `BrokenVideoError` for a damaged frame.
    """
    first, last = reader.index.window(start, end)
    indices = first + sample_frame_indices(last - first, processor.num_frames).flatten()
    return prepare_frames(reader.decode(indices.tolist()), processor)


def prepare_frames(images: Iterator[np.ndarray], processor: VideoMambaVideoProcessor) -> torch.Tensor:
    """`pixel_values` `(1, frames, 3, height, width)` of frames `(height, width, 3)`, uint8, a few at a time."""
    return torch.cat([process_clips(processor, [part]) for part in _parts(images)], dim=1)


def _parts(images: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    """
    Frames `(frames, 3, height, width)`, at least one and as many as have `PREPARED_BYTES`: all of a large video would
    take gigabytes, and one of a small one costs as much as all.
    """
    for first in images:
        others = itertools.islice(images, max(0, PREPARED_BYTES // first.nbytes - 1))
        yield torch.from_numpy(np.stack([first, *others])).permute(0, 3, 1, 2)


class Windows(torch.utils.data.IterableDataset):
    r"""
    The windows of videos, each video opened once, as items of [`collate`]: `name` is the window as JSON, and what can't
    be read has its path and the reason in `broken`.

    Args:
        files (`list[Source]`): Of [`find_files`].
        root (`str`): What their paths are relative to.
        processor ([`VideoMambaVideoProcessor`]): Of the model.
        clip_seconds (`float`): As in [`cut_video`].
        known (`set[VideoWindow]`): Left out.
        frames ([`FrameIndexes`]): Gets the frame index of each video with several windows.
        share ([`Share`]): Of this process, whose workers share it.
    """

    def __init__(
        self,
        files: list[Source],
        root: str,
        processor: VideoMambaVideoProcessor,
        clip_seconds: float,
        known: set[VideoWindow],
        frames: FrameIndexes,
        share: Share,
    ):
        self.files, self.root, self.processor, self.clip_seconds = files, root, processor, clip_seconds
        self.complete, self.frames, self.share = frames.complete(known), frames, share
        self.known = {window for window in known if window.video not in self.complete}
        self.blank = Examples([], EvaluationViews(processor), skip_broken=True).item(None, 0, -1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        share = self.share if worker is None else self.share.split(worker.id, worker.num_workers)
        for video, media, error in read_videos(self.files, self.root, self.complete, share):
            if media is None:
                yield self._broken(video, str(error))
                continue
            try:
                with open_video(media, self.frames.read(video)) as reader:
                    windows = cut_video(video, reader.index.duration, self.clip_seconds)
                    for window in windows:
                        if window not in self.known:
                            yield self._item(window, reader)
            except BROKEN as broken:
                yield self._broken(video, str(broken))
                continue
            if len(windows) > 1:
                self.frames.write(video, reader.index)

    def _item(self, window: VideoWindow, reader: VideoFile) -> dict[str, Any]:
        try:
            pixels = window_pixels(reader, window.start, window.end, self.processor)
        except BROKEN as error:  # the other windows may be whole
            return self._broken(window.video, str(error))
        return self.blank | {"pixel_values": pixels, "name": json.dumps(window), "valid": True}

    def _broken(self, video: Source, reason: str) -> dict[str, Any]:
        return self.blank | {"broken": (legible(video.path), legible(reason))}
