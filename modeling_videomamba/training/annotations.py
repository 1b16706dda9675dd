"""Videos with captions, from the annotation files of retrieval benchmarks as they are published."""

import csv
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, Features, List, Value, Video

from ..labels import check_unicode, marked_encoding
from .files import VIDEO_SUFFIXES, walk_files

KNOWN_FORMATS = """the known formats are
- JSON of the original release, VindLU and others: a list of {video or image, caption}, where captions may be lists;
- MSR-VTT: JSON of {videos, sentences}, or a CSV with video_id and sentence;
- DiDeMo: a JSON list of {video, description};
- ActivityNet Captions: JSON of {v_...: {sentences}};
- LSMDC: lines of a clip, four times and a sentence, separated by tabs;
- MSVD: a CSV with VideoID, Start, End, Language and Description, or lines of VIDEO_START_END and a sentence."""
MSR_VTT_COLUMNS = {"video_id", "sentence"}
MSVD_COLUMNS = {"VideoID", "Start", "End", "Language", "Description"}
MSVD_LINE = re.compile(r"(\S+_\d+_\d+)\s+(.*)")
LSMDC_TIME = r"\d\d\.\d\d\.\d\d\.\d{3}"
LSMDC_LINE = re.compile(rf"[^\t]+_{LSMDC_TIME}-{LSMDC_TIME}\t")
LSMDC_NUM_COLUMNS = 6
ALL_SPLITS = "all"
PICKLE_SUFFIXES = {".p", ".pickle", ".pkl"}
NUM_SHOWN = 5
Pairs = Iterable[tuple[Any, Any]]


def read_annotations(path: Path, *, split: str | None = None) -> dict[str, list[str]]:
    r"""
    The captions of each video, whatever the format, which the content of the file tells.

    Args:
        path (`Path`):
            One of: JSON of the original release (a list of `{"video", "caption"}`); `MSRVTT_data.json` or
            `*_videodatainfo.json`, or `MSRVTT_JSFUSION_test.csv`, of MSR-VTT; `*_data.json` of DiDeMo; `train.json`,
            `val_1.json` or `val_2.json` of ActivityNet Captions; `LSMDC16_*.csv`; `MSR Video Description Corpus.csv`
            (English only, without the rows that have no description, with a warning that counts these) or
            `AllVideoDescriptions.txt` of MSVD.
        split (`str`, *optional*):
            For JSON of MSR-VTT, whose videos name their split: the one to read, or `"all"`. Needed if
            there are several.

    Returns:
        `dict[str, list[str]]`: by the name of the video as the file has it, without white space around captions. Videos
        and captions come in the order of the file, which is that of the paragraphs of the published protocols, too.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is no such file, it is of no known format, broken or a pickle, a
            caption is empty, or `split` is not one of the file's.
    """
    data = _read(path)
    if path.suffix.lower() in PICKLE_SUFFIXES or data.startswith(b"\x80"):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read: for MSVD, pass AllVideoDescriptions.txt or "
            "MSR Video Description Corpus.csv, and a list of names for the split."
        )
    content = _parse_json(path, data) if data.lstrip().startswith((b"{", b"[")) else None
    if isinstance(content, dict) and {"videos", "sentences"} <= set(content):
        return _grouped(path, _msr_vtt_pairs(path, content, split))
    if split is not None:
        raise ValueError(f"`split` is for JSON of MSR-VTT, and {path} is something else: got {split!r}.")
    return _grouped(path, _text_pairs(path, data) if content is None else _json_pairs(path, content))


def load_annotated(
    path: Path,
    videos: Path,
    *,
    split: str | None = None,
    names: Path | None = None,
    paragraphs: bool = False,
    skip_missing: bool = False,
) -> tuple[Dataset, dict[str, str]]:
    r"""
    Video files with their captions, undecoded.

    A video file below `videos` is that of a name if it has this relative path, else this file name, else this file name
    but for the suffix, which the name may lack or the file have another after (`x.mov.mp4`, as DiDeMo's download script
    saves).
    Folders that both name and file have must agree, counted from the last.

    Args:
        path (`Path`): The annotations, as in [`read_annotations`].
        videos (`Path`): A folder with the files, at any depth.
        split (`str`, *optional*): As in [`read_annotations`].
        names (`Path`, *optional*):
            Text with a name a line: the videos to take, in this order, such as `test_list.txt` of MSVD. A first line
            `video_id` is the header of `MSRVTT_train.9k.csv` (which goes with `split="all"`).
        paragraphs (`bool`, defaults to `False`):
            Whether to join the captions of a video into one, in the order of the file, for paragraph-to-video
            retrieval, as is usual on ActivityNet Captions and DiDeMo.
        skip_missing (`bool`, defaults to `False`): Whether to leave out a video without a file instead of failing.

    Returns:
        `tuple[Dataset, dict[str, str]]`: columns `video` (a dictionary with `path` and `bytes`) and `captions` (a list
        of strings); by the name of each video that was left out, why.

    Raises:
        `FileNotFoundError`: if there is no such file or folder, a video has no file, or none has.
        `ValueError`: if the annotations can't be read, a listed name has none, or names and files don't match one to
            one.
    """
    captions = read_annotations(path, split=split)
    if names is not None:
        captions = _restricted(captions, path, names)
    if paragraphs:
        captions = {name: [" ".join(sentences)] for name, sentences in captions.items()}
    files = _find_files(captions, videos)
    missing = [name for name in captions if name not in files]
    if missing and not (skip_missing and files):
        raise FileNotFoundError(
            f"{len(missing)} of the {len(captions)} videos in {path} have no file below {videos}: {_few(missing)}"
        )
    columns = {
        "video": [{"path": str(file), "bytes": None} for file in files.values()],
        "captions": [captions[name] for name in files],
    }
    features = Features({"video": Video(decode=False), "captions": List(Value("string"))})
    return Dataset.from_dict(columns, features=features), dict.fromkeys(missing, f"no such file below {videos}")


def _read(path: Path) -> bytes:
    """Without a byte-order mark, and in UTF-8 where the mark is one of another encoding of Unicode."""
    data = path.read_bytes()
    encoding = marked_encoding(data)
    try:
        return data if encoding is None else data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} begins as {encoding} and is not: byte {error.start} can't be read.") from error


def _grouped(path: Path, pairs: Pairs) -> dict[str, list[str]]:
    """Captions by name. Raises `ValueError` where a name or a caption is empty or no string, or there is none."""
    captions: dict[str, list[str]] = {}
    for number, (name, caption) in enumerate(pairs, start=1):
        where = f"{path}: caption {number}"
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: the name of a video must be text, got {name!r} (caption {caption!r}).")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: the caption of {name} must be text, got {caption!r}.")
        check_unicode(name, f"{where}: the name of a video")
        check_unicode(caption, f"{where}: the caption of {name}")
        captions.setdefault(name.strip(), []).append(caption.strip())
    if not captions:
        raise ValueError(f"{path} has no captions.")
    return captions


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error  # which names the line, or the byte


def _json_pairs(path: Path, content: Any) -> Pairs:
    entries = list(content.values()) if isinstance(content, dict) else content
    if entries and all(isinstance(entry, dict) for entry in entries):
        first = entries[0]
        if isinstance(content, dict) and "sentences" in first:  # ActivityNet Captions
            return _unfolded(content, [entry.get("sentences") for entry in entries])
        key = "video" if "video" in first else "image"
        if isinstance(content, list) and key in first and "description" in first:  # DiDeMo
            return [(entry.get(key), entry.get("description")) for entry in entries]
        if isinstance(content, list) and key in first and "caption" in first:
            if "answer" in first:
                raise ValueError(f"{path} has an `answer` for each video: it is for multiple choice, not retrieval.")
            return _unfolded([entry.get(key) for entry in entries], [entry.get("caption") for entry in entries])
    raise ValueError(f"{path} is JSON of no known format; {KNOWN_FORMATS}")


def _unfolded(names: Iterable[Any], captions: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of a name and a caption, where a video may have a list of them; an empty list counts as an empty one."""
    for name, own in zip(names, captions, strict=True):
        for caption in (own or [""]) if isinstance(own, list) else [own]:
            yield name, caption


def _msr_vtt_pairs(path: Path, content: dict[str, Any], split: str | None) -> Pairs:
    for name in ("videos", "sentences"):
        entries = content[name]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: `{name}` must be a list of dictionaries, got {str(entries)[:80]}")
        for number, entry in enumerate(entries, start=1):
            if not isinstance(entry.get("video_id"), str):
                found = str(entry.get("video_id"))[:80]
                raise ValueError(f"{path}: `{name}`, entry {number}: `video_id` must be text, got {found}")
    splits = {video.get("video_id"): video.get("split") for video in content["videos"]}
    known = sorted({str(name) for name in splits.values()})
    if (split is None and len(known) > 1) or split not in (None, ALL_SPLITS, *known):
        raise ValueError(f"`split` must be {ALL_SPLITS} or a split in {path}, {', '.join(known)}, got {split!r}.")
    wanted = {name for name, own in splits.items() if split in (None, ALL_SPLITS, own)}
    pairs = [(sentence.get("video_id"), sentence.get("caption")) for sentence in content["sentences"]]
    captioned = {name for name, _ in pairs}
    if stray := sorted(map(str, captioned - set(splits))):
        raise ValueError(f"{path} has sentences for {len(stray)} videos that are not in `videos`: {_few(stray)}")
    if bare := sorted(map(str, wanted - captioned)):
        raise ValueError(f"{path} has no sentence for {len(bare)} videos: {_few(bare)}")
    return [pair for pair in pairs if pair[0] in wanted]


def _text_pairs(path: Path, data: bytes) -> Pairs:
    lines = _lines(path, data)
    columns = set(next(csv.reader(lines[:1]), []))  # the first line alone: a quote in LSMDC would open a field
    try:
        if columns >= MSR_VTT_COLUMNS:
            return [(row["video_id"], row["sentence"]) for row in _csv_rows(lines)]
        if columns >= MSVD_COLUMNS:
            return _msvd_pairs(path, lines)
    except csv.Error as error:
        raise ValueError(f"{path} is not a valid CSV: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and line[0] != "#"]
    first = numbered[0][1] if numbered else ""
    if LSMDC_LINE.match(first):
        return [_lsmdc_pair(path, number, line) for number, line in numbered]
    if MSVD_LINE.match(first):
        return [_msvd_pair(path, number, line) for number, line in numbered]
    raise ValueError(f"{path} is of no known format; {KNOWN_FORMATS}")


def _lines(path: Path, data: bytes) -> list[str]:
    return [_decode(path, number, line) for number, line in enumerate(data.splitlines(), start=1)]


def _decode(path: Path, number: int, line: bytes) -> str:
    """UTF-8, or Windows-1252 where a line is not: old lists have quotes and accents in it, also among UTF-8."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path}: line {number} must be text in UTF-8 or Windows-1252, got {line[:40]!r}.")


def _csv_rows(lines: list[str]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader((f"{line}\n" for line in lines), restval="", strict=True)
    for row in reader:
        if None in row:
            raise csv.Error(f"line {reader.line_num} has more columns than the header")
        yield row


def _msvd_pairs(path: Path, lines: list[str]) -> Pairs:
    rows = [row for row in _csv_rows(lines) if row["Language"] == "English"]
    described = [row for row in rows if row["Description"].strip()]
    if len(described) < len(rows):  # in the published file
        warnings.warn(f"{path}: left out {len(rows) - len(described)} English rows without a description", stacklevel=2)
    return [(f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]) for row in described]


def _lsmdc_pair(path: Path, number: int, line: str) -> tuple[str, str]:
    fields = line.rstrip().split("\t")
    if len(fields) != LSMDC_NUM_COLUMNS:
        raise ValueError(
            f"{path}: line {number} must have {LSMDC_NUM_COLUMNS} columns separated by tabs, a clip, four times and a "
            f"sentence (which the blind test lacks), got {len(fields)}: {line!r}"
        )
    return fields[0], fields[-1]


def _msvd_pair(path: Path, number: int, line: str) -> tuple[str, str]:
    match = MSVD_LINE.match(line)
    if match is None:
        raise ValueError(f"{path}: line {number} must be VIDEO_START_END and a sentence, got {line!r}.")
    return match[1], match[2]


def _restricted(captions: dict[str, list[str]], path: Path, names: Path) -> dict[str, list[str]]:
    """The captions of the names in a list. Raises `ValueError` if it lists none, or one without captions."""
    listed = [line.strip() for line in _lines(names, _read(names)) if line.strip()]
    listed = listed[1:] if listed[:1] == ["video_id"] else listed
    if not listed:
        raise ValueError(f"`names` must list videos, and {names} is empty.")
    known = {_composed(name): name for name in captions} | {name: name for name in captions}
    found = {name: known.get(name, known.get(_composed(name))) for name in listed}
    if unknown := [name for name in listed if found[name] is None]:
        raise ValueError(f"{len(unknown)} of the {len(listed)} videos in {names} are not in {path}: {_few(unknown)}")
    return {name: captions[name] for name in found.values() if name is not None}


def _find_files(names: Iterable[str], videos: Path) -> dict[str, Path]:
    """The file of each name that has one. Raises `ValueError` where a name has several, or a file has."""
    if not videos.is_dir():
        raise FileNotFoundError(f"`videos` must be a folder, got {videos}.")
    by_stem: dict[str, list[PurePosixPath]] = {}
    for file in walk_files(videos, VIDEO_SUFFIXES):
        relative = PurePosixPath(file.relative_to(videos).as_posix())
        by_stem.setdefault(_composed(_stem(relative.name)), []).append(relative)
    found: dict[str, Path] = {}
    owners: dict[PurePosixPath, str] = {}
    for name in names:
        wanted = PurePosixPath(name)
        match = _pick(wanted, by_stem.get(_composed(_stem(wanted.name)), []))
        if match is None:
            continue
        if owners.setdefault(match, name) != name:
            raise ValueError(f"{owners[match]} and {name} must be two videos, and both match {match} below {videos}.")
        found[name] = videos / match
    return found


def _pick(wanted: PurePosixPath, files: list[PurePosixPath]) -> PurePosixPath | None:
    """Of files with the same stem, that of a name. Raises `ValueError` if several match equally well."""
    near = [file for file in files if _same_folders(file, wanted)]
    composed = PurePosixPath(_composed(str(wanted)))
    choices: tuple[list[PurePosixPath], ...] = (
        [file for file in near if file == wanted],
        [file for file in near if _composed(str(file)) == str(composed)],
        [file for file in near if file.name == wanted.name],
        [file for file in near if _composed(file.name) == composed.name],
        near,
    )
    for best in choices:
        if len(best) > 1:
            raise ValueError(f"{wanted} must match one file, and matches {_few(list(map(str, best)))}")
        if best:
            return best[0]
    return None


def _same_folders(one: PurePosixPath, other: PurePosixPath) -> bool:
    folders = zip(one.parts[-2::-1], other.parts[-2::-1], strict=False)
    return all(_composed(a) == _composed(b) for a, b in folders)


def _composed(name: str) -> str:
    """With accents in one form: an editor composes them (NFC), a file system may not (NFD)."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    """Without suffixes of videos, and these alone: names of LSMDC end in something that looks like a suffix."""
    while (path := PurePosixPath(name)).suffix.lower() in VIDEO_SUFFIXES:
        name = path.stem
    return name


def _few(names: list[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else ".")
