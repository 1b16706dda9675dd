import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoVideoProcessor

from modeling_videomamba import BrokenVideoError, VideoMambaVideoProcessor
from modeling_videomamba.video_decoding import read_frames
from modeling_videomamba.video_processing_videomamba import sample_frame_indices, spatial_crop_offsets
from tests.conftest import GOLDEN, moving_square, tiny_config

PROTOCOL = json.loads((GOLDEN / "protocol.json").read_text("utf-8"))
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def pixels(videos, **kwargs):
    return VideoMambaVideoProcessor()(videos, return_tensors="pt", **kwargs)["pixel_values"]


# Sampling and views


@pytest.mark.parametrize("case", PROTOCOL["segment_sampling"])
def test_multi_clip_sampling_is_that_of_the_original(case):
    indices = sample_frame_indices(case["total_frames"], case["num_frames"], case["num_segments"])
    assert indices[case["segment"]].tolist() == case["indices"]


@pytest.mark.parametrize("case", PROTOCOL["segment_sampling_validation"])
def test_sampling_of_one_clip_is_that_of_the_original(case):
    assert sample_frame_indices(case["total_frames"], case["num_frames"]).tolist() == [case["indices"]]


@pytest.mark.parametrize("case", PROTOCOL["spatial_crops"])
def test_crops_are_those_of_the_original(case):
    crop = (case["crop"], case["crop"])
    corners = spatial_crop_offsets(case["resized_height"], case["resized_width"], crop, case["num_crops"])
    assert len(corners) == case["num_crops"]
    assert corners[case["crop_index"]] == (case["top"], case["left"])


@given(total=st.integers(1, 5000), frames=st.integers(1, 128), clips=st.integers(1, 10))
def test_indices_are_frames_in_order(total, frames, clips):
    indices = sample_frame_indices(total, frames, clips)
    assert indices.shape == (clips, frames)
    assert indices.min() >= 0 and indices.max() < total
    assert (np.diff(indices, axis=0) >= 0).all() and (np.diff(indices, axis=1) >= 0).all()


@given(
    height=st.integers(16, 300),
    width=st.integers(16, 300),
    crop=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    crops=st.integers(1, 7),
)
def test_crops_lie_inside_and_reach_both_ends(height, width, crop, crops):
    corners = spatial_crop_offsets(height, width, crop, crops)
    assert len(corners) == crops
    assert all(0 <= top <= height - crop[0] and 0 <= left <= width - crop[1] for top, left in corners)
    if crops > 1:
        axis = 0 if height > width else 1
        assert corners[0][axis] == 0 and corners[-1][axis] == (height, width)[axis] - crop[axis]


@pytest.mark.parametrize("arguments", [(0, 8, 1), (8, 0, 1), (8, 8, 0)])
def test_sampling_needs_positive_numbers(arguments):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sample_frame_indices(*arguments)


def test_crops_must_fit():
    with pytest.raises(ValueError, match=r"crop_size.*\(224, 224\).*\(200, 300\)"):
        spatial_crop_offsets(200, 300, (224, 224))
    with pytest.raises(ValueError, match="num_crops"):
        spatial_crop_offsets(300, 300, (224, 224), 0)


# From videos to pixel values


def test_a_file_becomes_sampled_resized_cropped_normalised_frames(video):
    values = pixels(video)
    assert values.shape == (1, 8, 3, 224, 224) and values.dtype == torch.float32
    frames, _ = read_frames(video, lambda metadata: sample_frame_indices(metadata.total_num_frames, 8)[0])
    resized = F.interpolate(frames.float(), size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
    expected = (resized.round() / 255 - MEAN) / STD
    assert (values[0] - expected).abs().max() <= 1.01 / 255 / STD.min()  # rounding of uint8


@pytest.mark.parametrize("kind", ["bytes", "dict", "array", "channels first", "tensor", "PIL", "list of arrays"])
def test_every_kind_of_video_gives_the_same(video, kind):
    frames, _ = read_frames(video)
    last = frames.permute(0, 2, 3, 1).numpy()
    source = {
        "bytes": video.read_bytes(),
        "dict": {"path": str(video), "bytes": None},
        "array": last,
        "channels first": frames.numpy(),
        "tensor": frames,
        "PIL": [Image.fromarray(frame) for frame in last],
        "list of arrays": list(last),
    }[kind]
    assert torch.equal(pixels(source), pixels(str(video)))


def test_batches_equal_one_by_one(video):
    other = moving_square(11, size=64)
    together = pixels([video, other, [other[:5], other[3:]]])
    assert torch.equal(together, torch.cat([pixels(video), pixels(other), pixels(other[:5]), pixels(other[3:])]))
    assert torch.equal(pixels(np.stack([other, other[::-1]])), torch.cat([pixels(other), pixels(other[::-1])]))


def test_pipelines_pass_no_number_of_frames_for_an_image_model(video):
    assert torch.equal(pixels(video, num_frames=None), pixels(video))


def test_a_short_video_repeats_frames():
    frames = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 100, 200)])
    values = pixels(frames, num_frames=8)
    shown = ((values * STD + MEAN)[0, :, 0, 0, 0] * 255).round().int().tolist()
    assert shown == [int(frames[index, 0, 0, 0]) for index in sample_frame_indices(3, 8)[0]]
    assert pixels(frames[:1], num_frames=4).shape == (1, 4, 3, 224, 224)


def test_views_are_clips_times_crops(video):
    frames = np.random.default_rng(0).integers(0, 256, (30, 60, 100, 3), dtype=np.uint8)
    processor = VideoMambaVideoProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    views = processor([frames, frames[::-1]], num_clips=4, num_crops=3, return_tensors="pt")["pixel_values"]
    assert views.shape == (2 * 4 * 3, 8, 3, 48, 48)
    everything = processor(frames, do_sample_frames=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
    assert everything.shape == (30, 3, 48, 80)
    for clip, indices in enumerate(sample_frame_indices(30, 8, 4)):
        for crop, left in enumerate((0, 16, 32)):
            expected = everything[indices, :, :, left : left + 48]
            assert torch.equal(views[3 * clip + crop], expected)
    with pytest.raises(ValueError, match="num_clips.*do_sample_frames"):
        processor(frames, num_clips=2, do_sample_frames=False)
    with pytest.raises(ValueError, match="num_crops.*do_center_crop"):
        processor(frames, num_crops=3, do_center_crop=False)


def test_grey_and_transparent_videos_become_rgb():
    grey = np.random.default_rng(0).integers(0, 256, (8, 32, 32), dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    opaque = np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1)
    clear = np.concatenate([rgb, np.full_like(rgb[..., :1], 128)], axis=-1)
    pictures = [Image.fromarray(frame) for frame in grey]
    for same in (grey[..., None], list(grey), opaque, clear, pictures, [Image.fromarray(frame) for frame in clear]):
        assert torch.equal(pixels(same), pixels(rgb))
    torch.testing.assert_close(pixels(clear / 255, do_rescale=False), pixels(rgb), rtol=0, atol=0.03)
    assert torch.equal(pixels(rgb.astype(np.uint16)), pixels(rgb))


def test_the_layout_can_be_told_where_it_is_ambiguous():
    frames = np.random.default_rng(0).integers(0, 256, (8, 3, 5, 3), dtype=np.uint8)
    kept = {"do_resize": False, "do_center_crop": False}
    last = pixels(frames, input_data_format="channels_last", **kept)
    assert last.shape == (1, 8, 3, 3, 5)
    assert torch.equal(pixels(frames.transpose(0, 3, 1, 2), input_data_format="channels_first", **kept), last)
    pictures = [Image.fromarray(frame) for frame in frames]
    assert torch.equal(pixels(pictures, input_data_format="channels_last", **kept), last)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        pixels(frames[..., :2], input_data_format="channels_last", **kept)


def test_rescaled_floats_need_do_rescale_false():
    frames = moving_square(8)
    expected = pixels(frames)
    torch.testing.assert_close(pixels(frames.astype(np.float32)), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(pixels(frames.astype(np.float32) / 255, do_rescale=False), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(pixels(frames.astype(np.int64)), expected)
    with pytest.raises(ValueError, match="do_rescale=False"):
        pixels(frames.astype(np.float32) / 255)
    for wrong in (frames, frames.astype(np.float32)):
        with pytest.raises(ValueError, match=r"between 0 and 1 with `do_rescale=False`, got \d+ to 25\d"):
            pixels(wrong, do_rescale=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames: frames.astype(np.int64) - 1, "between 0 and 255.*-1"),
        (lambda frames: frames.astype(np.int64) + 200, "between 0 and 255"),
        (lambda frames: np.full(frames.shape, np.nan), "between 0 and 255.*nan"),
        (lambda frames: frames > 100, "bool"),
        (lambda frames: np.repeat(frames, 2, axis=-1), "1, 3 or 4 channels"),
        (lambda frames: frames[..., :2], "1, 3 or 4 channels"),
        (lambda frames: frames[:0], "no frames"),
        (lambda frames: frames[0], "4-D"),
        (lambda frames: [frames[0], frames[1, :10]], "one size"),
        (lambda frames: [Image.fromarray(frames[0, ..., 0].astype(np.int32))], "PIL mode 'I'"),
        (lambda frames: [Image.fromarray(frames[0, ..., 0].astype(np.float32))], "PIL mode 'F'"),
        (lambda frames: [], "empty list"),
        (lambda frames: 5, "paths, URLs"),
    ],
)
def test_wrong_pixels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pixels(change(moving_square(8)))


def test_a_broken_file_and_unsupported_arguments_are_refused(tmp_path, video):
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(BrokenVideoError, match=r"text\.mp4"):
        pixels([str(video), str(tmp_path / "text.mp4")])
    with pytest.raises(FileNotFoundError, match=r"no\.mp4"):
        pixels("no.mp4")
    with pytest.raises(ValueError, match="`fps`"):
        pixels(video, fps=2)
    with pytest.raises(ValueError, match="`video_metadata`"):
        pixels(video, video_metadata=[{"total_num_frames": 3}])
    for name in ("num_frames", "num_clips", "num_crops"):
        with pytest.raises(Exception, match=f"{name}|at least 1"):
            pixels(video, **{name: 0})


@settings(max_examples=10, deadline=None)
@given(num_frames=st.integers(1, 70), size=st.sampled_from([32, 48, 80]))
def test_any_size_and_number_of_frames(num_frames, size):
    processor = VideoMambaVideoProcessor(size=size, crop_size=size, num_frames=num_frames)
    assert processor(moving_square(9), return_tensors="pt")["pixel_values"].shape == (1, num_frames, 3, size, size)


def test_metadata_and_saving(tmp_path, video):
    processor = VideoMambaVideoProcessor.for_model(tiny_config(image_size=[32, 64], num_frames=6))
    processor.save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VideoMambaVideoProcessor)
    batch = loaded(video, return_metadata=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], processor(video, return_tensors="pt")["pixel_values"])
    assert batch["pixel_values"].shape == (1, 6, 3, 32, 64)
    assert batch["video_metadata"][0].frames_indices == sample_frame_indices(45, 6)[0].tolist()
