"""Processor of videos and texts."""

from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration_videomamba import VideoMambaConfig
from .video_processing_videomamba import VideoMambaVideoProcessor


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises `ValueError` for a tokenizer that knows its special tokens alone: where a directory has no `tokenizer.json`,
    Transformers makes one of them without an error, to which all texts are the same.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path or 'the processor'} must know words, and knows only "
            f"{', '.join(tokenizer.all_special_tokens)}: tokenizer.json is missing there, or has no vocabulary."
        )


class VideoMambaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg] # a TypedDict
    """A text is one sentence to the model, which takes no `token_type_ids`."""

    _defaults = {"text_kwargs": {"return_token_type_ids": False}}


class VideoMambaProcessor(ProcessorMixin):
    r"""
    A [`VideoMambaVideoProcessor`] for `videos` and a tokenizer of BERT for `text`, in one.

    Args:
        video_processor (`VideoMambaVideoProcessor`): Makes `pixel_values`.
        tokenizer (`PreTrainedTokenizerBase`): Makes `input_ids` and `attention_mask`.

    Raises:
        `ValueError`: if the tokenizer knows no words, because its `tokenizer.json` is missing.

    Example:

    ```python
    >>> processor = VideoMambaProcessor.from_pretrained("org/videomamba-m-25m")
    >>> inputs = processor(videos="clip.mp4", text=["a dog runs", "a cat sleeps"], padding=True, return_tensors="pt")
    ```
    """

    valid_processor_kwargs = VideoMambaProcessorKwargs

    def __init__(self, video_processor=None, tokenizer=None):
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        super().__init__(video_processor, tokenizer)

    @staticmethod
    def video_processor_for(config: VideoMambaConfig) -> VideoMambaVideoProcessor:
        """As of the released models, for a video encoder: frames are squeezed to its resolution, none is cropped."""
        height, width = config.input_size
        processor = VideoMambaVideoProcessor.for_model(config)
        processor.size = {"height": height, "width": width}
        processor.resample = PILImageResampling.BICUBIC
        return processor

    @property
    def model_input_names(self) -> list[str]:
        """What a model is to be given."""
        return ["pixel_values", "input_ids", "attention_mask"]


__all__ = ["VideoMambaProcessor"]
