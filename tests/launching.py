"""Scripts as a user launches them, in this process or in processes of their own, and data for them."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock

import av
import numpy as np
from safetensors.torch import load_file

from tests.conftest import ROOT, forget_accelerator

SCRIPTS = ROOT / "scripts"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true"}


def words(*command):
    return [str(part) for part in command]


def call(script, *options):
    """Runs a script in this process, which takes a tenth of the time of a process of its own."""
    output, errors, code = _stream("strict"), _stream("backslashreplace"), 0
    module = import_module(script.removesuffix(".py"))
    arguments = words(SCRIPTS / script, *options)
    environment = mock.patch.dict(os.environ, ENVIRONMENT)
    handler = logging.StreamHandler(errors)  # pytest has one of its own, so that the default one stays silent
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    with mock.patch.object(sys, "argv", arguments), environment, redirect_stdout(output), redirect_stderr(errors):
        try:
            module.main()
        except SystemExit as error:
            code = error.code
        finally:
            forget_accelerator()
            logging.getLogger().removeHandler(handler)
    if isinstance(code, str):
        print(code, file=errors)
    return subprocess.CompletedProcess(
        arguments,
        1 if isinstance(code, str) else code or 0,
        *(one.buffer.getvalue().decode() for one in (output, errors)),
    )


def _stream(errors):
    """As Python opens standard output and errors in most terminals."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)


def call_as_process(command, **_):
    """In place of `subprocess.run` where a script runs others: these run in this process too."""
    place = next(index for index, part in enumerate(command) if part.endswith(".py"))
    assert command[0] == sys.executable and Path(command[place]).parent == SCRIPTS
    result = call(Path(command[place]).name, *command[place + 1 :])
    assert_finished(result)
    return result


def run(*command, folder=ROOT):
    """Runs a command in a process of its own."""
    return subprocess.run(words(*command), capture_output=True, text=True, cwd=folder, env=ENVIRONMENT)


def launched(script, processes, *options):
    """The command that launches a script."""
    kind = ("--cpu", "--num_processes", 1) if processes == 1 else ("--config_file", SCRIPTS / "launch" / "cpu.yaml")
    accelerate = Path(sys.executable).with_name("accelerate")
    return words(accelerate, "launch", *kind, SCRIPTS / script, *options)


def launch(script, processes, *options):
    """Runs a script by `accelerate launch`, as several processes if there are to be several."""
    return run(*launched(script, processes, *options))


def start(*command):
    return subprocess.Popen(
        words(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
    )


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < end
        time.sleep(0.05)


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def last_weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def assert_finished(result):
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


def write_broken_videos(folder, video):
    """A truncated, an empty and a text file and one that has only sound, all by the name of videos."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = video.read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return ["truncated.mp4", "empty.mp4", "text.mp4", "sound.mp4"]
