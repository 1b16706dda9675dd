"""Time and memory of VideoMamba on a CPU, beside the machine's own limit and beside what Transformers offers.

    python scripts/benchmark.py --json results.json --picture results.png

Everything is float32 with random weights and is measured in this one run, each measurement in a process of its own.
Peak memory is that of the first call, above the weights and the input; it is a lower bound on systems other than Linux.
The limit of a model is the time for its multiply-adds at the best rate of matrix products that was seen before, between
and after its timed runs. A measurement that can't be made is reported with the reason.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmark_measures import COMPARED, MEASURES, WITHOUT_AMX, Result, matrix_units_unusable, model_name, scan_name
from benchmark_report import draw_picture, make_report, print_report
from filmstrips import check_picture

SCAN_SHAPES = [[1, 1569, 384], [1, 12545, 1152]]  # Ti at 8 frames of 224 pixels, M at 64
FRAMES = [8, 16, 32, 64]
SCAN_IMPLEMENTATIONS = ("cpu", "torch", "transformers", "mambapy")
TRAINING_BATCH = 2
MASK_RATIO = 0.8  # of masked pretraining, as published


# One process for each measurement


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
    masked = {**spec, "mask_ratio": MASK_RATIO}
    listed["masked training VideoMamba-Ti"] = {"measure": "masked training", **masked, **timing}
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
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    try:
        if args.picture:
            check_picture(args.picture)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
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
