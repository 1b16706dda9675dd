"""The folder of a run: one writer at a time, files that are whole, and a clear error where the disk refuses."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .diagnosis import RunError

LOCK_FILE = "lock"
LOCK_SECONDS = 1  # `check_folder` of another run holds the lock for a moment
WRITING = ".writing-"
FULL = os.strerror(errno.ENOSPC)
# messages of torch.save where the disk takes less than it writes
CUT_FILES = ("PytorchStreamWriter", "inline_container", "unexpected pos")


class WriteError(RunError, OSError):
    """A file can't be written; the message names the folder, the reason and the room on the disk."""


class FolderInUseError(RunError, ValueError):
    """Another run writes to the folder."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs from writing to it. Raises [`FolderInUseError`] where another run writes."""
    folder.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(folder / LOCK_FILE, timeout=LOCK_SECONDS)
    try:
        file_lock.acquire()
    except Timeout:
        raise FolderInUseError(f"another run is writing {folder}: wait for its end") from None
    except NotImplementedError:
        print(f"warning: the file system of {folder} has no locks, so that no other run is kept from writing there")
    try:
        yield
    finally:
        file_lock.release()


def check_folder(folder: Path) -> None:
    """
    Raises `ValueError` where files can't be written to a folder or another run writes to it. A folder that doesn't
    exist is made, and removed again.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except FileExistsError:
        raise ValueError(_refusal(folder, "it is no folder")) from None
    except OSError as error:
        raise ValueError(_refusal(folder, str(error))) from None
    finally:
        for path in made:
            with suppress(OSError):  # it could not be made, or another run has begun in it
                path.rmdir()
    if (folder / LOCK_FILE).exists():
        with lock(folder):
            pass


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises [`WriteError`] where a file, or what is to be in a folder, can't be written."""
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(f"{_refusal(path, reason)}. What was saved before is still there") from error


def _reason(error: BaseException) -> str | None:
    """Why a file could not be written, `None` for an error with another cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | SafetensorError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if FULL in str(error):  # of FAISS
        return str(error).splitlines()[0]
    if any(words in str(error) for words in CUT_FILES):
        return f"{FULL}, probably ({str(error).splitlines()[0]})"
    return None


def _refusal(path: Path, reason: str) -> str:
    return f"{path} can't be written: {reason}; {_room(path)}"


def _room(path: Path) -> str:
    for place in (path, *path.absolute().parents):
        with suppress(OSError):  # a folder that does not exist
            usage = shutil.disk_usage(place)
            return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free on the disk of {place}"
    return "its disk is unknown"


def replace_files(folder: Path, write: Callable[[Path], Any]) -> None:
    """
    Calls `write` with an empty folder and moves each file that it wrote to `folder`, over those that are there. Nothing
    is written outside `folder`, which may be a mount point.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=WRITING) as temporary:
            write(Path(temporary))
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)


def remove_unfinished(folder: Path) -> None:
    """Removes what [`replace_files`] has left anywhere in a folder because its process was killed."""
    for path in list(folder.rglob(f"{WRITING}*")):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for any other content."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file of JSON lines that have a `step`, and a warning for each line that is none."""
    records: list[dict[str, Any]] = []
    warnings = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records += [record] if record["step"] >= 0 else []
        except (ValueError, TypeError, KeyError):
            shown = line[:40].decode("utf-8", "replace")
            warnings.append(f"{path}, line {number} is left out, it is not a whole record: {shown!r}")
    return records, warnings
