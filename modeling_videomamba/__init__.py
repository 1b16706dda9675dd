"""VideoMamba (arXiv 2403.06977) for Transformers. Importing it registers its models with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BertTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from ._version import __version__
from .configuration_videomamba import VIDEOMAMBA_SIZES, VideoMambaConfig, VideoMambaVideoTextConfig
from .image_processing_videomamba import VideoMambaImageProcessor
from .modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
)
from .modeling_videomamba_pretraining import VideoMambaForMaskedPreTraining
from .modeling_videomamba_video_text import VideoMambaForVideoTextRetrieval
from .processing_videomamba import VideoMambaProcessor
from .selective_scan import selective_scan, selective_scan_backends
from .video_decoding import BrokenVideoError
from .video_processing_videomamba import VideoMambaVideoProcessor
from .zero_shot_video_classification import TASK, ZeroShotVideoClassificationPipeline

AutoConfig.register("videomamba", VideoMambaConfig)
AutoConfig.register("videomamba_video_text", VideoMambaVideoTextConfig)
AutoModel.register(VideoMambaConfig, VideoMambaModel)
AutoModel.register(VideoMambaVideoTextConfig, VideoMambaForVideoTextRetrieval)
AutoModelForImageClassification.register(VideoMambaConfig, VideoMambaForImageClassification)
AutoModelForVideoClassification.register(VideoMambaConfig, VideoMambaForVideoClassification)
AutoModelForPreTraining.register(VideoMambaConfig, VideoMambaForMaskedPreTraining)
AutoImageProcessor.register(VideoMambaConfig, image_processor_classes={"torchvision": VideoMambaImageProcessor})
AutoVideoProcessor.register(VideoMambaConfig, VideoMambaVideoProcessor)
AutoVideoProcessor.register(VideoMambaVideoTextConfig, VideoMambaVideoProcessor)
AutoTokenizer.register(VideoMambaVideoTextConfig, fast_tokenizer_class=BertTokenizer)
AutoProcessor.register(VideoMambaVideoTextConfig, VideoMambaProcessor)

PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ZeroShotVideoClassificationPipeline, pt_model=AutoModel, type="multimodal"
)

# What is saved carries its code and an `auto_map`, so that it also loads where this package is not installed.
VideoMambaConfig.register_for_auto_class()
VideoMambaVideoTextConfig.register_for_auto_class()
VideoMambaModel.register_for_auto_class()
VideoMambaForImageClassification.register_for_auto_class("AutoModelForImageClassification")
VideoMambaForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
VideoMambaForMaskedPreTraining.register_for_auto_class("AutoModelForPreTraining")
VideoMambaForVideoTextRetrieval.register_for_auto_class()
VideoMambaImageProcessor.register_for_auto_class()
VideoMambaVideoProcessor.register_for_auto_class()
VideoMambaProcessor.register_for_auto_class()

__all__ = [
    "VIDEOMAMBA_SIZES",
    "BrokenVideoError",
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForMaskedPreTraining",
    "VideoMambaForVideoClassification",
    "VideoMambaForVideoTextRetrieval",
    "VideoMambaImageProcessor",
    "VideoMambaModel",
    "VideoMambaProcessor",
    "VideoMambaVideoProcessor",
    "VideoMambaVideoTextConfig",
    "ZeroShotVideoClassificationPipeline",
    "__version__",
    "selective_scan",
    "selective_scan_backends",
]
