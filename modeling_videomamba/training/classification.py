"""Training of classifiers and regressors of videos and images: from arguments to a published model."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .arguments import DataArguments, RunArguments, parse_arguments
from .augmentation import AugmentationArguments, Mixing, training_transform
from .checkpoints import replace_files
from .data import (
    Examples,
    StreamedExamples,
    TestViews,
    TrainingBatches,
    TrainingViews,
    cut_into_windows,
    iterate,
    test_batches,
)
from .diagnosis import NonFiniteError
from .evaluation import Predictions, compute_metrics, predict
from .loop import Batch, Trainer, make_accelerator
from .losses import classification_loss, regression_loss
from .models import ModelArguments, load_model, load_processor
from .optimization import OptimizationArguments
from .reports import draw_confusion_matrix, draw_curves, model_card
from .sources import Split, find_evaluation_split, load_split, media_kind

ARGUMENTS_FILE = "arguments.json"
# what may differ from one part of a run to the next
FREE = {"resume", "output_dir", "num_workers", "log_steps", "save_steps", "report_to", "push_to_hub"}


@dataclass
class Arguments:
    """All that a run is told."""

    data: DataArguments
    model: ModelArguments
    augmentation: AugmentationArguments
    optimization: OptimizationArguments
    run: RunArguments


class ClassificationRun:
    r"""
    A run of training of a classifier or, where the labels are numbers, a regressor.

    Args:
        args ([`Arguments`]): Of the run.
        model_changes: Fields of the model's configuration.

    Raises:
        `OSError`, `ValueError`: for data, a model or values that don't fit.
    """

    def __init__(self, args: Arguments, **model_changes: Any):
        self.args = args
        logging.disable_progress_bar()  # of loading and saving weights, which would break into the loop's own
        self.accelerator = make_accelerator(args.run, args.optimization)
        if self.accelerator.is_main_process:
            self._check_output_dir()
            if args.run.push_to_hub is not None:  # now rather than after days
                HfApi().create_repo(args.run.push_to_hub, exist_ok=True)
        with self.accelerator.main_process_first():  # the others find what it has put into the cache
            self._load_data()
        self.model = load_model(args.model, self.kind, self.label_names, **model_changes)
        self.processor = load_processor(args.model, self.model, self.kind)
        self.mixing = None if self.label_names is None else Mixing(args.augmentation, len(self.label_names))
        self.predictions = Predictions()
        self.trainer = Trainer(
            accelerator=self.accelerator,
            model=self.model,
            objective=self.objective,
            batches=self.batches,
            steps_per_epoch=self._steps_per_epoch(),
            evaluate=self.evaluate,
            save_model=self.save_model,
            metric="mse" if self.regression else "accuracy",
            run=args.run,
            optimization=args.optimization,
            views_per_step=self.views_per_step,
        )

    def recorded(self) -> dict[str, Any]:
        """The arguments that decide what the run computes."""
        args = self.args
        groups = (args.data, args.model, args.augmentation, args.optimization, args.run)
        values = {name: value for group in groups for name, value in asdict(group).items() if name not in FREE}
        values["processes"] = self.accelerator.num_processes
        if args.data.streaming:  # each worker has shards of its own
            values["num_workers"] = args.data.num_workers
        return json.loads(json.dumps(values, default=str))

    def _check_output_dir(self) -> None:
        """A folder with a run in it is not written over, and a run goes on with the arguments that it began with."""
        run = self.args.run
        path = run.output_dir / ARGUMENTS_FILE
        if not path.exists():
            return
        if not run.resume:
            raise ValueError(f"--output-dir {run.output_dir} has a run in it: pass --resume or another folder")
        before, now = json.loads(path.read_text("utf-8")), self.recorded()
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(f"--resume goes on with the arguments of the run, but: {', '.join(changed)}")

    def _load_data(self) -> None:
        data = self.args.data
        options: dict[str, Any] = {"data_root": data.data_root, "regression": data.regression}
        names = data.label_names()
        self.train_split = load_split(data.data, "train", streaming=data.streaming, label_names=names, **options)
        self.kind = media_kind(self.train_split)
        self.label_names: list[str] | None = getattr(self.train_split.features["label"], "names", None)
        self.regression = self.label_names is None
        mixing = self.args.augmentation
        if self.regression and (mixing.mixup or mixing.cutmix or mixing.label_smoothing):
            raise ValueError("--mixup, --cutmix and --label-smoothing are for classes, the labels are numbers")
        self.test_name = find_evaluation_split(data.data)
        self.test_split = load_split(data.data, self.test_name, label_names=self.label_names, **options)
        if media_kind(self.test_split) != self.kind:
            raise ValueError(
                f"{data.data}: the training split has a column {self.kind}, the {self.test_name} split not"
            )
        if data.clip_seconds is not None:
            self.train_split = cut_into_windows(self.train_split, data.clip_seconds, data.clip_stride_seconds)
            self.test_split = cut_into_windows(self.test_split, data.clip_seconds, data.clip_stride_seconds)

    # What the loop asks for

    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy, or squared error for regression."""
        pixel_values, targets = self.mix(batch)
        return {"loss": self.loss(model(pixel_values).logits, targets)}

    def mix(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and targets after mixup, cutmix and label smoothing."""
        if self.mixing is None:
            return batch["pixel_values"], batch["labels"]
        return self.mixing(batch["pixel_values"], batch["labels"], batch["valid"])

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`(rows,)`"""
        return regression_loss(logits, targets) if self.regression else classification_loss(logits, targets)

    def batches(self, start: int, end: int) -> Iterable[Batch]:
        """The training batches of this process from number `start` on."""
        args, accelerator = self.args, self.accelerator
        views = TrainingViews(
            self.processor, training_transform(self.processor, args.augmentation), args.augmentation.num_sample
        )
        examples = self._examples(self.train_split, views)
        if self.streaming:
            return self._stream(examples, start)
        sampler = TrainingBatches(
            len(examples),
            args.optimization.batch_size,
            seed=args.run.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start=start,
            end=end,
        )
        return iterate(examples, args.data.num_workers, batch_sampler=sampler, pin_memory=self._pins_memory)

    def _stream(self, examples: Examples, start: int) -> Iterable[Batch]:
        accelerator = self.accelerator
        examples.split = split_dataset_by_node(examples.split, accelerator.process_index, accelerator.num_processes)
        workers = min(self.args.data.num_workers, examples.split.num_shards)
        seen = start - start % max(workers, 1)  # the rest have been seen too, but belong to some workers
        size = self.args.optimization.batch_size
        stream = StreamedExamples(examples, size, seen)
        batches = iterate(stream, workers, batch_size=size, pin_memory=self._pins_memory)
        for number, batch in enumerate(batches, start=seen):
            if number >= start:
                yield batch

    def _examples(self, split: Split, views: TrainingViews | TestViews) -> Examples:
        skip = self.args.data.on_broken_video == "skip"
        return Examples(split, views, skip_broken=skip, seed=self.args.run.seed)

    @property
    def _pins_memory(self) -> bool:
        return self.accelerator.device.type == "cuda"

    @property
    def streaming(self) -> bool:
        """Whether the training data are a stream."""
        return isinstance(self.train_split, IterableDataset)

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics on the test split, and the files of it that could not be read."""
        accelerator = self.accelerator
        keys = test_batches(
            list(range(len(self.test_split))),
            self.args.optimization.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        examples = self._examples(self.test_split, TestViews(self.processor))
        batches = iterate(examples, self.args.data.num_workers, batch_sampler=keys, pin_memory=self._pins_memory)
        predictions = predict(accelerator, model, batches)
        if "source" in self.test_split.features:
            predictions = predictions.grouped(dict(enumerate(self.test_split["source"])))
        self.predictions = predictions
        return compute_metrics(predictions, self.regression), predictions.broken

    def save_model(
        self, model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, metrics: dict[str, float]
    ) -> None:
        """Writes model, processor and card."""
        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)
        self._card(metrics).save(folder / "README.md")

    # The run

    @property
    def views_per_step(self) -> int:
        """Views that all processes see in a step."""
        args = self.args.optimization
        count = args.batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return count * self.args.augmentation.num_sample

    def train(self) -> None:
        """Trains, and writes what belongs to the model: `best`, `last`, pictures, `summary.json`."""
        if self.accelerator.is_main_process:
            replace_files(
                self.args.run.output_dir,
                lambda folder: (folder / ARGUMENTS_FILE).write_text(json.dumps(self.recorded(), indent=2), "utf-8"),
            )
        self.trainer.train()
        self.trainer.save_last()
        if self.accelerator.is_main_process:
            self._report()
        self.accelerator.end_training()

    def _steps_per_epoch(self) -> int:
        args = self.args
        if self.streaming:
            if args.run.steps_per_epoch is None:
                raise ValueError("--streaming needs --steps-per-epoch: the length of a stream is not known")
            return args.run.steps_per_epoch
        if args.run.steps_per_epoch is not None:
            raise ValueError("--steps-per-epoch is for --streaming")
        examples = self.views_per_step // args.augmentation.num_sample
        if len(self.train_split) < examples:
            raise ValueError(f"fewer training examples ({len(self.train_split)}) than one step takes ({examples})")
        return len(self.train_split) // examples

    def _report(self) -> None:
        output_dir, trainer = self.args.run.output_dir, self.trainer
        progress, window = trainer.progress, trainer.window
        draw_curves(trainer.records(), output_dir / "curves.png")
        if not self.regression:
            draw_confusion_matrix(self.predictions, self.label_names or [], output_dir / "confusion_matrix.png")
        summary = {
            "steps": progress.step,
            "metrics": trainer.metrics,
            "best": progress.best,
            "evaluated": len(self.predictions.scores),
            "skipped_steps": progress.skipped,
            "data_wait": window.waited_in_all / max(window.seconds_in_all, 1e-9),
            "broken": progress.broken,
        }
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=2), "utf-8")
        print(f"saved {output_dir / 'best'} ({trainer.metric} {progress.best:.4f}) and {output_dir / 'last'}")
        print(f"waited for data {summary['data_wait']:.1%} of the time; {progress.skipped} steps skipped, not finite")
        print(f"{len(progress.broken)} broken files" + "".join(f"\n  {reason}" for reason in progress.broken.values()))
        if self.args.run.push_to_hub is not None:
            HfApi().upload_folder(repo_id=self.args.run.push_to_hub, folder_path=output_dir / "best")
            print(f"uploaded to {self.args.run.push_to_hub}")

    def _card(self, metrics: dict[str, float]) -> Any:
        args, progress, start = self.args, self.trainer.progress, self.args.model.model
        broken = len(progress.broken)
        return model_card(
            model_name=args.run.push_to_hub or args.run.output_dir.name,
            pipeline_tag=f"{self.kind}-classification",
            dataset_name=Path(args.data.data).name,
            split=self.test_name,
            results=metrics,
            start=f"from `{Path(start).name}`" if start is not None else "from scratch",
            base_model=start if start is not None and not Path(start).exists() else None,
            examples=len(self.predictions.scores),
            steps=progress.step,
            views_per_step=self.views_per_step,
            processes=self.accelerator.num_processes,
            seed=args.run.seed,
            broken=f"; {broken} broken files were left out" if broken else "",
            command=shlex.join(_without_folders(word) for word in sys.argv),
        )


def _without_folders(word: str) -> str:
    """Absolute paths are nobody's business."""
    return Path(word).name if Path(word).is_absolute() else word


def parse(description: str, recipes: Path, *more: Any) -> tuple[Any, ...]:
    """[`Arguments`] and instances of the dataclasses `more` from a recipe and the command line."""
    classes = (DataArguments, ModelArguments, AugmentationArguments, OptimizationArguments, RunArguments)
    groups = parse_arguments(description, recipes, *classes, *more)
    return Arguments(*groups[: len(classes)]), *groups[len(classes) :]


def run_or_exit(make_run: Callable[[], ClassificationRun]) -> None:
    """Trains; what is wrong with the arguments, or with the numbers, ends the process with a message."""
    try:
        run = make_run()
    except (OSError, ValueError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    try:
        run.train()
    except NonFiniteError as error:
        sys.exit(f"error: {error}")
