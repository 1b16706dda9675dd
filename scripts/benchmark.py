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
import sys
from pathlib import Path

from command_line import Parser, check_output, check_picture, run_main

SCAN_SHAPES = [[1, 1569, 384], [1, 12545, 1152]]  # Ti at 8 frames of 224 pixels, M at 64
FRAMES = [8, 16, 32, 64]


def scan_shape(text: str) -> list[int]:
    shape = [int(size) for size in text.split("x")]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError
    return shape


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    output = parser.add_argument_group("Output")
    output.add_argument("--json", type=Path, metavar="OUT.json", help="write all measurements (default: print a table)")
    output.add_argument(
        "--picture", type=Path, metavar="OUT.png", help="draw time and memory against frames (default: no picture)"
    )
    output.add_argument("--list", action="store_true", help="print the names of the measurements and stop")
    what = parser.add_argument_group("What is measured")
    what.add_argument(
        "--only", nargs="+", metavar="TEXT", help="measurements whose names contain one of these (default: all)"
    )
    what.add_argument(
        "--busy",
        action="store_true",
        help="measure instead how VideoMamba-Ti, VideoMAE-Ti and a step of training slow down beside busy processes",
    )
    what.add_argument(
        "--scan-shapes",
        type=scan_shape,
        nargs="+",
        default=SCAN_SHAPES,
        metavar="BATCHxLENGTHxCHANNELS",
        help="inputs of the scans (default: 1x1569x384 1x12545x1152)",
    )
    what.add_argument(
        "--frames", type=int, nargs="+", default=FRAMES, help="frames of the clips; M and training take the first"
    )
    what.add_argument("--long-clip", type=int, default=1024, help="frames of a last clip for Ti")
    what.add_argument("--image-size", type=int, default=224, help="pixels of a side, a multiple of 16")
    how = parser.add_argument_group("How it is measured")
    how.add_argument("--threads", type=int, help="threads of a measurement (default: PyTorch's)")
    how.add_argument("--repeats", type=int, default=5, help="timed calls, at least")
    how.add_argument("--min-seconds", type=float, default=2.0, help="seconds of timed calls, at least")
    how.add_argument("--timeout", type=float, default=600.0, help="seconds for one measurement")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args: argparse.Namespace) -> None:
    for name in ("threads", "repeats", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.image_size % 16:
        raise ValueError(f"--image-size must be a multiple of 16, got {args.image_size}")
    if min(*args.frames, args.long_clip) < 1:
        raise ValueError("--frames and --long-clip must be at least 1")
    if args.json:
        check_output("--json", args.json)
    if args.picture:
        check_picture(args.picture)


def main() -> None:
    args = parse_args()
    import benchmark_runs

    try:
        benchmark_runs.main(args)
    except (ImportError, ValueError) as error:
        if args.worker:  # the report quotes the last line, with the type of the error
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
