"""
Clips of videos and images: what a model sees of them, and in which order.

A run is one sequence of batches, each a function of the seed and its number: the order of an epoch follows from the
seed and the epoch, the random choices of an example from these and its index. So a run can go on at any batch.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import IterableDataset, Value
from torch import nn
from torch.utils.data import get_worker_info

from ..image_processing_videomamba import VideoMambaImageProcessor, open_image, rgb_tensor
from ..video_decoding import BrokenVideoError, read_frames, read_metadata
from ..video_metadata import TimedVideoMetadata
from ..video_processing_videomamba import VideoMambaVideoProcessor, sample_frame_indices
from .diagnosis import RunError
from .shards import BrokenSampleError
from .sources import Split

Processor = VideoMambaImageProcessor | VideoMambaVideoProcessor
Key = tuple[int, int]


class BrokenImageError(ValueError):
    """A file that is not an image, or that can't be decoded."""


class MissingCaptionError(ValueError):
    """An example without a text."""


BROKEN = (BrokenVideoError, BrokenImageError, MissingCaptionError, OSError)


BROKEN_IN_WORKER = re.compile(
    r"[\w.]*(?:BrokenVideoError|BrokenImageError|MissingCaptionError|BrokenSampleError): (.*)"
)


def broken_file(error: Exception) -> str | None:
    """The message of an error about a file or sample, which a worker of a `DataLoader` hides behind its traceback."""
    if isinstance(error, (*BROKEN[:-1], BrokenSampleError)) and "\n" not in str(error):
        return str(error)
    match = BROKEN_IN_WORKER.fullmatch(str(error).strip().split("\n")[-1])
    return match and match[1]


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Ends the process with one line at a [`RunError`] and at a broken file; other errors pass."""
    try:
        yield
    except RunError as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, ValueError) as error:
        reason = broken_file(error)
        if reason is None:
            raise
        is_sample = isinstance(error, BrokenSampleError)  # which can't be left out
        hint = "" if is_sample else ". With --on-broken-video skip a run goes on without broken files"
        sys.exit(f"error: {reason}{hint}")


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits for what these numbers name (seed of the run, epoch, index, ...)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def decode_image(image: dict[str, Any]) -> torch.Tensor:
    r"""
    RGB pixels `(1, 3, height, width)`, uint8, of a value of the `Image` feature of `datasets`.

    Raises:
        `BrokenImageError`: if it is not an image or can't be decoded.
        `OSError`: if there is no such file.
    """
    try:
        return rgb_tensor(image["path"], open_image(image)).unsqueeze(0)
    except ValueError as error:
        raise BrokenImageError(str(error)) from error


def decode_clips(
    example: dict[str, Any], num_frames: int, num_clips: int = 1, generator: np.random.Generator | None = None
) -> list[torch.Tensor]:
    r"""
    The clips of a video as in [`sample_frame_indices`], from the window of it that the columns `start` and `end` give
    in seconds, where there are such; an image is one clip.

    Args:
        example (`dict`): With `video` or `image`.
        num_frames (`int`): Frames of a clip.
        num_clips (`int`, defaults to 1): Clips of a video.
        generator (`np.random.Generator`, *optional*): Draws the frame of each segment, as in training.

    Returns:
        `list[torch.Tensor]`: of shape `(num_frames, 3, height, width)`, uint8.

    Raises:
        `BrokenVideoError`, `BrokenImageError`, `OSError`: if the file can't be read.
    """
    media = _fetched(example["image" if "image" in example else "video"])
    if "image" in example:
        return [decode_image(media)]

    def indices(metadata: TimedVideoMetadata) -> np.ndarray:
        first, last = metadata.index.window(example.get("start") or 0.0, example.get("end"))
        return first + sample_frame_indices(last - first, num_frames, num_clips, generator).flatten()

    frames, _ = read_frames(media, indices)
    return list(frames.chunk(num_clips))


def _fetched(media: dict[str, Any]) -> dict[str, Any]:
    """With the bytes of a file that is elsewhere: streams of the Hub give addresses, also of files in archives."""
    if media["bytes"] is not None or "://" not in media["path"]:
        return media
    with fsspec.open(media["path"], "rb") as file:
        return {"path": media["path"], "bytes": file.read()}


@dataclass
class TrainingViews:
    """
    Random views of an example: one random frame from each segment of the video, decoded once, then `num_sample` times
    augmented (repeated augmentation).

    Args:
        processor: Of the model; makes the only view where there is no `transform`.
        transform (`nn.Module`, *optional*): From uint8 frames `(frames, 3, height, width)` to normalised ones.
        num_sample (`int`, defaults to 1): Views of each decoded clip.
    """

    processor: Processor
    transform: nn.Module | None = None
    num_sample: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_sample, frames, channels, height, width)`, without frames for images."""
        return self.num_sample, *_shape(self.processor)

    def __call__(self, example: dict[str, Any], seed: int) -> torch.Tensor:
        """Of `shape`, float32."""
        generator = np.random.default_rng(seed)
        (clip,) = decode_clips(example, getattr(self.processor, "num_frames", 1), generator=generator)
        if self.transform is None:
            return process_clips(self.processor, [clip]).repeat_interleave(self.num_sample, dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            views = torch.stack([self.transform(clip) for _ in range(self.num_sample)])
        return views.squeeze(1) if "image" in example else views


@dataclass
class EvaluationViews:
    """The views by which an example is tested: `num_clips` along time, of each `num_crops` in space."""

    processor: Processor
    num_clips: int = 1
    num_crops: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_clips * num_crops, frames, channels, height, width)`, without frames for images."""
        return self.num_clips * self.num_crops, *_shape(self.processor)

    def __call__(self, example: dict[str, Any], seed: int) -> torch.Tensor:
        """Of `shape`, float32."""
        clips = decode_clips(example, getattr(self.processor, "num_frames", 1), self.num_clips)
        return process_clips(self.processor, clips, self.num_crops)


def _shape(processor: Processor) -> tuple[int, ...]:
    frames = () if isinstance(processor, VideoMambaImageProcessor) else (processor.num_frames,)
    return *frames, 1 if processor.do_grayscale else 3, processor.crop_size["height"], processor.crop_size["width"]


def process_clips(processor: Processor, clips: list[torch.Tensor], num_crops: int = 1) -> torch.Tensor:
    """
    `pixel_values` of decoded clips, `(clips * num_crops, frames, channels, height, width)`, without frames for images.
    """
    if isinstance(processor, VideoMambaImageProcessor):
        return processor([clip[0] for clip in clips], return_tensors="pt")["pixel_values"]
    options = {"do_sample_frames": False, "num_clips": 1, "num_crops": num_crops, "return_tensors": "pt"}
    return processor(clips, **options)["pixel_values"]


class Examples(torch.utils.data.Dataset):
    """
    Examples of a split by their keys `(epoch, index)`: `pixel_values` of all views, `label` (0 where there is none),
    `caption` (one of those that there are) and `video_id` (the same for the same file), `index`, `name` and `valid`. A
    negative index stands for nothing, and a broken file is not `valid`: both are zeros, so that batches keep their
    size.

    Args:
        split: Of [`load_split`].
        views: [`TrainingViews`] or [`EvaluationViews`].
        skip_broken (`bool`): Whether a broken file is passed over, with `broken` telling which and why, or an error.
        seed (`int`): Of the run.
    """

    def __init__(self, split: Split, views: TrainingViews | EvaluationViews, *, skip_broken: bool, seed: int = 0):
        self.split, self.views, self.skip_broken, self.seed = split, views, skip_broken, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        return self.item(self.split[max(index, 0)] if index >= 0 else None, epoch, index)

    def item(self, example: dict[str, Any] | None, epoch: int, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "pixel_values": torch.zeros(self.views.shape),
            "label": 0,
            "index": index,
            "valid": False,
        }
        item |= {"name": "", "broken": None, "caption": "", "video_id": -1}
        if example is None:
            return item
        media = example["image" if "image" in example else "video"]
        item |= {"label": example.get("label", 0), "name": media["path"] or f"example {index}"}
        try:
            if "captions" in example:
                caption = draw_caption(example["captions"], item["name"], derive_seed(self.seed, epoch, index, 1))
                item |= {"caption": caption, "video_id": media_id(media)}
            item["pixel_values"] = self.views(example, derive_seed(self.seed, epoch, index))
            item["valid"] = True
        except BROKEN as error:
            if not self.skip_broken:
                raise
            item["broken"] = (item["name"], str(error))
        return item


def draw_caption(captions: list[str], name: str, seed: int) -> str:
    """One of the captions of an example. Raises [`MissingCaptionError`] where there is none, or one is empty."""
    if not captions or not all(caption and caption.strip() for caption in captions):
        raise MissingCaptionError(f"{name}: must have captions, and none that is empty, got {captions}")
    return captions[np.random.default_rng(seed).integers(len(captions))]


def media_id(media: dict[str, Any]) -> int:
    """A number of 63 bits for a file, by its content or, where that isn't read yet, by its path."""
    content = media["path"].encode() if media["bytes"] is None else media["bytes"]
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


class StreamedExamples(torch.utils.data.IterableDataset):
    """
    Examples of a stream, again and again, without the first `skip_batches` batches, nothing of which is decoded.

    Args:
        examples ([`Examples`]): Of this process's share of a stream (`datasets.distributed.split_dataset_by_node`).
        batch_size (`int`): Examples of a batch; batches come from the workers in turn.
        skip_batches (`int`): Batches that have been seen; a multiple of the number of workers.
        buffer_size (`int`): Examples among which the next is drawn.
    """

    def __init__(self, examples: Examples, batch_size: int, skip_batches: int = 0, buffer_size: int = 1000):
        self.examples, self.batch_size, self.skip_batches = examples, batch_size, skip_batches
        self.buffer_size = buffer_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        seen = self.skip_batches // (worker.num_workers if worker else 1) * self.batch_size
        split: IterableDataset = self.examples.split
        seed, index, epoch = self.examples.seed, 0, 0
        while True:
            before = index
            for example in split.shuffle(seed=derive_seed(seed, epoch) % 2**32, buffer_size=self.buffer_size):
                if index >= seen:
                    identity = index if worker is None else index * worker.num_workers + worker.id
                    yield self.examples.item(example, epoch, identity)
                index += 1
            if index == before:
                raise ValueError("The stream has no example.")
            epoch += 1


class TrainingBatches(torch.utils.data.Sampler):
    """
    Keys `(epoch, index)` of the batches of one process, from batch `start` to `end` of a run. An epoch is a permutation
    of all examples without those that fill no batch on every process; consecutive examples of it go to batch 0 of
    process 0, of process 1, ..., so that the processes together see what one process with all of a batch sees.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, rank: int, world_size: int, start: int, end: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start, self.end = rank, world_size, start, end

    @property
    def batches_per_epoch(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order, ordered_epoch = np.empty(0, int), -1
        for batch in range(self.start, self.end):
            epoch, position = divmod(batch, self.batches_per_epoch)
            if epoch != ordered_epoch:
                order = np.random.default_rng(derive_seed(self.seed, epoch)).permutation(self.length)
                ordered_epoch = epoch
            first = (position * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]


def test_batches(indices: list[int], batch_size: int, rank: int, world_size: int) -> list[list[Key]]:
    """Keys of one process for each of `indices` once; all processes have as many batches, some with index -1."""
    per_process = -(-len(indices) // world_size)
    own = indices[rank::world_size]
    own = own + [-1] * (per_process - len(own))
    return [[(0, index) for index in own[i : i + batch_size]] for i in range(0, len(own), batch_size)]


def spread(length: int, wanted: int) -> list[int]:
    """At most `wanted` indices, from the first to the last of `length`."""
    return np.unique(np.linspace(0, length - 1, wanted).round().astype(int)).tolist()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch: `pixel_values` `(views * batch, ...)`, and for each of these rows `labels`, `indices`, `valid`, `captions`
    and `video_ids` (negative where it isn't valid); `names` of the examples; `broken`, a list of `(name, reason)`.
    First comes the first view of every example, so that neighbours, which are mixed with each other, show different
    examples.
    """
    views = torch.stack([item["pixel_values"] for item in items], dim=1)
    columns = {"labels": "label", "indices": "index", "valid": "valid", "video_ids": "video_id"}
    rows = {name: torch.tensor([item[key] for item in items]).repeat(len(views)) for name, key in columns.items()}
    rows["video_ids"].masked_fill_(~rows["valid"], -1)
    return {
        "pixel_values": views.flatten(0, 1),
        **rows,
        "captions": [item["caption"] for item in items] * len(views),
        "names": [item["name"] for item in items],
        "broken": [item["broken"] for item in items if item["broken"] is not None],
    }


def hold_back(labels: Sequence[Any], share: float, seed: int, by_class: bool) -> list[int]:
    """
    Indices of a share of the examples, sorted, the same for the same labels and seed: of each class alike, or of all
    at once. A class keeps at least one example, and with two or more at least one is held back.
    """
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label if by_class else None, []).append(index)
    found: list[int] = []
    for number, (_, members) in enumerate(sorted(groups.items(), key=lambda group: group[1][0])):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = np.random.default_rng([seed, number]).permutation(len(members))
        found += [members[place] for place in order[:count]]
    return sorted(found)


def cut_into_windows(split: Split, seconds: float, stride_seconds: float) -> Split:
    r"""
    Every video of a split as windows of `seconds`, one each `stride_seconds`, for long untrimmed videos (paper, section
    4.3): rows with the columns `start` and `end` in seconds, and `source`, the number of the video. A video that is
    shorter, or that can't be read, is one window.
    """

    def windows(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        cut: dict[str, list[Any]] = {name: [] for name in [*rows, "start", "end", "source"]}
        for row in range(len(rows["video"])):
            try:
                duration = read_metadata(_fetched(rows["video"][row])).index.duration
            except BROKEN:  # reported when its window is read
                duration = seconds
            count = 1 + max(0, int((duration - seconds) // stride_seconds))
            for start in np.arange(count) * stride_seconds:
                window = {"start": float(start), "end": float(start + seconds), "source": numbers[row]}
                for name, value in {**{name: rows[name][row] for name in rows}, **window}.items():
                    cut[name].append(value)
        return cut

    features = split.features.copy()
    features |= {"start": Value("float64"), "end": Value("float64"), "source": Value("int64")}
    return split.map(windows, with_indices=True, batched=True, batch_size=16, features=features)
