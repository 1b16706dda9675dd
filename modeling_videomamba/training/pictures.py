"""Pictures of masked pretraining: what is hidden of a clip, and how near the student is to the teacher."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .plots import pyplot

HIDDEN_BRIGHTNESS = 0.2


@dataclass
class Picture:
    """
    Of one clip: `frames` `(frames, 3, height, width)` between 0 and 1, and for each patch token `(T', rows, columns)`
    whether it is `hidden`, and the cosine of student and teacher, `similarity`.
    """

    frames: torch.Tensor
    hidden: torch.Tensor
    similarity: torch.Tensor


def draw_alignment(pictures: list[Picture], path: Path) -> None:
    """Three rows for each clip: a frame of each tubelet, what is visible of it, and the similarity of its tokens."""
    if not pictures:
        return
    plots, steps = pyplot(), len(pictures[0].hidden)
    figure, axes = plots.subplots(
        3 * len(pictures), steps, figsize=(1.3 * steps + 1.2, 4.2 * len(pictures)), squeeze=False, layout="constrained"
    )
    for clip, picture in enumerate(pictures):
        frames, brightness, scale = _by_token(picture)
        rows = axes[3 * clip : 3 * clip + 3]
        for step in range(steps):
            rows[0, step].imshow(frames[step])
            rows[1, step].imshow(frames[step] * brightness[step])
            shown = rows[2, step].imshow(picture.similarity[step], vmin=scale[0], vmax=scale[1], cmap="viridis")
        for row, label in enumerate(("frame", "visible", f"cosine, mean {picture.similarity.mean():.2f}")):
            rows[row, 0].set_ylabel(label)
        figure.colorbar(shown, ax=list(rows[2]), shrink=0.9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=90)
    plots.close(figure)


def _by_token(picture: Picture) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A frame of each tubelet with channels last, the brightness of its pixels, and the range of similarities."""
    steps, rows, columns = picture.hidden.shape
    tubelet = len(picture.frames) // steps
    frames = picture.frames[tubelet // 2 :: tubelet].permute(0, 2, 3, 1).numpy()
    height, width = frames.shape[1] // rows, frames.shape[2] // columns
    hidden = picture.hidden.numpy().repeat(height, axis=1).repeat(width, axis=2)[..., None]
    scale = min(0.0, picture.similarity.min().item()), 1.0
    return frames, np.where(hidden, HIDDEN_BRIGHTNESS, 1.0), scale
