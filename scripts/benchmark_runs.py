"""The measurements of benchmark.py, one process for each."""

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmark_measures import (
    COMPARED,
    MEASURES,
    TRAINING_STEP,
    WITHOUT_AMX,
    Result,
    busy_name,
    matrix_units_unavailable_reason,
    model_name,
    scan_name,
)
from benchmark_report import draw_picture, make_report, print_report
from modeling_videomamba.training.plots import pyplot

SCAN_IMPLEMENTATIONS = ("cpu", "torch", "transformers", "mambapy")
TRAINING_BATCH = 2
MASK_RATIO = 0.8  # of masked pretraining, as published


# One process for each measurement


def list_busy_measurements(args: argparse.Namespace) -> dict[str, Result]:
    """The measurements of --busy, as in [`list_measurements`]."""
    clip = {"frames": args.frames[0], "image_size": args.image_size}
    timing = {"repeats": args.repeats, "min_seconds": args.min_seconds}
    batches = {"VideoMamba-Ti": 1, "VideoMAE-Ti": 1, TRAINING_STEP: TRAINING_BATCH}
    return {
        busy_name(model, args.frames[0]): {"measure": "busy", "model": model, **clip, "batch": batch, **timing}
        for model, batch in batches.items()
    }


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
    if matrix_units_unavailable_reason() is None and hasattr(torch.backends.mkldnn, "matmul"):
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
    masked = {**spec, "mask_ratio": MASK_RATIO}
    listed["masked training VideoMamba-Ti"] = {"measure": "masked training", **masked, **timing}
    listed["profile training VideoMamba-Ti"] = {"measure": "training profile", **spec, **timing}
    return listed


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
    command = [
        sys.executable,
        str(Path(__file__).with_name("benchmark.py")),
        "--worker",
        json.dumps({**spec, "threads": threads}),
    ]
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


def main(args: argparse.Namespace) -> None:
    """The measurements that benchmark.py is asked for. Raises `ImportError` or `ValueError` with what is wrong."""
    if args.worker:
        print(json.dumps(work(args.worker)))
        return
    threads = args.threads or torch.get_num_threads()
    measurements = find_measurements(args)
    if args.list:
        print(*measurements, sep="\n")
        return
    if args.picture:
        pyplot()  # before hours of work, if matplotlib is missing
    results: dict[str, Result] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(measurements))
        for name, spec in measurements.items():
            progress.update(task, description=name)
            results[name] = run_worker(spec, threads, args.timeout)
            progress.advance(task)
            report = make_report(results, threads)
            if args.json:  # after each, so that a run that is stopped leaves what it has
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(Console(width=None if sys.stdout.isatty() else 110), report)
    if args.picture:
        draw_picture(args.picture, report)


def find_measurements(args: argparse.Namespace) -> dict[str, Result]:
    """Those that --only names, or all. Raises `ValueError` where there is none, or none for the picture."""
    found = list_busy_measurements(args) if args.busy else list_measurements(args)
    if args.only:
        found = {name: spec for name, spec in found.items() if any(part in name for part in args.only)}
    if not found:
        raise ValueError(f"--only {' '.join(args.only)}: there is no such measurement, see --list")
    if args.picture and not any(spec["measure"] == "model" for spec in found.values()):
        raise ValueError("--picture shows the models: --busy measures none of them alone, and --only must leave one")
    return found
