"""What a directory or the Hub holds: models, configurations, processors, tokenizers; with errors of one line."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedModel
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

FEW = 5  # names in a message


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


def read_config(config_class: Any, path: Path, **changes: Any) -> Any:
    """A configuration from a JSON file, with other values for some fields. Raises `OSError` or `ValueError`."""
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"its value is a {type(values).__name__}, no object")
    except ValueError as error:
        raise ValueError(f"{path} must be a configuration in JSON: {error}") from error
    try:
        return config_class.from_dict(values | changes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def load_model(model_class: Any, name: str | Path, **options: Any) -> Any:
    """A model that is to be used as it is: [`load_start`] where no part may be fresh."""
    return load_start(model_class, name, (), **options)[0]


def load_start(model_class: Any, name: str | Path, may_be_fresh: Sequence[str], **options: Any) -> tuple[Any, set[str]]:
    r"""
    A model to train from a checkpoint, and its parts that have fresh weights.

    Args:
        model_class: As `kind` of [`load_pretrained`].
        name (`str` or `Path`): Directory or Hub id.
        may_be_fresh (`Sequence[str]`): Modules of the model, such as heads, that the checkpoint may lack or have in
            another shape.
        options: For `from_pretrained`.

    Raises:
        `OSError`, `ValueError`: as [`load_pretrained`], and where the checkpoint lacks weights of other modules, has
            them in another shape, has weights of a module for which the configuration leaves no room, or has weights
            that are not finite.
    """
    model, info = load_pretrained(model_class, name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    shapes = {key: (found, expected) for key, found, expected in info["mismatched_keys"]}
    if lacking := sorted(key for key in info["missing_keys"] if _part(key) not in may_be_fresh):
        raise ValueError(f"{name} has no weights for {_few(lacking)}")
    for key, (found, expected) in shapes.items():
        if _part(key) not in may_be_fresh:
            raise ValueError(f"{name}: {key} must have the shape {tuple(expected)}, got {tuple(found)}")
    if strange := sorted(_of_modules(model, info["unexpected_keys"], may_be_fresh)):
        raise ValueError(f"{name} has weights that its configuration leaves no room for: {_few(strange)}")
    if broken := sorted(key for key, value in model.state_dict().items() if not value.isfinite().all()):
        raise ValueError(f"{name} has weights that are not finite: {_few(broken)}")
    return model, {_part(key) for key in (*info["missing_keys"], *shapes)}


def _of_modules(model: PreTrainedModel, keys: Iterable[str], without: Sequence[str]) -> Iterator[str]:
    """Which of the keys, of a checkpoint with or without a head, belong to modules that the model has."""
    prefix = model.base_model_prefix
    modules = {name for part in (model, getattr(model, prefix, model)) for name, _ in part.named_children()}
    for key in keys:
        if _part(key.removeprefix(f"{prefix}.")) in modules.difference(without):
            yield key


def _part(key: str) -> str:
    return key.split(".")[0]


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:FEW]) + (f" and {len(keys) - FEW} more" if len(keys) > FEW else "")


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
