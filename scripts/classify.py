"""Labels of videos, or their embeddings, with a VideoMamba model.

    python scripts/classify.py VIDEO...
    python scripts/classify.py FOLDER --csv labels.csv

A folder stands for all videos in it, at any depth, sorted. Without --model it is the small model that comes with this
repository: it tells in which direction a digit moves.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import sys
from pathlib import Path

from command_line import MAX_PICTURE_ROWS, Parser, check_output, check_picture, run_main

NANO = Path(__file__).resolve().parents[1] / "hub_cards" / "videomamba-nano"


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="path, folder or URL")
    parser.add_argument(
        "--model", default=str(NANO), metavar="DIR_OR_ID", help="model (default: the one that comes along)"
    )
    parser.add_argument("--top-k", type=int, default=5, help="labels to show of each video")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the labels to a table (default: print them)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--features", type=Path, metavar="OUT.safetensors", help="write an embedding of each video (default: labels)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="OUT.png",
        help=f"draw the frames beside the top labels, of at most {MAX_PICTURE_ROWS} videos (default: no picture)",
    )
    args = parser.parse_args()
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}")
    if args.features:
        check_output("--features", args.features)
        for option in ("picture", "csv"):
            if getattr(args, option):
                raise ValueError(f"--{option} shows labels, --features has none: pass one of them")
    if args.csv:
        check_output("--csv", args.csv)
    if args.picture:
        check_picture(args.picture)


def main() -> None:
    args = parse_args()
    from labelling import run

    try:
        run(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
