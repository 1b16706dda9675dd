"""Names of classes and the text files that hold them."""

import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KNOWN_LABELS = ("imagenet-1k", "kinetics400", "something-something-v2")
# UTF-32 goes first: its mark begins with the mark of UTF-16
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURROGATE = re.compile(r"[\ud800-\udfff]")
NOT_IN_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte-order mark tells, if there is one."""
    return next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), None)


def read_text(path: Path) -> str:
    r"""
    The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, without the mark,
    with the line breaks of Unix.

    Raises:
        `OSError`: if it can't be read.
        `ValueError`: if it is in another encoding; the message names the line and the byte.
    """
    data = path.read_bytes()
    encoding = marked_encoding(data) or "utf-8"
    if encoding.startswith("utf-8") and b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ValueError(f"{path}: line {line} must be text in UTF-8, got a null character: save the file as UTF-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} must be text in UTF-8, got the byte 0x{data[error.start]:02x} (byte {error.start} of "
            "the file): save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean_name(name: str, where: str) -> str:
    """A name of a class without white space around it, composed (NFC). Raises `ValueError` if it isn't one line."""
    name = unicodedata.normalize("NFC", name.strip())
    if not name:
        raise ValueError(f"{where}: the name of a class must not be empty.")
    check_line(name, f"{where}: the name of a class")
    return name


def check_line(text: str, what: str) -> None:
    """Raises `ValueError` for control characters, such as line breaks, and for what is no Unicode."""
    if NOT_IN_LINE.search(text):
        raise ValueError(f"{what} must be one line without control characters, got {text!r}.")


def check_unicode(text: str, what: str) -> None:
    """Raises `ValueError` for half a character (a lone surrogate), which JSON can hold and no file."""
    if SURROGATE.search(text):
        raise ValueError(f"{what} must be Unicode, got {text!r}.")


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`). Raises `ValueError` for a key that comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name!r} comes twice")
    return found


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, with its index after each that occurs more than once, as in lists of ImageNet's classes."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def load_labels(source: str | Path) -> list[str]:
    r"""
    Class names in index order.

    Args:
        source (`str` or `Path`): `imagenet-1k`, `kinetics400`, `something-something-v2`, or a file: one name a line, or
            JSON with a list of names, or an object from index to name or from name to index.

    Raises:
        `FileNotFoundError`: if it is neither a known data set nor a file.
        `ValueError`: if the file holds something else, no name, or a name twice; the message names the line.
    """
    if source == "imagenet-1k":
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    if source in KNOWN_LABELS:
        return json.loads((Path(__file__).parent / "labels.json").read_text("utf-8"))[str(source)]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such labels file, nor a known data set ({', '.join(KNOWN_LABELS)})")
    text = read_text(path)
    if path.suffix == ".json":
        return _unique(path, ((f"class {index}", name) for index, name in enumerate(_names_in_json(path, text))))
    lines = enumerate(text.split("\n"), start=1)
    return _unique(path, ((f"line {number}", line) for number, line in lines if line.strip()))


def _unique(path: Path, names: Iterable[tuple[str, str]]) -> list[str]:
    found: dict[str, str] = {}
    for place, raw in names:
        name = clean_name(raw, f"{path}: {place}")
        if name in found:
            raise ValueError(
                f"{path}: {place} has the name {name!r}, as {found[name]} has: each class has its own name."
            )
        found[name] = place
    if not found:
        raise ValueError(f"{path}: there is no name of a class.")
    return list(found)


def _names_in_json(path: Path, text: str) -> list[str]:
    try:
        labels: Any = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(labels, dict):
        by_index = {str(index): name for index, name in labels.items()}
        if set(by_index) != set(map(str, range(len(labels)))):  # Something-Something's own files go the other way
            by_index = {str(index): name for name, index in labels.items()}
        labels = [by_index.get(str(index)) for index in range(len(labels))]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: must hold a list of names, or an object between the indices 0, 1, ... and names")
    return labels
