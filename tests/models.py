"""Small models with random weights, and what goes into them and comes out."""

import torch
from transformers import BertTokenizer

from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaForVideoTextRetrieval,
    VideoMambaModel,
    VideoMambaProcessor,
    VideoMambaVideoProcessor,
    VideoMambaVideoTextConfig,
)
from tests.conftest import tiny_config

MODEL_CLASSES = [VideoMambaModel, VideoMambaForImageClassification, VideoMambaForVideoClassification]


def build(model_class=VideoMambaForVideoClassification, seed=0, **changes):
    torch.manual_seed(seed)
    return model_class(tiny_config(**changes)).eval()


def video(batch=2, frames=4, height=32, width=32, seed=0):
    return torch.randn(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual, expected):
    """Up to the order of sums, which matrix products choose by the alignment of memory."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def main_output(outputs):
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def save_video_text(folder):
    """A directory with a model of videos and texts and its processor."""
    folder.mkdir(exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "seven", "moves"]
    text = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = VideoMambaVideoTextConfig(vision_config=tiny_config(), text_config=text, fusion_layer=2, projection_dim=8)
    torch.manual_seed(0)
    VideoMambaForVideoTextRetrieval(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    video_processor = VideoMambaVideoProcessor.for_model(config.vision_config)
    VideoMambaProcessor(video_processor, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
