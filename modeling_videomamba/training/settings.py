"""Arguments that the training scripts share, from recipes and the command line."""

import json
import uuid
from pathlib import Path
from typing import Any

from .output import read_object, writing


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name old -> new` for each value of `now` that isn't as it was."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]


def check_settings(path: Path, settings: dict[str, Any], owner: str) -> None:
    """
    What is computed with other settings is not mixed: writes them to a JSON file, or raises `ValueError` where those in
    the file are others, or [`WriteError`] where the disk refuses. `owner` says what they are of.
    """
    if path.exists():
        if changed := differences(read_object(path), settings):
            raise ValueError(f"{owner}, with other settings: {', '.join(changed)}")
        return
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(settings, indent=2), "utf-8")
        unfinished.replace(path)
