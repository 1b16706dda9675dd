"""What the studies share: runs of the training scripts, each made once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent


def check_study(folder: Path, **settings: Any) -> None:
    """Ends the process where what is in the folder was made with other settings, or can't be read or written."""
    from modeling_videomamba.training.settings import check_settings  # takes seconds, and is not for the help

    try:
        check_settings(folder / "settings.json", settings, f"{folder} has a study")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def run_script(script: str, *options: Any) -> None:
    """Runs a script to its end. Raises `subprocess.CalledProcessError` with what it wrote."""
    subprocess.run([sys.executable, str(SCRIPTS / script), *map(str, options)], check=True, capture_output=True)


def train(script: str, output: Path, *options: Any) -> dict[str, Any]:
    """The summary of a run of training on one process, which is made, or goes on, if it isn't there."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1")
    command = (*launcher, SCRIPTS / script, "--output-dir", output, "--resume", *options)
    if not (output / "summary.json").exists():
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return json.loads((output / "summary.json").read_text("utf-8"))
