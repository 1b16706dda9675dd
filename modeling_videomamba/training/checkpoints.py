"""States of a run on disk: always a whole one, whenever the process is killed."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

STATE = "state.json"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, save: Callable[[Path], None], state: Any
) -> None:
    r"""
    Writes `folder/step-N`, which appears under that name once it is whole, and then removes the states before it.

    Args:
        accelerator (`Accelerator`): All processes take part.
        folder (`Path`): Of the states of this run.
        step (`int`): Steps done.
        save (`Callable`): Writes more files into the folder that it is given, on the main process.
        state: What [`load_checkpoint`] returns, as JSON.
    """
    writing, whole = folder / f".writing-{step}", folder / f"step-{step:08}"
    if accelerator.is_main_process:
        for left in folder.glob(".*"):  # by a process that was killed
            shutil.rmtree(left)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(writing))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save(writing)
        (writing / STATE).write_text(json.dumps(state), "utf-8")
        older = [path for path in folder.glob("step-*") if path != whole]
        if whole.exists():
            whole.rename(folder / ".removing")
        writing.rename(whole)
        for path in older:
            path.rename(folder / f".removing-{path.name}")
        for path in folder.glob(".removing*"):
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest state in a folder."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, load: Callable[[Path], None]) -> Any:
    """Restores what [`save_checkpoint`] has written and returns its `state`; `load` reads what its `save` wrote."""
    accelerator.load_state(str(checkpoint))
    load(checkpoint)
    return json.loads((checkpoint / STATE).read_text("utf-8"))


def replace_files(folder: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with an empty folder and moves each file that it wrote to `folder`, over those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        write(Path(temporary))
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)
