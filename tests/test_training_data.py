import itertools
import math
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor
from modeling_videomamba.training.augmentation import Mixing, RandAugment, training_transform
from modeling_videomamba.training.data import (
    BrokenImageError,
    EvaluationViews,
    Examples,
    MissingCaptionError,
    StreamedExamples,
    TrainingBatches,
    TrainingViews,
    collate,
    cut_into_windows,
    decode_clips,
    hold_back,
    media_id,
    test_batches,
)
from modeling_videomamba.training.plots import restore_pixels
from modeling_videomamba.training.workers import iterate
from modeling_videomamba.video_decoding import BrokenVideoError, read_frames
from modeling_videomamba.video_processing_videomamba import sample_frame_indices
from tests.conftest import moving_square, tiny_config, write_video
from tests.test_video_order import CASES
from videomamba_arguments import LabelledAugmentationArguments

test_batches.__test__ = False  # no test of pytest


def processor(**changes):
    return VideoMambaVideoProcessor.for_model(tiny_config(**changes))


def videos(*paths, **columns):
    rows = {"video": [str(path) for path in paths], "label": list(range(len(paths))), **columns}
    return Dataset.from_dict(rows).cast_column("video", Video(decode=False))


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.integers(0, 2**32))
def test_training_takes_a_random_frame_of_each_segment(total, frames, clips, seed):
    indices = sample_frame_indices(total, frames, clips, np.random.default_rng(seed))
    bounds = np.round((total - 1) / frames * np.arange(frames + 1)).astype(int)
    assert indices.shape == (clips, frames)
    assert (indices >= bounds[:-1]).all() and (indices <= bounds[1:]).all() and indices.max() < total


def test_every_frame_of_a_segment_is_drawn():
    drawn = sample_frame_indices(31, 3, 500, np.random.default_rng(0))
    assert [sorted(set(column)) for column in drawn.T] == [list(range(0, 11)), list(range(10, 21)), list(range(20, 31))]


# The order of a run


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 40))
def test_processes_together_see_what_one_sees(length, batch_size, world, seed, start):
    if length < batch_size * world:
        return
    end = start + 25
    options = {"seed": seed, "start": start, "end": end}
    ranks = [TrainingBatches(length, batch_size, rank=rank, world_size=world, **options) for rank in range(world)]
    one = list(TrainingBatches(length, batch_size * world, rank=0, world_size=1, **options))
    together = [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    assert together == one and len(one) == len(ranks[0]) == 25
    # a run that goes on at `start` sees what it would have seen
    whole = TrainingBatches(length, batch_size * world, rank=0, world_size=1, seed=seed, start=0, end=end)
    assert list(whole)[start:] == one
    epochs: dict[int, list[int]] = {}
    for epoch, index in itertools.chain(*whole):
        epochs.setdefault(epoch, []).append(index)
    assert all(len(set(seen)) == len(seen) and set(seen) <= set(range(length)) for seen in epochs.values())
    assert len(epochs) < 2 or length < 6 or epochs[0] != epochs[1]


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=50), st.integers(1, 5), st.integers(1, 4))
def test_each_example_is_tested_once(indices, batch_size, world):
    ranks = [test_batches(indices, batch_size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for _, index in batch if index >= 0]
    assert sorted(seen) == sorted(indices)


# Views


def test_views_follow_from_the_seed(video):
    args = LabelledAugmentationArguments(
        flip=True, min_crop_area=0.3, rand_augment_ops=2, random_erasing=0.5, num_sample=3
    )
    views = TrainingViews(processor(), training_transform(processor(), args), 3)
    example = {"video": {"path": str(video), "bytes": None}}
    state = torch.get_rng_state()
    first = views(example, 5)
    assert first.shape == views.shape == (3, 4, 3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, views(example, 5)) and not torch.equal(first, views(example, 6))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are taken


def test_without_augmentation_training_differs_from_testing_by_its_frames_alone(tmp_path):
    path = write_video(tmp_path / "still.mp4", np.repeat(moving_square(1), 12, axis=0))
    example = {"video": {"path": str(path), "bytes": None}}
    assert training_transform(processor(), LabelledAugmentationArguments()) is None
    training = TrainingViews(processor(), num_sample=2)(example, 0)
    testing = EvaluationViews(processor())(example, 0)
    torch.testing.assert_close(training, testing.expand(2, -1, -1, -1, -1), atol=0.05, rtol=0)


def test_testing_makes_the_views_of_the_processor(video):
    example = {"video": {"path": str(video), "bytes": None}}
    views = EvaluationViews(processor(), num_clips=2, num_crops=3)
    expected = processor()(str(video), num_clips=2, num_crops=3, return_tensors="pt")["pixel_values"]
    assert views.shape == tuple(expected.shape)
    assert torch.equal(views(example, 0), expected)


def test_images(tmp_path):
    PILImage.fromarray(moving_square(1)[0]).save(tmp_path / "x.png")
    image_processor = VideoMambaImageProcessor.for_model(tiny_config(num_frames=None))
    example = {"image": {"path": str(tmp_path / "x.png"), "bytes": None}}
    for source in (example, {"image": {"path": "x", "bytes": (tmp_path / "x.png").read_bytes()}}):
        tested = EvaluationViews(image_processor)(source, 0)
        expected = image_processor(PILImage.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"]
        assert torch.equal(tested, expected) and EvaluationViews(image_processor).shape == (1, 3, 32, 32)
    transform = training_transform(image_processor, LabelledAugmentationArguments(auto_augment=True, min_crop_area=0.5))
    assert TrainingViews(image_processor, transform, 2)(example, 0).shape == (2, 3, 32, 32)


def test_a_model_of_one_channel_is_trained_with_grey(video):
    example = {"video": {"path": str(video), "bytes": None}}
    grey = processor(num_channels=1)
    tested = EvaluationViews(grey)(example, 0)
    assert torch.equal(tested, grey(str(video), return_tensors="pt")["pixel_values"])
    transform = training_transform(grey, LabelledAugmentationArguments(rand_augment_ops=4, random_erasing=1.0))
    for views in (EvaluationViews(grey), TrainingViews(grey), TrainingViews(grey, transform)):
        assert views(example, 0).shape == views.shape == (1, 4, 1, 32, 32)
    assert restore_pixels(tested, grey).shape == (1, 4, 3, 32, 32)


def test_files_that_are_elsewhere(tmp_path, video):
    PILImage.fromarray(moving_square(1)[0]).save(tmp_path / "x.png")
    for kind, path in (("video", video), ("image", tmp_path / "x.png")):
        with fsspec.open(f"memory://{path.name}", "wb") as file:
            file.write(path.read_bytes())
        here = decode_clips({kind: {"path": str(path), "bytes": None}}, 4)
        there = decode_clips({kind: {"path": f"memory://{path.name}", "bytes": None}}, 4)
        assert torch.equal(here[0], there[0])
    with pytest.raises(FileNotFoundError):
        decode_clips({"video": {"path": "memory://nothing.mp4", "bytes": None}}, 4)


def test_pictures_are_turned_upright(tmp_path):
    picture = PILImage.fromarray(moving_square(1, size=16)[0][:8])
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "x.png", exif=exif)
    (turned,) = decode_clips({"image": {"path": str(tmp_path / "x.png"), "bytes": None}}, 1)
    assert turned.shape == (1, 3, 16, 8)
    PILImage.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BrokenImageError, match="more than 8 bits"):
        decode_clips({"image": {"path": str(tmp_path / "deep.png"), "bytes": None}}, 1)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_broken_images(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BrokenImageError, match=r"x\.png: not a picture, or truncated"):
        decode_clips({"image": {"path": str(tmp_path / "x.png"), "bytes": None}}, 1)
    with pytest.raises(FileNotFoundError):
        decode_clips({"image": {"path": str(tmp_path / "y.png"), "bytes": None}}, 1)


def test_a_broken_file_keeps_its_place(tmp_path, video):
    (tmp_path / "text.mp4").write_text("no video")
    broken = [tmp_path / "text.mp4", tmp_path / "missing.mp4", CASES / "unknown_fourcc.mp4"]
    examples = Examples(videos(video, *broken), EvaluationViews(processor()), skip_broken=True)
    batch = collate([examples[0, index] for index in (0, 1, 2, 3, -1)])
    assert batch["pixel_values"].shape == (5, 4, 3, 32, 32) and not batch["pixel_values"][1:].any()
    assert batch["valid"].tolist() == [True, False, False, False, False]
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0] and batch["indices"].tolist() == [0, 1, 2, 3, -1]
    assert [name for name, _ in batch["broken"]] == list(map(str, broken))
    assert "not a video" in batch["broken"][0][1] and "no such video file" in batch["broken"][1][1]
    assert "there is no decoder for its video codec" in batch["broken"][2][1]
    with pytest.raises(BrokenVideoError, match=r"text\.mp4: not a video"):
        Examples(videos(video, *broken), EvaluationViews(processor()), skip_broken=False)[0, 1]


@pytest.mark.parametrize("name", ["live.ts", "cut.ts"])
def test_leading_frames_break_no_draw(name):
    """Whatever frames are drawn from a recording that begins in the middle of a group of pictures."""
    examples = Examples(videos(CASES / name), TrainingViews(processor(), lambda clip: clip), skip_broken=True)
    items = [examples[epoch, 0] for epoch in range(20)]
    assert all(item["valid"] for item in items)


def test_captions_are_drawn_and_files_told_apart(tmp_path, video):
    copy = shutil.copy(video, tmp_path / "copy.mp4")
    texts = [["one", "two"], ["three"], ["four"], ["five", " "], []]
    split = videos(video, copy, video, video, video).add_column("captions", texts)
    examples = Examples(split, EvaluationViews(processor()), skip_broken=True)
    drawn = [[examples[epoch, index]["caption"] for index in range(3)] for epoch in range(20)]
    assert {first for first, *_ in drawn} == {"one", "two"} and all(rest == ["three", "four"] for _, *rest in drawn)
    assert drawn == [[examples[epoch, index]["caption"] for index in range(3)] for epoch in range(20)]
    batch = collate([examples[0, index] for index in (0, 1, 2, 3, 4, -1)])
    ids = batch["video_ids"].tolist()
    assert ids[0] == ids[2] != ids[1] and min(ids[:3]) >= 0 and ids[3:] == [-1, -1, -1]
    assert batch["captions"][1:3] == ["three", "four"] and batch["valid"].tolist() == [True] * 3 + [False] * 3
    reason = f"{video}: must have captions, and none that is empty, got"
    assert [reason for _, reason in batch["broken"]] == [f"{reason} ['five', ' ']", f"{reason} []"]
    read = [{"path": name, "bytes": Path(path).read_bytes()} for name, path in (("a", video), ("b", copy))]
    assert media_id(read[0]) == media_id(read[1]) >= 0  # the same content
    (tmp_path / "text.mp4").write_text("no video")
    broken = Examples(
        videos(tmp_path / "text.mp4").add_column("captions", [["a"]]), EvaluationViews(processor()), skip_broken=True
    )
    assert collate([broken[0, 0]])["video_ids"].tolist() == [-1]  # though its caption is there
    with pytest.raises(MissingCaptionError):
        Examples(split, EvaluationViews(processor()), skip_broken=False)[0, 4]


def test_the_views_of_a_batch_come_one_after_the_other(video):
    examples = Examples(videos(video, video), TrainingViews(processor(), num_sample=3), skip_broken=False)
    items = [examples[0, index] for index in (0, 1)]
    batch = collate(items)
    assert batch["labels"].tolist() == [0, 1] * 3 and batch["indices"].tolist() == [0, 1] * 3
    assert torch.equal(batch["pixel_values"][3], items[1]["pixel_values"][1])


# Windows


def test_long_videos_are_cut_into_windows(tmp_path, video):
    (tmp_path / "broken.mp4").write_text("no video")
    split = videos(video, tmp_path / "broken.mp4")  # the first has 45 frames, 10 a second
    cut = cut_into_windows(split, 2.0, 1.0)
    assert [(row["source"], row["start"], row["end"], row["label"]) for row in cut] == [
        *((0, 0.0, 2.0, 0), (0, 1.0, 3.0, 0), (0, 2.0, 4.0, 0)),
        (1, 0.0, 2.0, 1),
    ]
    (clip,) = decode_clips(cut[1], 8)
    frames, _ = read_frames(str(video))
    assert torch.equal(clip, frames[10 + sample_frame_indices(20, 8)[0]])
    # a stream is cut as it comes
    assert list(cut_into_windows(split.to_iterable_dataset(), 2.0, 1.0)) == list(cut)
    # longer than the video: all of it
    (row,) = cut_into_windows(split.select([0]), 60.0, 16.0)
    assert (row["start"], row["end"]) == (0.0, 60.0)
    assert torch.equal(decode_clips(row, 8)[0], frames[sample_frame_indices(45, 8)[0]])


# Streams


class Recorded:
    """Views that tell which example they are of."""

    shape = (1, 1)

    def __call__(self, example, seed):
        return torch.full(self.shape, float(example["label"]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [2, 4, 6])
def test_a_stream_goes_on_where_it_was(workers, skip):
    rows = {"video": [f"{i}.mp4" for i in range(24)], "label": list(range(24))}
    stream = Dataset.from_dict(rows).cast_column("video", Video(decode=False)).to_iterable_dataset(num_shards=4)

    def batches(start):
        examples = Examples(stream, Recorded(), skip_broken=False, seed=3)
        dataset = StreamedExamples(examples, 3, start, buffer_size=5)
        loaded = itertools.islice(iterate(dataset, workers, batch_size=3), 16 - start)
        return [batch["pixel_values"].flatten().tolist() for batch in loaded]

    whole = batches(0)
    assert whole[skip:] == batches(skip)
    assert len(set(map(tuple, whole))) > 8
    first_epoch = sorted(itertools.chain(*whole[:8]))
    assert first_epoch == list(range(24))


# Augmentation


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_all_frames_of_a_clip_change_alike(seed):
    args = LabelledAugmentationArguments(flip=True, min_crop_area=0.08, rand_augment_ops=4, random_erasing=0.5)
    transform = training_transform(processor(), args)
    frame = torch.from_numpy(moving_square(1)).permute(0, 3, 1, 2)
    torch.manual_seed(seed)
    frames = transform(frame.repeat(4, 1, 1, 1))
    assert frames.shape == (4, 3, 32, 32) and frames.isfinite().all()
    torch.testing.assert_close(frames, frames[:1].expand_as(frames))


def test_left_stays_left_without_flips():
    frames = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    frames[..., :24] = 255
    for flip in (False, True):
        transform = training_transform(processor(), LabelledAugmentationArguments(flip=flip, min_crop_area=0.9))
        torch.manual_seed(0)
        left = [bool((view := transform(frames))[..., 0].mean() > view[..., -1].mean()) for _ in range(20)]
        assert all(left) != flip


def test_rand_augment_does_half_of_its_operations_with_about_its_magnitude(monkeypatch):
    levels = []
    real = torch.nn.Module.__call__

    class Operation(torch.nn.Module):
        def __init__(self, num_ops, level, bins, interpolation, fill):
            super().__init__()
            assert (num_ops, bins) == (1, 31)
            levels.append(level)

        def forward(self, frames):
            return frames

    monkeypatch.setattr("modeling_videomamba.training.augmentation.v2.RandAugment", Operation)
    torch.manual_seed(0)
    augment = RandAugment(4, magnitude=7.0, magnitude_std=0.5, fill=[0.0, 0.0, 0.0])
    for _ in range(200):
        real(augment, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert 0.45 < len(levels) / 800 < 0.55
    assert abs(np.mean(levels) - 21) < 0.3 and 1.2 < np.std(levels) < 1.8


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 4, 3, 16, 16)])
@pytest.mark.parametrize("on", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixtures(shape, on):
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    pixel_values = labels.float().reshape(6, *[1] * (len(shape) - 1)).expand(shape).clone()
    valid = torch.tensor([True, True, False, True, True, True])
    mixed, targets = Mixing(LabelledAugmentationArguments(label_smoothing=0.1, **on), 5)(pixel_values, labels, valid)
    torch.testing.assert_close(targets.sum(-1), torch.ones(6))
    assert torch.equal(mixed[2], pixel_values[2])  # a broken row is in no mixture
    torch.testing.assert_close(targets[2], torch.tensor([0.02, 0.02, 0.92, 0.02, 0.02]))
    for row, partner in ((1, 0), (3, 1), (4, 3)):
        # the share of a label is the share of its pixels
        share = (mixed[row].mean() - labels[partner]) / (labels[row] - labels[partner])
        torch.testing.assert_close(targets[row, labels[row]], 0.02 + 0.9 * share, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets[row, labels[partner]], 0.92 - 0.9 * share, atol=1e-5, rtol=0)
        assert math.isclose(mixed[row, 0].mean(), mixed[row, -1].mean(), abs_tol=1e-5)


def test_targets_without_mixing():
    labels = torch.tensor([1, 0])
    pixel_values = torch.randn(2, 3, 8, 8)
    same, targets = Mixing(LabelledAugmentationArguments(), 3)(pixel_values, labels, torch.ones(2, dtype=torch.bool))
    assert torch.equal(same, pixel_values) and torch.equal(targets, torch.tensor([[0.0, 1, 0], [1, 0, 0]]))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"random_erasing": 1.5}, {"label_smoothing": -0.1}, {"mixup": -1.0}, {"rand_augment_magnitude": 11.0}),
        *({"num_sample": 0}, {"rand_augment_ops": 2, "auto_augment": True}, {"min_crop_area": 2.0}),
    ],
)
def test_wrong_augmentation_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelledAugmentationArguments(**wrong)


# What is held back of the training data


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_each_class_is_held_back_alike(share):
    labels = [0] * 100 + [1] * 10 + [2] * 2 + [3]
    np.random.default_rng(0).shuffle(labels)
    held_back = hold_back(labels, share, 7, by_class=True)
    assert held_back == sorted(set(held_back)) == hold_back(labels, share, 7, by_class=True)
    counts = [sum(labels[index] == label for index in held_back) for label in range(4)]
    assert counts == [{0.01: 1, 0.2: 20, 0.5: 50, 0.99: 99}[share], {0.01: 1, 0.2: 2, 0.5: 5, 0.99: 9}[share], 1, 0]
    others = [hold_back(labels, share, seed, by_class=True) for seed in range(5)]
    assert len(set(map(tuple, others))) > 1


def test_values_are_held_back_at_random():
    values = [float(value) for value in range(50)]
    held_back = hold_back(values, 0.3, 0, by_class=False)
    assert len(held_back) == 15 and held_back != list(range(15))
    assert hold_back([1.0], 0.3, 0, by_class=False) == []
