"""Pictures of videos as rows of frames."""

from typing import Any

import torch
import torch.nn.functional as F

from modeling_videomamba.training.plots import restore_pixels

MAX_FRAMES = 8


def draw_filmstrip(axis: Any, pixel_values: torch.Tensor, processor: Any, title: str) -> None:
    """Some frames of `(frames, 3, height, width)`, normalised by a processor, side by side on an axis of matplotlib."""
    shown = torch.linspace(0, len(pixel_values) - 1, min(len(pixel_values), MAX_FRAMES)).round().long()
    frames = restore_pixels(pixel_values[None, shown], processor)[0].movedim(1, -1)
    gap = max(1, frames.shape[2] // 32)
    frames = F.pad(frames, (0, 0, 0, gap), value=1.0)  # white between the frames
    axis.imshow(frames.movedim(0, 1).flatten(1, 2).numpy(), aspect="equal")
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.axis("off")
