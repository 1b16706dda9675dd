"""The masks of masked pretraining (paper, section 3.3 and figure 5)."""

import torch
from accelerate import Accelerator

from videomamba_arguments import MASK_TYPES, MaskType

from ..configuration_videomamba import VideoMambaConfig


def make_masks(
    noise: torch.Tensor, mask_type: MaskType, mask_ratio: float, attention: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Which tokens are hidden, a function of random numbers. Every sample has the same number of them.

    Args:
        noise (`torch.Tensor` of shape `(batch, T', rows, columns)`): Uniform in `[0, 1)`, of a grid of patch tokens.
        mask_type (`str`): Which tokens stay visible:

            - `"random"`: any of the clip;
            - `"tube"`: any of a frame, the same in all frames;
            - `"clip_row"`: whole rows, any of the clip;
            - `"frame_row"`: whole rows, as many in every frame;
            - `"attention"`: as many in every frame, drawn without replacement with the probabilities `attention`.
        mask_ratio (`float`): Share that is hidden, at least 0 and below 1; rounded down to whole tokens of the clip
            (`"random"`) or of a frame, or to whole rows of a frame.
        attention (`torch.Tensor` of shape `(batch, T', P)`, *optional*): Not negative; for `"attention"`.

    Returns:
        `torch.Tensor` of shape `(batch, T'P)`: booleans, `True` for hidden, on the device of `noise`.

    Raises:
        `ValueError`: for another `mask_type`, a `mask_ratio` out of range, or a missing or misshapen `attention`.
    """
    if mask_type not in MASK_TYPES:
        raise ValueError(f"`mask_type` must be one of {', '.join(MASK_TYPES)}, got {mask_type}.")
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"`mask_ratio` must be at least 0 and below 1, got {mask_ratio}.")
    steps, rows, columns = noise.shape[1:]
    if mask_type == "random":
        return _hide(noise.flatten(1), _count(mask_ratio, noise[0].numel()))
    if mask_type == "tube":
        return _hide(noise[:, 0].flatten(1), _count(mask_ratio, rows * columns)).repeat(1, steps)
    if mask_type == "clip_row":
        hidden = _hide(noise[..., 0].flatten(1), steps * _count(mask_ratio, rows))
        return hidden.repeat_interleave(columns, dim=1)
    if mask_type == "frame_row":
        hidden = _hide(noise[..., 0], _count(mask_ratio, rows))
        return hidden.flatten(1).repeat_interleave(columns, dim=1)
    if attention is None or attention.shape != (*noise.shape[:2], rows * columns):
        found = None if attention is None else tuple(attention.shape)
        raise ValueError(f"`attention` must be of shape {(*noise.shape[:2], rows * columns)}, got {found}.")
    # the tokens whose exponential clocks, at the rate of their attention, ring first: drawn without replacement
    clocks = -torch.log1p(-noise.flatten(2)) / attention.clamp(min=torch.finfo(attention.dtype).tiny)
    return _hide(clocks, _count(mask_ratio, rows * columns)).flatten(1)


def draw_noise(
    accelerator: Accelerator, grid: tuple[int, int, int], rows: int, num_views: int, seed: int
) -> torch.Tensor:
    r"""
    Noise of the batch of this process, as part of those of the batches of all: several have the masks of one.

    Args:
        accelerator (`Accelerator`): Of the run.
        grid (`tuple`): Of [`token_grid`].
        rows (`int`): Of the batch: the first view of every example, then the second.
        num_views (`int`): Views of each example.
        seed (`int`): The same on all processes.

    Returns:
        `torch.Tensor` of shape `(rows, T', rows, columns)`, on the device of the process.
    """
    generator = torch.Generator(accelerator.device).manual_seed(seed)
    shape = (num_views, accelerator.num_processes, rows // num_views)
    noise = torch.rand(*shape, *grid, generator=generator, device=accelerator.device)
    return noise[:, accelerator.process_index].flatten(0, 1)


def token_grid(config: VideoMambaConfig, pixel_values: torch.Tensor) -> tuple[int, int, int]:
    """`T'`, rows and columns of the patch tokens of `pixel_values`, videos or images."""
    rows, columns = (side // config.patch_size for side in pixel_values.shape[-2:])
    steps = pixel_values.shape[1] // config.tubelet_size if pixel_values.ndim == 5 else 1
    return steps, rows, columns


def _count(mask_ratio: float, number: int) -> int:
    """Rounded down, but for what a ratio lacks as it is binary: 0.29 of 100 are 29."""
    return int(mask_ratio * number + 1e-9)


def _hide(values: torch.Tensor, count: int) -> torch.Tensor:
    """Booleans of the shape of `values`: whether a value is among the `count` largest of the last dimension."""
    hidden = torch.zeros_like(values, dtype=torch.bool)
    return hidden.scatter_(-1, values.topk(count, dim=-1).indices, True)
