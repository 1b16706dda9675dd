"""
The engine of a layer on a CPU. It computes what [`VideoMambaLayer.forward`] says with the compiled kernels of `csrc/`,
from the parameters of the layer alone, without a call of its modules.

- With gradients a layer is one function, as the Mamba release has its block. It keeps the residual stream, its norm,
  the outputs of `in_proj` and `x_proj`, the states between chunks and the output before the gate. The backward pass
  computes the output of the convolution, the time steps and the gated output again, because that takes no more time
  than to read them from memory (Mamba, arXiv 2312.00752, section 3.3.2).
- Inference takes the tokens in tiles that fit into the caches, in buffers that the layers of a forward pass share. Only
  `x` and the output of the scans exist for all tokens at the same time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from .matrix_product_cpu import GrowingBuffer, matmul, weight_gradient
from .operators import has_hooks, is_tracing
from .rms_norm_cpu import norm_backward, norm_forward
from .selective_scan import has_compiled_kernels
from .selective_scan_cpu import Gate, convolve, convolve_backward, scan, scan_backward
from .tiles_cpu import Queue, TiledConvolution, TiledLinear, TiledScan, norm_into, sum_into

# Tokens of a tile, of all samples of the batch together: few enough for the caches, and enough for matrix products at
# full speed. A tile has at least `MIN_TILE_LENGTH` tokens of each sample.
TILE_SIZE = 3200
MIN_TILE_LENGTH = 64

# The parameters of a layer


@dataclass
class ScanParameters:
    """
    Of one scan, as its modules have them: `conv_weight` (channels, 1, width), `conv_bias`, `dt_bias` and `D`
    (channels,), `x_proj` (rank + 2 * state, channels), `dt_proj` (channels, rank), `A_log` (channels, state).
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: torch.Tensor
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor

    def of_convolution(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv_weight.squeeze(1).float(), self.conv_bias.float()

    def state_matrix(self) -> torch.Tensor:
        """A."""
        return self.A_log.float().exp().neg_()

    def of_scan(self) -> dict[str, torch.Tensor]:
        """The others."""
        return {"D": self.D.float(), "dt_bias": self.dt_bias.float(), "dt_proj": self.dt_proj.float()}

    def split(self, projected: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `x_proj` makes: what `dt_proj` makes time steps of, B and C."""
        state = self.A_log.shape[1]
        return dict(zip(("dt", "B", "C"), projected.split([self.dt_proj.shape[1], state, state], dim=-1), strict=True))


NUM_PARAMETERS = len(fields(ScanParameters))


@dataclass
class LayerParameters:
    """`norm` (D,), `in_proj` (2 * channels, D), `out_proj` (D, channels), and each scan with its direction."""

    norm: torch.Tensor
    eps: float
    in_proj: torch.Tensor
    out_proj: torch.Tensor
    scans: list[ScanParameters]
    reverse: list[bool]

    @classmethod
    def of(cls, layer: Any) -> "LayerParameters":
        """The parameters of a [`VideoMambaLayer`]: the one place that knows where they are."""
        mixer = layer.mixer
        scans = [
            ScanParameters(
                conv_weight=scan.conv1d.weight,
                conv_bias=scan.conv1d.bias,
                x_proj=scan.x_proj.weight,
                dt_proj=scan.dt_proj.weight,
                dt_bias=scan.dt_bias,
                A_log=scan.A_log,
                D=scan.D,
            )
            for scan in mixer.scans
        ]
        reverse = [scan.reverse for scan in mixer.scans]
        return cls(layer.norm.weight, layer.norm.eps, mixer.in_proj.weight, mixer.out_proj.weight, scans, reverse)


# Which layers the engine may compute


FUSIBLE: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: nn.Linear.forward,
    nn.ModuleList: nn.ModuleList.forward,
}
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


def fusible(module_class: ModuleClass) -> ModuleClass:
    """Declares that the engine does what the `forward` of this class does, so that it may pass over its modules."""
    FUSIBLE[module_class] = module_class.forward
    return module_class


def is_unmodified(layer: nn.Module) -> bool:
    """
    Whether a layer does what its classes say, with its own parameters. Modules inside may be wrapped by adapters,
    replaced (by linear layers with a bias, say) or have hooks; a `forward` may be replaced on a module (as accelerate
    does to offload weights) or on a class; weights may be quantised, parametrised or offloaded.
    """
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            return False
        parameters = (parameter for parameter in module._parameters.values() if parameter is not None)
        if "forward" in vars(module) or any(type(parameter) is not nn.Parameter for parameter in parameters):
            return False
        if module is not layer and (FUSIBLE.get(type(module)) is not type(module).forward or has_hooks(module)):
            return False
    return True


def can_fuse(layer: nn.Module, hidden_states: torch.Tensor, buffers: "InferenceBuffers | None") -> bool:
    """Whether [`fused_layer`] can compute a layer in spatial-first order. Autocast needs buffers."""
    if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32 or is_tracing(hidden_states):
        return False
    if not is_unmodified(layer) or len({parameter.dtype for parameter in layer.parameters()}) != 1:
        return False
    is_autocast = torch.is_autocast_enabled("cpu")
    if is_autocast and (buffers is None or layer.training):
        return False
    return has_compiled_kernels("cpu", _compute_dtype(next(layer.parameters())))


def fused_layer(layer: Any, hidden_states: torch.Tensor, buffers: "InferenceBuffers | None") -> torch.Tensor:
    """
    [`VideoMambaLayer.forward`] in spatial-first order: `(batch, length, D)` to the same, both float32. With `buffers`,
    and not in training, it runs in tiles. The mixer computes in the dtype of the parameters or of autocast, but in
    float32 instead of float16: what is between the modules can exceed float16 where outputs and gradients fit.
    """
    parameters = LayerParameters.of(layer)
    if buffers is None or layer.training:
        return _as_one_function(parameters, hidden_states, layer.drop_path.scale(hidden_states))
    is_own = hidden_states is buffers.overwritable and not has_hooks(layer)
    hidden_states = hidden_states.contiguous()
    outputs = hidden_states if is_own else torch.empty_like(hidden_states)
    _in_tiles(parameters, hidden_states, outputs, buffers)
    return outputs


def _compute_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parameter.dtype


# With gradients: one function


def _as_one_function(
    parameters: LayerParameters, hidden_states: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """The mixed branch is multiplied by `scale`, `(batch, 1, 1)`, if there is one."""
    scans = [tensor for each in parameters.scans for tensor in vars(each).values()]
    tensors = [hidden_states, parameters.norm, parameters.in_proj, parameters.out_proj, *scans]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _FusedLayer.apply(parameters.reverse, parameters.eps, scale, keep, *tensors)


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, eps, scale, keep, hidden_states, norm, *parameters):
        ctx.reverse, ctx.eps, ctx.num_parameters = reverse, eps, len(parameters)
        normed = norm_forward(hidden_states, _computed(norm), eps)
        mixed, kept = _mix(normed, *_by_scan(parameters), reverse, keep)
        if keep:
            ctx.save_for_backward(scale, hidden_states, norm, normed, *parameters, *kept)
        return _scaled(mixed.float(), scale).add_(hidden_states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        # once: checkpoints compute them anew at each request
        scale, hidden_states, norm, normed, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.num_parameters], rest[ctx.num_parameters :]
        with torch.autocast("cpu", enabled=False):  # as it was in the forward pass
            grad_mixed = _scaled(grad_out, scale).to(normed.dtype)
            grad_normed, *gradients = _mix_backward(grad_mixed, normed, *_by_scan(parameters), ctx.reverse, *kept)
            grad_hidden, grad_norm = norm_backward(grad_normed, hidden_states, _computed(norm), ctx.eps, add=grad_out)
        gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, parameters, strict=True)]
        return None, None, None, None, grad_hidden, grad_norm.to(norm.dtype), *gradients


def _scaled(tensor, scale):
    return tensor if scale is None else tensor * scale


def _computed(parameter):
    return parameter.float() if parameter.dtype == torch.float16 else parameter


def _by_scan(parameters):
    """`in_proj`, `out_proj` and the parameters of the scans, in the dtype in which they are computed."""
    parameters = list(map(_computed, parameters))
    scans = [ScanParameters(*parameters[i : i + NUM_PARAMETERS]) for i in range(2, len(parameters), NUM_PARAMETERS)]
    return *parameters[:2], scans


def _rows(tensor):
    return tensor.flatten(0, 1)


def _mix(hidden_states, in_proj, out_proj, scans, reverse, keep):
    """
    The output, and what is to `keep` for the backward pass: `x` and `z` in one tensor, the output before the gate, and,
    for each scan, what `x_proj` made, the states between chunks and A.
    """
    shape, kept = hidden_states.shape[:2], []
    xz = matmul(_rows(hidden_states), in_proj.T).unflatten(0, shape)
    x, z = xz.chunk(2, dim=-1)
    y = ungated = None
    for i, each in enumerate(scans):
        convolved = convolve(x, *each.of_convolution(), reverse[i])
        projected = matmul(_rows(convolved), each.x_proj.T).unflatten(0, shape)
        A = each.state_matrix()
        y, ungated, checkpoints = scan(
            **{"x": convolved, "A": A},
            **each.split(projected),
            **each.of_scan(),
            **{"z": z if each is scans[-1] else None, "add": y, "ungated": y, "reverse": reverse[i], "keep": keep},
        )
        kept += [projected, checkpoints, A]
        del convolved  # whose place, which is in the cache, the next one takes
    return matmul(_rows(y), out_proj.T).unflatten(0, shape), [xz, ungated, *kept]


def _mix_backward(grad_out, hidden_states, in_proj, out_proj, scans, reverse, xz, ungated, *kept):
    """Gradients of `hidden_states, in_proj, out_proj`, then of the parameters of the scans."""
    shape, grad_out = xz.shape[:2], _rows(grad_out)
    (x, z), grad_xz = xz.chunk(2, dim=-1), torch.empty_like(xz)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    grad_y = matmul(grad_out, out_proj).unflatten(0, shape)
    gradients: list[torch.Tensor] = []
    for i in reversed(range(len(scans))):
        each, (projected, checkpoints, A), is_last = scans[i], kept[3 * i : 3 * i + 3], i == len(scans) - 1
        gate = Gate(z, ungated, grad_z, grad_ungated=grad_y, y=torch.empty_like(grad_y)) if is_last else None
        convolution = each.of_convolution()
        gradient = scan_backward(
            *(grad_y, x),
            **each.split(projected),
            **each.of_scan(),
            **{"A": A, "checkpoints": checkpoints, "gate": gate, "convolution": convolution, "reverse": reverse[i]},
        )
        if gate:
            grad_out_proj = weight_gradient(grad_out, _rows(gate.y))
        grad_weight, grad_bias, grad_x_proj = convolve_backward(
            *(gradient.x, x, *convolution, reverse[i], grad_x),
            add=not is_last,
            x_proj=each.x_proj.float(),
            grad_projected=gradient.projected,
        )
        of_scan = ScanParameters(
            conv_weight=grad_weight.unsqueeze(1),
            conv_bias=grad_bias,
            x_proj=grad_x_proj,
            dt_proj=gradient.dt_proj,
            dt_bias=gradient.dt_bias,
            A_log=gradient.A.mul_(A),
            D=gradient.D,
        )
        gradients = [*vars(of_scan).values(), *gradients]
        del gate, gradient  # whose places, which are in the cache, the next ones take
    grad_xz = _rows(grad_xz)
    return [
        matmul(grad_xz, in_proj).unflatten(0, shape),
        weight_gradient(grad_xz, _rows(hidden_states)),
        grad_out_proj,
        *gradients,
    ]


# Inference: tiles


@dataclass
class Tile:
    """
    Buffers `(batch, length of the tile, ...)`. Inputs `x` and outputs `y` of the scans exist for all tiles at the same
    time. The other buffers are the same memory for all tiles, and the last three of them share it.
    """

    x: torch.Tensor
    y: torch.Tensor
    projected: torch.Tensor
    z: torch.Tensor
    convolved: torch.Tensor
    normed: torch.Tensor
    out: torch.Tensor


class InferenceBuffers:
    """
    Memory that the layers of a forward pass share, because a page fault costs more than some steps of a layer.
    `overwritable` is the residual stream that nothing else holds, which a layer may overwrite.
    """

    def __init__(self) -> None:
        self.overwritable: torch.Tensor | None = None
        self.tiles: list[Tile] = []
        self.lengths: list[int] = []
        self.weights = {name: GrowingBuffer() for name in ("x_proj", "x", "z", "out")}
        self.queue = Queue()
        self._made_for: tuple[Any, ...] | None = None

    def allocate(self, parameters: LayerParameters, batch: int, length: int, dtype: torch.dtype) -> None:
        """Makes the tiles for `(batch, length, D)`, unless they are there."""
        hidden_size, channels = parameters.out_proj.shape
        (projected, _), conv_kernel = parameters.scans[0].x_proj.shape, parameters.scans[0].conv_weight.shape[2]
        needed = (batch, length, dtype, hidden_size, channels, projected, conv_kernel)
        if needed == self._made_for:
            return
        shortest = max(MIN_TILE_LENGTH, conv_kernel)  # a convolution sees no further than the tile before
        num_tiles = max(1, min(math.ceil(batch * length / TILE_SIZE), length // shortest))
        lengths = [length // num_tiles + (i < length % num_tiles) for i in range(num_tiles)]

        def side_by_side(width: int) -> list[torch.Tensor]:
            sizes = [batch * n * width for n in lengths]
            parts = torch.empty(sum(sizes), dtype=dtype).split(sizes)
            return [part.view(batch, n, width) for part, n in zip(parts, lengths, strict=True)]

        def in_the_same_place(*widths: int) -> list[list[torch.Tensor]]:
            memory = torch.empty(batch * max(lengths) * max(widths), dtype=dtype)
            return [[memory[: batch * n * width].view(batch, n, width) for n in lengths] for width in widths]

        columns = (
            *map(side_by_side, (channels, channels)),
            *in_the_same_place(projected),
            *in_the_same_place(channels),
            *in_the_same_place(channels, hidden_size, hidden_size),
        )
        self.tiles = [Tile(*tile) for tile in zip(*columns, strict=True)]
        self.lengths, self._made_for = lengths, needed


def inference_buffers(hidden_states: torch.Tensor) -> InferenceBuffers | None:
    """For the layers of a forward pass; none with gradients, or where operators are recorded."""
    return None if torch.is_grad_enabled() or is_tracing(hidden_states) else InferenceBuffers()


def _in_tiles(
    parameters: LayerParameters, hidden_states: torch.Tensor, outputs: torch.Tensor, buffers: InferenceBuffers
) -> None:
    """A layer of `hidden_states` into `outputs`, which may be the same memory, tile by tile for each scan."""
    (batch, length, _), dtype = hidden_states.shape, _compute_dtype(parameters.norm)
    if dtype == torch.float16:
        dtype = torch.float32
    buffers.allocate(parameters, batch, length, dtype)
    queue, weights = buffers.queue, buffers.weights
    sources, targets = hidden_states.split(buffers.lengths, dim=1), outputs.split(buffers.lengths, dim=1)
    x_weight, z_weight = parameters.in_proj.to(dtype).chunk(2)
    project_x = TiledLinear(x_weight, weights["x"], queue)
    project_z = TiledLinear(z_weight, weights["z"], queue)
    project_out = TiledLinear(parameters.out_proj.to(dtype), weights["out"], queue)
    for number, (each, reverse) in enumerate(zip(parameters.scans, parameters.reverse, strict=True)):
        is_first, is_last = number == 0, number == len(parameters.scans) - 1
        convolution = TiledConvolution(each.conv_weight, each.conv_bias, queue, reverse=reverse)
        project = TiledLinear(each.x_proj.to(dtype), weights["x_proj"], queue)
        tiled_scan = TiledScan(
            each.state_matrix(), each.D, each.dt_bias, each.dt_proj, queue, batch=batch, reverse=reverse
        )
        for i in reversed(range(len(sources))) if reverse else range(len(sources)):
            tile = buffers.tiles[i]
            if is_first or is_last:
                norm_into(tile.normed, sources[i], parameters.norm, parameters.eps, queue)
            if is_first:
                project_x(tile.normed, tile.x)
            if is_last:
                project_z(tile.normed, tile.z)
            convolution(tile.x, tile.convolved)
            project(tile.convolved, tile.projected)
            z, add = tile.z if is_last else None, None if is_first else tile.y
            tiled_scan(tile.convolved, **each.split(tile.projected), out=tile.y, z=z, add=add)
            if is_last:
                project_out(tile.y, tile.out)
                sum_into(targets[i], sources[i], tile.out, queue)
    queue.run()
