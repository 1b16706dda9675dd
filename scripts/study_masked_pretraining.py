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

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from make_moving_digits import DIRECTIONS, draw_clip
from modeling_videomamba.training.masks import MASK_TYPES
from studies import check_study, run_script, train

NANO = Path(__file__).parents[1] / "hub_cards" / "videomamba-nano" / "config.json"
SCRATCH = "none (from scratch)"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
TRANSFORMER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
# the text is one word between the tokens of beginning and end
BEGIN, END = len(NAMES), len(NAMES) + 1
TEXT = {"vocab_size": len(NAMES) + 2, "bos_token_id": BEGIN, "eos_token_id": END, "max_position_embeddings": 3}
PRETRAINING = ("--batch-size", 32, "--learning-rate", 2e-3, "--warmup-epochs", 1, "--max-grad-norm", 1)
FINETUNING = ("--batch-size", 16, "--learning-rate", 2e-3, "--warmup-epochs", 4, "--max-grad-norm", 1)


# The teacher


def draw_frames(digits: np.ndarray, targets: np.ndarray, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames `(16 * clips, 3, 32, 32)`, uint8, of moving digits, and which digit each shows."""
    rng, steps = np.random.default_rng(seed), list(DIRECTIONS.values())
    chosen = rng.integers(len(digits), size=clips)
    frames = np.concatenate([draw_clip(digits[index], steps[rng.integers(len(steps))], rng) for index in chosen])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = F.interpolate(pixels.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    return small.round().byte(), torch.from_numpy(targets[chosen]).repeat_interleave(len(frames) // clips)


def train_teacher(folder: Path, steps: int, batch_size: int = 64) -> float:
    """Writes a CLIP that tells the names of digits; returns its zero-shot accuracy on frames of other digits."""
    torch.manual_seed(0)
    data = load_digits()
    digits, test, train_targets, test_targets = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0
    )
    images, targets = draw_frames(digits, train_targets, 800, seed=1)
    vision = {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": 8, "projection_dim": 64}
    model = CLIPModel(
        CLIPConfig(text_config={**TRANSFORMER, **TEXT, "projection_dim": 64}, vision_config=vision, projection_dim=64)
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    words = torch.tensor([[BEGIN, word, END] for word in range(len(NAMES))])

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=words, pixel_values=(pixels / 255 - mean) / std).logits_per_image

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in track(range(steps), "teacher"):
        batch = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(logits(images[batch]), targets[batch])  # which of all names belongs to a picture
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, targets = draw_frames(test, test_targets, 60, seed=2)
    with torch.no_grad():
        accuracy = (model.eval()(words, (images / 255 - mean) / std).logits_per_image.argmax(-1) == targets).float()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "accuracy.json").write_text(json.dumps(accuracy.mean().item()), "utf-8")
    return accuracy.mean().item()


# The students


def write_few_labels(clips: Path, folder: Path, per_class: int) -> None:
    """Lists of `per_class` training clips of each class, and of all test clips."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--masks", nargs="*", default=list(MASK_TYPES), choices=MASK_TYPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-clips", type=int, default=2048, help="without labels")
    parser.add_argument("--test-clips", type=int, default=800)
    parser.add_argument("--labels-per-class", type=int, default=20)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=16, help="of pretraining")
    parser.add_argument("--finetuning-epochs", type=int, default=40)
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "masks", "seeds")}
    check_study(args.folder, **settings)
    if not (args.folder / "teacher" / "accuracy.json").exists():
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
    main()
