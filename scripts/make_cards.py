"""Writes the model cards of all released checkpoints, OUTPUT_DIR/NAME/README.md, and tables of them, models.md.

    python scripts/make_cards.py OUTPUT_DIR --organization ORG

They come from the table hub_cards/models.json and the templates beside it.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import sys

from command_line import Parser, output_folder, run_main


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("output_dir", type=output_folder, metavar="OUTPUT_DIR", help="folder for the cards")
    parser.add_argument("--organization", default="ORG", help="on the Hub, where the models are published")
    args = parser.parse_args()
    from model_table import model_tables
    from model_zoo import load_zoo, make_card
    from modeling_videomamba.training.names import check_hub_id

    try:
        check_hub_id("--organization", args.organization, owned=False)
        zoo = load_zoo()
        for entry in zoo:
            repo_id = f"{args.organization}/{entry.name}"
            make_card(entry, repo_id).save(args.output_dir / entry.name / "README.md")
        (args.output_dir / "models.md").write_text(model_tables(zoo), "utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(zoo)} cards in {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
