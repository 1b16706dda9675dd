"""Checkpoints of the original release to models of this package."""

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from .checkpoint_files import CheckpointError, load_tensors
from .configuration_videomamba import VideoMambaConfig
from .conversion_clip import build_clip, is_clip_visual_encoder, rename_clip
from .conversion_video_text import (
    POSITION_IDS,
    is_video_text,
    part,
    rename_video_text,
    video_text_config,
)
from .conversion_video_text import REQUIRED as VIDEO_TEXT_REQUIRED
from .conversion_vim import REASON, has_middle_class_token, is_vim_name
from .image_processing_videomamba import VideoMambaImageProcessor
from .modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    VideoMambaPreTrainedModel,
)
from .modeling_videomamba_pretraining import VideoMambaForMaskedPreTraining
from .modeling_videomamba_video_text import VideoMambaForVideoTextRetrieval
from .processing_videomamba import VideoMambaProcessor
from .video_processing_videomamba import VideoMambaVideoProcessor

StateDict = dict[str, torch.Tensor]

# Tensors without which a file is not a VideoMamba checkpoint, and the dimensions they may have.
REQUIRED = {
    "cls_token": (3,),
    "pos_embed": (3,),
    "patch_embed.proj.weight": (4, 5),
    "patch_embed.proj.bias": (1,),
    "layers.0.norm.weight": (1,),
    "layers.0.mixer.in_proj.weight": (2,),
    "layers.0.mixer.conv1d.weight": (3,),
    "layers.0.mixer.dt_proj.weight": (2,),
    "layers.0.mixer.A_b_log": (2,),
}

# From the original's names to those of `VideoMambaForVideoClassification`, applied in turn.
RENAMING = (
    (r"^head\.", "classifier."),
    (r"^distill_head\.", "distillation_head."),
    (r"^clip_decoder\.", "alignment_decoders."),
    (r"^norm(_f)?\.", "videomamba.norm."),
    (r"^cls_token$", "videomamba.embeddings.cls_token"),
    (r"^pos_embed$", "videomamba.embeddings.position_embeddings"),
    (r"^temporal_pos_embedding$", "videomamba.embeddings.temporal_position_embeddings"),
    (r"^patch_embed\.proj\.", "videomamba.embeddings.patch_embeddings.projection."),
    (r"^layers\.", "videomamba.layers."),
    (r"\.mixer\.A_b_log$", ".mixer.scans.1.A_log"),
    (r"\.mixer\.(A_log|D)$", r".mixer.scans.0.\1"),
    (r"\.mixer\.D_b$", ".mixer.scans.1.D"),
    (r"\.mixer\.dt_proj_b\.bias$", ".mixer.scans.1.dt_bias"),
    (r"\.mixer\.dt_proj\.bias$", ".mixer.scans.0.dt_bias"),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r".mixer.scans.1.\1."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)\.", r".mixer.scans.0.\1."),
)

CLIP = "CLIP visual encoder"
VIDEO_TEXT = "video-text"
ALIGNED_KINDS = ("masked-pretraining", VIDEO_TEXT)
WRAPPERS = ("model", "module")


@dataclass
class ConvertedCheckpoint:
    """A model, its processor, what the checkpoint was recognised as, and the CLIP teacher that was in it."""

    model: PreTrainedModel
    processor: VideoMambaImageProcessor | VideoMambaVideoProcessor | VideoMambaProcessor | BaseImageProcessor
    kind: str
    teacher: "ConvertedCheckpoint | None" = None

    def add_tokenizer(self, tokenizer: str | os.PathLike) -> None:
        r"""
        Makes the processor of a model of videos and texts one of both.

        Args:
            tokenizer (`str` or `os.PathLike`): Directory or Hub id.

        Raises:
            `OSError`: if there is no such tokenizer.
            `CheckpointError`: if it is damaged, has more tokens than the model or no words, or the model takes no text.
        """
        if self.kind != VIDEO_TEXT:
            raise CheckpointError(f"`tokenizer` is for a {VIDEO_TEXT} checkpoint, this is a {self.kind} one.")
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
        except OSError:
            raise
        except Exception as error:  # a damaged file fails in any way
            raise CheckpointError(
                f"`tokenizer` {tokenizer} can't be loaded: {type(error).__name__}: {error}"
            ) from error
        vocab_size = self.model.config.text_config.vocab_size
        if len(loaded) > vocab_size:
            raise CheckpointError(f"`tokenizer` {tokenizer} has {len(loaded)} tokens, the checkpoint {vocab_size}.")
        try:
            self.processor = VideoMambaProcessor(self.processor, loaded)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes safetensors, configurations and the code for remote loading."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)


def convert_checkpoint(
    path: str | os.PathLike,
    labels: Sequence[str] | None = None,
    *,
    alignment_interval: int | None = None,
    num_attention_heads: int | None = None,
    text_num_attention_heads: int | None = None,
) -> ConvertedCheckpoint:
    r"""
    Reads a checkpoint of the original release: an image model, a self-distilled student, a video model, a model of
    masked pretraining, a model of videos and texts, or the visual encoder of CLIP that taught them. Every other value
    of the configuration comes from the shapes of the tensors.

    Args:
        path (`str` or `os.PathLike`): The `.pth` file, read with `weights_only=True`.
        labels (`Sequence[str]`, *optional*): Class names in the order of the head.
        alignment_interval (`int`, *optional*): Of masked pretraining that aligned several layers; by default 1.
        num_attention_heads (`int`, *optional*): Of a visual encoder of CLIP; by default heads have 64 channels.
        text_num_attention_heads (`int`, *optional*): Of the BERT of a model of videos and texts; by default 12.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `CheckpointError`: if it is no checkpoint of a known kind, has tensors that the model has no place for, lacks
            some, or an argument doesn't fit it.
    """
    state_dict = load_state_dict(path)
    kind = recognise(state_dict)
    if alignment_interval is not None and kind not in ALIGNED_KINDS:
        raise CheckpointError(f"`alignment_interval` is for masked pretraining, this is a {kind} checkpoint.")
    if num_attention_heads is not None and kind not in (CLIP, VIDEO_TEXT):
        raise CheckpointError(f"`num_attention_heads` is for a {CLIP}, this is a {kind} checkpoint.")
    if text_num_attention_heads is not None and kind != VIDEO_TEXT:
        raise CheckpointError(f"`text_num_attention_heads` is for a {VIDEO_TEXT} checkpoint, this is a {kind} one.")
    interval = 1 if alignment_interval is None else alignment_interval
    if kind in (CLIP, VIDEO_TEXT):
        _set_labels(VideoMambaConfig(), {}, labels)  # they have none
    if kind == CLIP:
        return _convert_clip(state_dict, num_attention_heads)
    if kind == VIDEO_TEXT:
        teacher = part(state_dict, "clip_teacher.")
        own = {name: tensor for name, tensor in state_dict.items() if not name.startswith("clip_teacher.")}
        heads = 12 if text_num_attention_heads is None else text_num_attention_heads
        converted = _convert_video_text(own, interval, heads)
        converted.teacher = _convert_clip(teacher, num_attention_heads) if teacher else None
        return converted
    try:
        config = infer_config(state_dict, interval)
    except StrictDataclassError as error:
        raise CheckpointError(str(error)) from error
    _set_labels(config, state_dict, labels)
    is_video = kind in ("video", "masked-pretraining")
    model_class: type[VideoMambaPreTrainedModel] = VideoMambaModel
    if kind == "masked-pretraining":
        model_class = VideoMambaForMaskedPreTraining
    elif "head.weight" in state_dict:
        model_class = VideoMambaForVideoClassification if is_video else VideoMambaForImageClassification
    model = model_class(config)
    _load(model, _renamed(state_dict, model))
    processor_class = VideoMambaVideoProcessor if is_video else VideoMambaImageProcessor
    return ConvertedCheckpoint(model.eval(), processor_class.for_model(config), kind)


def _convert_clip(state_dict: StateDict, num_attention_heads: int | None) -> ConvertedCheckpoint:
    try:
        model, processor = build_clip(state_dict, num_attention_heads)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    _load(model, rename_clip(state_dict))
    return ConvertedCheckpoint(model.eval(), processor, CLIP)


def _convert_video_text(
    state_dict: StateDict, alignment_interval: int, text_num_attention_heads: int
) -> ConvertedCheckpoint:
    encoder = part(state_dict, "vision_encoder.")
    try:
        vision_config = infer_config(encoder, alignment_interval)
        config = video_text_config(state_dict, vision_config, text_num_attention_heads)
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(str(error)) from error
    model = VideoMambaForVideoTextRetrieval(config)
    renamed: StateDict = {}
    for name, tensor in state_dict.items():
        if name == POSITION_IDS and torch.equal(tensor.flatten(), torch.arange(tensor.numel())):
            continue  # no weight, and no other than those of Transformers
        inner = name.removeprefix("vision_encoder.")
        renamed[rename_video_text(rename(inner) if inner != name else name, config.fusion_layer)] = tensor
    if len(renamed) < len(state_dict) - (POSITION_IDS in state_dict):
        raise CheckpointError("The checkpoint does not fit: two of its tensors have one place in the model.")
    _load(model, renamed)
    return ConvertedCheckpoint(model.eval(), VideoMambaProcessor.video_processor_for(vision_config), VIDEO_TEXT)


def load_state_dict(path: str | os.PathLike) -> StateDict:
    """The tensors of a `.pth` file, out of `model` or `module` if they are in there, without wrappers' prefixes."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    # trainers stored their arguments beside the weights; a namespace holds values and runs nothing
    checkpoint = load_tensors(path, allowed=[argparse.Namespace])
    if is_vim_name(checkpoint):
        raise CheckpointError(f"{path}: a checkpoint of Vim, by the arguments in it: {REASON}")
    while isinstance(checkpoint, dict) and (
        inner := [key for key in WRAPPERS if isinstance(checkpoint.get(key), dict)]
    ):
        checkpoint = checkpoint[inner[0]]
    if not isinstance(checkpoint, dict) or not any(isinstance(tensor, torch.Tensor) for tensor in checkpoint.values()):
        raise CheckpointError(f"{path}: holds no state dict, neither at top level nor under 'model' or 'module'")
    strangers = [name for name, tensor in checkpoint.items() if not isinstance(tensor, torch.Tensor)]
    if strangers:
        raise CheckpointError(f"{path}: not only tensors in its state dict: {_listing(strangers)}")
    if numbers := [name for name in checkpoint if not isinstance(name, str)]:
        raise CheckpointError(f"{path}: names of tensors must be text, got {_listing(numbers)}")
    state_dict = {_without_wrappers(name): tensor for name, tensor in checkpoint.items()}
    if len(state_dict) < len(checkpoint):
        raise CheckpointError(f"{path}: holds tensors that differ only in the prefix of their names")
    return state_dict


def _without_wrappers(name: str) -> str:
    """Without what `torch.compile`, of the model or of parts, and other wrappers add to the name of a tensor."""
    return re.sub(r"^((module|backbone|encoder)\.)+", "", re.sub(r"(^|(?<=\.))_orig_mod\.", "", name))


def recognise(state_dict: StateDict) -> str:
    """`"image"`, `"student"`, `"video"`, `"masked-pretraining"`, [`VIDEO_TEXT`] or [`CLIP`]; an error for any other."""
    if is_clip_visual_encoder(state_dict):
        return CLIP
    if is_video_text(state_dict):
        missing = [name for name in VIDEO_TEXT_REQUIRED if name not in state_dict]
        if missing:
            raise CheckpointError(f"This is not a {VIDEO_TEXT} checkpoint: it lacks {_listing(missing)}.")
        _check_encoder(part(state_dict, "vision_encoder."))
        return VIDEO_TEXT
    _check_encoder(state_dict)
    prefixes = {name.split(".")[0] for name in state_dict}
    if "clip_decoder" in prefixes:
        return "masked-pretraining"
    if "distill_head" in prefixes:
        return "student"
    is_video = "temporal_pos_embedding" in state_dict or state_dict["patch_embed.proj.weight"].ndim == 5
    if not is_video and has_middle_class_token(state_dict["pos_embed"]):
        raise CheckpointError(f"This is a checkpoint of Vim, by its position embeddings: {REASON}")
    return "video" if is_video else "image"


def _check_encoder(state_dict: StateDict) -> None:
    """Raises `CheckpointError` unless there is what makes a VideoMamba."""
    missing = [name for name in REQUIRED if name not in state_dict]
    if missing:
        raise CheckpointError(f"This is not a VideoMamba checkpoint: it lacks {_listing(missing)}.")
    for name, dimensions in REQUIRED.items():
        if state_dict[name].ndim not in dimensions:
            raise CheckpointError(f"This is not a VideoMamba checkpoint: `{name}` is {tuple(state_dict[name].shape)}.")


def infer_config(state_dict: StateDict, alignment_interval: int = 1) -> VideoMambaConfig:
    """The configuration that the shapes of the tensors imply."""
    kernel = state_dict["patch_embed.proj.weight"]
    tubelet_size = kernel.shape[2] if kernel.ndim == 5 else 1
    num_patches = state_dict["pos_embed"].shape[1] - 1
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise CheckpointError(f"`pos_embed` holds {num_patches} patches, which is not the square of a whole number.")
    temporal = state_dict.get("temporal_pos_embedding")
    hidden_size = state_dict["cls_token"].shape[-1]
    mixer, names = "layers.0.mixer.", "\n".join(state_dict)
    channels, state_size = state_dict[mixer + "A_b_log"].shape
    distillation_head = state_dict.get("distill_head.1.weight")
    decoders = [tensor for name, tensor in state_dict.items() if re.fullmatch(r"clip_decoder\.\d+\.head\.weight", name)]
    alignment: dict[str, Any] = {}
    if decoders:
        alignment = {"num_aligned_layers": len(decoders), "alignment_interval": alignment_interval}
        alignment["alignment_size"] = len(decoders[0])
    return VideoMambaConfig(
        **alignment,
        image_size=grid * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        num_channels=kernel.shape[1],
        num_frames=None if temporal is None else temporal.shape[1] * tubelet_size,
        tubelet_size=tubelet_size,
        hidden_size=hidden_size,
        num_hidden_layers=1 + max(int(index) for index in re.findall(r"^layers\.(\d+)\.", names, re.MULTILINE)),
        state_size=state_size,
        conv_kernel=state_dict[mixer + "conv1d.weight"].shape[-1],
        expand=channels // hidden_size,
        time_step_rank=state_dict[mixer + "dt_proj.weight"].shape[1],
        teacher_hidden_size=None if distillation_head is None else distillation_head.shape[0],
    )


def rename(name: str) -> str:
    """Name in `VideoMambaForVideoClassification` of a tensor of the original."""
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def _set_labels(config: VideoMambaConfig, state_dict: StateDict, labels: Sequence[str] | None) -> None:
    num_labels = state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0
    if labels is None:
        if num_labels:
            config.num_labels = num_labels
        return
    if len(labels) != num_labels:
        raise CheckpointError(f"`labels` has {len(labels)} names, the checkpoint has {num_labels} classes.")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _renamed(state_dict: StateDict, model: VideoMambaPreTrainedModel) -> StateDict:
    """The tensors under the names and in the shapes of `model`."""
    prefix = f"{model.base_model_prefix}." if isinstance(model, VideoMambaModel) else ""
    renamed = {rename(name).removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    if len(renamed) < len(state_dict):
        raise CheckpointError("The checkpoint does not fit: two of its tensors have one place in the model.")
    kernel = rename("patch_embed.proj.weight").removeprefix(prefix)
    if renamed[kernel].ndim == 4:
        renamed[kernel] = renamed[kernel].unsqueeze(2)
    return renamed


def _load(model: PreTrainedModel, state_dict: StateDict) -> None:
    expected = model.state_dict()
    problems = []
    if unused := sorted(set(state_dict) - set(expected)):
        problems.append(f"tensors that the model has no place for: {_listing(unused)}")
    if missing := sorted(set(expected) - set(state_dict)):
        problems.append(f"tensors that the checkpoint lacks: {_listing(missing)}")
    for name in sorted(set(expected) & set(state_dict)):
        if state_dict[name].shape != expected[name].shape:
            shapes = f"{tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
            problems.append(f"`{name}` has shape {shapes}")
    if problems:
        raise CheckpointError("The checkpoint does not fit: " + "; ".join(problems))
    model.load_state_dict(state_dict)


def _listing(names: Sequence[object], limit: int = 10) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + more
