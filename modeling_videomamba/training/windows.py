"""
The windows of videos that lie in a folder or in shards, tar files of videos.

A video is known by its path, and by size and time of its file: where they are others, it is another video.
"""

import itertools
import json
import math
import re
import tarfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from datasets import Features, IterableDataset, Value

from ..video_decoding import VideoFile, VideoSource, open_source
from ..video_processing_videomamba import VideoMambaVideoProcessor, sample_frame_indices
from .data import BROKEN, Examples, TestViews
from .sources import VIDEO_SUFFIXES

SHARD_SUFFIX = ".tar"
Media = dict[str, Any]  # `path` and `bytes`, as the `Video` feature of `datasets` has them


class Source(NamedTuple):
    """A file or a video: its path, and the size and the time (ns) of the file, which are none for one elsewhere."""

    path: str
    size: int | None
    mtime: int | None


class Window(NamedTuple):
    """One of the `windows` equal parts of a video, in seconds; `end` is none where the file doesn't tell its length."""

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
    def file(self) -> Source:
        return Source(split_path(self.path)[0], self.size, self.mtime)


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
        `ValueError`: if nothing is found, or what is given is no shard.
    """
    if len(data) == 1 and Path(data[0]).is_dir():
        root = Path(data[0])
        suffixes = (*sorted(VIDEO_SUFFIXES), SHARD_SUFFIX)
        paths = [path for path in root.rglob("*") if path.suffix.lower() in suffixes and not path.is_dir()]
        if not paths:
            raise ValueError(f"{root}: there is no video, which would end in one of {', '.join(suffixes)}")
        return sorted(_source(path, path.relative_to(root).as_posix()) for path in paths)
    for name in data:
        if not is_shard(name):
            raise ValueError(f"{name}: must be one folder, or shards, which end in {SHARD_SUFFIX}")
        if "://" not in name and not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such shard")
    local = {name: Path(name).absolute() for name in data if "://" not in name}
    return sorted({_source(local[n], local[n].as_posix()) if n in local else Source(n, None, None) for n in data})


def _source(path: Path, name: str) -> Source:
    try:
        found = path.stat()
    except OSError:  # a dangling link, say: reported when it is read
        return Source(name, None, None)
    return Source(name, found.st_size, found.st_mtime_ns)


def read_videos(files: list[Source], root: str, complete: Container[Source]) -> Iterator[dict[str, Any]]:
    """`path`, `size`, `mtime` and `video` of each video, in a shard if it is not `complete`; or `error` of a shard."""
    for file in files:
        location = locate(root, file.path)
        if is_shard(file.path):
            try:
                yield from _read_shard(file, location, complete)
            except (OSError, tarfile.TarError) as error:
                yield {**file._asdict(), "video": None, "error": f"{location}: {error}"}
        else:
            yield {**file._asdict(), "video": {"path": location, "bytes": None}, "error": None}


def locate(root: str, path: str) -> str:
    """Where a file is, by its path in the collection."""
    return path if "://" in path else str(Path(root) / path)  # an absolute one stays as it is


def _read_shard(file: Source, location: str, complete: Container[Source]) -> Iterator[dict[str, Any]]:
    with _open_shard(location) as (opened, archive):
        for member in archive:
            video = file._replace(path=f"{file.path}::{member.name}")
            if not member.isfile() or Path(member.name).suffix.lower() not in VIDEO_SUFFIXES or video in complete:
                continue
            media = {"path": f"{location}::{member.name}", "bytes": _read_member(archive, member)}
            yield {**video._asdict(), "video": media, "error": None}
        if opened.seekable():  # tarfile takes a file that is cut at a header for one that ends there
            opened.seek(archive.offset)
            if len(opened.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("truncated: it has no end mark")


@contextmanager
def _open_shard(location: str) -> Iterator[tuple[Any, tarfile.TarFile]]:
    """The file, and the archive in it. What is passed over is not read where that can be."""
    with (
        fsspec.open(location, "rb") as opened,
        tarfile.open(fileobj=opened, mode="r:" if opened.seekable() else "r|") as archive,
    ):
        yield opened, archive


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # as it is of a member that is a file
    return file.read()


def read_media(root: str, path: str) -> Media:
    """A video by its path in the collection. Raises `OSError` where a shard can't be read, or has no such member."""
    name, wanted = split_path(path)
    location = locate(root, name)
    if wanted is None:
        return {"path": location, "bytes": None}
    try:
        with _open_shard(location) as (_, archive):
            for member in archive:
                if member.name == wanted and member.isfile():
                    return {"path": f"{location}::{wanted}", "bytes": _read_member(archive, member)}
    except tarfile.TarError as error:
        raise OSError(f"{location}: {error}") from error
    raise FileNotFoundError(f"{location}: has no {wanted}")


def open_video(video: VideoSource) -> VideoFile:
    """A video of [`read_media`], or any other. Raises `BrokenVideoError` or `OSError` for what can't be read."""
    return VideoFile(*open_source(video))


def cut_video(video: Source, duration: float | None, clip_seconds: float) -> list[Window]:
    """As few equal windows as are no longer than `clip_seconds` (but for a hundredth), which leave nothing out."""
    if duration is None:
        return [Window(*video, 0.0, None, 1)]
    count = max(1, math.ceil(duration / clip_seconds - 0.01))  # ten seconds at 29.97 frames a second are 10.01
    bounds = [index * duration / count for index in range(count)] + [duration]
    return [Window(*video, start, end, count) for start, end in itertools.pairwise(bounds)]


def window_pixels(
    reader: VideoFile, start: float, end: float | None, processor: VideoMambaVideoProcessor
) -> torch.Tensor:
    """
    What the model sees of a window, `(1, frames, 3, height, width)`. Raises `BrokenVideoError` for a damaged frame.
    """
    first, last = 0, reader.metadata.total_num_frames
    if end is not None:
        first = min(round(start * reader.metadata.fps), last - 1)
        last = max(min(round(end * reader.metadata.fps), last), first + 1)
    frames = reader.frames((first + sample_frame_indices(last - first, processor.num_frames).flatten()).tolist())
    options = {"do_sample_frames": False, "num_clips": 1, "num_crops": 1, "return_tensors": "pt"}
    return processor([frames], **options)["pixel_values"]


class Windows(torch.utils.data.IterableDataset):
    r"""
    The windows of videos, each video opened once, as items of [`collate`]: `name` is the window as JSON, and what can't
    be read has its path and the reason in `broken`.

    Args:
        videos (`IterableDataset`): Rows of [`read_videos`].
        processor ([`VideoMambaVideoProcessor`]): Of the model.
        clip_seconds (`float`): Which no window is longer than.
        known (`set[Window]`): Left out.
    """

    def __init__(
        self,
        videos: IterableDataset,
        processor: VideoMambaVideoProcessor,
        clip_seconds: float,
        known: Container[Window],
    ):
        self.videos, self.processor, self.clip_seconds, self.known = videos, processor, clip_seconds, known
        self.blank = Examples([], TestViews(processor), skip_broken=True).item(None, 0, -1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.videos:
            video = Source(*(row[name] for name in Source._fields))
            if row["error"] is not None:
                yield self._broken(video, row["error"])
                continue
            try:
                with open_video(row["video"]) as reader:
                    for window in cut_video(video, reader.metadata.duration, self.clip_seconds):
                        if window not in self.known:
                            yield self._item(window, reader)
            except BROKEN as error:
                yield self._broken(video, str(error))

    def _item(self, window: Window, reader: VideoFile) -> dict[str, Any]:
        try:
            pixels = window_pixels(reader, window.start, window.end, self.processor)
        except BROKEN as error:  # the other windows may be whole
            return self._broken(window.video, str(error))
        return self.blank | {"pixel_values": pixels, "name": json.dumps(window), "valid": True}

    def _broken(self, video: Source, reason: str) -> dict[str, Any]:
        return self.blank | {"broken": (video.path, reason)}


def stream_videos(files: list[Source], root: str, complete: frozenset[Source]) -> IterableDataset:
    """[`read_videos`] as a stream, which processes and workers can share out among them."""
    media = {"path": Value("string"), "bytes": Value("binary")}
    columns = {"path": Value("string"), "size": Value("int64"), "mtime": Value("int64"), "error": Value("string")}
    arguments = {"files": files, "root": root, "complete": complete}
    return IterableDataset.from_generator(read_videos, Features({**columns, "video": media}), gen_kwargs=arguments)
