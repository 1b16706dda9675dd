"""The frame indexes of the long videos of a collection: with them a moment in a video is found without a scan of it."""

from __future__ import annotations

import hashlib
import json
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..video_index import FrameIndex
from .output import writing

if TYPE_CHECKING:
    from .windows import Source, VideoWindow

VERSION = 1
MAX_HELD = 32  # of 10 MB for three hours
ARRAYS = ("timestamps", "keyframes", "seeks", "labels")
NUMBERS = ("num_frames", "end", "label", "is_certain")


class FrameIndexes:
    r"""
    A folder with a file for each video that has several windows; the scan of a shorter video takes no time. The name of
    a file tells for which video it is, of which size and time, and what version of this module has written it.

    Args:
        folder (`Path`): May not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Path, FrameIndex] = {}  # the candidates of a query are often of a few videos

    def path(self, video: Source) -> Path:
        identity = json.dumps([VERSION, *video]).encode()
        return self.folder / f"{hashlib.sha256(identity).hexdigest()[:32]}.npz"

    def read(self, video: Source) -> FrameIndex | None:
        """`None` where there is none, or its file is damaged."""
        path = self.path(video)
        if path not in self._read and (index := _load(path)) is not None:
            if len(self._read) == MAX_HELD:
                self._read.clear()
            self._read[path] = index
        return self._read.get(path)

    def write(self, video: Source, index: FrameIndex) -> None:
        """Raises [`WriteError`] where the disk refuses."""
        unfinished = self.folder / f".{uuid.uuid4().hex}.writing"
        numbers = {name: getattr(index, name) for name in NUMBERS}
        numbers |= {"time_base": str(index.time_base), "rate": None if index.rate is None else str(index.rate)}
        arrays = {name: np.diff(array, prepend=0) for name in ARRAYS if (array := getattr(index, name)) is not None}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.savez_compressed(file, numbers=np.array(json.dumps(numbers)), **arrays)
            unfinished.replace(self.path(video))

    def complete(self, windows: Iterable[VideoWindow]) -> frozenset[Source]:
        """The videos of which all windows are there, and the frame index if it is kept."""
        counts = Counter(window.video for window in windows)
        expected = {window.video: window.windows for window in windows}
        return frozenset(
            video
            for video, count in counts.items()
            if count == expected[video] and (count == 1 or self.path(video).exists())
        )

    def keep(self, videos: Iterable[Source]) -> None:
        """Removes the files of all others."""
        kept = {self.path(video) for video in videos}
        for path in self.folder.glob("*") if self.folder.exists() else ():
            if path.suffix in (".npz", ".writing") and path not in kept:
                path.unlink(missing_ok=True)


def _load(path: Path) -> FrameIndex | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            values = json.loads(str(file["numbers"]))
            values |= {name: np.cumsum(file[name], dtype=np.int64) if name in file else None for name in ARRAYS}
        values["time_base"] = Fraction(values["time_base"])
        values["rate"] = None if values["rate"] is None else Fraction(values["rate"])
        return FrameIndex(**values)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
