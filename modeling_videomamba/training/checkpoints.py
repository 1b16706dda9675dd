"""States of a run on disk: whole whenever the process is killed, and checked before they are loaded."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from .diagnosis import RunError
from .output import WRITING, read_object, remove, writing

STATE = "state.json"
CHECKSUMS = "checksums.json"
REPLACED = "-replaced"  # what is added to the name of a state while another of the same step takes its name
NAME = re.compile(rf"step-(\d{{8,}})({REPLACED})?")
KEPT = 2  # the second for the case that the disk damages the first
LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, save: Callable[[Path], None], state: Any
) -> None:
    r"""
    Writes a state and renames it to `folder/step-N` once it is whole. Then removes all other states but the one before
    it.

    Args:
        accelerator (`Accelerator`): All processes take part.
        folder (`Path`): Of the states of this run.
        step (`int`): Steps done.
        save (`Callable`): Writes more files into the folder that it is given, on the main process.
        state: What [`load_checkpoint`] returns, as JSON.

    Raises:
        [`RunError`]: where the disk refuses; the states that were there stay.
    """
    unfinished, whole = folder / f"{WRITING}{step}", folder / f"step-{step:08}"
    with writing(folder):
        try:
            if accelerator.is_main_process:
                _remove_unfinished(folder)
                unfinished.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                save(unfinished)
                (unfinished / STATE).write_text(json.dumps(state), "utf-8")
                _finish(unfinished)
                _replace(unfinished, whole)
        except Exception:
            if accelerator.is_main_process:
                _remove_unfinished(folder)  # makes room on a full disk
            raise
    accelerator.wait_for_everyone()


def _finish(checkpoint: Path) -> None:
    """Records what is in a state."""
    for path in checkpoint.glob("random_states_*.pkl"):  # every step sets its own
        path.unlink()
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    found = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
    (checkpoint / CHECKSUMS).write_text(json.dumps(found, indent=1), "utf-8")


def _replace(unfinished: Path, whole: Path) -> None:
    folder = whole.parent
    replaced = folder / f"{whole.name}{REPLACED}"
    before = [path for path in list_checkpoints(folder) if _step(path) < _step(whole)]
    if whole.exists():
        if replaced.exists():
            remove(replaced)
        whole.rename(replaced)
    unfinished.rename(whole)
    for path in list_checkpoints(folder):
        if path not in (whole, *before[: KEPT - 1]):
            path.rename(folder / f"{WRITING}{path.name}")
    _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{WRITING}*"):
        remove(path)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The states in a folder, the newest first, whole or damaged. What has another name is not ours."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), not path.name.endswith(REPLACED)), reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removesuffix(REPLACED).removeprefix("step-"))


def find_damage(checkpoint: Path) -> str | None:
    """Which file of a state is not as it was written, and why; `None` where all are."""
    try:
        expected = read_object(checkpoint / CHECKSUMS)
        for name in (STATE, *expected):
            path, size, digest = checkpoint / name, expected[name]["bytes"], expected[name]["sha256"]
            if path.is_dir():
                return f"{path} is a folder"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes instead of {size}"
            if _digest(path) != digest:
                return f"{path} has other content than was written (SHA-256)"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError):
        return f"{checkpoint / CHECKSUMS} has no checksum of {name}"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    r"""
    The newest state in a folder that is as it was written.

    Returns:
        `tuple`: the state, or `None` where there is none; and a line for each newer state, all of which are damaged.

    Raises:
        [`RunError`]: if all states are damaged.
    """
    damaged: list[str] = []
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, damaged
        damaged.append(f"the state of step {_step(checkpoint)} is damaged: {damage}")
    if damaged:
        raise RunError(f"{'; '.join(damaged)}. There is no state before it: the run can't go on")
    return None, []


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, load: Callable[[Path], None]) -> Any:
    r"""
    Restores what [`save_checkpoint`] has written and returns its `state`; `load` reads what its `save` wrote.

    Raises:
        [`RunError`]: if it is the state of another model.
    """
    try:
        accelerator.load_state(str(checkpoint))
        load(checkpoint)
        return read_object(checkpoint / STATE)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{checkpoint} can't be loaded, it is of step {_step(checkpoint)}: {reason}") from error
