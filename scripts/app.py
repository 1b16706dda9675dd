"""A page that labels videos with a VideoMamba model and, given an index, finds videos by a text.

    python scripts/app.py [--model DIR_OR_ID] [--index INDEX]

Without --model it is the one that the README.md beside this file names, as in a Space by make_space.py, or the small
one that comes with this repository. The videos in its directory, or else beside this file, are the examples to pick.
INDEX is one of search_videos.py.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import sys
from pathlib import Path

from command_line import Parser, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", metavar="DIR_OR_ID", help="model that gives labels (default: see above)")
    parser.add_argument(
        "--index", type=Path, metavar="INDEX", help="folder of an index: adds the search (default: no search)"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860 on)")
    args = parser.parse_args()
    if args.port is not None and not 0 < args.port < 2**16:
        parser.error(f"--port must be from 1 to 65535, got {args.port}")
    return args


def main() -> None:
    args = parse_args()
    try:
        from page import serve

        serve(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
