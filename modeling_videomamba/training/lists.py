"""Lists of videos or images: what is in a CSV or JSON file, row by row, with the line of each."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..labels import check_line, check_unicode, read_text, unique_keys
from .files import is_media

PATH_COLUMNS = ("path", "video", "image")  # the latter in the lists of the original release
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
JSON_SUFFIXES = (".json", ".jsonl")
LIST_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
SEPARATORS = (",", "\t", ";", " ")
FILE_NAME = re.compile(r".*\.\w{1,5}|\S+://\S+")
ADDRESS = re.compile(r"\S+://\S+")
WHOLE = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MAX_SHOWN = 80
Target = Literal["label", "captions"]


@dataclass(frozen=True)
class Row:
    """One example: `where` it is listed, its `path`, and a label or captions, or `None` where neither is wanted."""

    where: str
    path: str
    value: Any = None


def read_list(path: Path, target: Target | None, path_columns: tuple[str, ...] = PATH_COLUMNS) -> list[Row]:
    r"""
    The rows of a list.

    Args:
        path (`Path`):
            CSV, with columns separated by commas, tabs, semicolons or, where a label is one word, spaces. The first
            line names the columns, or is `path,label` or `path` itself, as in the lists of the original release. JSON
            (one list) or JSON lines, of objects.
        target (`str`, *optional*): `"label"` or `"captions"`.
        path_columns (`tuple[str, ...]`): Names of the column of paths, the first that is there counts.

    Returns:
        `list[Row]`: labels as `str`, `int` or `float`, in a CSV by how they are written ([`Text`] keeps that);
        captions as a list of texts, which may be empty.

    Raises:
        `OSError`, `ValueError`: if it can't be read; the message names the line.
    """
    text = read_text(path)
    is_json = path.suffix.lower() in JSON_SUFFIXES
    rows = list((_json_rows if is_json else _csv_rows)(path, text, target, path_columns))
    if not rows:
        raise ValueError(f"{path} lists nothing.")
    return rows


# CSV


class Text(str):
    """A label of a CSV, whose cells have no types."""

    def number(self) -> int | float | None:
        """What it is written as, if that is a number."""
        if not DECIMAL.fullmatch(self) or not math.isfinite(float(self)):
            return None
        return int(self) if WHOLE.fullmatch(self) else float(self)


def _csv_rows(path: Path, text: str, target: Target | None, path_columns: tuple[str, ...]) -> Iterator[Row]:
    cells = _cells(path, text, path_columns)
    first, names = next(cells, (0, []))
    if not names:
        return
    has_header = not _is_path(names[0])
    rows = [] if has_header else [(first, names)]
    if not has_header:
        names = [path_columns[0], "label"][: len(names)] if len(names) <= 2 else []
    path_name, value_name = _columns(names, target, path_columns, f"{path}: line {first}")
    for number, row in (*rows, *cells):
        where = f"{path}: line {number}"
        if len(row) != len(names):
            raise ValueError(
                f"{where} must have {len(names)} columns ({', '.join(names)}), got {len(row)}: "
                f"{', '.join(row)[:MAX_SHOWN]!r}; a value with a separator in it goes in quotes"
            )
        values = dict(zip(names, row, strict=True))
        value: Any = None if value_name is None else values[value_name]
        if target == "captions":
            value = [value] if value else []
        yield Row(where, _path(values[path_name], where), Text(_label(value, where)) if target == "label" else value)


def _cells(path: Path, text: str, path_columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells, without white space around, of the lines that aren't blank."""
    lines = text.split("\n")
    start, first = next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, ""))
    separator = _separator(first, path_columns, f"{path}: line {start}")
    if separator == " ":
        count = len(first.split()) if not _is_path(first.rsplit(None, 1)[0]) else 2
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _words(f"{path}: line {number}", line, count)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}: line {number} is not valid CSV: {error}") from error
        if any(cell.strip() for cell in row):
            yield number, [cell.strip() for cell in row]
        elif len(row) > 1:
            raise ValueError(f"{path}: line {number} has empty cells alone.")


def _is_path(text: str) -> bool:
    """Whether a first line that begins with this is an example: else it has the names of the columns."""
    return is_media(text) or ADDRESS.fullmatch(text) is not None


def _separator(line: str, path_columns: tuple[str, ...], where: str) -> str:
    """
    The first separator that makes the first line a header, or a path and what goes with it. Raises `ValueError` where
    paths end before two of them.
    """
    rows = {separator: _split(line, separator, path_columns) for separator in SEPARATORS}
    headers = [separator for separator, cells in rows.items() if set(cells) & set(path_columns)]
    paths = [separator for separator, cells in rows.items() if _is_path(cells[0].strip('"'))]
    ends = {cells[0] for cells in rows.values() if len(cells) > 1 and is_media(cells[0].strip('"'))}
    if len(ends) > 1 and not headers:
        raise ValueError(
            f"{where} can be separated in two ways, got {line.strip()[:MAX_SHOWN]!r}: put the path in quotes, or begin "
            f"with a line {path_columns[0]},label."
        )
    return (headers or paths or SEPARATORS)[0]


def _split(line: str, separator: str, path_columns: tuple[str, ...]) -> list[str]:
    if separator == " ":
        return line.split() if set(line.split()) & set(path_columns) else line.rsplit(None, 1) or [""]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])] or [
            ""
        ]
    except csv.Error:  # told with its line when the rows are read
        return [""]


def _words(where: str, line: str, count: int) -> list[str]:
    """Cells separated by spaces: all but the first are one word, and only a file name has spaces in it."""
    words = line.rsplit(None, count - 1)
    words[0] = words[0].strip()
    if words[0].startswith('"') and words[0].endswith('"'):
        words[0] = words[0][1:-1]
    elif " " in words[0] and not FILE_NAME.fullmatch(words[0]):
        raise ValueError(f"{where} must have {count} words, got {line.strip()[:MAX_SHOWN]!r}: separate them by commas")
    return words


def _columns(
    names: list[str], target: Target | None, path_columns: tuple[str, ...], where: str
) -> tuple[str, str | None]:
    """The columns of the path and of what is wanted. Raises `ValueError` where one lacks, or is there twice."""
    path_name = next((name for name in path_columns if name in names), None)
    wanted = {"label": ("label",), "captions": CAPTION_COLUMNS}.get(target or "", ())
    value_name = next((name for name in wanted if name in names), None)
    got = ", ".join(names) or "more than two columns without a header"
    if path_name is None or (target == "label" and value_name is None):
        columns = " and ".join(f"`{name}`" for name in (path_columns[0], *wanted[:1] * (target == "label")))
        raise ValueError(f"{where} must have the columns {columns}, got {got}.")
    if target == "captions" and value_name is None:
        known = ", ".join(f"`{name}`" for name in CAPTION_COLUMNS)
        raise ValueError(f"{where} must have one of the columns {known}, got {got}.")
    for name in (path_name, value_name):
        if names.count(name or "") > 1:
            raise ValueError(f"{where} has the column `{name}` twice.")
    return path_name, value_name


# JSON


def _json_rows(path: Path, text: str, target: Target | None, path_columns: tuple[str, ...]) -> Iterator[Row]:
    for number, entry in _json_entries(path, text):
        where = f"{path}: line {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object with names and values, got {_shown(entry)}.")
        names = list(entry)
        if target == "captions" and not set(names) & set(CAPTION_COLUMNS):
            names.append(CAPTION_COLUMNS[0])  # a video without captions
        path_name, value_name = _columns(names, target, path_columns, where)
        if not isinstance(entry[path_name], str):
            raise ValueError(f"{where}: `{path_name}` must be text, got {_shown(entry[path_name])}.")
        value = None if value_name is None else entry.get(value_name)
        if target == "label":
            value = _json_label(value, where)
        elif target == "captions":
            value = _json_captions(value, where)
        yield Row(where, _path(entry[path_name].strip(), where), value)


def _json_entries(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The entries of a list, or else one value after another, each with the line on which it begins."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    position, line = 0, 1

    def skip(more: str = "") -> None:
        nonlocal position, line
        while position < len(text) and (text[position].isspace() or text[position] in more):
            line += text[position] == "\n"
            position += 1

    skip()
    in_list = text.startswith("[", position)
    position += in_list
    skip()
    while position < len(text) and not (in_list and text[position] == "]"):
        try:
            entry, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {error.lineno} is not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {line} is not valid JSON: {error}") from error
        yield line, entry
        line += text.count("\n", position, end)
        position = end
        before = line
        skip()
        if in_list and position < len(text) and text[position] == ",":
            position += 1
            skip()
        elif position < len(text) and (text[position] != "]" if in_list else line == before):
            raise ValueError(f"{path}: line {line} is not valid JSON: entries must be separated")
    if in_list and text[position:].strip() != "]":
        raise ValueError(f"{path}: line {line} is not valid JSON: the list has no end, or something after it")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _json_label(value: Any, where: str) -> Any:
    if isinstance(value, list | dict):
        raise ValueError(f"{where}: `label` must be one text or number, got {_shown(value)}: a video has one label.")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: `label` must be text or a number, got {_shown(value)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: `label` must be a number that fits 64 bits, got {_shown(value)}.")
    return _label(value, where) if isinstance(value, str) else value


def _json_captions(value: Any, where: str) -> list[str]:
    captions = value if isinstance(value, list) else [] if value is None else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"{where}: a caption must be text, got {_shown(caption)}.")
        check_unicode(caption, f"{where}: a caption")
    return captions


# Values


def _label(text: str, where: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError(f"{where}: `label` must not be empty.")
    return text


def _path(text: str, where: str) -> str:
    if not text:
        raise ValueError(f"{where}: the path must not be empty.")
    check_line(text, f"{where}: the path")
    return text


def _shown(value: Any) -> str:
    return json.dumps(value)[:MAX_SHOWN]
