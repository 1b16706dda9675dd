"""What labels mean: classes by name or by number, or numbers to predict."""

import re
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..labels import clean_name
from .lists import MAX_SHOWN, WHOLE, Row, Text

MAX_CLASSES = 100_000
BETWEEN_LABELS = re.compile(r"[,;|]")


@dataclass(frozen=True)
class Labels:
    """How to read labels: arguments of [`load_split`]."""

    regression: bool = False
    names: list[str] | None = None
    indices: bool = True


def labels_of_rows(rows: Sequence[Row], name: str, labels: Labels) -> tuple[list[Any], list[str] | None]:
    r"""
    The labels of a split as numbers, and the names of its classes, or `None` for numbers to predict.

    Args:
        rows (`Sequence[Row]`): With labels of [`read_list`].
        name (`str`): What errors call the split.
        labels ([`Labels`]): How to read them.

    Raises:
        `ValueError`: for labels of different types, several labels in one, or a label that is no class; the message
            names the line.
    """
    if empty := next((row for row in rows if row.value is None), None):
        raise ValueError(f"{empty.where}: a label is missing.")
    values = [_typed(row) for row in rows]
    if labels.names is not None and not labels.regression:
        lookup = ClassLookup(labels.names, labels.indices)
        return [lookup(row.value, row.where) for row in rows], labels.names
    decimal = next((row for row, value in zip(rows, values, strict=True) if isinstance(value, float)), None)
    word = next((row for row, value in zip(rows, values, strict=True) if isinstance(value, str)), None)
    if word is not None and labels.regression:
        raise ValueError(f"{word.where}: the labels of the {name} must be numbers for regression, got {word.value!r}.")
    if word is not None and decimal is not None:
        raise ValueError(
            f"{word.where}: the label {word.value!r} is no number, and {decimal.value} ({decimal.where}) is."
        )
    if decimal is not None or labels.regression:
        return [as_value(value, row.where) for row, value in zip(rows, values, strict=True)], None
    if word is None:
        return values, _numbered_names(rows, values)
    if mixed := next((row for row in rows if isinstance(row.value, int)), None):
        raise ValueError(
            f"{mixed.where}: the label {mixed.value} is a number, and {word.value!r} ({word.where}) is text."
        )
    texts = [clean_name(row.value, row.where) for row in rows]
    names = sorted(set(texts))
    _check_single(rows, texts, names)
    positions = {text: index for index, text in enumerate(names)}
    return [positions[text] for text in texts], names


def as_value(number: Any, where: str) -> float:
    """A number to predict, as float32 holds it. Raises `ValueError` where that is none, or another whole number."""
    try:
        (value,) = struct.unpack("f", struct.pack("f", number))
    except (OverflowError, struct.error):
        value = None
    if value is None or (value != number and (isinstance(number, int) or value in (0, float("inf"), -float("inf")))):
        shown = str(number)[:MAX_SHOWN]
        raise ValueError(
            f"{where}: a value to predict must fit float32 (from 1e-45 to 3.4e38, and all whole numbers up to "
            f"16777216), got {shown}."
        )
    return value


class ClassLookup:
    """
    The class of a label: the one with this name. A whole number that is no name is an index, where `indices` says so
    and no name is a whole number.
    """

    def __init__(self, names: Sequence[str], indices: bool):
        self.names = names
        self.positions = {unicodedata.normalize("NFC", name): index for index, name in enumerate(names)}
        self.indices = indices and not any(map(WHOLE.fullmatch, names))

    def __call__(self, label: Any, where: str) -> int:
        """Raises `ValueError` for a label that is no class."""
        number = _whole_number(label)
        if isinstance(label, str) and (index := self.positions.get(clean_name(label, where))) is not None:
            return index
        if number is not None and (index := self.positions.get(str(number))) is not None:
            return index
        if number is not None and self.indices and 0 <= number < len(self.names):
            return number
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        raise ValueError(f"{where}: the label {label!r} is not one of the {len(self.names)} classes ({shown}).")


def _typed(row: Row) -> str | int | float:
    """A label as a number, if it is one. A word in JSON stays a word, whatever it looks like."""
    if isinstance(row.value, Text):
        number = row.value.number()
        return row.value if number is None else number
    return row.value


def _whole_number(label: Any) -> int | None:
    number = label.number() if isinstance(label, Text) else label
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _numbered_names(rows: Sequence[Row], values: Sequence[Any]) -> list[str]:
    for row, value in zip(rows, values, strict=True):
        if not 0 <= value < MAX_CLASSES:
            raise ValueError(
                f"{row.where}: a class must be a number from 0 to {MAX_CLASSES - 1}, got {str(row.value)[:MAX_SHOWN]}."
            )
    return [str(index) for index in range(max(values) + 1)]


def _check_single(rows: Sequence[Row], texts: Sequence[str], names: Sequence[str]) -> None:
    """Raises `ValueError` for a label that seems to be several: of numbers, or of parts that other labels have too."""
    parts = {name: {part.strip() for part in BETWEEN_LABELS.split(name)} for name in names}
    owners: dict[str, int] = {}
    for own in parts.values():
        for part in own:
            owners[part] = owners.get(part, 0) + 1
    for row, text in zip(rows, texts, strict=True):
        known = all(owners[part] > 1 for part in parts[text]) or all(map(WHOLE.fullmatch, parts[text]))
        if len(parts[text]) > 1 and known:
            raise ValueError(
                f"{row.where}: {text!r} seems to be several labels, and a video has one. If it is the name of a "
                "class, pass the names of the classes (--label-file)."
            )
