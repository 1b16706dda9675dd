"""Labels of videos, or their embeddings, with a VideoMamba model.

    python scripts/classify.py VIDEO...

Without --model it is the small model that comes with this repository: it tells in which direction a digit moves.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForVideoClassification, AutoVideoProcessor, logging

import modeling_videomamba  # noqa: F401 - registers VideoMamba with the Auto classes
from filmstrips import MAX_PICTURE_ROWS, check_picture, draw_filmstrip
from modeling_videomamba.training.plots import pyplot

NANO = Path(__file__).resolve().parents[1] / "hub_cards" / "videomamba-nano"


@dataclass
class Result:
    """What the model makes of one video: the scores of all labels or the embedding, and the frames for a picture."""

    video: str
    values: torch.Tensor
    frames: torch.Tensor


@dataclass
class Failure:
    """Why one video could not be read."""

    video: str
    error: str


def run_model(videos: list[str], model: Any, processor: Any, keep_frames: bool) -> Iterator[Result | Failure]:
    """Scores or, from a model without a head, embeddings, mean over the views that the processor makes of a video."""
    for video in videos:
        try:
            pixel_values = processor(video, return_tensors="pt")["pixel_values"]
        except (OSError, ValueError) as error:
            yield Failure(video, str(error))
            continue
        with torch.inference_mode():
            outputs = model(pixel_values.to(model.device))
        values = scores(outputs.logits, model.config.problem_type) if "logits" in outputs else outputs.pooler_output
        yield Result(video, values.mean(0).cpu(), pixel_values[0] if keep_frames else torch.empty(0))


def scores(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Probabilities, or the values themselves for regression."""
    if problem_type == "regression":
        return logits
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(-1)


def top_labels(result: Result, id2label: dict[int, str], top_k: int) -> list[dict[str, Any]]:
    """The labels with the highest scores, best first."""
    top = result.values.topk(min(top_k, len(id2label)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return [{"label": id2label[index], "score": score} for score, index in pairs]


def print_table(console: Console, results: list[Result], labels: list[list[dict[str, Any]]]) -> None:
    table = Table("video", "label", "score")
    table.columns[2].justify = "right"
    for result, best in zip(results, labels, strict=True):
        for rank, item in enumerate(best):
            table.add_row(Text("" if rank else result.video), Text(item["label"]), f"{item['score']:.3f}")
        table.add_section()
    console.print(table)


def draw_picture(path: Path, results: list[Result], labels: list[list[dict[str, Any]]], processor: Any) -> None:
    """A row for each video: the sampled frames as the model sees them, beside bars of the top labels."""
    plots = pyplot()
    figure, axes = plots.subplots(
        len(results), 2, figsize=(14, 2 * len(results) + 0.5), width_ratios=(3, 1), squeeze=False, layout="constrained"
    )
    for (strip, bars), result, best in zip(axes, results, labels, strict=True):
        draw_filmstrip(strip, result.frames, processor, result.video)
        labels_up = [item["label"].replace("$", r"\$") for item in best][::-1]
        bars.barh(labels_up, [item["score"] for item in best][::-1])
        if all(0 <= item["score"] <= 1 for item in best):
            bars.set_xlim(0, 1)
        bars.tick_params(labelsize=8)
    figure.savefig(path, dpi=100)
    plots.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="path or URL")
    parser.add_argument("--model", default=str(NANO), metavar="DIR_OR_ID", help="default: the model that comes along")
    parser.add_argument("--top-k", type=int, default=5, help="labels to show (default: 5)")
    parser.add_argument("--features", type=Path, metavar="OUT.safetensors", help="write one embedding for each video")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="draw the frames beside the top labels")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.top_k < 1:
        parser.error(f"--top-k must be at least 1, got {args.top_k}")
    if args.picture and len(args.videos) > MAX_PICTURE_ROWS:
        parser.error(f"--picture takes at most {MAX_PICTURE_ROWS} videos, got {len(args.videos)}")
    if args.features and not args.features.absolute().parent.is_dir():
        parser.error(f"--features {args.features}: there is no such folder")
    try:
        if args.picture:
            check_picture(args.picture)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if args.picture and args.features:
        parser.error("--picture shows labels, --features has none: pass one of them")
    if len(set(args.videos)) < len(args.videos):
        parser.error("a video is given twice")
    return args


def main() -> None:
    args = parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto_class = AutoModel if args.features else AutoModelForVideoClassification
    try:
        processor = AutoVideoProcessor.from_pretrained(args.model)
        model, info = auto_class.from_pretrained(args.model, output_loading_info=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {args.model}: {error}")
    if info["missing_keys"]:
        sys.exit(f"error: --model {args.model} has no weights for {', '.join(sorted(info['missing_keys']))}")
    model = model.to(device).eval()

    console = Console(stderr=True)
    bar = len(args.videos) > 1
    running = run_model(args.videos, model, processor, keep_frames=args.picture is not None)
    results = list(track(running, "videos", len(args.videos), console=console, disable=not bar))
    failed = [result for result in results if isinstance(result, Failure)]
    read = [result for result in results if isinstance(result, Result)]

    if args.features:
        if read:
            save_file({result.video: result.values for result in read}, args.features)
        report = [{"video": result.video, "features": len(result.values)} for result in read]
        lines = [f"{len(read)} embeddings of {model.config.hidden_size} values: {args.features}"] if read else []
    else:
        labels = [top_labels(result, model.config.id2label, args.top_k) for result in read]
        report = [{"video": result.video, "labels": best} for result, best in zip(read, labels, strict=True)]
        lines = []
        if read and not args.json:
            print_table(Console(), read, labels)
        if read and args.picture:
            draw_picture(args.picture, read, labels, processor)
    if args.json:
        report += [{"video": result.video, "error": result.error} for result in failed]
        print(json.dumps(report, indent=2))
    else:
        print(*lines, sep="\n", end="\n" if lines else "")
    for result in failed:
        console.print(f"error: {result.error}", style="red", highlight=False, soft_wrap=True, markup=False)
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} videos could not be read")


if __name__ == "__main__":
    main()
