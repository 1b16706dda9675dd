"""Settings of a processor that can't be meant are refused by name, from a file as in a call."""

import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
from huggingface_hub.errors import StrictDataclassError
from torchvision.transforms.v2 import InterpolationMode
from transformers import AutoImageProcessor, AutoVideoProcessor

import classify
from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor
from tests.conftest import NANO, moving_square

COUNTS = [
    *((name, value) for name in ("num_frames", "num_clips", "num_crops") for value in (0, -1, 10**7, 2.5, "8", True)),
]
VALUES = [
    *(("image_std", value) for value in (0, 0.0, -0.1, math.nan, math.inf, [0.2, 0.0, 0.2], [0.2, 0.2], [], [0.2] * 4)),
    *(("image_mean", value) for value in (math.nan, math.inf, [0.5, math.nan, 0.5], [0.5, 0.5], [0.5] * 4)),
    *(("rescale_factor", value) for value in (0, 0.0, -1 / 255, math.nan, math.inf)),
    *(("size", value) for value in (0, {"shortest_edge": 0}, {"height": -1, "width": 8}, {"shortest_edge": 10**7})),
    *(("crop_size", value) for value in (0, {"height": 0, "width": 8}, {"height": 8, "width": 10**7})),
    # pixels that would not be finite in float32
    *(("image_std", value) for value in (1e-300, 1e-46, 1e300, [0.2, 1e-46, 0.2])),
    *(("image_mean", value) for value in (1e300, -1e30, [0.5, 0.5, 1e39])),
    *(("rescale_factor", value) for value in (1e300, 1e-300, 1e-40)),
    *((name, value) for name in ("size", "crop_size") for value in ([32], [], [32, 32, 32], {}, {"height": 8}, "32")),
    *(("crop_size", value) for value in ({"shortest_edge": 8}, {"longest_edge": 8}, {"max_height": 8, "max_width": 8})),
    *(("size", value) for value in ({"longest_edge": 8}, {"side": 8})),
    *(("resample", value) for value in (99, -1, 4, 5, 2.0, True, "box", "quick")),
    *(("device", value) for value in ("cuda:77", "gpu", 77, "meta")),
]
FLAGS = [name for name in VideoMambaVideoProcessor().valid_kwargs.__annotations__ if name.startswith("do_")]
FLAGS += ["default_to_square"]
VIDEO_FLAGS = {"do_sample_frames", "do_pad"}
CLASSES = [(VideoMambaVideoProcessor, AutoVideoProcessor), (VideoMambaImageProcessor, AutoImageProcessor)]


def call(processor, **options):
    pixels = moving_square(3)
    return processor(pixels if isinstance(processor, VideoMambaVideoProcessor) else pixels[0], **options)


@pytest.mark.parametrize(("name", "value"), [*COUNTS, *VALUES])
def test_a_setting_that_cannot_be_meant_is_refused(tmp_path, name, value):
    for processor_class, auto_class in CLASSES[: 1 if name.startswith("num_") or name in VIDEO_FLAGS else 2]:
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


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["no", "false", 0, 1, [True]])
def test_a_flag_is_true_or_false(tmp_path, name, value):
    test_a_setting_that_cannot_be_meant_is_refused(tmp_path, name, value)


def load_with(folder, auto_class, processor, **settings):
    processor.save_pretrained(folder)
    (path,) = folder.glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return auto_class.from_pretrained(folder)


@pytest.mark.parametrize("name", ["num_frames", "num_clips", "num_crops"])
def test_a_file_has_all_numbers(tmp_path, name):
    """In a call `None` stands for the number of the processor."""
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number from 1 to .*, got None"):
        load_with(tmp_path, AutoVideoProcessor, VideoMambaVideoProcessor(), **{name: None})
    assert call(VideoMambaVideoProcessor(), **{name: None})["pixel_values"][0].shape[0] == 8


@pytest.mark.parametrize(("name", "value"), [("fps", 3), ("fps", 0), ("video_metadata", {"fps": 3})])
def test_what_is_not_supported_is_refused_in_a_file_too(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        call(VideoMambaVideoProcessor(), **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        load_with(tmp_path, AutoVideoProcessor, VideoMambaVideoProcessor(), **{name: value})


@pytest.mark.parametrize(
    "settings", [{"image_std": 1e-300}, {"num_frames": None}, {"resample": 99}, {"do_resize": "no"}]
)
def test_classify_names_the_setting(tmp_path, settings, exit_of):
    shutil.copytree(NANO, tmp_path / "model")
    path = tmp_path / "model" / "video_preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}))
    message = exit_of(classify, NANO / "example.mp4", "--model", tmp_path / "model")
    assert f"`{next(iter(settings))}` must be " in message and "\n" not in message


def test_numbers_that_are_too_many_together_are_refused():
    with pytest.raises(ValueError, match="`num_frames` x `num_clips` x `num_crops` must be at most 1000000 frames"):
        call(VideoMambaVideoProcessor(num_frames=20_000), num_clips=10, num_crops=10)


def test_settings_are_refused_before_a_video_is_decoded():
    with pytest.raises(ValueError, match="`image_std`"):
        VideoMambaVideoProcessor()("no such file.mp4", image_std=[1.0, 0.0, 1.0])


def test_unusual_settings_work():
    for resample in (0, 1, 2, 3, PIL.Image.Resampling.BICUBIC, InterpolationMode.NEAREST, "bilinear"):
        assert len(call(VideoMambaVideoProcessor(), resample=resample, device="cpu")["pixel_values"]) == 1
    for size in (256, (230, 240), {"shortest_edge": 230, "longest_edge": 260}, {"max_height": 230, "max_width": 230}):
        assert call(VideoMambaImageProcessor(), size=size)["pixel_values"][0].shape == (3, 224, 224)
    for numbers in (
        {"rescale_factor": 1 / 65535},
        {"image_mean": 0, "image_std": 1e-3},
        {"image_mean": [-255.0, 0, 9]},
    ):
        assert call(VideoMambaImageProcessor(**numbers))["pixel_values"][0].isfinite().all()
    processor = VideoMambaVideoProcessor(
        size=40, crop_size={"height": 16, "width": 32}, num_frames=np.int64(5), num_clips=2, num_crops=3, image_std=0.25
    )
    assert call(processor, return_tensors="pt")["pixel_values"].shape == (6, 5, 3, 16, 32)
    assert (
        call(processor, num_clips=1, image_mean=[0.5] * 3, num_crops=1, num_frames=2)["pixel_values"][0].shape[0] == 2
    )
