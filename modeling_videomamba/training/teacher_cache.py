"""Features of a teacher on disk, for clips that are the same in every epoch."""

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .diagnosis import RunError
from .output import writing
from .settings import check_settings

IDENTITY_FILE = "cache.json"
CLIPS_PER_FOLDER = 1000

Answer = tuple[torch.Tensor, torch.Tensor | None]  # of a teacher: features, and attention if it is wanted


def digest(model: nn.Module, *settings: dict[str, Any]) -> str:
    """SHA-256 of the names and values of all weights, and of settings."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class TeacherCache:
    r"""
    What a teacher says of clips, each clip in a safetensors file of its own, features in float16. The first answer is
    used in that precision too, so that it makes no difference which clips are there already.

    Args:
        folder (`Path`): May hold the answers of runs before.
        teach (`Callable`): From pixels `(batch, ...)` to features `(layers, batch, length, size)` and, if it is wanted,
            attention `(batch, ...)`.
        identity (`dict`): What the answers depend on; anything that JSON can hold.

    Raises:
        `ValueError`: if the folder holds answers of another identity.
    """

    def __init__(self, folder: Path, teach: Callable[[torch.Tensor], Answer], identity: dict[str, Any]):
        self.folder, self.teach = folder, teach
        check_settings(folder / IDENTITY_FILE, identity, f"--teacher-cache {folder} is of another run")

    def __call__(self, batch: dict[str, Any]) -> Answer:
        """The answer for a batch. Where one of a clip is missing, `teach` is asked about all of the batch."""
        clips = list(zip(batch["indices"].tolist(), batch["names"], batch["valid"].tolist(), strict=True))
        answers: list[Any] = [self._read(index, name) if valid else None for index, name, valid in clips]
        known = [answer for answer in answers if answer is not None]
        if not known or any(valid and answer is None for (*_, valid), answer in zip(clips, answers, strict=True)):
            features, attention = self.teach(batch["pixel_values"])
            for row, (index, name, valid) in enumerate(clips):
                if answers[row] is None:
                    answers[row] = self._answer(features[:, row], None if attention is None else attention[row])
                    if valid:
                        self._write(index, name, answers[row])
            known = answers
        # what is not valid counts for nothing, whatever stands in its place
        filled = [known[0] if answer is None else answer for answer in answers]
        device = batch["pixel_values"].device
        stacked = {key: torch.stack([answer[key] for answer in filled]).to(device) for key in filled[0]}
        return stacked["features"].transpose(0, 1).float(), stacked.get("attention")

    @staticmethod
    def _answer(features: torch.Tensor, attention: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"features": features.half().cpu()} | ({} if attention is None else {"attention": attention.cpu()})

    def _read(self, index: int, name: str) -> dict[str, torch.Tensor] | None:
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                saved = file.metadata()["name"]
                answer = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError, KeyError) as error:
            raise RunError(f"{path} is damaged ({error}): remove it, and the teacher is asked again") from error
        if saved != name:
            raise RunError(f"{path} is of {saved}, but clip {index} is {name}: the data have changed")
        return answer

    def _write(self, index: int, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """A file gets its name when it is whole."""
        path = self._path(index)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
        with writing(self.folder):
            path.parent.mkdir(exist_ok=True)
            save_file({key: t.contiguous() for key, t in tensors.items()}, unfinished, metadata={"name": name})
            unfinished.replace(path)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index // CLIPS_PER_FOLDER:05}" / f"{index:08}.safetensors"
