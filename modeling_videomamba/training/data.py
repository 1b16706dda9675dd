"""Labelled videos for training."""

from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Video, load_dataset

from ..video_processing_videomamba import VideoMambaVideoProcessor


def load_videos(path: str) -> DatasetDict:
    r"""
    Splits of labelled videos, undecoded.

    Args:
        path (`str`): A folder in the `videofolder` layout (`train/LABEL/*.mp4`, `test/LABEL/*.mp4`), or the id of a
            data set on the Hub with the columns `video` and `label`.

    Returns:
        `DatasetDict`: with the columns `video` (a dictionary with `path` and `bytes`) and `label`.

    Raises:
        `ValueError`: if a split lacks a column or `label` has no class names.
    """
    splits = load_dataset(path)
    for name, split in splits.items():
        missing = {"video", "label"} - set(split.column_names)
        if missing or not isinstance(split.features["label"], ClassLabel):
            raise ValueError(
                f"Split {name!r} of {path} must have a column `video` and a column `label` with class names, "
                f"got {split.features}."
            )
    return splits.cast_column("video", Video(decode=False))


class LabelledVideos(torch.utils.data.Dataset):
    """Items `pixel_values` `(num_frames, channels, height, width)` and `labels` of a split of [`load_videos`]."""

    def __init__(self, split: Dataset, processor: VideoMambaVideoProcessor):
        self.split = split
        self.processor = processor

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.split[index]
        pixel_values = self.processor(example["video"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values[0], "labels": example["label"]}
