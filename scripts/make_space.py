"""Writes the folder of a Space of Hugging Face that shows the page of app.py for a model on the Hub.

    python scripts/make_space.py ORG/MODEL DIR
    hf upload ORG/SPACE DIR . --repo-type space

The folder has all that the Space needs: the page, the source of this package, and a Dockerfile that installs it. Files
`*.mp4` added to the folder become examples to pick.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import sys

from command_line import Parser, output_folder, run_main


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="ORG/MODEL", help="model on the Hub that gives labels to videos")
    parser.add_argument("folder", type=output_folder, metavar="DIR", help="empty, or not there yet")
    args = parser.parse_args()
    from space import write_space

    try:
        write_space(args.folder, args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.folder} is ready: hf upload ORG/SPACE {args.folder} . --repo-type space")


if __name__ == "__main__":
    run_main(main)
