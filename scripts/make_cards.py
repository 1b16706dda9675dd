"""Writes the model cards of all released checkpoints, OUTPUT_DIR/NAME/README.md, and tables of them, models.md.

    python scripts/make_cards.py OUTPUT_DIR --organization ORG

They come from the table hub_cards/models.json and the templates beside it.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import sys
from pathlib import Path

from command_line import Parser, run_main


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder for the cards")
    parser.add_argument("--organization", default="ORG", help="on the Hub, where the models are published")
    args = parser.parse_args()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from model_table import model_tables
    from model_zoo import load_zoo, make_card

    try:
        zoo = load_zoo()
        for entry in zoo:
            repo_id = f"{args.organization}/{entry.name}"
            validate_repo_id(repo_id)
            make_card(entry, repo_id).save(args.output_dir / entry.name / "README.md")
        (args.output_dir / "models.md").write_text(model_tables(zoo), "utf-8")
    except (OSError, ValueError, HFValidationError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(zoo)} cards in {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
