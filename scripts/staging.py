"""The folder of a model as it is published: what is in it, and that it is what it was made of."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig
from transformers.modeling_utils import PreTrainedModel

import modeling_videomamba
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoTextRetrieval,
    VideoMambaImageProcessor,
    VideoMambaProcessor,
    VideoMambaVideoProcessor,
    VideoMambaVideoTextConfig,
)
from modeling_videomamba.conversion import VIDEO_TEXT, convert_checkpoint
from modeling_videomamba.labels import load_labels
from modeling_videomamba.training.cards import CARD, reason_to_keep, seal
from modeling_videomamba.training.loading import load_pretrained
from modeling_videomamba.training.masks import token_grid
from modeling_videomamba.training.names import check_name

SHOWN_WITH_CARD = {".png", ".jpg", ".gif", ".mp4"}  # what a card of a trained model may link to
MAX_VERIFIED_FRAMES = 8


@dataclass
class Publishable:
    """A model with its processor, and the files that its card shows."""

    model: PreTrainedModel
    processor: Any
    pictures: list[Path]


@dataclass
class StagedFile:
    """A file as it is published: its path in the repository, bytes, SHA-256, and what Git would call it."""

    path: str
    size: int
    sha256: str
    git_oid: str


def load_source(source: Path, labels: str | None, tokenizer: str | None) -> Publishable:
    r"""
    A checkpoint of the original release, converted, or a directory that was trained or converted.

    Args:
        source (`Path`): A `.pth` file or a directory.
        labels (`str`, *optional*): Of a checkpoint: as in [`load_labels`].
        tokenizer (`str`, *optional*): Of a checkpoint of videos and texts: directory or Hub id.

    Raises:
        `OSError`, `ValueError`: if it is no such model, or an option doesn't fit.
    """
    if source.is_dir():
        if labels is not None:
            raise ValueError(f"--labels {labels} is for a .pth file: {source} has its own")
        if (source / CARD).is_symlink():  # it may lead to any file of this machine
            raise ValueError(f"{source / CARD} is a symbolic link to {(source / CARD).readlink()}: pass --card")
        return Publishable(*load_directory(source), find_pictures(source))
    converted = convert_checkpoint(source, None if labels is None else load_labels(labels))
    if converted.kind == VIDEO_TEXT:
        if tokenizer is None:
            raise ValueError(f"{source} is a model of videos and texts: pass --tokenizer")
        check_name(tokenizer)
        converted.add_tokenizer(tokenizer)
    if not isinstance(converted.model.config, VideoMambaConfig | VideoMambaVideoTextConfig):
        raise ValueError(f"{source} is a {converted.kind}, which is not VideoMamba")
    return Publishable(converted.model, converted.processor, [])


def find_pictures(source: Path) -> list[Path]:
    """What the card of a directory may show; names what looks like it and is not published."""
    pictures = []
    for path in sorted(path for path in source.iterdir() if path.suffix in SHOWN_WITH_CARD):
        reason = reason_to_keep(path)
        if reason is None:
            pictures.append(path)
        else:
            print(f"left out: {path}, {reason}")
    return pictures


def load_directory(path: Path) -> tuple[PreTrainedModel, Any]:
    """Model and processor of a directory. Raises `OSError` or `ValueError` where it isn't one of ours, or not whole."""
    config = load_pretrained(AutoConfig, path)
    if not isinstance(config, VideoMambaConfig | VideoMambaVideoTextConfig):
        raise ValueError(f"{path} must be a VideoMamba, got {config.model_type}")
    name = ", ".join(config.architectures or ["VideoMambaModel"])
    if name not in modeling_videomamba.__all__:
        raise ValueError(f"{path} is a {name}, which this package doesn't have")
    model_class = getattr(modeling_videomamba, name)
    model, info = load_pretrained(model_class, path, output_loading_info=True, ignore_mismatched_sizes=True)
    if strange := [f"{kind} {', '.join(sorted(map(str, keys)))}" for kind, keys in info.items() if keys]:
        raise ValueError(f"{path} does not fit {name}: {'; '.join(strange)}")
    processor_class: Any = VideoMambaProcessor
    if isinstance(config, VideoMambaConfig):
        processor_class = VideoMambaImageProcessor if config.num_frames is None else VideoMambaVideoProcessor
    return model.eval(), load_pretrained(processor_class, path)


def stage(source: Publishable, card: ModelCard, folder: Path, max_shard_size: str) -> list[StagedFile]:
    r"""
    Writes weights, configurations, code and card, and checks that the model in the folder is the one given.

    Args:
        source ([`Publishable`]): The model.
        card (`ModelCard`): Becomes `README.md`.
        folder (`Path`): Empty, or not there yet.
        max_shard_size (`str`): Of a file of weights, such as `"5GB"`.

    Returns:
        `list[StagedFile]`: sorted by path.

    Raises:
        `ValueError`: if the folder has something in it, or the model in it says something else.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be empty")
    folder.mkdir(parents=True, exist_ok=True)
    source.model.save_pretrained(folder, max_shard_size=max_shard_size)
    source.processor.save_pretrained(folder)
    for path in source.pictures:
        shutil.copyfile(path, folder / path.name)
    (folder / CARD).write_text(seal(str(card)), "utf-8", newline="\n")
    verify(source.model, folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [_describe(path, folder) for path in paths]


def _describe(path: Path, folder: Path) -> StagedFile:
    size = path.stat().st_size
    sha256, git_oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git_oid.update(block)
    return StagedFile(path.relative_to(folder).as_posix(), size, sha256.hexdigest(), git_oid.hexdigest())


def verify(model: PreTrainedModel, folder: Path) -> None:
    """
    Raises `ValueError` unless the model in a folder has the weights of the one given, bit by bit, and gives what it
    gives, up to the order of sums, which matrix products choose by the alignment of memory.
    """
    staged, _ = load_directory(folder)
    weights, written = model.state_dict(), staged.state_dict()
    differing = [name for name in weights.keys() | written.keys() if not _equal(weights.get(name), written.get(name))]
    inputs = example_inputs(model)
    with torch.inference_mode():
        before, after = (dict(one(**inputs)) for one in (model.eval(), staged))
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and not torch.allclose(value, after[name], rtol=1e-5, atol=1e-6):
            differing.append(name)
    if differing:
        raise ValueError(f"{folder} is not what was staged: {', '.join(sorted(differing)[:5])} differ")


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Noise of the resolution of a model, of as many frames as it sees but no more than a few."""
    config = model.config if isinstance(model.config, VideoMambaConfig) else model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    height, width = config.input_size
    frames = config.num_frames
    shape = [] if frames is None else [min(frames, MAX_VERIFIED_FRAMES // config.tubelet_size * config.tubelet_size)]
    pixels = torch.randn(1, *shape, config.num_channels, height, width, generator=generator)
    inputs = {"pixel_values": pixels}
    if isinstance(model, VideoMambaForMaskedPreTraining):
        grid = token_grid(config, pixels)
        inputs["bool_masked_pos"] = torch.arange(grid[0] * grid[1] * grid[2]).remainder(2).bool().unsqueeze(0)
    if isinstance(model, VideoMambaForVideoTextRetrieval):
        inputs["input_ids"] = torch.randint(model.text_model.config.vocab_size, (1, 8), generator=generator)
    return inputs
