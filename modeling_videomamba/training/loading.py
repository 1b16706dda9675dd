"""What a directory or the Hub holds: models, configurations, processors, tokenizers; with errors of one line."""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers.utils import CONFIG_NAME

from ..checkpoint_files import CheckpointError, load_tensors, refusal
from .names import check_name

# How to find out whether a file is whole, by its name.
READERS: dict[str, Callable[[Path], Any]] = {
    CONFIG_NAME: lambda path: json.loads(path.read_text("utf-8")),
    "*_config.json": lambda path: json.loads(path.read_text("utf-8")),
    "*.index.json": lambda path: json.loads(path.read_text("utf-8")),
    "tokenizer.json": lambda path: Tokenizer.from_file(str(path)),
    "*.safetensors": lambda path: safe_open(path, "pt"),
    "pytorch_model*.bin": lambda path: load_tensors(path, "meta"),
}


def load_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    r"""
    `kind.from_pretrained(name, **options)` for every script: the one place for the errors of what can't be loaded.

    Args:
        kind: A model, configuration, processor or tokenizer class, or an Auto class.
        name (`str` or `Path`): Directory or Hub id.
        options: For `from_pretrained`.

    Raises:
        `OSError`: if there is no such directory or id, or it lacks a file.
        `ValueError`: if a file is damaged, with its path, or it holds something else.
    """
    with one_line_errors(name):
        return kind.from_pretrained(name, **options)


def load_model(model_class: Any, name: str | Path, **options: Any) -> Any:
    """
    As [`load_pretrained`], for a model that is to be used as it is: raises `ValueError` also where the checkpoint lacks
    weights of the model, or has some of another shape.
    """
    model, info = load_pretrained(model_class, name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"{name} has no weights for {', '.join(sorted(info['missing_keys']))}")
    for key, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{name}: {key} must have the shape {tuple(expected)}, got {tuple(found)}")
    return model


@contextmanager
def one_line_errors(*names: str | Path) -> Iterator[None]:
    """Raises as [`load_pretrained`] for whatever fails while these directories or Hub ids are loaded."""
    for name in names:
        check_name(name)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in any way
        for name in names:
            _check_files(name)
        reason = refusal(error) if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split())
        message = f"{' or '.join(map(str, names))} can't be loaded: {reason}"
        if isinstance(error, OSError):
            raise OSError(message) from error
        if isinstance(error, ValueError):
            raise ValueError(message) from error
        raise ValueError(f"{message} ({type(error).__name__})") from error


def _check_files(name: str | Path) -> None:
    """Raises `ValueError` with the path of the first damaged file of a directory or of a downloaded repository."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(str(name), CONFIG_NAME)
        except HFValidationError:
            return
        if not isinstance(config, str):
            return
        folder = Path(config).parent
    for pattern, read in READERS.items():
        for path in sorted(folder.glob(pattern)):
            try:
                read(path)
            except CheckpointError:  # has the path
                raise
            except Exception as error:
                raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
