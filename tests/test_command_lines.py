"""The command lines of all scripts: help, orders of options, what is wrong with them, and how scripts end."""

import argparse
import io
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tqdm import tqdm

import classify
import command_line
import evaluate_retrieval
import evaluate_video
import push_to_hub
import search_videos
from tests.launching import ENVIRONMENT, SCRIPTS, call, run

NAMES = sorted(path.name for path in SCRIPTS.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8"))
HELP_OF_ALL = """
import contextlib, io, runpy, sys
heavy = ("torch", "transformers", "datasets", "accelerate", "gradio", "sklearn", "matplotlib", "huggingface_hub")
heavy += ("modeling_videomamba",)
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
    assert "usage: " in text.getvalue(), name
    assert not (loaded := [module for module in heavy if module in sys.modules]), (name, loaded)
"""


def test_help_of_every_script_comes_before_the_heavy_imports():
    command = [sys.executable, "-c", HELP_OF_ALL, str(SCRIPTS), *NAMES]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr


def parsers_of(name, monkeypatch):
    """All parsers that a script makes for its help, and the help."""
    made = []

    class Recorded(command_line.Parser):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(command_line, "Parser", Recorded)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    assert end.value.code == 0
    return made


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_everything_once(name, monkeypatch, capsys):
    for parser in parsers_of(name, monkeypatch):
        if not parser.add_help:  # reads the name of a recipe only
            continue
        text = parser.format_help()
        options = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.MULTILINE)
        assert len(options) == len(set(options)) and not re.search(r"--\w+_\w", text.split("\n\n", 2)[-1])
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
                continue
            assert action.help and len(action.help) > 5, action
            if action.option_strings:
                assert action.option_strings[0] in ("-h", *options)
            takes_value = action.option_strings and action.nargs != 0
            shown = parser._get_formatter()._get_help_string(action)
            assert not takes_value or re.search(r"default: \S|no default|\(required\)", shown), action


# what a number is: things that are counted, or how it is to be understood
UNITS = """frames|seconds|minutes|pixels|videos|windows|clips|crops|images|digits|labels|hits|candidates|epochs|steps|
batch(es)?|views|examples|layers?|heads|tokens|threads|calls|processes|times|operations|bytes|runs|port|0\\ to\\ \\d+|
share|probability|alpha|decay|norm|weight|standard\\ deviation|learning\\ rate|random\\ choice|decides\\ every"""
MANY = 12  # options besides --help


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_numbers_are_and_groups_many_options(name, monkeypatch, capsys):
    for parser in parsers_of(name, monkeypatch):
        if not parser.add_help:
            continue
        shown = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
        for action in shown:
            if action.type in (int, float):
                assert re.search(rf"\b({UNITS})\b", action.help, re.VERBOSE), (name, action)
        ungrouped = [action for action in parser._optionals._group_actions if action in shown]
        assert len(shown) - 1 <= MANY or {action.dest for action in ungrouped} <= {"help", "recipe"}, name
        titles = [group.title for group in parser._action_groups if group._group_actions]
        assert len(set(titles)) == len(titles) and all(titles)


def test_help_says_the_values_of_a_recipe(monkeypatch, capsys):
    words = ["finetune.py", "--recipe", "k400-tiny-f8x224", "--help"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPTS / "finetune.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert "times that the run sees the training data (default: 70" in text


def test_scripts_run_through_links(tmp_path):
    (tmp_path / "scripts").symlink_to(SCRIPTS)
    result = run(sys.executable, "scripts/finetune.py", "--help", folder=tmp_path)
    assert result.returncode == 0 and "a name in scripts/recipes, or a YAML file" in " ".join(result.stdout.split())


# Orders

ORDERS = [
    (search_videos, ["query"], [["IX"], ["a dog"], ["--top-k", "3"], ["--json"], ["--picture", "hits.png"]]),
    (search_videos, ["query"], [["IX"], ["--video", "c.mp4"], ["--top-k=3"], ["--json"]]),
    (search_videos, ["index"], [["A", "B", "OUT"], ["--model", "M"], ["--clip_seconds", "4"], ["--num-workers=0"]]),
    (classify, [], [["a.mp4", "b.mp4"], ["--top-k", "3"], ["--json"], ["--model", "M"]]),
    (push_to_hub, [], [["M"], ["o/n"], ["--dry-run"], ["--revision", "x"]]),
]


@pytest.mark.parametrize(("script", "first", "parts"), ORDERS)
def test_positional_arguments_and_options_come_in_any_order(script, first, parts, monkeypatch):
    """Positional ones keep their order among themselves."""
    found = []
    for order in itertools.permutations(parts):
        positional = [part for part in order if not part[0].startswith("-")]
        if positional != [part for part in parts if not part[0].startswith("-")]:
            continue
        monkeypatch.setattr(sys, "argv", [script.__file__, *first, *itertools.chain(*order)])
        found.append(script.parse_args())
    assert len(found) > 5 and all(one == found[0] for one in found), found[0]


def test_what_is_read_in_any_order(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search_videos.py", "query", "IX", "--top-k", "3", "a dog"])
    args = search_videos.parse_args()
    assert (str(args.out), args.top_k, args.text) == ("IX", 3, "a dog")
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", "M", "--dry-run", "org/name"])
    args = push_to_hub.parse_args()
    assert (str(args.source), args.repo_id, bool(args.dry_run)) == ("M", "org/name", True)


@pytest.mark.parametrize(("script", "flag"), [(evaluate_video, "--regression"), (evaluate_retrieval, "--paragraphs")])
def test_the_model_to_test_comes_anywhere(script, flag, monkeypatch):
    classes = [script.Arguments, *(one for one in getattr(script, "CLASSES", ()) if one is not script.Arguments)]
    parts = ["M"], ["--data", "CLIPS"], [flag], ["--output_dir=OUT"]
    for order in itertools.permutations(parts):
        monkeypatch.setattr(sys, "argv", [script.__file__, *itertools.chain(*order)])
        args, *_ = command_line.parse_dataclasses("", *classes)
        assert (args.model, str(args.output_dir)) == ("M", "OUT")


# What is wrong

REQUIRED = ("--data", "d", "--output-dir", "o")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("finetune.py", ("--model", "m"), "error: the following arguments are required: --data, --output-dir"),
        (
            "finetune.py",
            (*REQUIRED, "--epoch", "x"),
            "error: argument --epochs: invalid float",
        ),
        (
            "finetune.py",
            (*REQUIRED, "--nonsense"),
            "error: unrecognized arguments: --nonsense",
        ),
        *(
            ("finetune.py", (*REQUIRED, "--size", "tiny", f"--{name}", value), f"error: --{name} must be finite, got")
            for name in ("epochs", "weight-decay", "learning-rate", "max-grad-norm", "clip-seconds", "mixup")
            for value in ("nan", "inf")
        ),
        ("finetune.py", (*REQUIRED, "--size", "tiny", "--seed", "-1"), "error: --seed must be from 0 to 2^63 - 1"),
        ("search_videos.py", ("query", "i", "a", "b"), "error: unrecognized arguments: b"),
        ("search_videos.py", ("query", "i"), "error: pass one of a text and --video"),
        ("classify.py", ("a", "--csv", "no/such/a.csv"), "error: --csv no/such/a.csv: there is no such folder"),
        ("classify.py", ("a", "--csv", "."), "error: --csv .: is a folder"),
    ],
)
def test_what_is_wrong_is_one_line_of_one_process(name, words, message, monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        shown = end.value.code
        if rank == "0":
            assert shown.startswith(message) and "\n" not in shown
        else:
            assert shown == 1
        assert capsys.readouterr() == ("", "")


def words_with(parser, emptied):
    """A command line with all that is required, where one argument is empty."""
    for action in parser._actions:
        word = "" if action is emptied else "1"
        if not action.option_strings:
            yield word
        elif action is emptied or action.required:
            yield from (action.option_strings[0], word)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_text_or_path_is_refused(name, monkeypatch, capsys):
    """An empty path would be the current folder."""
    for parser in parsers_of(name, monkeypatch):
        if parser._subparsers is not None:
            continue
        for action in parser._actions:
            if action.nargs == 0 or action.help == argparse.SUPPRESS:
                continue
            with pytest.raises(SystemExit) as end:
                parser.parse_args(list(words_with(parser, action)))
            name = action.option_strings[0] if action.option_strings else action.metavar
            is_text = action.type in (None, str, Path, command_line.output_folder)
            expected = "must not be empty" if is_text else "invalid"
            assert end.value.code.startswith(f"error: argument {name}: {expected}"), action


NANO = SCRIPTS.parent / "hub_cards" / "videomamba-nano"
FOLDERS = [
    ("make_moving_digits.py", "OUTPUT_DIR", "{}"),
    ("make_cards.py", "OUTPUT_DIR", "{}"),
    ("make_space.py", "DIR", "org/name", "{}"),
    ("study_distillation.py", "FOLDER", "{}"),
    ("study_masked_pretraining.py", "FOLDER", "{}"),
    ("convert_checkpoint.py", "OUTPUT_DIR", "a.pth", "{}"),
    ("convert_checkpoint.py", "--clip-teacher", "a.pth", "a", "--clip-teacher", "{}"),
    ("push_to_hub.py", "--folder", "m", "org/name", "--dry-run", "--folder", "{}"),
    ("search_videos.py", "OUT", "index", "videos", "{}", "--model", "m"),
]


@pytest.mark.parametrize(("name", "argument", "words"), [(name, argument, words) for name, argument, *words in FOLDERS])
@pytest.mark.parametrize("below", ["", "sub/deep"])
def test_a_folder_to_write_cannot_be_a_file(name, argument, words, below, tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = call(name, *(word.format(file / below) for word in words))
    expected = f"error: argument {argument}: {file} is a file, not a folder\n"
    assert (result.returncode, result.stderr, result.stdout) == (1, expected, "")


@pytest.mark.parametrize("name", ["../x", "a/b/c", "a b", "a/", "/a", "a//b"])
def test_what_cannot_be_a_repository_is_named(name, tmp_path):
    shape = "of letters, digits, '-', '_' and '.' on the Hub"
    for script, argument, *words in (
        ("make_space.py", "ORG/MODEL", name, tmp_path / "new"),
        ("push_to_hub.py", "ORG/NAME", "--dry-run", NANO, name),
    ):
        result = call(script, *words)
        assert result.stderr == f"error: {argument} must be OWNER/NAME {shape}, got {name!r}\n", result.stderr
    result = call("make_cards.py", tmp_path / "new", f"--organization={name}")
    assert result.stderr == f"error: --organization must be a name {shape}, got {name!r}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--train-clips", "--test-clips", "--seed"])
@pytest.mark.parametrize("captions", [(), ("--captions",)])
def test_moving_digits_are_not_fewer_than_none(option, captions, tmp_path):
    result = call("make_moving_digits.py", tmp_path / "new", option, -1, *captions)
    assert result.stderr == f"error: {option} must not be negative, got -1\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_published_arguments_that_are_damaged_are_named(content, tmp_path):
    path = tmp_path / "published.json"
    path.write_bytes(content)
    result = call("make_recipes.py", path)
    assert result.stderr.startswith(f"error: {path}: ") and result.stderr.count("\n") == 1


def test_a_launcher_adds_nothing_to_the_line():
    """As docs/training.md says: without a launcher, and with one that is quiet."""
    options = ("--data", "../nope", "--size", "tiny", "--output-dir", "nowhere")
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1")
    results = [run(*launcher, SCRIPTS / "finetune.py", *options) for launcher in ((sys.executable,), accelerate)]
    for result in results:
        assert result.returncode == 1
        lines = [line for line in result.stderr.splitlines() if "Warning" not in line]
        assert "Traceback" not in result.stderr and lines[-1] == "error: ../nope: there is no such folder"
    assert results[0].stderr == "error: ../nope: there is no such folder\n"


# Ends

TRAINING = ("distill.py", "finetune.py", "pretrain_umt.py", "pretrain_video_text.py")
REPEATED = ("evaluate_retrieval.py", "evaluate_video.py", "push_to_hub.py", "search_videos.py")
REPEATED += ("study_distillation.py", "study_masked_pretraining.py")
GO_ON = {**dict.fromkeys(TRAINING, "--resume"), **dict.fromkeys(REPEATED, "the same command")}


def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "words", "go_on"),
    [
        *((name, ["index"], GO_ON.get(name)) for name in NAMES),
        ("search_videos.py", ["query"], None),
    ],
)
def test_ctrl_c_is_one_line_of_one_process(name, words, go_on, monkeypatch, capsys, sigint):
    monkeypatch.setattr(command_line.Parser, "parse_known_args", interrupt)
    monkeypatch.setattr(sys, "argv", [name, *words])
    line = "interrupted" + (f": go on with {go_on}" if go_on else "") + "\n"
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        assert end.type is SystemExit and end.value.code == 130
        assert capsys.readouterr() == ("", line if rank == "0" else "")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one interrupts no clean-up with a traceback


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_goes_away_ends_nothing(stream, buffered, tmp_path, monkeypatch):
    """As `| head` does, and at Ctrl-C `2>&1 | tee log`, while a run saves its state."""
    reader, writer = os.pipe()
    file = open(writer, "wb", buffering=0)  # noqa: SIM115, PTH123
    text = io.TextIOWrapper(io.BufferedWriter(file) if buffered else file, "utf-8", write_through=not buffered)
    monkeypatch.setattr(sys, stream, text)

    def main():
        print("before", file=getattr(sys, stream), flush=buffered)
        assert os.read(reader, 100) == b"before\n"
        os.close(reader)
        for _ in tqdm(range(3), mininterval=0):
            print("x" * 10**5, file=getattr(sys, stream))
            Console(stderr=stream == "stderr").print("rich")
        (tmp_path / "whole").write_text("whole")
        print("last", file=getattr(sys, stream))

    command_line.run_main(main)
    assert getattr(sys, stream) is text and (tmp_path / "whole").exists()
    text.close()


def test_a_script_whose_output_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, SCRIPTS / "classify.py", "--help"], {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
