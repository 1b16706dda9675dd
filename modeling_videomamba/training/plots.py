"""What all pictures need."""

from typing import Any

import torch


def pyplot() -> Any:
    """matplotlib for files, without a screen. Raises `ImportError` where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def restore_pixels(pixel_values: torch.Tensor, processor: Any) -> torch.Tensor:
    """Normalised videos or images to `(batch, frames, 3, height, width)` between 0 and 1."""
    mean, std = (
        torch.tensor(values, device=pixel_values.device).view(-1, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    pixels = (pixel_values * std + mean).clamp(0, 1)
    pixels = pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    return pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
