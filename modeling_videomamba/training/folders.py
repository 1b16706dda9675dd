"""Folders of videos or images: which file belongs to which split, and what class it is of."""

import re
import unicodedata
from functools import cache
from pathlib import Path, PurePath

from PIL import Image as PILImage

from ..labels import check_line
from .files import VIDEO_SUFFIXES, walk_files
from .lists import Row, Target, read_list

# Of a folder, as `datasets` has it: `train`, `my-train-2`, `validation`, `test`.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_FOLDERS = {
    split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?", re.DOTALL)
    for split, words in SPLIT_WORDS.items()
}
METADATA = ("metadata.csv", "metadata.jsonl")
METADATA_PATHS = ("file_name",)
OTHER_SUFFIXES = {".arrow", ".parquet", ".tar", ".zip"}  # which `datasets` loads


@cache
def image_suffixes() -> set[str]:
    """Of what Pillow opens; its MPEG plugin opens no pictures."""
    known = PILImage.registered_extensions()
    return {suffix for suffix, name in known.items() if name in PILImage.OPEN} - VIDEO_SUFFIXES


def is_image(path: str) -> bool:
    return f".{path.rpartition('.')[2].lower()}" in image_suffixes()


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """
    The videos, or else the images, and the files of metadata of each split. A file is in the split that the first
    folder on its path names; where no folder names a split, all are in `train`. Empty for shards and tables.

    Raises:
        `OSError`: for a folder that can't be read.
        `ValueError`: for a name with control characters.
    """
    images = image_suffixes()
    files = walk_files(folder, VIDEO_SUFFIXES | images | OTHER_SUFFIXES | {Path(name).suffix for name in METADATA})
    files = [file for file in files if not any(_is_hidden(part) for part in file.relative_to(folder).parts)]
    if any(file.suffix.lower() in OTHER_SUFFIXES for file in files):
        return {}
    kinds = [[file for file in files if file.suffix.lower() in suffixes] for suffixes in (VIDEO_SUFFIXES, images)]
    media = kinds[0] or kinds[1]
    if not media:
        return {}
    splits: dict[str, list[Path]] = {}
    for file in (*media, *(file for file in files if file.name in METADATA)):
        check_line(str(file), "The path of a file")
        splits.setdefault(_split_of(file.relative_to(folder)) or "", []).append(file)
    unnamed = splits.pop("", [])
    return splits or {"train": unnamed}


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "__"))


def _split_of(path: PurePath) -> str | None:
    return next(filter(None, map(_split_named, path.parts[:-1])), None)


def _split_named(part: str) -> str | None:
    return next((split for split, pattern in SPLIT_FOLDERS.items() if pattern.fullmatch(part)), None)


def folder_rows(folder: Path, files: list[Path], target: Target | None) -> list[Row]:
    r"""
    The examples of a split.

    Args:
        folder (`Path`): The data.
        files (`list[Path]`): Its files, of [`find_splits`].
        target (`str`, *optional*): `"label"`, which is the folder of a file or a column of the metadata, or
            `"captions"`, a column of the metadata.

    Raises:
        `OSError`, `ValueError`: if the metadata can't be read, or files are in folders of different depths.
    """
    metadata = [file for file in files if file.name in METADATA]
    if metadata:
        return [row for file in metadata for row in _metadata_rows(file, target)]
    if target == "captions":
        raise ValueError(f"{folder} must have captions: in {METADATA[0]} beside the files, or in a list.")
    depths = {len(file.parts) for file in files}
    if target == "label" and len(depths) > 1:
        first, other = (next(file for file in files if len(file.parts) == depth) for depth in sorted(depths))
        raise ValueError(f"{folder}: each file must be in the folder of its class, {first} and {other} can't both be.")
    if target == "label" and not _has_class(files[0].relative_to(folder)):
        raise ValueError(f"{folder}: each file must be in the folder of its class, {files[0]} is in none.")
    return [Row(str(file), str(file), file.parent.name if target == "label" else None) for file in files]


def _has_class(path: PurePath) -> bool:
    """Whether there is a folder between the folder of the split and the file."""
    first = next((index for index, part in enumerate(path.parts[:-1]) if _split_named(part)), -1)
    return first < len(path.parts) - 2


def _metadata_rows(file: Path, target: Target | None) -> list[Row]:
    rows = read_list(file, target, METADATA_PATHS)
    for row in rows:
        if "://" in row.path or PurePath(row.path).is_absolute() or ".." in PurePath(row.path).parts:
            raise ValueError(f"{row.where}: `file_name` must be a file below {file.parent}, got {row.path!r}.")
    find = FileFinder(file.parent)
    return [Row(row.where, str(find(row.path, row.where)), row.value) for row in rows]


class FileFinder:
    """
    Files by the names that lists have: `root / name`, or the one file that differs from it only in how accents are
    encoded. An editor composes them (NFC), a file system may not (NFD).
    """

    def __init__(self, root: Path):
        self.root = root
        self._inside: dict[Path, dict[str, list[Path]]] = {}

    def __call__(self, name: str, where: str) -> Path:
        """Raises `ValueError` if there are several files that differ only in that."""
        path = self.root / name
        if name.isascii() or path.exists():
            return path
        found = [Path(path.anchor)]
        for part in path.relative_to(path.anchor).parts:
            found = [child for folder in found for child in self._children(folder, part)]
        if len(found) > 1:
            raise ValueError(
                f"{where}: {name!r} must be one file, and {len(found)} have this name but for its accents."
            )
        return found[0] if found else path

    def _children(self, folder: Path, name: str) -> list[Path]:
        if (folder / name).exists():
            return [folder / name]
        if folder not in self._inside:
            inside: dict[str, list[Path]] = {}
            for child in folder.iterdir() if folder.is_dir() else ():
                inside.setdefault(unicodedata.normalize("NFC", child.name), []).append(child)
            self._inside[folder] = inside
        return self._inside[folder].get(unicodedata.normalize("NFC", name), [])
