"""From pixels to tokens: embeddings with positions, which of the tokens are taken, and in which order."""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_videomamba import VideoMambaConfig


def resize_spatial_positions(
    position_embeddings: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Bicubic resize of `(1, 1 + rows * columns, D)` to another grid of `(rows, columns)`; the class entry is kept."""
    if new_grid == grid:
        return position_embeddings
    class_entry, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    patches = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False)
    patches = patches.to(class_entry.dtype).flatten(2).transpose(1, 2)
    return torch.cat([class_entry, patches], dim=1)


def resize_temporal_positions(position_embeddings: torch.Tensor, length: int) -> torch.Tensor:
    """Linear resize of `(1, T', D)` to `(1, length, D)`."""
    if position_embeddings.shape[1] == length:
        return position_embeddings
    resized = F.interpolate(
        position_embeddings.float().transpose(1, 2), size=length, mode="linear", align_corners=False
    )
    return resized.transpose(1, 2).to(position_embeddings.dtype)


def temporal_first(num_steps: int, num_patches: int, device: torch.device) -> torch.Tensor:
    """Permutation `(1, 1 + num_steps * num_patches)` from spatial-first to temporal-first order; class token first."""
    patches = torch.arange(1, 1 + num_steps * num_patches, device=device).view(num_steps, num_patches)
    return F.pad(patches.T.flatten(), (1, 0)).unsqueeze(0)


def take_tokens(sequence: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Of `(batch, length, ...)` those tokens that `indices`, `(batch, count)` or `(1, count)`, name."""
    if len(indices) == 1:  # the same of all samples
        return sequence[:, indices[0]]
    return torch.take_along_dim(sequence, indices.view(*indices.shape, *[1] * (sequence.ndim - 2)), dim=1)


def visible_tokens(bool_masked_pos: torch.Tensor, batch: int, num_patches: int) -> torch.Tensor:
    r"""
    Indices `(batch, 1 + visible)` of the class token and of the patch tokens that are not masked, in their order.

    Raises:
        `ValueError`: if `bool_masked_pos` is not boolean and `(batch, num_patches)`, or hides more of one sample than
            of another.
    """
    if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != (batch, num_patches):
        raise ValueError(
            f"`bool_masked_pos` must be boolean and of shape (batch, T'P) = {(batch, num_patches)}, got "
            f"{bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}."
        )
    counts = bool_masked_pos.sum(dim=1).unique().tolist() or [0]
    if len(counts) > 1:
        raise ValueError(
            f"`bool_masked_pos` must hide the same number of tokens of each sample, got {counts[0]} to {counts[-1]}."
        )
    visible = F.pad(~bool_masked_pos, (1, 0), value=True)
    return visible.nonzero()[:, 1].view(batch, 1 + num_patches - counts[0])


class VideoMambaPatchEmbeddings(nn.Module):
    """Tubelets of pixels to tokens: `(batch, frames, channels, height, width)` to `(batch, D, T', rows, columns)`."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.projection = nn.Conv3d(config.num_channels, config.hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tubelet, patch, _ = self.projection.kernel_size
        _, frames, channels, height, width = pixel_values.shape
        if channels != self.projection.in_channels:
            raise ValueError(
                f"`pixel_values` must have {self.projection.in_channels} channels, third dimension from the end, "
                f"got shape {tuple(pixel_values.shape)}."
            )
        if frames == 0 or frames % tubelet:
            raise ValueError(
                f"The frames of `pixel_values` must be a multiple of `tubelet_size` ({tubelet}), got {frames}."
            )
        if not (height and width) or height % patch or width % patch:
            raise ValueError(
                f"Height and width of `pixel_values` must be multiples of `patch_size` ({patch}), "
                f"got {height} x {width}."
            )
        pixel_values = pixel_values.transpose(1, 2)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and pixel_values.device.type == "cpu":
            # convolutions copy their input twice, which for a long video is more than all layers need
            pieces = (piece.to(self.projection.weight.dtype) for piece in pixel_values.split(8 * tubelet, dim=2))
            first = self.projection(next(pieces))
            patches = first.new_empty(*first.shape[:2], frames // tubelet, *first.shape[3:])
            for target, piece in zip(
                patches.split(8, dim=2), chain([first], map(self.projection, pieces)), strict=True
            ):
                target.copy_(piece)
            return patches
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class VideoMambaEmbeddings(nn.Module):
    """Patch tokens with positions, behind the class token."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        self.patch_embeddings = VideoMambaPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.temporal_position_embeddings = None
        if config.num_frames is not None:
            num_steps = config.num_frames // config.tubelet_size
            self.temporal_position_embeddings = nn.Parameter(torch.zeros(1, num_steps, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Tokens `(batch, 1 + T'P, D)` in spatial-first order, and `T'`."""
        if pixel_values.ndim not in (4, 5):
            raise ValueError(
                "`pixel_values` must be a video (batch, frames, channels, height, width) or an image "
                f"(batch, channels, height, width), got shape {tuple(pixel_values.shape)}."
            )
        is_image = pixel_values.ndim == 4
        if is_image:  # a still picture fills one tubelet
            pixel_values = pixel_values.unsqueeze(1).expand(-1, self.config.tubelet_size, -1, -1, -1)
        patches = self.patch_embeddings(pixel_values)
        batch, _, num_steps, rows, columns = patches.shape
        positions = resize_spatial_positions(self.position_embeddings, self.config.grid_size, (rows, columns))
        cls_token = (self.cls_token + positions[:, :1]).expand(batch, -1, -1)
        tokens = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1)
        del patches
        frames = tokens[:, 1:].unflatten(1, (num_steps, rows * columns))
        frames += positions[:, 1:].unsqueeze(1)
        if self.temporal_position_embeddings is not None and not is_image:
            frames += resize_temporal_positions(self.temporal_position_embeddings, num_steps).unsqueeze(2)
        return tokens, num_steps

    @torch.no_grad()
    def resize_positions(self, image_size: int | list[int] | tuple[int, int], num_frames: int | None) -> None:
        """See [`VideoMambaPreTrainedModel.resize_position_embeddings`]."""
        grid = self.config.grid_size
        self.config.image_size, self.config.num_frames = image_size, num_frames
        resized = resize_spatial_positions(self.position_embeddings, grid, self.config.grid_size)
        self.position_embeddings = nn.Parameter(resized.clone())
        if num_frames is not None:
            num_steps = num_frames // self.config.tubelet_size
            if self.temporal_position_embeddings is None:
                resized = self.position_embeddings.new_zeros(1, num_steps, self.config.hidden_size)
            else:
                resized = resize_temporal_positions(self.temporal_position_embeddings, num_steps)
            self.temporal_position_embeddings = nn.Parameter(resized.clone())

    @torch.no_grad()
    def inflate_patches(self, tubelet_size: int) -> None:
        """See [`VideoMambaPreTrainedModel.inflate`]."""
        kernel = self.patch_embeddings.projection
        self.config.tubelet_size = tubelet_size
        self.patch_embeddings = VideoMambaPatchEmbeddings(self.config).to(kernel.weight.device, kernel.weight.dtype)
        inflated = self.patch_embeddings.projection
        inflated.bias = kernel.bias
        inflated.weight.zero_()
        inflated.weight[:, :, tubelet_size // 2] = kernel.weight[:, :, 0]
