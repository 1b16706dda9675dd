"""Finds videos, and the moment in them, by a text or by another clip, with a model of videos and texts.

    python scripts/search_videos.py index FOLDER OUT --model DIR_OR_ID
    python scripts/search_videos.py query OUT "a dog runs"

`index` embeds every window of every video of FOLDER, of the videos in its tar shards too; instead of FOLDER it takes
the paths or addresses of shards. It may be stopped at any moment and started again, also on another number of
processes; started later, it embeds what is new or has changed, and drops what is no longer among what it is given.
`query` searches OUT, where `index` has left its table.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import sys
from pathlib import Path

from command_line import MAX_PICTURE_ROWS, Parser, check_picture, output_folder, run_main

RERANKED = 32  # candidates, as in `find`


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed videos, those that are new or changed")
    index.add_argument(
        "data", nargs="+", metavar="FOLDER", help="folder with videos or tar shards; or paths or URLs of shards"
    )
    index.add_argument("out", type=output_folder, metavar="OUT", help="folder of the index")
    index.add_argument("--model", required=True, metavar="DIR_OR_ID", help="model of videos and texts")
    index.add_argument("--clip-seconds", type=float, default=10.0, help="longest window of a video, in seconds")
    index.add_argument("--batch-size", type=int, default=8, help="windows of a batch on each process")
    index.add_argument("--num-workers", type=int, default=4, help="decoding processes of each process")
    index.add_argument(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        help="precision of the model (default: as accelerate is configured, else no)",
    )
    index.add_argument(
        "--on-broken-video", choices=["skip", "raise"], default="skip", help="leave it out and report it, or end"
    )
    query = commands.add_parser("query", help="search what is indexed")
    query.add_argument("out", type=Path, metavar="OUT", help="folder of the index")
    query.add_argument("text", nargs="?", metavar="TEXT", help="what the videos are to show")
    query.add_argument("--video", metavar="CLIP", help="what they are to be like, instead of TEXT (default: TEXT)")
    query.add_argument("--top-k", type=int, default=10, help="hits to show")
    query.add_argument("--rerank", type=int, help=f"candidates to judge more exactly, 0 for none (default: {RERANKED})")
    query.add_argument("--picture", type=Path, metavar="OUT.png", help="draw the hits as filmstrips (default: no)")
    query.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        {"index": check_index_args, "query": check_query_args}[args.command](args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_index_args(args: argparse.Namespace) -> None:
    if not args.clip_seconds > 0:
        raise ValueError(f"--clip-seconds must be positive, got {args.clip_seconds}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.num_workers < 0:
        raise ValueError(f"--num-workers must not be negative, got {args.num_workers}")


def check_query_args(args: argparse.Namespace) -> None:
    if (args.text is None) == (args.video is None):
        raise ValueError("pass one of a text and --video")
    if args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}")
    if args.rerank is not None and args.rerank < 0:
        raise ValueError(f"--rerank must not be negative, got {args.rerank}")
    if args.rerank is not None and args.video is not None:
        raise ValueError(f"--rerank {args.rerank}: candidates are judged by a text, not by --video")
    if args.picture is None:
        return
    check_picture(args.picture)
    if args.top_k > MAX_PICTURE_ROWS:
        raise ValueError(f"--picture shows at most {MAX_PICTURE_ROWS} hits, got --top-k {args.top_k}")


def main() -> None:
    args = parse_args()
    from searching import run

    try:
        run(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_main(main, go_on="the same command" if sys.argv[1:2] == ["index"] else None)
