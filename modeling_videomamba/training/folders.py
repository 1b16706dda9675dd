"""Folders of videos or images: which file belongs to which split, and what class it is of."""

import re
import unicodedata
from pathlib import Path, PurePath

from ..labels import check_line
from .files import VIDEO_SUFFIXES, image_suffixes, walk_files
from .lists import LIST_SUFFIXES, Row, Target, read_list

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLITS = {word: split for split, words in SPLIT_WORDS.items() for word in words}
LIKE_A_SPLIT = rf"(.*[-._ 0-9])?({'|'.join(SPLITS)})([-._ 0-9].*)?"  # which `datasets` takes for one: `my-train-2`
METADATA = "metadata"
METADATA_PATHS = ("file_name",)
OTHER_SUFFIXES = {".arrow", ".parquet", ".tar", ".zip"}  # which `datasets` loads
UNREAD_SUFFIXES = {".txt", ".lst", ".list", ".dat", ".xls", ".xlsx", ".ods", ".gz"}  # of lists in other formats


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """
    The videos, or else the images, and the files of metadata of each split. A file is in the split that the first
    folder on its path names; where no folder names a split, all are in `train`. Empty for shards and tables.

    Raises:
        `OSError`: for a folder that can't be read.
        `ValueError`: for a name with control characters, a file of which it isn't clear in which split it is, and a
            list or metadata in a format that isn't read.
    """
    images = image_suffixes()
    files = walk_files(folder, {*VIDEO_SUFFIXES, *images, *OTHER_SUFFIXES, *LIST_SUFFIXES, *UNREAD_SUFFIXES})
    files = [file for file in files if not _is_hidden(file.relative_to(folder))]
    if others := [file for file in files if file.suffix.lower() in OTHER_SUFFIXES]:
        _check_others(folder, others, [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES])
        return {}
    kinds = [[file for file in files if file.suffix.lower() in suffixes] for suffixes in (VIDEO_SUFFIXES, images)]
    media = kinds[0] or kinds[1]
    if not media:
        return {}
    for file in files:
        _check_is_read(folder, file)
    return _by_split(folder, [*media, *filter(_is_metadata, files)])


def find_tables(folder: Path) -> list[Path]:
    """The shards and tables in a folder."""
    return [file for file in walk_files(folder, OTHER_SUFFIXES) if not _is_hidden(file.relative_to(folder))]


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _is_metadata(file: Path) -> bool:
    return file.stem.casefold() == METADATA and file.suffix.lower() in LIST_SUFFIXES


def _check_others(folder: Path, others: list[Path], videos: list[Path]) -> None:
    """Raises `ValueError` for what `datasets` would leave out, or take for another split."""
    for file in (*others, *videos):
        for part in file.relative_to(folder).parts:
            if re.fullmatch(LIKE_A_SPLIT, part, re.DOTALL):
                break
            if re.fullmatch(LIKE_A_SPLIT, part.lower(), re.DOTALL):
                raise ValueError(f"{file}: {part} must be in lower case, if it is the name of a split, else renamed.")
    shards = [file for file in others if file.suffix.lower() == ".tar"]
    if shards and videos:
        raise ValueError(f"{folder} has both shards and videos: {shards[0]}, {videos[0]}.")


def _check_is_read(folder: Path, file: Path) -> None:
    """Raises `ValueError` for what looks like a list of labels or files, in a format or with a name that isn't read."""
    name, _, suffix = file.name.casefold().partition(".")
    is_split = file.parent == folder and name in SPLITS
    is_unread = file.suffix.lower() in UNREAD_SUFFIXES
    if (is_split and (is_unread or f".{suffix}" in LIST_SUFFIXES)) or (is_unread and name == METADATA):
        raise ValueError(
            f"{file} seems to be a list, and is not read: lists are called train.csv, val.csv, test.csv or "
            "metadata.csv, or end in .tsv, .jsonl or .json. Rename it, or move it elsewhere."
        )


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    names: dict[str, str] = {}
    for file in files:
        check_line(str(file), "The path of a file")
        name = _split_folder(file.relative_to(folder))
        split = SPLITS[name.casefold()] if name else ""
        if not name:
            _check_no_split(folder, file)
        elif names.setdefault(split, name) != name:
            raise ValueError(
                f"{folder}: the folders {names[split]} and {name} both mean the split {split}: put the files of both "
                "in one, or rename one."
            )
        splits.setdefault(split, []).append(file)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        other = next(iter(splits.values()))[0]
        raise ValueError(f"{unnamed[0]} must be in the folder of a split, as {other} is.")
    return splits or {"train": unnamed}


def _split_folder(path: PurePath) -> str | None:
    """The first folder on a path that is called as a split."""
    return next((part for part in path.parts[:-1] if part.casefold() in SPLITS), None)


def _check_no_split(folder: Path, file: Path) -> None:
    for part in file.relative_to(folder).parts[:-1]:
        if match := re.fullmatch(LIKE_A_SPLIT, part, re.DOTALL | re.IGNORECASE):
            split = SPLITS[match[2].casefold()]
            raise ValueError(
                f"{file}: the folder {part!r} may be a split or a class: call the split {split!r}, or put classes in "
                "a folder 'train'."
            )


def folder_rows(folder: Path, files: list[Path], target: Target | None) -> list[Row]:
    r"""
    The examples of a split.

    Args:
        folder (`Path`): The data.
        files (`list[Path]`): Its files, of [`find_splits`].
        target (`str`, *optional*): `"label"`, which is the folder of a file or a column of the metadata, or
            `"captions"`, a column of the metadata.

    Raises:
        `OSError`, `ValueError`: if the metadata can't be read or aren't there for each file once, or files are in
            folders of different depths.
    """
    metadata = [file for file in files if _is_metadata(file)]
    if metadata:
        _check_metadata(metadata, [file for file in files if not _is_metadata(file)])
        return [row for file in metadata for row in _metadata_rows(file, target)]
    if target == "captions":
        raise ValueError(f"{folder} must have captions: in {METADATA}.csv beside the files, or in a list.")
    depths = {len(file.parts) for file in files}
    if target == "label" and len(depths) > 1:
        first, other = (next(file for file in files if len(file.parts) == depth) for depth in sorted(depths))
        raise ValueError(f"{folder}: each file must be in the folder of its class, {first} and {other} can't both be.")
    if target == "label" and not _has_class(files[0].relative_to(folder)):
        raise ValueError(f"{folder}: each file must be in the folder of its class, {files[0]} is in none.")
    return [Row(str(file), str(file), file.parent.name if target == "label" else None) for file in files]


def _has_class(path: PurePath) -> bool:
    """Whether there is a folder between the folder of the split and the file."""
    name = _split_folder(path)
    return path.parent.name != "" and (name is None or path.parts.index(name) < len(path.parts) - 2)


def _check_metadata(metadata: list[Path], media: list[Path]) -> None:
    """Raises `ValueError` for a file that two files of metadata may list, and for one that none can."""
    owners: dict[Path, Path] = {}
    for file in sorted(metadata, key=lambda file: len(file.parts)):
        if other := next((owners[parent] for parent in file.parents if parent in owners), None):
            raise ValueError(
                f"{file} must be the only list of the files below {file.parent}, and {other} lists them too."
            )
        owners[file.parent] = file
    if bare := next((file for file in media if owners.keys().isdisjoint(file.parents)), None):
        raise ValueError(
            f"{bare} must be below a file of metadata, as all below {metadata[0].parent} are: none is in "
            f"{bare.parent} or above."
        )


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
