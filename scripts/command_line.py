"""
How the scripts read their command lines, with options in any order, help with defaults and values of recipes, and how
they end.
"""

import argparse
import io
import math
import os
import signal
import stat
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME"}  # PATH for the others
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
MAX_PICTURE_ROWS = 50
STARTS = {"model", "config", "size", "vision", "text"}  # those of a recipe give way to any that is given


class Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of each option, unless its text does, and leaves out the names that switch a flag off."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=120)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.option_strings or action.nargs == 0 or "default" in str(action.help):
            return action.help
        if action.required:
            return f"{action.help} (required)"
        has_default = action.default is not None and action.default != []
        return f"{action.help} (default: %(default)s)" if has_default else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type or str, "PATH")


class Parser(argparse.ArgumentParser):
    """
    Positional arguments and options come in any order, and a name may have underscores instead of hyphens. No text or
    path may be empty. What is wrong ends the script with one line, printed by one of its processes.
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=Help, **options)
        self._mixes = False
        for kind, read in ((None, _read_text), (str, _read_text), (Path, _read_path)):
            self.register("type", kind, read)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixes or self._subparsers is not None:  # the parser of the command reads what follows it
            return super().parse_known_args(args, namespace)
        self._mixes = True  # because `parse_known_intermixed_args` calls this method
        try:
            words = [_hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
            return self.parse_known_intermixed_args(words, namespace)
        finally:
            self._mixes = False

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}" if _is_first_process() else 1)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _read_text(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("must not be empty")
    return word


def _read_path(word: str) -> Path:
    return Path(_read_text(word))  # `Path("")` is the current folder


def output_folder(word: str) -> Path:
    """The type of an argument for a folder that is written, which may not exist yet."""
    path = _read_path(word)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{place} is a file, not a folder")
    return path


def _hyphenated(word: str) -> str:
    """`--a_b=c_d` as `--a-b=c_d`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def parse_dataclasses(description: str, *classes: Any, recipes: Path | None = None) -> tuple[Any, ...]:
    r"""
    Values of dataclasses from the command line and, with `--recipe`, from a recipe: a YAML file in `recipes`, or a
    path. What the command line gives goes before what the recipe gives. Ends the process with a message for wrong ones.

    Args:
        description (`str`): Of the script.
        classes: Dataclasses whose fields have a `help` in their metadata, and `positional` where they have no option.
        recipes (`Path`, *optional*): Folder of the recipes; without it there is no `--recipe`.

    Returns:
        `tuple`: One instance of each class.
    """
    parser = Parser(description=description)
    for group_class in classes:
        _add_options(parser, group_class)
    _shorten_usage(parser)
    if recipes is not None:
        _add_recipes(parser, recipes, classes)
    values = vars(parser.parse_args())
    try:
        _check_finite(values)
        return tuple(one(**{item.name: values[item.name] for item in fields(one)}) for one in classes)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _check_finite(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be finite, got {value}")


def _add_options(parser: argparse.ArgumentParser, group_class: Any) -> None:
    """An option for each field, in a group named by the docstring of the class."""
    hints = get_type_hints(group_class)
    group = parser.add_argument_group(group_class.__doc__.strip().rstrip("."))
    for item in fields(group_class):
        options = dict(item.metadata)
        if options.pop("positional", False):
            group.add_argument(item.name, metavar=item.name.upper(), **options)
            continue
        text = options.pop("help")
        options = {**_default(item), **_kind(hints[item.name]), **options}
        action = group.add_argument(f"--{item.name.replace('_', '-')}", **options)
        action.help = text  # only now, because Python 3.10 to 3.12 add "(default: False)" to the text of a flag


def _default(item: Field[Any]) -> dict[str, Any]:
    if item.default is not MISSING:
        return {"default": item.default}
    if item.default_factory is not MISSING:
        return {"default": item.default_factory()}
    return {"required": True}


def _kind(hint: Any) -> dict[str, Any]:
    """What `add_argument` takes for a type, which may be optional."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is list:
        return {"type": get_args(hint)[0], "nargs": "+"}
    return {"type": hint}


def _shorten_usage(parser: argparse.ArgumentParser) -> None:
    """What is required, as the list of all options would fill the screen."""
    words = []
    for action in parser._actions:
        if not action.option_strings:
            words.append(str(action.metavar))
        elif action.required:
            words.append(f"{action.option_strings[0]} {action.dest.upper()}")
    parser.usage = " ".join(["%(prog)s", *words, "[options]"])


def _add_recipes(parser: Parser, recipes: Path, classes: Any) -> None:
    """`--recipe`; the values of the recipe that the command line names become the defaults."""
    names = sorted(path.stem for path in recipes.glob("*.yaml"))
    where = recipes.resolve().relative_to(Path(__file__).resolve().parents[1])
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"values of a published run: a name in {where}, or a YAML file (default: none); options go before them, "
        "--no-FLAG switches off a flag that the recipe sets",
    )
    first = Parser(add_help=False)
    first.add_argument("--recipe")
    found, rest = first.parse_known_args()
    if found.recipe is not None:
        parser.set_defaults(**_read_recipe(parser, found.recipe, recipes, names, classes, rest))


def _read_recipe(
    parser: Parser, name: str, recipes: Path, names: list[str], classes: Any, given: list[str]
) -> dict[str, Any]:
    from recipe_files import read_recipe  # imports YAML, which the other scripts don't need

    path = recipes / f"{name}.yaml" if name in names else Path(name)
    if not path.is_file():
        parser.error(f"--recipe {name}: neither a file nor one of {', '.join(names)}")
    known = {item.name for one in classes for item in fields(one)}
    try:
        values = read_recipe(path, {action.dest: action for action in parser._actions if action.dest in known})
    except (OSError, ValueError) as error:
        parser.error(f"--recipe {name}: {error}")
    starts = {word.removeprefix("--").split("=")[0] for word in given} & STARTS
    return {name: value for name, value in values.items() if not (starts and name in STARTS)}


# Files that are written


def check_output(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises `ValueError` for a file that can't be written because of its name or its folder."""
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no such folder")


def check_picture(path: Path) -> None:
    """Raises `ValueError` for a --picture that can't be written."""
    check_output("--picture", path, PICTURE_SUFFIXES)


# Ends


def run_main(main: Callable[[], None], go_on: str | None = None) -> None:
    """
    Runs a script. Ctrl-C ends it with a line and status 130, and again at once. If nobody reads what it prints any more
    (`| head`), it runs to its end all the same.

    Args:
        main (`Callable`): The script.
        go_on (`str`, *optional*): With what a script goes on that was interrupted.
    """
    with _without_broken_pipes("stdout"), _without_broken_pipes("stderr"):
        try:
            main()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if _is_first_process():
                print("interrupted" + (f": go on with {go_on}" if go_on else ""), file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


@contextmanager
def _without_broken_pipes(name: str) -> Iterator[None]:
    """What is written to a stream of `sys`, a pipe, is discarded once the pipe has no reader."""
    stream = getattr(sys, name)
    if not _is_pipe(stream):
        yield
        return
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    unbuffered = stream.write_through
    options = {"line_buffering": stream.line_buffering, "write_through": unbuffered}
    text = io.TextIOWrapper(pipe if unbuffered else io.BufferedWriter(pipe), stream.encoding, stream.errors, **options)
    setattr(sys, name, text)
    try:
        yield
    finally:
        text.flush()
        setattr(sys, name, stream)


def _is_pipe(stream: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # no stream, none of the system, or closed
        return False


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
