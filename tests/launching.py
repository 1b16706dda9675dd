"""Scripts as a user launches them, and data for them."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

from tests.conftest import ROOT

SCRIPTS = ROOT / "scripts"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true"}


def words(*command):
    return [str(part) for part in command]


def run(*command, folder=ROOT):
    return subprocess.run(words(*command), capture_output=True, text=True, cwd=folder, env=ENVIRONMENT)


def launched(script, processes, *options):
    """The command that launches a script."""
    kind = ("--cpu", "--num_processes", 1) if processes == 1 else ("--config_file", SCRIPTS / "launch" / "cpu.yaml")
    accelerate = Path(sys.executable).with_name("accelerate")
    return words(accelerate, "launch", *kind, SCRIPTS / script, *options)


def launch(script, processes, *options):
    return run(*launched(script, processes, *options))


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
