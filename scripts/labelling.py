"""Labels and embeddings of videos, as classify.py gives them."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForVideoClassification, AutoVideoProcessor, logging

import modeling_videomamba  # noqa: F401 - registers VideoMamba with the Auto classes
from command_line import MAX_PICTURE_ROWS
from filmstrips import draw_filmstrip
from modeling_videomamba.training.files import (
    VIDEO_SUFFIXES,
    check_no_file_twice,
    legible,
    name_error,
    walk_files,
)
from modeling_videomamba.training.loading import load_model, load_pretrained
from modeling_videomamba.training.output import writing
from modeling_videomamba.training.plots import pyplot

COLUMNS = ("video", "rank", "label", "score", "error")


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
        if reason := name_error(video):
            yield Failure(legible(video), reason)
            continue
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
    with writing(path):
        figure.savefig(path, dpi=100)
    plots.close(figure)


def run(args: argparse.Namespace) -> None:
    """What classify.py does; videos that can't be read are reported, and end the process with 1 when all are done."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.picture:
        pyplot()  # before the model, if matplotlib is missing
    videos = find_videos(args.videos)
    if args.picture and len(videos) > MAX_PICTURE_ROWS:
        raise ValueError(f"--picture takes at most {MAX_PICTURE_ROWS} videos, got {len(videos)}")
    model, processor = load_with_processor(args.model, AutoModel if args.features else AutoModelForVideoClassification)
    console = Console(stderr=True)
    results = run_model(videos, model, processor, keep_frames=args.picture is not None)
    shown = track(results, "videos", len(videos), console=console, disable=len(videos) == 1)
    failed = write_features(args, shown) if args.features else write_labels(args, shown, model, processor)
    for failure in failed:
        console.print(f"error: {failure.error}", style="red", highlight=False, soft_wrap=True, markup=False)
    if failed:
        sys.exit(f"{len(failed)} of {len(videos)} videos could not be read")


def find_videos(given: list[str]) -> list[str]:
    """Files and addresses as given, and of each folder its videos, sorted. Raises `ValueError` for a video twice."""
    videos: list[str] = []
    for name in given:
        inside = [str(path) for path in walk_files(Path(name), VIDEO_SUFFIXES)] if Path(name).is_dir() else [name]
        if not inside:
            raise ValueError(f"{name}: no video in this folder ({', '.join(sorted(VIDEO_SUFFIXES))})")
        videos += inside
    check_no_file_twice("video", videos)
    return videos


def load_with_processor(name: str, auto_class: Any) -> tuple[Any, Any]:
    """A model, on the GPU if there is one, and its processor. Raises `OSError` or `ValueError`."""
    try:
        processor = load_pretrained(AutoVideoProcessor, name)
        model = load_model(auto_class, name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def write_features(args: argparse.Namespace, results: Iterable[Result | Failure]) -> list[Failure]:
    """Writes the embeddings and says so; returns the videos that could not be read."""
    features, report, failed = {}, [], []
    for result in results:
        if isinstance(result, Failure):
            failed.append(result)
            continue
        features[result.video] = result.values
        report.append({"video": result.video, "features": len(result.values)})
    if features:
        with writing(args.features):
            save_file(features, args.features)
    if args.json:
        print_json(report, failed)
    elif features:
        print(f"{len(features)} embeddings of {report[0]['features']} values: {legible(str(args.features))}")
    return failed


def write_labels(
    args: argparse.Namespace, results: Iterable[Result | Failure], model: Any, processor: Any
) -> list[Failure]:
    """Writes, draws and prints the labels as `args` say; returns the videos that could not be read."""
    read: list[Result] = []
    labels: list[list[dict[str, Any]]] = []
    failed: list[Failure] = []
    with _open_csv(args.csv) if args.csv else nullcontext() as file:
        table = csv.writer(file) if file else None
        if table:
            table.writerow(COLUMNS)
        for result in results:
            if isinstance(result, Failure):
                failed.append(result)
                rows: list[tuple[Any, ...]] = [(result.video, "", "", "", result.error)]
            else:
                read.append(result)
                labels.append(top_labels(result, model.config.id2label, args.top_k))
                rows = [
                    (result.video, n, item["label"], round(item["score"], 6), "")
                    for n, item in enumerate(labels[-1], 1)
                ]
            if table:
                table.writerows(rows)
    if args.json:
        print_json([{"video": one.video, "labels": best} for one, best in zip(read, labels, strict=True)], failed)
    elif args.csv:
        print(f"labels of {len(read)} videos: {legible(str(args.csv))}")
    elif read:
        print_table(Console(), read, labels)
    if read and args.picture:
        draw_picture(args.picture, read, labels, processor)
    return failed


@contextmanager
def _open_csv(path: Path) -> Iterator[TextIO]:
    """A row is written at once, so that a run that is stopped leaves what it has."""
    with writing(path), path.open("w", newline="", encoding="utf-8", buffering=1) as file:
        yield file


def print_json(report: list[dict[str, Any]], failed: list[Failure]) -> None:
    print(json.dumps([*report, *({"video": one.video, "error": one.error} for one in failed)], indent=2))
