"""Tensors of examples on disk, written batch by batch, so that what computes them may be stopped at any moment."""

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .output import writing

Place: TypeAlias = tuple[Path, int]


class TensorStore:
    r"""
    Tensors of examples by key, in safetensors files of a folder, a file for each batch. Each process writes files of
    its own, which get their names when they are whole.

    Args:
        folder (`Path`): May hold tensors of an earlier run, also of another number of processes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def places(self) -> dict[str, Place]:
        """
        Where each example is: a file, and a row in it. Raises `ValueError` for a file that others have broken.
        """
        places: dict[str, Place] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads(file.metadata()["keys"])
            except (SafetensorError, TypeError, KeyError, ValueError) as error:
                raise ValueError(f"{path} is not a file of this store ({error}): remove it") from error
            places |= {key: (path, row) for row, key in enumerate(keys)}
        return places

    def write(self, keys: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
        """
        The tensors of a batch, each `(len(keys), ...)`; nothing for no keys. Raises [`WriteError`] where the disk
        refuses.
        """
        if not keys:
            return
        name = uuid.uuid4().hex
        unfinished, whole = self.folder / f".{name}.writing", self.folder / f"{name}.safetensors"
        rows = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(rows, unfinished, metadata={"keys": json.dumps(list(keys))})
            unfinished.replace(whole)

    @staticmethod
    def read(places: Iterable[Place], name: str) -> torch.Tensor:
        """The tensors `name` of the examples at some places, `(places, ...)`."""
        wanted = list(places)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(wanted)
        by_file: dict[Path, list[int]] = {}
        for index, (path, _) in enumerate(wanted):
            by_file.setdefault(path, []).append(index)
        for path, indices in by_file.items():
            with safe_open(path, "pt") as file:
                found = file.get_slice(name)
                for index in indices:
                    rows[index] = found[wanted[index][1]]
        return torch.stack(rows)
