"""Time and memory of VideoMamba on a CPU, beside the machine's own limit and beside what Transformers offers.

    python scripts/benchmark.py --json results.json --picture results.png

Everything is float32 with random weights and is measured in this one run, each measurement in a process of its own.
Peak memory is that of the first call, above the weights and the input; it is a lower bound on systems other than Linux.
The limit of a model is the time for its multiply-adds at the best rate of matrix products that was seen before, between
and after its timed runs. A measurement that can't be made is reported with the reason.
"""

import argparse
import ctypes
import functools
import gc
import inspect
import json
import math
import operator
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    selective_scan,
    selective_scan_backends,
)
from modeling_videomamba.cpu_library import kernels
from modeling_videomamba.matrix_product_cpu import unusable as matrix_units_unusable
from modeling_videomamba.modeling_videomamba import SCANS
from modeling_videomamba.selective_scan import BACKEND_VARIABLE
from modeling_videomamba.training.memory import keep_freed_memory

SCAN_SHAPES = [[1, 1569, 384], [1, 12545, 1152]]  # Ti at 8 frames of 224 pixels, M at 64
FRAMES = [8, 16, 32, 64]
STATE_SIZE = 16
SCAN_IMPLEMENTATIONS = ("cpu", "torch", "transformers", "mambapy")
VIDEOMAMBAS = {"VideoMamba-Ti": "tiny", "VideoMamba-M": "middle"}
WITHOUT_AMX = " without AMX"  # added to the name of a model whose products are left to PyTorch
COMPARED = ("VideoMamba-Ti", "VideoMAE-Ti", "TimeSformer-Ti joint", "TimeSformer-Ti divided")
COLORS = ("#0072b2", "#d55e00", "#cc79a7", "#009e73")
MATRIX_SHAPES = ((2048, 2048, 2048), (1569, 192, 768), (1569, 576, 2304))  # the last two are projections of Ti and M
MATRIX_SECONDS = 0.1  # for each shape, each time that the rate is measured
ROUNDS_SECONDS = 0.5  # of timed calls between two measurements of that rate
SLOW_SECONDS = 10.0  # a first call as slow as this counts as a timed one
MAX_SECONDS = 60.0  # of timed calls, after which no further one starts
TRAINING_BATCH = 2
PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")

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
    "videomamba_sum": "sum",
}


class Watched:
    """A module or library whose functions add their time to `spent`."""

    def __init__(self, target: Any, spent: defaultdict[str, float]):
        self.__dict__["target"], self.__dict__["spent"] = target, spent

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.target, name)
        return functools.partial(self._timed, PARTS[name], function) if name in PARTS else function

    def _timed(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.spent[part] += time.perf_counter() - start
        return result


def watch_kernels() -> defaultdict[str, float]:
    """From now on the kernels of this process add their time to what is returned."""
    spent: defaultdict[str, float] = defaultdict(float)
    modules = [import_module(f"modeling_videomamba.{name}") for name in ("pieces_cpu", "selective_scan_cpu")]
    products = import_module("modeling_videomamba.matrix_product_cpu")
    if selective_scan_backends()["cpu"].usable:
        watched = Watched(kernels(), spent)
        for module in modules:
            module.kernels = lambda: watched  # type: ignore[attr-defined]
    if products.unusable() is None:
        units = Watched(products.matrix_kernels(), spent)
        products.matrix_kernels = modules[0].matrix_kernels = lambda: units  # type: ignore[attr-defined]
    products.F = Watched(F, spent)  # type: ignore[attr-defined]
    for module in (modules[0], products, import_module("modeling_videomamba.layer_cpu")):
        module.torch = Watched(torch, spent)  # type: ignore[attr-defined]
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
    watched = Watched(optimizer, spent)
    optimizer.step = functools.partial(watched._timed, "optimizer", optimizer.step)  # type: ignore[method-assign]
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
    first = first_call(step)
    start = time.perf_counter()
    inference()
    firsts = [time.perf_counter() - start, first["first_seconds"]]
    timed = time_rounds([inference, step], firsts, **timing)
    ratios = {f"ratio_of_{key}": timed[1][f"{key}_seconds"] / timed[0][f"{key}_seconds"] for key in ("min", "median")}
    pairs = zip(("inference", "step"), timed, strict=True)
    return {**first, **{f"{name}_{key}": value for name, times in pairs for key, value in times.items()}, **ratios}


# One process for each measurement

MEASURES: dict[str, Callable[..., Result]] = {
    "scan": measure_scan,
    "model": measure_model,
    "profile": measure_profile,
    "training": measure_training,
    "training profile": measure_training_profile,
}


def scan_name(implementation: str, shape: list[int], direction: str) -> str:
    return f"scan {'x'.join(map(str, shape))} {direction} {implementation}"


def model_name(model: str, frames: int) -> str:
    return f"model {model} {frames} frames"


def list_measurements(args: argparse.Namespace) -> dict[str, Result]:
    """Name -> what to measure, and the arguments of its function."""
    timing = {"repeats": args.repeats, "min_seconds": args.min_seconds}
    listed: dict[str, Result] = {}
    for shape in args.scan_shapes:
        for direction in ("forward", "forward+backward"):
            for implementation in SCAN_IMPLEMENTATIONS:
                spec = {"implementation": implementation, "shape": shape, "direction": direction}
                listed[scan_name(**spec)] = {"measure": "scan", **spec, **timing}
    short = args.frames[0]
    clips = [(model, frames, timing) for frames in args.frames for model in COMPARED]
    clips += [("VideoMamba-M", short, timing)]
    if matrix_units_unusable() is None and hasattr(torch.backends.mkldnn, "matmul"):
        clips += [
            (f"VideoMamba-Ti{WITHOUT_AMX}", args.frames[-1], timing),
            (f"VideoMamba-M{WITHOUT_AMX}", short, timing),
        ]
    if args.long_clip not in args.frames:
        clips += [("VideoMamba-Ti", args.long_clip, {"repeats": 1, "min_seconds": 0.0})]
    for model, frames, how in clips:
        spec = {"model": model, "frames": frames, "image_size": args.image_size}
        listed[model_name(model, frames)] = {"measure": "model", **spec, **how}
    for model, frames in (("VideoMamba-Ti", args.frames[-1]), ("VideoMamba-M", short)):
        spec = {"model": model, "frames": frames, "image_size": args.image_size}
        listed[f"profile {model} {frames} frames"] = {"measure": "profile", **spec, **timing}
    spec = {"frames": short, "image_size": args.image_size, "batch": TRAINING_BATCH}
    listed["training VideoMamba-Ti"] = {"measure": "training", **spec, **timing}
    listed["profile training VideoMamba-Ti"] = {"measure": "training profile", **spec, **timing}
    if not args.only:
        return listed
    return {name: spec for name, spec in listed.items() if any(part in name for part in args.only)}


def work(request: Result) -> Result:
    """In the process of a measurement."""
    with suppress(OSError):  # where memory runs out, this process shall be ended rather than another
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(request.pop("threads"))
    torch.manual_seed(0)
    return MEASURES[request.pop("measure")](**request)


def run_worker(spec: Result, threads: int, timeout: float) -> Result:
    """What the measurement found, or `failed`: the reason."""
    facts = {key: value for key, value in spec.items() if key not in ("repeats", "min_seconds")}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps({**spec, "threads": threads})]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**facts, "failed": f"not done after {timeout:g} s"}
    if process.returncode == 0:
        return {**facts, **json.loads(process.stdout.splitlines()[-1])}
    if process.returncode < 0:
        hint = ", probably for lack of memory" if process.returncode == -9 else ""
        return {**facts, "failed": f"ended by signal {-process.returncode}{hint}"}
    return {**facts, "failed": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}


# The report


def claims(results: dict[str, Result]) -> list[Result]:
    """The targets of this project, what was measured (`None` if it was not), and whether it holds."""

    def value(name: str, key: str = "min_seconds") -> float:
        return results.get(name, {}).get(key, math.nan)

    def times_ours(peer: str, key: str = "min_seconds") -> float:
        return value(model_name(peer, 64), key) / value(ti, key)

    def mambapy(direction: str) -> float:
        return value(scan_name("mambapy", [1, 1569, 384], direction), "time_over_cpu")

    ti, ti_1024, m = model_name("VideoMamba-Ti", 64), model_name("VideoMamba-Ti", 1024), model_name("VideoMamba-M", 8)
    rows = [
        ("scan 1x1569x384 forward: mambapy's time / ours", mambapy("forward"), ">=", 80.0),
        ("scan 1x1569x384 forward+backward: the same", mambapy("forward+backward"), ">=", 50.0),
        ("Ti, 64 frames: time / limit", value(ti, "ratio_to_limit"), "<=", 2.0),
        ("Ti, 64 frames: VideoMAE's time / ours", times_ours("VideoMAE-Ti"), ">=", 6.0),
        ("Ti, 64 frames: divided TimeSformer's time / ours", times_ours("TimeSformer-Ti divided"), ">=", 1.0),
        ("M, 8 frames: time / limit", value(m, "ratio_to_limit"), "<=", 1.15),
        ("Ti, 64 frames: peak MB", value(ti, "peak_bytes") / 1e6, "<=", 90.0),
        (
            "Ti, 64 frames: joint TimeSformer's peak / ours",
            times_ours("TimeSformer-Ti joint", "peak_bytes"),
            ">=",
            40.0,
        ),
        ("Ti, 1024 frames: GB of the process", value(ti_1024, "process_peak_bytes") / 1e9, "<", 2.5),
        ("Ti: training step / inference", value("training VideoMamba-Ti", "ratio_of_min"), "<=", 4.0),
    ]
    holds: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
    return [
        {"claim": claim, "target": f"{sign} {target:g}", "value": None, "holds": None}
        | ({} if math.isnan(measured) else {"value": measured, "holds": holds[sign](measured, target)})
        for claim, measured, sign, target in rows
    ]


def make_report(results: dict[str, Result], threads: int) -> Result:
    for result in results.values():
        if result["measure"] == "scan" and "failed" not in result:
            ours = results.get(scan_name("cpu", result["shape"], result["direction"]), {})
            if "min_seconds" in ours:
                result["time_over_cpu"] = result["min_seconds"] / ours["min_seconds"]
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "logical_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_units": matrix_units_unusable() or "used",
        "backend": os.environ.get(BACKEND_VARIABLE) or ("cpu" if selective_scan_backends()["cpu"].usable else "torch"),
        "dtype": "float32",
        "best_matrix_product_rate": max((r.get("matrix_product_rate", 0.0) for r in results.values()), default=0.0),
    }
    return {"environment": environment, "measurements": results, "claims": claims(results)}


# Title, what names a row, the numbers of a row, and a note. Numbers have the names that they have in the JSON.
TABLES = {
    "scan": (
        "The scan alone, state 16",
        ("shape", "direction", "implementation"),
        ("min_seconds", "median_seconds", "peak_bytes", "time_over_cpu"),
        "`cpu` and `torch` are ours. They do more: the softplus of dt, whose result the others are given.",
    ),
    "model": (
        "Models, inference on one clip",
        ("model", "frames"),
        ("min_seconds", "median_seconds", "peak_bytes", "process_peak_bytes"),
        "peak: above the weights and the input; process peak: all memory of the process.",
    ),
    "limit": (
        "Models beside the limit of this machine",
        ("model", "frames"),
        (
            *("multiply_adds", "multiply_adds_without_scan", "matrix_product_rate"),
            *("limit_seconds", "ratio_to_limit", "ratio_to_matrix_products_only"),
        ),
        "Multiply-adds in 10^9; the best rate of matrix products around the timed calls in 10^9 of them per second.",
    ),
    "profile": (
        "Where the time goes, inference on one clip",
        ("model", "frames"),
        ("min_seconds", *(f"{part}_seconds" for part in ("products", "scan", "convolution", "norm", "sum", "rest"))),
        "Of the fastest call, kernel by kernel; products of the embeddings and of dt_proj are in the rest.",
    ),
    "training": (
        "Training of VideoMamba-Ti",
        ("frames", "batch"),
        ("inference_min_seconds", "step_min_seconds", "ratio_of_min", "ratio_of_median", "peak_bytes"),
        "A step: forward, backward and AdamW, in turn with inference on the same clips.",
    ),
    "training profile": (
        "Where the time goes, a step of training",
        ("frames", "batch"),
        (
            *("min_seconds", "products_seconds", "scan_seconds", "scan_backward_seconds", "convolution_seconds"),
            *("convolution_backward_seconds", "optimizer_seconds", "rest_seconds"),
        ),
        "Of the fastest step; the norm, the embeddings and what PyTorch adds up are in the rest.",
    ),
}
BILLIONS = {word: (word, 1e-9) for word in ("adds", "scan", "rate")}
UNITS = {"seconds": ("ms", 1e3), "bytes": ("MB", 1e-6), **BILLIONS}  # by the last word of a name


def number(value: float, key: str = "") -> str:
    """At least three digits, in the unit of the key."""
    value *= UNITS.get(key.split("_")[-1], ("", 1.0))[1]
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f}"


def make_table(kind: str, results: list[Result]) -> Table:
    title, names, keys, note = TABLES[kind]
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for key in keys:
        start, _, unit = key.rpartition("_")
        table.add_column(f"{start.replace('_', ' ')} {UNITS.get(unit, (unit,))[0]}", justify="right")
    notes = [note]
    for result in results:
        row = ["x".join(map(str, result[name])) if name == "shape" else str(result[name]) for name in names]
        if "failed" in result:
            table.add_row(*row, "failed")
            notes.append(f"{' '.join(row)}: failed: {result['failed']}")
        else:
            table.add_row(*row, *(number(result[key], key) if key in result else "" for key in keys))
    table.caption = Text("\n".join(notes))
    return table


def print_report(console: Console, report: Result) -> None:
    facts, results = report["environment"], report["measurements"].values()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    machine = f"threads: {facts['threads']}, logical cores: {facts['logical_cores']}, {facts['cpu_capability']}"
    rate = f"best rate of matrix products: {number(facts['best_matrix_product_rate'], 'rate')} G multiply-adds / s"
    units = f"matrix units: {facts['matrix_units']}"
    lines = (versions, f"{machine}, {facts['dtype']}, backend {facts['backend']}", rate, units)
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
    for kind in TABLES:
        rows = [r for r in results if ("ratio_to_limit" in r if kind == "limit" else r["measure"] == kind)]
        if rows:
            console.print(make_table(kind, rows))
    table = Table("claim", "target", "measured", "holds", title="Claims, by the shortest times", title_justify="left")
    for claim in report["claims"]:
        measured = "not measured" if claim["value"] is None else number(claim["value"])
        table.add_row(claim["claim"], claim["target"], measured, {None: "", True: "yes", False: "no"}[claim["holds"]])
    console.print(table)


def draw_picture(path: Path, report: Result) -> None:
    """Time and peak memory against the number of frames, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    results = [result for result in report["measurements"].values() if result["measure"] == "model"]
    facts, ticks = report["environment"], sorted({r["frames"] for r in results if r["model"] in COMPARED[1:]})
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    panels = (
        ("min_seconds", 1, "time of a forward pass, s"),
        ("peak_bytes", 1e6, "peak memory above weights and input, MB"),
    )
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        for model, color, marker in zip(COMPARED, COLORS, "osD^", strict=True):
            points = [r for r in results if r["model"] == model and r["frames"] in ticks]
            done = [(r["frames"], r[key] / unit) for r in points if "failed" not in r]
            failed = [str(r["frames"]) for r in points if "failed" in r]
            label = f"{model} (failed: {', '.join(failed)})" if failed else model
            frames, values = zip(*done, strict=True) if done else ((), ())
            width = 3 if model == COMPARED[0] else 1.5
            axis.plot(frames, values, color=color, marker=marker, linewidth=width, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, map(str, ticks))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel("frames")
        axis.set_title(title, fontsize=11)
        axis.grid(which="major", alpha=0.3)
    size = results[0]["image_size"]
    figure.suptitle(f"One clip of {size} x {size} on a CPU, {facts['dtype']}, threads: {facts['threads']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def scan_shape(text: str) -> list[int]:
    shape = [int(size) for size in text.split("x")]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError
    return shape


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all measurements")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="draw time and memory against frames")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="measurements whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the measurements and stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, at least (default: 5)")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="of timed calls, at least (default: 2)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one measurement (default: 600)")
    parser.add_argument(
        "--scan-shapes", type=scan_shape, nargs="+", default=SCAN_SHAPES, metavar="BATCHxLENGTHxCHANNELS"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="M and training take the first of these")
    parser.add_argument("--long-clip", type=int, default=1024, help="frames of a last clip for Ti (default: 1024)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels, a multiple of 16 (default: 224)")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for option in ("threads", "repeats", "image_size"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if args.image_size % 16:
        parser.error(f"--image-size must be a multiple of 16, got {args.image_size}")
    if min(*args.frames, args.long_clip) < 1:
        parser.error("--frames and --long-clip must be at least 1")
    for option, path in (("--json", args.json), ("--picture", args.picture)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{option} {path}: there is no such folder")
    if args.picture and args.picture.suffix not in PICTURE_SUFFIXES:
        parser.error(f"--picture {args.picture}: must end in {', '.join(PICTURE_SUFFIXES)}")
    if args.picture and not find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install matplotlib")
    args.measurements = list_measurements(args)
    if not args.measurements:
        parser.error(f"--only {' '.join(args.only)}: there is no such measurement, see --list")
    if args.picture and not any(spec["measure"] == "model" for spec in args.measurements.values()):
        parser.error("--picture shows the models, --only leaves none of them")
    return args


def main() -> None:
    args = parse_args()
    if args.worker:
        print(json.dumps(work(args.worker)))
        return
    if args.list:
        print(*args.measurements, sep="\n")
        return
    results: dict[str, Result] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(args.measurements))
        for name, spec in args.measurements.items():
            progress.update(task, description=name)
            results[name] = run_worker(spec, args.threads, args.timeout)
            progress.advance(task)
            report = make_report(results, args.threads)
            if args.json:  # after each, so that a run that is stopped leaves what it has
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(Console(width=None if sys.stdout.isatty() else 110), report)
    if args.picture:
        draw_picture(args.picture, report)


if __name__ == "__main__":
    main()
