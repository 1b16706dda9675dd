"""
What `benchmark.py` measures: scans, models, training, each with its time and its peak memory, and where the time goes.
"""

import ctypes
import functools
import gc
import inspect
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    selective_scan,
    selective_scan_backends,
)
from modeling_videomamba.cpu_library import kernels
from modeling_videomamba.matrix_product_cpu import matrix_kernels
from modeling_videomamba.matrix_product_cpu import unavailable_reason as matrix_units_unavailable_reason
from modeling_videomamba.modeling_videomamba import SCANS
from modeling_videomamba.modeling_videomamba_pretraining import take_visible
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from modeling_videomamba.training.masks import make_masks
from modeling_videomamba.training.memory import keep_freed_memory

STATE_SIZE = 16
VIDEOMAMBAS = {"VideoMamba-Ti": "tiny", "VideoMamba-M": "middle"}
WITHOUT_AMX = " without AMX"  # added to the name of a model whose products are left to PyTorch
COMPARED = ("VideoMamba-Ti", "VideoMAE-Ti", "TimeSformer-Ti joint", "TimeSformer-Ti divided")
MATRIX_SHAPES = ((2048, 2048, 2048), (1569, 192, 768), (1569, 576, 2304))  # the last two are projections of Ti and M
MATRIX_SECONDS = 0.1  # for each shape, each time that the rate is measured
ROUNDS_SECONDS = 0.5  # of timed calls between two measurements of that rate
SLOW_SECONDS = 10.0  # a first call as slow as this counts as a timed one
MAX_SECONDS = 60.0  # of timed calls, after which no further one starts
NEIGHBOURS = (1, 4)  # busy processes beside a measurement
TRAINING_STEP = "VideoMamba-Ti training"

Result = dict[str, Any]


# Time, memory, and the rate of matrix products


def high_water_mark() -> int:
    """The most memory that this process has held since it started or since the last reset, in bytes."""
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_high_water_mark() -> None:
    """Sets the mark to the memory that is in use now, without what is free but not yet returned to the system."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def first_call(function: Callable[[], Any]) -> Result:
    """Time of a first call, and the peak memory above that before it, in bytes."""
    before = high_water_mark()
    reset_high_water_mark()
    baseline = high_water_mark()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    peak = high_water_mark()
    return {"first_seconds": seconds, "peak_bytes": peak - baseline, "process_peak_bytes": max(before, peak)}


def time_rounds(
    functions: list[Callable[[], Any]],
    first_seconds: list[float],
    repeats: int,
    min_seconds: float,
    between: Callable[[], Any] = lambda: None,
) -> list[Result]:
    """Times of each function, which are called in turn; `between` is called before, after, and now and then between."""
    times = [[seconds] if seconds >= SLOW_SECONDS else [] for seconds in first_seconds]
    since = 0.0
    between()
    while True:
        total, rounds = sum(map(sum, times)), min(map(len, times))
        if (rounds >= repeats and total >= min_seconds) or (rounds and total >= MAX_SECONDS):
            break
        if since >= ROUNDS_SECONDS:
            between()
            since = 0.0
        for function, its_times in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            its_times.append(time.perf_counter() - start)
            since += its_times[-1]
    between()
    return [{"min_seconds": min(t), "median_seconds": statistics.median(t), "seconds": t} for t in times]


@functools.cache
def _matrices(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b, product = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    torch.mm(a, b, out=product)
    return a, b, product


def matrix_product_rate() -> float:
    """The best rate that float32 matrix products of a few shapes keep up for a while, in multiply-adds per second."""
    best = 0.0
    for shape in MATRIX_SHAPES:
        a, b, product = _matrices(*shape)
        start, calls, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < MATRIX_SECONDS:
            torch.mm(a, b, out=product)
            calls, elapsed = calls + 1, time.perf_counter() - start
        best = max(best, calls * math.prod(shape) / elapsed)
    return best


def multiply_adds(config: VideoMambaConfig, frames: int) -> tuple[int, int]:
    """Of one clip of `config.image_size`: those of projections and convolutions, and those of the scans."""
    patches = frames // config.tubelet_size * math.prod(config.grid_size)
    length, D, E, N = 1 + patches, config.hidden_size, config.intermediate_size, config.state_size
    R = int(config.time_step_rank)
    scans = config.num_hidden_layers * len(SCANS[config.scan_order])
    embeddings = patches * D * config.num_channels * config.tubelet_size * config.patch_size**2
    projections = config.num_hidden_layers * length * (D * 2 * E + E * D)
    inside_scans = scans * length * (E * config.conv_kernel + E * (R + 2 * N) + R * E)
    # `dt * A`, `dt * x * B`, `decay * h + ...` and `C . h` for each state of each step
    return embeddings + projections + inside_scans, scans * length * E * N * 4


# The scans


def prepare_scan(name: str, shape: list[int]) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """
    A scan and its inputs `x, dt, A, B, C, D`, the same for all but for what each takes: ours have the softplus of `dt`
    inside, and Transformers' takes `x` and `dt` as `(batch, channels, length)`.
    """
    batch, length, channels = shape
    x, dt = torch.randn(2, batch, length, channels).unbind()
    B, C = torch.randn(2, batch, length, STATE_SIZE).unbind()
    A, D = -torch.arange(1.0, STATE_SIZE + 1).repeat(channels, 1), torch.ones(channels)
    x, dt = x.clone(), dt - 4
    if name == "mambapy":
        from mambapy.mamba import MambaBlock, MambaConfig

        config = MambaConfig(d_model=channels, n_layers=1, expand_factor=1, d_state=STATE_SIZE)
        return MambaBlock(config).selective_scan, [x, F.softplus(dt), A, B, C, D]
    if name == "transformers":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        fallback = inspect.unwrap(mamba_selective_scan)  # kernels that are installed for a GPU would take its place
        x, dt = (tensor.transpose(1, 2).contiguous() for tensor in (x, F.softplus(dt)))
        return lambda x, dt, A, B, C, D: fallback(x, dt, A, B.mT, C.mT, D), [x, dt, A, B, C, D]
    os.environ[BACKEND_VARIABLE] = name
    return selective_scan, [x, dt, A, B, C, D]


def measure_scan(implementation: str, shape: list[int], direction: str, **timing: Any) -> Result:
    scan, inputs = prepare_scan(implementation, shape)
    backward = direction == "forward+backward"
    inputs = [tensor.requires_grad_(backward) for tensor in inputs]
    grad_y = torch.randn_like(inputs[0])

    def call() -> None:
        y = scan(*inputs)
        if backward:
            torch.autograd.grad(y, inputs, grad_y)

    with torch.set_grad_enabled(backward):
        first = first_call(call)
        [times] = time_rounds([call], [first["first_seconds"]], **timing)
    return {**first, **times}


# The models


def build_model(name: str, frames: int, image_size: int) -> torch.nn.Module:
    clip = {"num_frames": frames, "image_size": image_size}
    if name in VIDEOMAMBAS:
        return VideoMambaModel(VideoMambaConfig(**clip, **VIDEOMAMBA_SIZES[VIDEOMAMBAS[name]]))
    vit_tiny = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12, "intermediate_size": 768}
    if name == "VideoMAE-Ti":
        config = transformers.VideoMAEConfig(**clip, **vit_tiny, tubelet_size=1)
        return transformers.AutoModel.from_config(config, attn_implementation="sdpa")
    attention = {"TimeSformer-Ti joint": "joint_space_time", "TimeSformer-Ti divided": "divided_space_time"}[name]
    return transformers.TimesformerModel(transformers.TimesformerConfig(**clip, **vit_tiny, attention_type=attention))


def measure_model(model: str, frames: int, image_size: int, **timing: Any) -> Result:
    if model.endswith(WITHOUT_AMX):
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    network = build_model(model.removesuffix(WITHOUT_AMX), frames, image_size).eval()
    clip = torch.randn(1, frames, 3, image_size, image_size)
    rates: list[float] = []
    with torch.no_grad():
        first = first_call(lambda: network(clip))
        [times] = time_rounds(
            [lambda: network(clip)],
            [first["first_seconds"]],
            between=lambda: rates.append(matrix_product_rate()),
            **timing,
        )
    result = {**first, **times, "matrix_product_rate": max(rates)}
    if isinstance(network, VideoMambaModel):
        products, scans = multiply_adds(network.config, frames)
        limit = (products + scans) / max(rates)
        result |= {"multiply_adds": products + scans, "multiply_adds_without_scan": products, "limit_seconds": limit}
        result["ratio_to_limit"] = result["min_seconds"] / limit
        result["ratio_of_medians"] = result["median_seconds"] * statistics.median(rates) / (products + scans)
        result["ratio_to_matrix_products_only"] = result["min_seconds"] * max(rates) / products
    return result


# What the kernels and the functions of PyTorch that take their place are called in a profile.
PARTS = {
    "videomamba_pack": "products",
    "videomamba_matrix_product": "products",
    "mm": "products",
    "addmm": "products",
    "linear": "products",
    "videomamba_selective_scan": "scan",
    "videomamba_selective_scan_backward": "scan_backward",
    "videomamba_causal_conv1d": "convolution",
    "videomamba_causal_conv1d_backward": "convolution_backward",
    "videomamba_rms_norm": "norm",
    "videomamba_rms_norm_backward": "norm",
    "videomamba_sum": "sum",
}


def watch(target: Any, spent: defaultdict[str, float]) -> None:
    """From now on those functions of a module or library that are in `PARTS` add their time to `spent`."""

    def timed(part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[part] += time.perf_counter() - start
        return result

    for name, part in PARTS.items():
        if hasattr(target, name):
            setattr(target, name, functools.partial(timed, part, getattr(target, name)))


def watch_kernels() -> defaultdict[str, float]:
    """From now on the kernels and matrix products of this process add their time to what is returned."""
    spent: defaultdict[str, float] = defaultdict(float)
    for target in (torch, F):
        watch(target, spent)
    if selective_scan_backends()["cpu"].usable:
        watch(kernels(), spent)
    if matrix_units_unavailable_reason() is None:
        watch(matrix_kernels(), spent)
    return spent


def fastest(call: Callable[[], Any], spent: defaultdict[str, float], repeats: int, min_seconds: float) -> Result:
    """Where the time of the fastest call goes, after a first one."""
    calls: list[tuple[float, dict[str, float]]] = []
    while len(calls) <= repeats or sum(seconds for seconds, _ in calls) < min_seconds:
        spent.clear()
        start = time.perf_counter()
        call()
        calls.append((time.perf_counter() - start, dict(spent)))
    seconds, parts = min(calls[1:], key=lambda call: call[0])
    parts = dict.fromkeys((*PARTS.values(), "optimizer"), 0.0) | parts
    parts["rest"] = seconds - sum(parts.values())
    return {"min_seconds": seconds, **{f"{part}_seconds": value for part, value in parts.items()}}


def measure_profile(model: str, frames: int, image_size: int, **timing: Any) -> Result:
    """Where the time of inference goes."""
    network = build_model(model, frames, image_size).eval()
    clip = torch.randn(1, frames, 3, image_size, image_size)
    with torch.no_grad():
        return fastest(lambda: network(clip), watch_kernels(), **timing)


def measure_training_profile(frames: int, image_size: int, batch: int, **timing: Any) -> Result:
    """Where the time of a step of training goes."""
    spent = watch_kernels()
    _, step, optimizer = prepare_training(frames, image_size, batch)

    def start(*_: Any) -> None:
        spent["optimizer"] -= time.perf_counter()

    def stop(*_: Any) -> None:
        spent["optimizer"] += time.perf_counter()

    optimizer.register_step_pre_hook(start)
    optimizer.register_step_post_hook(stop)
    return fastest(step, spent, **timing)


def prepare_training(
    frames: int, image_size: int, batch: int
) -> tuple[Callable[[], None], Callable[[], None], torch.optim.Optimizer]:
    """Inference and a step of training of VideoMamba-Ti on the same clips, and the optimizer."""
    keep_freed_memory()  # as scripts/finetune.py does
    config = VideoMambaConfig(num_frames=frames, image_size=image_size, num_labels=400, **VIDEOMAMBA_SIZES["tiny"])
    model = VideoMambaForVideoClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the default of Transformers' Trainer
    clips, labels = torch.randn(batch, frames, 3, image_size, image_size), torch.arange(batch)

    def inference() -> None:
        with torch.no_grad():
            model.eval()(clips)

    def step() -> None:
        model.train()(clips, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return inference, step, optimizer


def measure_training(frames: int, image_size: int, batch: int, **timing: Any) -> Result:
    """A step of training and inference on the same clips, in turn."""
    inference, step, _ = prepare_training(frames, image_size, batch)
    return compare({"inference": inference, "step": step}, **timing)


def compare(functions: Mapping[str, Callable[[], None]], **timing: Any) -> Result:
    """Two functions in turn, and the ratio of the second's time to the first's; memory is that of the second."""
    one, other = functions.values()
    first = first_call(other)
    start = time.perf_counter()
    one()
    timed = time_rounds([one, other], [time.perf_counter() - start, first["first_seconds"]], **timing)
    ratios = {f"ratio_of_{key}": timed[1][f"{key}_seconds"] / timed[0][f"{key}_seconds"] for key in ("min", "median")}
    pairs = zip(functions, timed, strict=True)
    return {**first, **{f"{name}_{key}": value for name, times in pairs for key, value in times.items()}, **ratios}


def measure_masked_training(frames: int, image_size: int, batch: int, mask_ratio: float, **timing: Any) -> Result:
    """A step of masked pretraining of VideoMamba-Ti, without its teacher, and one that hides nothing, in turn."""
    keep_freed_memory()
    config = VideoMambaConfig(num_frames=frames, image_size=image_size, **VIDEOMAMBA_SIZES["tiny"])
    model = VideoMambaForMaskedPreTraining(config).train()
    model.freeze_unaligned()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    clips = torch.randn(batch, frames, 3, image_size, image_size)
    patches = math.prod(config.grid_size)
    features = F.normalize(torch.randn(1, batch, 1 + frames * patches, config.alignment_size), dim=-1)
    noise, attention = torch.rand(batch, frames, *config.grid_size), torch.rand(batch, frames, patches).softmax(-1)

    def step(ratio: float) -> None:
        hidden = make_masks(noise, "attention", ratio, attention)
        model(clips, hidden, teacher_features=take_visible(features, hidden)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {"unmasked": functools.partial(step, 0.0), "masked": functools.partial(step, mask_ratio)}
    return compare(steps, **timing)


# Beside other processes


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that take all the time that the system gives them."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has started
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measure_busy(model: str, frames: int, image_size: int, batch: int = 1, **timing: Any) -> Result:
    """Inference of a model, or a step of training, on the machine as it is and beside busy processes."""
    if model == TRAINING_STEP:
        _, call, _ = prepare_training(frames, image_size, batch)
    else:
        network = build_model(model, frames, image_size).eval()
        clip = torch.randn(batch, frames, 3, image_size, image_size)
        call = torch.no_grad()(functools.partial(network, clip))
    first = first_call(call)
    result = {**first}
    for count in (0, *NEIGHBOURS):
        with busy_processes(count):
            [times] = time_rounds([call], [first["first_seconds"]], **timing)
        result |= {f"beside_{count}_{key}": value for key, value in times.items()}
    quiet = result["beside_0_median_seconds"]
    return result | {f"ratio_beside_{count}": result[f"beside_{count}_median_seconds"] / quiet for count in NEIGHBOURS}


MEASURES: dict[str, Callable[..., Result]] = {
    "busy": measure_busy,
    "scan": measure_scan,
    "model": measure_model,
    "profile": measure_profile,
    "training": measure_training,
    "training profile": measure_training_profile,
    "masked training": measure_masked_training,
}


def scan_name(implementation: str, shape: list[int], direction: str) -> str:
    return f"scan {'x'.join(map(str, shape))} {direction} {implementation}"


def busy_name(model: str, frames: int) -> str:
    return f"busy {model} {frames} frames"


def model_name(model: str, frames: int) -> str:
    return f"model {model} {frames} frames"
