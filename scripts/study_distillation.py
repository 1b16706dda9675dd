"""Whether self-distillation helps a model that overfits: the digits of scikit-learn, a few hundred of them to train on.

    python scripts/study_distillation.py FOLDER

Trains a small teacher with finetune.py, three times as long as the students, then a larger student with and without it
(distill.py, finetune.py), each with the same seeds and steps, and prints a table of the accuracies on the digits that
nobody was trained on.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from command_line import Parser, output_folder, run_main
from studies import check_study, train

COMMON = {"image_size": 16, "patch_size": 4, "num_frames": None}
TEACHER = {**COMMON, "hidden_size": 48, "num_hidden_layers": 4}
STUDENT = {**COMMON, "hidden_size": 96, "num_hidden_layers": 12}
OPTIONS = ("--batch-size", "32", "--learning-rate", "1e-3", "--warmup-epochs", "5", "--weight-decay", "0.05")


def write_images(folder: Path, train_images: int) -> None:
    """The digits as PNG files of 16 x 16 pixels in the `imagefolder` layout."""
    import numpy as np  # with what follows it takes seconds, and is not for the help
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.images)), train_size=train_images, stratify=digits.target, random_state=0
    )
    for split, indices in (("train", train), ("test", test)):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC).save(path)


def accuracy(script: str, output: Path, *options: Any) -> float:
    """Accuracy after the last step."""
    return train(script, output, *options)["metrics"]["accuracy"]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=output_folder, metavar="FOLDER", help="folder for the runs")
    parser.add_argument("--train-images", type=int, default=300, help="training images in all")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of a student")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    args = parser.parse_args()
    check_study(args.folder, train_images=args.train_images, epochs=args.epochs)
    write_images(args.folder / "digits", args.train_images)
    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        (args.folder / f"{name}.json").write_text(json.dumps(config), "utf-8")

    def common(epochs: int) -> tuple[Any, ...]:
        return ("--data", args.folder / "digits", "--epochs", epochs, "--evaluation-epochs", epochs, *OPTIONS)

    try:
        start = ("--config", args.folder / "teacher.json", "--seed", 100)
        teacher = accuracy("finetune.py", args.folder / "teacher", *start, *common(3 * args.epochs))
        results: dict[str, list[float]] = {"with": [], "without": []}
        for seed in track(range(args.seeds), "seeds"):
            options = ("--config", args.folder / "student.json", "--seed", seed, *common(args.epochs))
            student = args.folder / f"student-{seed}"
            distilled = ("--teacher", args.folder / "teacher" / "last", *options)
            results["with"].append(accuracy("distill.py", student / "distilled", *distilled))
            results["without"].append(accuracy("finetune.py", student / "alone", *options))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error}\n{error.stderr.decode()}")
    print("| self-distillation | mean accuracy | standard deviation | each seed |\n|---|---|---|---|")
    for name, values in results.items():
        each = ", ".join(f"{100 * value:.1f}" for value in values)
        print(f"| {name} | {100 * statistics.mean(values):.2f} % | {100 * statistics.stdev(values):.2f} | {each} |")
    print(f"\nTeacher: {100 * teacher:.2f} %.")


if __name__ == "__main__":
    run_main(main, go_on="the same command")
