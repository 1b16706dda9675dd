"""Files of videos in folders and archives."""

import os
import tarfile
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

from PIL import Image as PILImage

VIDEO_SUFFIXES = {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
VIDEO_SUFFIXES |= {".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"}


@cache
def image_suffixes() -> set[str]:
    """Suffixes of the pictures that Pillow opens. Its MPEG plugin opens no pictures."""
    known = PILImage.registered_extensions()
    return {suffix for suffix, name in known.items() if name in PILImage.OPEN} - VIDEO_SUFFIXES


def is_image(path: str) -> bool:
    return _suffix(path) in image_suffixes()


def is_media(path: str) -> bool:
    """Whether a path ends in a suffix of videos or images."""
    return _suffix(path) in VIDEO_SUFFIXES or is_image(path)


def _suffix(path: str) -> str:
    return f".{path.rpartition('.')[2].lower()}"


def walk_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """
    The files at any depth of a folder that have one of these suffixes in any case, sorted. Links to folders are
    followed, but no folder is entered twice. Raises `OSError` for a folder that can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    entered: set[Path] = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(root).resolve()
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort(key=lambda name: ((real / name).is_symlink(), name))  # a folder goes before links to it
        found += [Path(root, name) for name in files if Path(name).suffix.lower() in suffixes]
    return sorted(found)


class TarMember(tarfile.TarInfo):
    """`tarfile` takes an archive that is damaged or cut at a header for one that ends there."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "TarMember":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or truncated: {error}") from error


def legible(path: str) -> str:
    """A path that can be printed, with escapes for what in it is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_error(path: str) -> str | None:
    """Why a video can't be read because of its name, which tables and JSON could not hold; else `None`."""
    return None if legible(path) == path else f"{legible(path)}: its name is not UTF-8, rename it"


def check_no_file_twice(kind: str, paths: Iterable[str]) -> None:
    """
    Raises `ValueError` where two of these paths or addresses are one file, also where they lead to its folder in two
    ways. `kind` says what it is a file of.
    """
    known: set[str | Path] = set()
    for path in paths:
        file = path if "://" in path else Path(path).parent.resolve() / Path(path).name
        if file in known:
            raise ValueError(f"a {kind} is given twice: {path}")
        known.add(file)
