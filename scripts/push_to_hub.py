"""Publishes a model on the Hub: converts it, checks that it still says the same, and uploads it in one commit.

    python scripts/push_to_hub.py videomamba_t16_k400_f8_res224.pth ORG/videomamba-ti-k400-f8-224 --dry-run
    python scripts/push_to_hub.py OUTPUT/best ORG/my-videomamba --private
    python scripts/push_to_hub.py --all CHECKPOINTS ORG

The model is a .pth file of the original release, or a directory from training or convert_checkpoint.py (which takes
what is not standard of a .pth file). Released checkpoints get the cards of the zoo, directories keep their README.md.
--all publishes every released checkpoint in a folder. Log in with `hf auth login`. A run that failed is started again:
what has been uploaded is not uploaded again, and without changes there is no commit.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
from pathlib import Path

from command_line import Parser, output_folder, run_main

DRY_RUN_FOLDER = "staged"
TOKENIZER = "google-bert/bert-base-uncased"  # of all released models of videos and texts


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source", type=Path, metavar="MODEL", help=".pth file or directory; with --all a folder of them"
    )
    parser.add_argument("repo_id", metavar="ORG/NAME", help="where it is published; with --all an organisation")
    parser.add_argument("--all", action="store_true", help="all released checkpoints that are in the folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="leave in --folder what would be published, and publish nothing"
    )
    parser.add_argument(
        "--folder", type=output_folder, default=DRY_RUN_FOLDER, metavar="DIR", help="with --dry-run: gets a folder NAME"
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="commit to this branch (default: main)")
    parser.add_argument("--pull-request", action="store_true", help="commit to a new pull request")
    parser.add_argument(
        "--labels", help="class names of a .pth file: a file, or a data set (default: those of the zoo)"
    )
    parser.add_argument("--tokenizer", default=TOKENIZER, help="tokenizer for a .pth file of videos and texts")
    parser.add_argument("--card", type=Path, help="README.md for a model that has none (default: the model's)")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a README.md that was written or edited on the Hub"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="most bytes of a file of weights")
    args = parser.parse_args()
    if args.revision is not None and args.pull_request:
        parser.error(f"--revision {args.revision} and --pull-request exclude each other")
    if args.all and (args.labels is not None or args.card is not None):
        parser.error("--labels and --card are for one model, not for --all")
    return args


def main() -> None:
    args = parse_args()
    from publishing import run

    run(args)


if __name__ == "__main__":
    run_main(main, go_on="the same command")
