"""Files that `torch.save` has written, from strangers: they are read without running what is in them."""

import os
import pickle
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that can't be read or converted; the message says why."""


def load_tensors(path: str | os.PathLike, device: str = "cpu", allowed: Sequence[type] = ()) -> Any:
    r"""
    What `torch.load` gives. Its advice to run a strange file's code is not passed on.

    Args:
        path (`str` or `os.PathLike`): The file.
        device (`str`, defaults to `"cpu"`): Where the tensors go.
        allowed (`Sequence[type]`): What the file may hold besides tensors; their code can run.

    Raises:
        `CheckpointError`: if the file is damaged, or holds something else; the message has its path.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            warnings.simplefilter("ignore", UserWarning)  # of other versions of pickle, which the error tells
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {refusal(error)}") from error
    except Exception as error:  # what is no checkpoint fails in any way
        tells = isinstance(error, OSError | RuntimeError) and str(error)
        reason = str(error).splitlines()[0] if tells else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of PyTorch: {reason}") from error


def refusal(error: pickle.UnpicklingError) -> str:
    """Why a file is not loaded, without PyTorch's advice."""
    stranger = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it holds {stranger[1]}" if stranger else "it holds more than PyTorch writes for tensors"
    return f"not a checkpoint of plain tensors ({reason}): refused, because loading it could run code in it"
