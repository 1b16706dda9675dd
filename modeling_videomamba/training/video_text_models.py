"""The model of videos and texts that a run starts from, and its processor."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, AutoTokenizer, BertTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from videomamba_arguments import VideoTextModelArguments

from ..configuration_videomamba import VideoMambaVideoTextConfig
from ..image_processing_videomamba import VideoMambaImageProcessor
from ..modeling_videomamba_pretraining import VideoMambaForMaskedPreTraining
from ..modeling_videomamba_video_text import VideoMambaForVideoTextRetrieval
from ..processing_videomamba import VideoMambaProcessor
from ..video_processing_videomamba import VideoMambaVideoProcessor
from .loading import load_model, load_pretrained, load_start, one_line_errors, read_config
from .models import HEADS, check_input_size
from .teacher_cache import digest

NORMALIZATION = ("image_mean", "image_std", "rescale_factor")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_video_text_model(args: VideoTextModelArguments) -> VideoMambaForVideoTextRetrieval:
    r"""
    The model to train. Position embeddings are resized to the frames and the resolution that are asked for, and an
    image model inflated.

    Args:
        args ([`VideoTextModelArguments`]): Of the run.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or a value does not fit.
    """
    check_input_size(args)
    changes = {} if args.drop_path_rate is None else {"drop_path_rate": args.drop_path_rate}
    if args.config is not None:
        config = read_config(VideoMambaVideoTextConfig, args.config)
        for name, value in changes.items():
            setattr(config.vision_config, name, value)
        model = VideoMambaForVideoTextRetrieval(config)
    elif args.model is not None:
        model = load_trained(args.model, **changes)
    elif args.vision is not None and args.text is not None:
        options: dict[str, Any] = {f"vision_{name}": value for name, value in changes.items()}
        if args.fusion_layer is not None:
            options["fusion_layer"] = args.fusion_layer
        load_start(VideoMambaForMaskedPreTraining, args.vision, HEADS)  # refuses what is no whole encoder
        with one_line_errors(args.vision, args.text):
            model = VideoMambaForVideoTextRetrieval.from_video_text_pretrained(args.vision, args.text, **options)
    encoder = model.videomamba
    if encoder.config.num_frames is None:
        encoder.inflate(args.num_frames or VideoMambaVideoProcessor.num_frames)
    encoder.resize_position_embeddings(image_size=args.image_size, num_frames=args.num_frames)
    return model


def load_trained(path: str, **vision_changes: Any) -> VideoMambaForVideoTextRetrieval:
    r"""
    A model of videos and texts as it was saved.

    Args:
        path (`str`): Directory or Hub id.
        vision_changes: Fields of the configuration of its video encoder.

    Raises:
        `OSError`, `ValueError`: if there is no such model, or it is another one.
    """
    config = load_pretrained(AutoConfig, path)
    if not isinstance(config, VideoMambaVideoTextConfig):
        raise ValueError(f"{path} must be a model of videos and texts (videomamba_video_text), got {config.model_type}")
    for name, value in vision_changes.items():
        setattr(config.vision_config, name, value)
    return load_model(VideoMambaForVideoTextRetrieval, path, config=config)


def load_retrieval_model(path: str) -> tuple[VideoMambaForVideoTextRetrieval, VideoMambaProcessor]:
    r"""
    A model of videos and texts, for evaluation, and its processor.

    Args:
        path (`str`): Directory or Hub id.

    Raises:
        `OSError`, `ValueError`: if there is no such model or processor, a file of them is damaged, or the tokenizer
            knows more tokens than the model.
    """
    model = load_trained(path).eval()
    processor = load_pretrained(VideoMambaProcessor, path)
    _check_vocabulary(processor.tokenizer, model)
    return model, processor


def fingerprint(model: VideoMambaForVideoTextRetrieval, processor: VideoMambaProcessor) -> str:
    """What the embeddings of a model depend on, in 64 characters."""
    config = model.config.to_diff_dict()
    config.pop("transformers_version", None)  # of the library that runs, not of the one that saved
    tokenizer = processor.tokenizer
    words = {"vocab": tokenizer.get_vocab(), "normalizer": str(tokenizer.backend_tokenizer.normalizer)}
    return digest(model, config, processor.video_processor.to_dict(), words)


def load_video_text_processor(
    args: VideoTextModelArguments, model: VideoMambaForVideoTextRetrieval, tokenizer: PreTrainedTokenizerBase | None
) -> VideoMambaProcessor:
    r"""
    The processor of a model; `tokenizer` is that of a model that has none yet.

    Raises:
        `OSError`, `ValueError`: if there is no such tokenizer, or it knows more tokens than the model.
    """
    video_processor = VideoMambaProcessor.video_processor_for(model.videomamba.config)
    if args.vision is not None:
        _copy_normalization(args.vision, video_processor)
    if args.model is not None:
        saved = load_pretrained(VideoMambaProcessor, args.model)
        for name in (*NORMALIZATION, "resample"):
            setattr(video_processor, name, getattr(saved.video_processor, name))
        if saved.video_processor.size.shortest_edge is not None:
            video_processor.size = {"shortest_edge": max(model.videomamba.config.input_size)}
        tokenizer = saved.tokenizer
    elif tokenizer is None:
        tokenizer = load_pretrained(AutoTokenizer, str(args.tokenizer or args.text))
    _check_vocabulary(tokenizer, model)
    return VideoMambaProcessor(video_processor, tokenizer)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: VideoMambaForVideoTextRetrieval) -> None:
    vocab_size = model.text_model.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer knows {len(tokenizer)} tokens, the model {vocab_size} (`vocab_size`)")


def _copy_normalization(path: str, video_processor: VideoMambaVideoProcessor) -> None:
    """That of the processor of a model, if it has one."""
    try:
        saved = load_pretrained(VideoMambaVideoProcessor, path)
    except OSError:
        return
    if saved.do_grayscale != video_processor.do_grayscale:  # of a model with other channels
        return
    for name in NORMALIZATION:
        setattr(video_processor, name, getattr(saved, name))


def image_processor_of(video_processor: VideoMambaVideoProcessor) -> VideoMambaImageProcessor:
    """A processor that prepares images as frames are."""
    names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_grayscale")
    return VideoMambaImageProcessor(**{name: getattr(video_processor, name) for name in names})


def make_tokenizer(captions: Iterable[str], vocab_size: int) -> BertTokenizer:
    r"""
    A tokenizer of BERT (WordPiece, lower case) that knows the characters of captions and their most frequent words. The
    same captions give the same one, which the trainer of `tokenizers` doesn't promise.

    Raises:
        `ValueError`: if `vocab_size` has no room for the characters.
    """
    empty = BertTokenizer(vocab={token: index for index, token in enumerate(SPECIAL_TOKENS)})
    backend = empty.backend_tokenizer
    counts: Counter[str] = Counter()
    for caption in captions:
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
        counts.update(word for word, _ in words)
    characters = sorted({character for word in counts for character in word})
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    if len(tokens) > vocab_size:
        raise ValueError(f"`vocab_size` must be at least {len(tokens)} for the characters, got {vocab_size}.")
    words = sorted(counts.keys() - set(characters), key=lambda word: (-counts[word], word))
    return BertTokenizer(vocab={token: index for index, token in enumerate([*tokens, *words][:vocab_size])})
