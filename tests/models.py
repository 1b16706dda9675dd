"""Small models with random weights, and what goes into them and comes out."""

import torch

from modeling_videomamba import VideoMambaForImageClassification, VideoMambaForVideoClassification, VideoMambaModel
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
