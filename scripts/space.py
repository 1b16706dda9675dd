"""The folder of a Space that shows the page of app.py, as make_space.py writes it."""

import shutil
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from modeling_videomamba.training.names import check_hub_id

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
PACKAGE = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "modeling_videomamba", "videomamba_arguments")
PAGE = ("app.py", "page.py", "command_line.py", "thread_policy.py")
PORT = 7860  # as in the Dockerfile


def write_space(folder: Path, model: str) -> None:
    r"""
    Writes the folder.

    Args:
        folder (`Path`): Empty, or not there yet.
        model (`str`): Id on the Hub; the page reads it from the card.

    Raises:
        `ValueError`: if the folder has something in it, or the model can't be one on the Hub.
    """
    if Path(model).is_dir():
        raise ValueError(f"{model} is a directory here, a Space needs a model on the Hub")
    check_hub_id("ORG/MODEL", model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copyfile(SCRIPTS / name, folder / name)
    shutil.copyfile(SCRIPTS / "space.Dockerfile", folder / "Dockerfile")
    copy_package(folder / "package")
    make_card(model).save(folder / "README.md")


def copy_package(folder: Path) -> None:
    """What pip needs to install the package, without what was compiled here."""
    folder.mkdir()
    for name in PACKAGE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
        else:
            shutil.copyfile(source, folder / name)


def make_card(model: str) -> SpaceCard:
    data = SpaceCardData(title="VideoMamba", sdk="docker", app_port=PORT, models=[model], license="apache-2.0")
    text = f"Labels of videos by [{model}](https://huggingface.co/{model})."
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n# VideoMamba\n\n{text}\n")
