"""Testing a classifier or regressor on labelled data, as evaluate_video.py does."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, AutoVideoProcessor

from modeling_videomamba import VideoMambaForVideoClassification
from modeling_videomamba.image_processing_videomamba import check_processor_settings
from modeling_videomamba.labels import distinct_names
from modeling_videomamba.training.data import EvaluationViews, Examples, cut_into_windows, errors_as_lines, test_batches
from modeling_videomamba.training.evaluation import (
    Predictions,
    class_scores,
    compute_metrics,
    is_regression,
    predict_batch,
)
from modeling_videomamba.training.loading import load_model, load_pretrained
from modeling_videomamba.training.loop import start_accelerator
from modeling_videomamba.training.output import check_folder, replace_files, writing
from modeling_videomamba.training.reports import METRICS, draw_confusion_matrix
from modeling_videomamba.training.settings import check_settings
from modeling_videomamba.training.sources import Split, find_evaluation_split, load_split, media_kind
from modeling_videomamba.training.workers import iterate
from videomamba_arguments import LabelledDataArguments


class PredictionLines:
    """
    One line of JSON for each example, in a file of its own for each process while a run goes on. A line that a kill has
    cut doesn't count.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.whole = folder / "predictions.jsonl"

    def part(self, rank: int) -> Path:
        return self.folder / f"predictions-{rank:04}.jsonl"

    def read(self) -> dict[int, dict[str, Any]]:
        """All lines by the index of the example. Raises `ValueError` for a line that others have broken."""
        found = {}
        for path in sorted(self.folder.glob("predictions*.jsonl")):
            for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    line = json.loads(text)
                    found[int(line["index"])] = line
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path}, line {number} is no prediction: remove the line") from None
        return found

    def append(self, rank: int, lines: Sequence[dict[str, Any]]) -> None:
        """Raises [`WriteError`] where the disk refuses."""
        with writing(self.folder), self.part(rank).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def merge(self) -> dict[int, dict[str, Any]]:
        """Moves all lines to one file, sorted."""
        lines = self.read()
        text = "".join(json.dumps(lines[index]) + "\n" for index in sorted(lines))
        replace_files(self.folder, lambda folder: (folder / self.whole.name).write_text(text, "utf-8"))
        for path in self.folder.glob("predictions-*.jsonl"):
            path.unlink()
        return lines


def load(args: Any, data: LabelledDataArguments) -> tuple[Any, Any, Split]:
    """Model, processor and split, which has the labels of the model."""
    if data.streaming:
        raise ValueError("--streaming is for training: which videos have been tested must be known")
    if data.validation_share is not None:
        raise ValueError("--validation-share is for training: pass --split train to test on all of it")
    split_name = args.split or find_evaluation_split(data.data)
    model = load_model(VideoMambaForVideoClassification, args.model)
    names = None
    if not is_regression(model):
        own = [model.config.id2label[index] for index in range(model.num_labels)]
        names = data.label_names() or distinct_names(own)
        if len(names) != len(own):
            raise ValueError(f"--label-file has {len(names)} names, {args.model} has {len(own)} classes")
    options: dict[str, Any] = {"data_root": data.data_root, "regression": is_regression(model), "label_names": names}
    split = load_split(data.data, split_name, **options)
    if media_kind(split) == "image":
        if args.num_clips * args.num_crops > 1:
            raise ValueError("--num-clips and --num-crops are for videos")
        return model, load_pretrained(AutoImageProcessor, args.model), split
    if data.clip_seconds is not None:
        split = cut_into_windows(split, data.clip_seconds, data.clip_stride_seconds)
    processor = load_pretrained(AutoVideoProcessor, args.model)
    views = {name: getattr(args, name) for name in ("num_clips", "num_crops")}
    check_processor_settings({"num_frames": processor.num_frames, **views})
    return model, processor, split


def predict_split(
    accelerator: Accelerator, model: Any, batches: Iterator[dict[str, Any]], lines: PredictionLines, bar: Any
) -> None:
    """Appends a line for each example of this process."""
    score = partial(class_scores, model, regression=is_regression(model))
    for batch in batches:
        found = {i: (scores, label) for i, scores, label in predict_batch(accelerator, score, batch)}
        reasons, fresh = dict(batch["broken"]), []
        for index, name in zip(batch["indices"].tolist(), batch["names"], strict=False):  # once for all views
            line: dict[str, Any] = {"index": index, "video": name}
            if index in found:
                scores, label = found[index]
                line |= {"label": label, "scores": [round(score, 6) for score in scores.tolist()]}
            elif index >= 0:
                line["error"] = reasons[name]
            fresh += [line] if index >= 0 else []
        lines.append(accelerator.process_index, fresh)
        bar.update(min(len(batch["names"]) * accelerator.num_processes, bar.total - bar.n))


def report(lines: dict[int, dict[str, Any]], split: Split, model: Any, folder: Path) -> None:
    """Metrics over videos, as a table, as JSON and, for classes, as a picture of what was taken for what."""
    read = {index: line for index, line in lines.items() if "scores" in line}
    predictions = Predictions(
        {index: torch.tensor(line["scores"]) for index, line in read.items()},
        {index: line["label"] for index, line in read.items()},
        {line["video"]: line["error"] for line in lines.values() if "error" in line},
    )
    if "source" in split.features:
        predictions = predictions.grouped(dict(enumerate(split["source"])))
    metrics = compute_metrics(predictions, is_regression(model))
    summary = {**metrics, "videos": len(predictions.scores), "broken": predictions.broken}
    text = json.dumps(summary, indent=2)
    replace_files(folder, lambda folder: (folder / "metrics.json").write_text(text, "utf-8"))
    table = Table("metric", "value", title=f"{len(predictions.scores)} videos")
    for name, value in metrics.items():
        table.add_row(METRICS[name], f"{value:.4f}")
    Console().print(table)
    for reason in predictions.broken.values():
        print(f"broken: {reason}")
    if not is_regression(model):
        names = [model.config.id2label[index] for index in range(model.num_labels)]
        picture = "confusion_matrix.png"
        replace_files(folder, lambda folder: draw_confusion_matrix(predictions, names, folder / picture))


def run(args: Any, data: LabelledDataArguments) -> None:
    """
    Tests a model. `args` are the arguments of evaluate_video.py. What is wrong with them, with the folder or with a
    video ends the process with a message.
    """
    lines = PredictionLines(args.output_dir)
    try:
        accelerator = start_accelerator(mixed_precision=args.mixed_precision)
        if accelerator.is_main_process:
            check_folder(args.output_dir)
        with accelerator.main_process_first():
            model, processor, split = load(args, data)
        if accelerator.is_main_process:
            settings = {**asdict(args), **asdict(data)}
            free = ("output_dir", "batch_size", "num_workers", "on_broken_video", "streaming")
            settings = {name: str(value) for name, value in settings.items() if name not in free}
            owner = f"--output-dir {args.output_dir} has predictions of another run"
            check_settings(args.output_dir / "settings.json", settings, owner)
            lines.merge()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with errors_as_lines():
        test(accelerator, model, processor, split, lines, args, data)
    accelerator.end_training()


def test(
    accelerator: Accelerator,
    model: Any,
    processor: Any,
    split: Split,
    lines: PredictionLines,
    args: Any,
    data: LabelledDataArguments,
) -> None:
    """Tests a model on what has no line yet, and reports on all."""
    accelerator.wait_for_everyone()
    done = lines.read()
    accelerator.wait_for_everyone()
    model = model.to(accelerator.device).eval()
    remaining = [index for index in range(len(split)) if index not in done]
    views = EvaluationViews(processor, args.num_clips, args.num_crops)
    examples = Examples(split, views, skip_broken=data.on_broken_video == "skip")
    keys = test_batches(remaining, args.batch_size, accelerator.process_index, accelerator.num_processes)
    batches = iterate(examples, data.num_workers, batch_sampler=keys)
    with tqdm(total=len(split), initial=len(done), unit="video", desc="all processes") as bar:
        predict_split(accelerator, model, batches, lines, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(lines.merge(), split, model, args.output_dir)
