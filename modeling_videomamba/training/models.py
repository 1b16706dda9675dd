"""The model that a run starts from."""

from typing import Any

from accelerate.logging import get_logger
from torch import nn

from videomamba_arguments import ModelArguments, StartArguments

from ..configuration_videomamba import VIDEOMAMBA_SIZES, VideoMambaConfig
from ..image_processing_videomamba import VideoMambaImageProcessor, check_processor_settings
from ..modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaPreTrainedModel,
)
from ..modeling_videomamba_pretraining import VideoMambaForMaskedPreTraining
from ..video_processing_videomamba import VideoMambaVideoProcessor
from .data import Processor
from .loading import load_pretrained, load_start, read_config

logger = get_logger(__name__)
HEADS = ("classifier", "distillation_head", "alignment_decoders")  # new ones for other classes and teachers
Classifier = VideoMambaForVideoClassification


def load_classifier(args: ModelArguments, kind: str, label_names: list[str] | None, **changes: Any) -> Classifier:
    r"""
    The classifier to train, with a head for the labels: position embeddings resized to the frames and the resolution
    that are asked for, an image model inflated for videos. The head is the checkpoint's where its labels are the same.

    Args:
        args ([`ModelArguments`]): `num_frames` is for videos only.
        kind (`str`): `"video"` or `"image"`.
        label_names (`list[str]`, *optional*): Classes in order; `None` for one number to predict.
        changes: Other fields of the configuration.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or a value does not fit.
    """
    labels = label_names or ["value"]
    changes |= {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "regression" if label_names is None else "single_label_classification",
    }
    model_class = VideoMambaForImageClassification if kind == "image" else VideoMambaForVideoClassification
    model, fresh = _load(model_class, args, kind, changes)
    if args.model is not None and load_pretrained(VideoMambaConfig, args.model).id2label != changes["id2label"]:
        fresh.add("classifier")
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    if fresh:
        names = f"these {len(labels)} classes" if label_names else "values"
        logger.warning(f"fresh weights in {', '.join(sorted(fresh))}: {args.model} has none that fit {names}")
    return model


def load_pretraining_model(args: ModelArguments, kind: str, **changes: Any) -> VideoMambaForMaskedPreTraining:
    r"""
    The model of masked pretraining to train, from scratch or from the weights of any VideoMamba, its position
    embeddings as with [`load_classifier`]. Decoders are those of the checkpoint where it aligns the same layers.

    Args:
        args ([`ModelArguments`]): `num_frames` is for videos only.
        kind (`str`): `"video"` or `"image"`.
        changes: Other fields of the configuration.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or a value does not fit.
    """
    model, fresh = _load(VideoMambaForMaskedPreTraining, args, kind, changes)
    if args.model is not None:
        before = load_pretrained(VideoMambaConfig, args.model)
        if before.aligned_layers != model.config.aligned_layers:  # a decoder belongs to its layer
            fresh.add("alignment_decoders")
            for decoder in model.alignment_decoders:
                nn.init.xavier_uniform_(decoder.head.weight)
                nn.init.zeros_(decoder.head.bias)
                decoder.norm.reset_parameters()
    if fresh:
        logger.warning(f"fresh weights in {', '.join(sorted(fresh))}: {args.model} has none that fit the teacher")
    return model


def _load(model_class: Any, args: ModelArguments, kind: str, changes: dict[str, Any]) -> tuple[Any, set[str]]:
    """A model for data of a kind, and the parts of it for which `args.model`, if that is given, has no weights."""
    if kind == "image" and args.num_frames is not None:
        raise ValueError(f"--num-frames {args.num_frames}: the data are images")
    check_input_size(args)
    if args.drop_path_rate is not None:
        changes["drop_path_rate"] = args.drop_path_rate
    if args.model is None:
        return model_class(_config(args, kind, changes)), set()
    model, fresh = load_start(model_class, args.model, HEADS, **changes)
    if kind == "image":
        model.resize_position_embeddings(image_size=args.image_size)
        # images don't take it, and several processes want gradients of all there is
        if model.config.num_frames is not None:
            model.videomamba.embeddings.temporal_position_embeddings.requires_grad_(False)
        return model, fresh
    if model.config.num_frames is None:
        model.inflate(args.num_frames or VideoMambaVideoProcessor.num_frames, args.tubelet_size or 1)
    elif args.tubelet_size not in (None, model.config.tubelet_size):
        raise ValueError(f"--tubelet-size {args.tubelet_size}: {args.model} has {model.config.tubelet_size}")
    return model.resize_position_embeddings(image_size=args.image_size, num_frames=args.num_frames), fresh


def check_input_size(args: StartArguments) -> None:
    """Raises `ValueError` for a number of frames or a resolution that no processor makes."""
    for option, setting, value in (
        ("--num-frames", "num_frames", args.num_frames),
        ("--image-size", "size", args.image_size),
    ):
        try:
            check_processor_settings({} if value is None else {setting: value})
        except ValueError as error:
            raise ValueError(f"{option} {value}: {error}") from None


def _config(args: ModelArguments, kind: str, changes: dict[str, Any]) -> VideoMambaConfig:
    if args.image_size is not None:
        changes["image_size"] = args.image_size
    if kind == "image":
        changes["num_frames"] = None
    elif args.num_frames is not None:
        changes["num_frames"] = args.num_frames
    if args.tubelet_size is not None:
        changes["tubelet_size"] = args.tubelet_size
    if args.config is not None:
        return read_config(VideoMambaConfig, args.config, **changes)
    return VideoMambaConfig(**VIDEOMAMBA_SIZES[str(args.size)], **changes)


def load_processor(args: StartArguments, model: VideoMambaPreTrainedModel, kind: str) -> Processor:
    """The processor of a model; mean and standard deviation are those of the checkpoint, if it has a processor."""
    processor_class = VideoMambaImageProcessor if kind == "image" else VideoMambaVideoProcessor
    processor = processor_class.for_model(model.config)
    if args.model is None:
        return processor
    try:
        saved = load_pretrained(processor_class, args.model)
    except OSError:
        return processor
    if saved.do_grayscale != processor.do_grayscale:  # of a model with other channels
        return processor
    kept = ["image_mean", "image_std", "rescale_factor"]
    if (load_pretrained(VideoMambaConfig, args.model).num_frames is None) == (kind == "image"):
        kept.append("resample")  # images are resized otherwise than videos
    for name in kept:
        setattr(processor, name, getattr(saved, name))
    return processor
