"""Whether masked pretraining helps where labels are few: clips of moving digits, and masks of all types.

    python scripts/study_masked_pretraining.py FOLDER

Trains a small CLIP on single frames and the names of their digits. It teaches a nano model on clips without labels
(pretrain_umt.py), which is then trained on a few labelled clips (finetune.py), as is one from scratch. Prints a table
of the accuracies on clips of digits that nobody was trained on. What is in FOLDER already is not computed again.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.progress import track

from command_line import Parser, output_folder, run_main
from studies import check_study, run_script, train
from videomamba_arguments import MASK_TYPES

NANO = Path(__file__).parents[1] / "hub_cards" / "videomamba-nano" / "config.json"
SCRATCH = "none (from scratch)"
PRETRAINING = ("--batch-size", 32, "--learning-rate", 2e-3, "--warmup-epochs", 1, "--max-grad-norm", 1)
FINETUNING = ("--batch-size", 16, "--learning-rate", 2e-3, "--warmup-epochs", 4, "--max-grad-norm", 1)


# The students


def write_few_labels(clips: Path, folder: Path, per_class: int) -> None:
    """Lists of `per_class` training clips of each class, and of all test clips."""
    from moving_digits import DIRECTIONS

    folder.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", per_class), ("test", None)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for label in sorted(DIRECTIONS):
                for path in sorted((clips / split / label).glob("*.mp4"))[:limit]:
                    writer.writerow([path.relative_to(clips).as_posix(), label])


def study(args: argparse.Namespace) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Of each seed the accuracy, and what pretraining measured, by type of mask."""
    folder, clips, labels = args.folder, args.folder / "clips", args.folder / "labels"
    if not clips.exists():
        writing = folder / ".clips.writing"
        counts = ("--train-clips", args.train_clips, "--test-clips", args.test_clips)
        run_script("make_moving_digits.py", writing, *counts)
        writing.rename(clips)
    write_few_labels(clips, labels, args.labels_per_class)
    finetuning = ["--data", labels, "--data-root", clips, "--epochs", args.finetuning_epochs, *FINETUNING]
    finetuning += ["--evaluation-epochs", args.finetuning_epochs]
    pretraining = ["--data", clips, "--teacher", folder / "teacher", "--config", NANO, "--epochs", args.epochs]
    pretraining += ["--evaluation-epochs", args.epochs, *PRETRAINING]
    results: dict[str, list[tuple[float, dict[str, float]]]] = {mask: [] for mask in (SCRATCH, *args.masks)}
    for seed in track(range(args.seeds), "seeds"):
        found = train("finetune.py", folder / f"scratch-{seed}", "--config", NANO, "--seed", seed, *finetuning)
        results[SCRATCH].append((found["metrics"]["accuracy"], {}))
        for mask in args.masks:
            output = folder / f"{mask}-{seed}"
            pretrained = train("pretrain_umt.py", output, "--mask-type", mask, "--seed", seed, *pretraining)
            start = ("--model", output / "last", "--seed", seed)
            found = train("finetune.py", folder / f"{mask}-{seed}-finetuned", *start, *finetuning)
            results[mask].append((found["metrics"]["accuracy"], pretrained["metrics"]))
    return results


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=output_folder, metavar="FOLDER", help="folder for the runs")
    parser.add_argument("--masks", nargs="*", default=list(MASK_TYPES), choices=MASK_TYPES, help="masks to compare")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--train-clips", type=int, default=2048, help="training clips without labels")
    parser.add_argument("--test-clips", type=int, default=800, help="test clips in all")
    parser.add_argument("--labels-per-class", type=int, default=20, help="labelled training clips of each class")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="training steps of the teacher")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of pretraining")
    parser.add_argument("--finetuning-epochs", type=int, default=40, help="epochs of fine-tuning")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "masks", "seeds")}
    check_study(args.folder, **settings)
    if not (args.folder / "teacher" / "accuracy.json").exists():
        from digit_teacher import train_teacher  # imports PyTorch, which the help doesn't need

        train_teacher(args.folder / "teacher", args.teacher_steps)
    teacher = json.loads((args.folder / "teacher" / "accuracy.json").read_text("utf-8"))
    try:
        results = study(args)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error}\n{error.stderr.decode()}")
    print("| masks of the pretraining | accuracy | each seed | distance from the teacher | of its mean feature |")
    print("|---|---|---|---|---|")
    for mask, runs in results.items():
        accuracies = [100 * accuracy for accuracy, _ in runs]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
        cells = [
            mask,
            f"{statistics.mean(accuracies):.1f}{spread} %",
            ", ".join(f"{value:.1f}" for value in accuracies),
        ]
        for name in ("evaluation_loss", "mean_feature_loss"):
            measured = [metrics[name] for _, metrics in runs if metrics]
            cells.append(f"{statistics.mean(measured):.3f}" if measured else "")
        print(f"| {' | '.join(cells)} |")
    print(f"\nThe teacher names {100 * teacher:.1f} % of the frames of digits that it has not seen.")


if __name__ == "__main__":
    run_main(main, go_on="the same command")
