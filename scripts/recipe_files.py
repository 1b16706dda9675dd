"""Recipes: YAML files with values for the options of a training script."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TEXT = "a text, in quotes if it could be a number, a date, yes or no"
ALLOWED: dict[Any, str] = {int: "a whole number", float: "a number"}


def read_recipe(path: Path, options: Mapping[str, argparse.Action]) -> dict[str, Any]:
    r"""
    The values of a recipe, each checked as the command line would check it.

    Args:
        path (`Path`): YAML file.
        options (`Mapping[str, argparse.Action]`): The options that may have values, by name.

    Raises:
        `OSError`: if the file can't be read.
        `ValueError`: if it is not YAML with names and values, or a value has another type than its option takes.
    """
    values = _read_yaml(path)
    if unknown := [str(name) for name in values if name not in options]:
        raise ValueError(f"this script has no {', '.join(sorted(unknown))}")
    for name, value in values.items():
        if not _is_allowed(options[name], value):
            raise ValueError(f"{name} must be {_allowed(options[name])}, got {value!r}")
    return values


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text("utf-8")
        root, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        wrong = f"the byte 0x{error.object[error.start]:02x} (byte {error.start + 1} of the file)"
        raise ValueError(f"must be text in UTF-8, got {wrong}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ValueError(f"must have lines of `name: value`, got {found}")
    lines: dict[str, int] = {}
    for key, _ in root.value:  # of a name that is there twice, YAML takes the last value
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"{key.value} is there twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
    return values


def _is_allowed(option: argparse.Action, value: Any) -> bool:
    if value is None:
        return _may_be_missing(option)
    if isinstance(option, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    if option.nargs is not None:
        return isinstance(value, list) and all(_is_item(option, item) for item in value)
    return _is_item(option, value)


def _is_item(option: argparse.Action, value: Any) -> bool:
    if option.choices is not None:
        return value in option.choices
    if option.type is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if option.type is float:
        return _is_number(value)
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # as YAML reads 1e-3
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _may_be_missing(option: argparse.Action) -> bool:
    return option.default is None and not option.required


def _allowed(option: argparse.Action) -> str:
    if isinstance(option, argparse.BooleanOptionalAction):
        return "true or false"
    names = [ALLOWED.get(option.type, TEXT)] if option.choices is None else [str(one) for one in option.choices]
    if option.nargs is not None:
        return f"a list, each item {_join(names)}"
    return _join([*names, "null"] if _may_be_missing(option) else names)


def _join(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
