"""Settings of a processor that can't be meant are refused by name, from a file as in a call."""

import json
import math

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, AutoVideoProcessor

from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor
from tests.conftest import moving_square

COUNTS = [
    *((name, value) for name in ("num_frames", "num_clips", "num_crops") for value in (0, -1, 10**7, 2.5, "8", True)),
]
VALUES = [
    *(("image_std", value) for value in (0, 0.0, -0.1, math.nan, math.inf, [0.2, 0.0, 0.2], [0.2, 0.2], [], [0.2] * 4)),
    *(("image_mean", value) for value in (math.nan, math.inf, [0.5, math.nan, 0.5], [0.5, 0.5], [0.5] * 4)),
    *(("rescale_factor", value) for value in (0, 0.0, -1 / 255, math.nan, math.inf)),
    *(("size", value) for value in (0, {"shortest_edge": 0}, {"height": -1, "width": 8}, {"shortest_edge": 10**7})),
    *(("crop_size", value) for value in (0, {"height": 0, "width": 8}, {"height": 8, "width": 10**7})),
]


def call(processor, **options):
    pixels = moving_square(3)
    return processor(pixels if isinstance(processor, VideoMambaVideoProcessor) else pixels[0], **options)


@pytest.mark.parametrize(("name", "value"), [*COUNTS, *VALUES])
def test_a_setting_that_cannot_be_meant_is_refused(tmp_path, name, value):
    classes = [(VideoMambaVideoProcessor, AutoVideoProcessor), (VideoMambaImageProcessor, AutoImageProcessor)]
    for processor_class, auto_class in classes[: 1 if name.startswith("num_") else 2]:
        processor = processor_class()
        with pytest.raises(ValueError, match=f"`{name}`"):
            processor_class(**{name: value})
        with pytest.raises((ValueError, StrictDataclassError), match=name):  # of Transformers for another type
            call(processor, **{name: value})
        processor.save_pretrained(tmp_path)
        (path,) = tmp_path.glob("*.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
        with pytest.raises(ValueError, match=f"`{name}`"):
            auto_class.from_pretrained(tmp_path)
        path.unlink()


def test_numbers_that_are_too_many_together_are_refused():
    with pytest.raises(ValueError, match="`num_frames` x `num_clips` x `num_crops` must be at most 1000000 frames"):
        call(VideoMambaVideoProcessor(num_frames=20_000), num_clips=10, num_crops=10)


def test_settings_are_refused_before_a_video_is_decoded():
    with pytest.raises(ValueError, match="`image_std`"):
        VideoMambaVideoProcessor()("no such file.mp4", image_std=[1.0, 0.0, 1.0])


def test_unusual_settings_work():
    processor = VideoMambaVideoProcessor(
        size=40, crop_size={"height": 16, "width": 32}, num_frames=np.int64(5), num_clips=2, num_crops=3, image_std=0.25
    )
    assert call(processor, return_tensors="pt")["pixel_values"].shape == (6, 5, 3, 16, 32)
    assert (
        call(processor, num_clips=1, image_mean=[0.5] * 3, num_crops=1, num_frames=2)["pixel_values"][0].shape[0] == 2
    )
