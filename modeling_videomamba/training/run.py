"""What all runs of training share: their data, their batches, the loop, and what they leave."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from videomamba_arguments import (
    AugmentationArguments,
    DataArguments,
    OptimizationArguments,
    RunArguments,
    StartArguments,
)

from .augmentation import training_transform
from .cards import CARD, check_card, public_command, public_name, reason_to_keep, seal, without_signatures
from .checkpoints import list_checkpoints
from .data import (
    EvaluationViews,
    Examples,
    StreamedExamples,
    TrainingBatches,
    TrainingViews,
    errors_as_lines,
    test_batches,
)
from .diagnosis import NothingReadError, RunError
from .loop import STATES, Batch, TrainingLoop, make_accelerator
from .models import load_processor
from .output import check_folder, lock, read_object, remove_unfinished, replace_files, writing
from .reports import draw_curves, model_card, origin_of
from .settings import differences
from .sources import Split
from .workers import iterate

ARGUMENTS_FILE = "arguments.json"
# what may differ from one part of a run to the next
MAY_CHANGE_ON_RESUME = {
    "resume",
    "output_dir",
    "num_workers",
    "log_steps",
    "save_steps",
    "save_minutes",
    "report_to",
    "push_to_hub",
}


@dataclass
class Arguments:
    """What every run is told."""

    data: DataArguments
    model: StartArguments
    augmentation: AugmentationArguments
    optimization: OptimizationArguments
    run: RunArguments


class TrainingRun(ABC):
    r"""
    A run of training, from arguments to a published model. What is trained, on what and how it is judged is up to its
    subclasses.

    Args:
        args ([`Arguments`]): Of the run.

    Raises:
        `OSError`, `ValueError`: for data, a model or values that don't fit.
    """

    train_split: Split
    kind: str  # of the data: "video" or "image"
    evaluation_name: str  # of the split that `evaluate` takes
    evaluated = 0  # examples of the last evaluation
    metric: str  # by which the best model is chosen
    minimize = False
    find_unused_parameters = False  # whether some get no gradient in a step

    def __init__(self, args: Arguments):
        self.args = args
        logging.disable_progress_bar()  # of loading and saving weights, which would break into the loop's own
        self.accelerator = make_accelerator(args.run, args.optimization, self.find_unused_parameters)
        if self.accelerator.is_main_process:
            check_folder(args.run.output_dir)
            self._check_output_dir()
            if args.run.push_to_hub is not None:  # now rather than after days
                HfApi().create_repo(args.run.push_to_hub, exist_ok=True)
                check_card(HfApi(), args.run.push_to_hub, "")
        with self.accelerator.main_process_first():  # the others find what it has put into the cache
            self.load_data()
        self.model = self.load_model()
        self.processor = self.load_processor()
        self.trainer = TrainingLoop(
            accelerator=self.accelerator,
            model=self.model,
            objective=self.objective,
            batches=self.batches,
            steps_per_epoch=self._steps_per_epoch(),
            evaluate=self.evaluate,
            save_model=self.save_model,
            metric=self.metric,
            minimize=self.minimize,
            run=args.run,
            optimization=args.optimization,
            views_per_step=self.views_per_step,
        )

    # What a subclass does

    @abstractmethod
    def load_data(self) -> None:
        """Sets `train_split`, `kind`, `evaluation_name`, and what else the run reads."""

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """The model to train."""

    @abstractmethod
    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses `(rows,)` by name, `"loss"` the one to minimise."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics, and the files that could not be read; sets `evaluated`."""

    @abstractmethod
    def card_use(self, model_name: str) -> str:
        """Python code for the card: how the model is used."""

    # What it may do otherwise

    def load_processor(self) -> Any:
        """The processor of the model, which is saved with it."""
        return load_processor(self.args.model, self.model, self.kind)

    def pipeline_tag(self) -> str:
        """The task of the model on the Hub, which has none for models without classes but this."""
        return "feature-extraction"

    def argument_groups(self) -> list[Any]:
        """Dataclasses of all arguments of the run."""
        args = self.args
        return [args.data, args.model, args.augmentation, args.optimization, args.run]

    def training_views(self) -> TrainingViews | EvaluationViews:
        """What the model sees of a training example."""
        augmentation = self.args.augmentation
        return TrainingViews(self.processor, training_transform(self.processor, augmentation), augmentation.num_sample)

    def examples_per_epoch(self) -> int:
        """Training examples that all processes see in an epoch, where the data are no stream."""
        return len(self.train_split)

    def batches(self, start: int, end: int) -> Iterable[Batch]:
        """The training batches of this process from number `start` on."""
        return self.batches_of(self.train_split, self.training_views(), start, end)

    def start(self) -> str | None:
        """Directory or Hub id that the model started from."""
        return self.args.model.model

    def classes(self) -> list[str]:
        """Names of the classes that the model tells apart, for its card."""
        return []

    def report(self) -> dict[str, Any]:
        """Draws and prints what the run leaves besides its curves, and returns what its summary says besides."""
        return {}

    # The arguments of the run

    def recorded(self) -> dict[str, Any]:
        """The arguments that decide what the run computes."""
        values = {
            name: value
            for group in self.argument_groups()
            for name, value in asdict(group).items()
            if name not in MAY_CHANGE_ON_RESUME
        }
        values["processes"] = self.accelerator.num_processes
        if self.args.data.streaming:  # each worker has shards of its own
            values["num_workers"] = self.args.data.num_workers
        return json.loads(json.dumps(values, default=str))

    def _check_output_dir(self, has_begun: bool = False) -> None:
        """A folder with a run in it is not written over, and a run goes on with the arguments that it began with."""
        run = self.args.run
        folder, path = run.output_dir, run.output_dir / ARGUMENTS_FILE
        states = list_checkpoints(folder / STATES)
        if not (states or path.exists() or (folder / "last").exists()):
            return
        if not run.resume:
            raise ValueError(f"--output-dir {folder} has a run in it: pass --resume or another folder")
        if (folder / "last").exists() and not states:
            raise ValueError(f"--resume: the run in {folder} has ended and its states are gone: pass another folder")
        if not path.exists():
            return
        try:
            before = read_object(path)
        except ValueError as error:
            if has_begun:
                print(f"warning: {error}. It is written again, without a comparison of the arguments")
            return
        if changed := differences(before, self.recorded()):
            raise ValueError(f"--resume goes on with the arguments of the run, but: {', '.join(changed)}")

    # Batches

    def batches_of(self, split: Split, views: TrainingViews | EvaluationViews, start: int, end: int) -> Iterable[Batch]:
        """The batches that this process has of a training split from number `start` to `end`."""
        args, accelerator = self.args, self.accelerator
        examples = self._examples(split, views)
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

    def _examples(self, split: Split, views: TrainingViews | EvaluationViews) -> Examples:
        skip = self.args.data.on_broken_video == "skip"
        return Examples(split, views, skip_broken=skip, seed=self.args.run.seed)

    def batches_once(self, split: Split, views: EvaluationViews, indices: list[int] | None = None) -> Iterator[Batch]:
        """Those examples of a split that `indices` names, or all, once on all processes together."""
        keys = test_batches(
            list(range(len(split))) if indices is None else indices,
            self.args.optimization.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        examples = self._examples(split, views)
        workers = min(self.args.data.num_workers, len(keys))
        return iterate(examples, workers, batch_sampler=keys, pin_memory=self._pins_memory)

    def check_readable(
        self, name: str, split: Split, views: EvaluationViews, indices: Iterable[int] | None = None
    ) -> None:
        """
        Raises [`NothingReadError`] if broken files are skipped and there is no other among `indices` of a split: the
        first evaluation would end the run, hours later. A stream is not read twice.
        """
        if self.args.data.on_broken_video == "raise" or isinstance(split, IterableDataset):
            return
        examples = self._examples(split, views)
        broken: dict[str, str] = {}
        for index in range(len(split)) if indices is None else indices:
            item = examples[0, index]
            if item["valid"]:
                return
            broken.update([item["broken"]])
        raise NothingReadError(name, broken)

    @property
    def _pins_memory(self) -> bool:
        return self.accelerator.device.type == "cuda"

    @property
    def streaming(self) -> bool:
        """Whether the training data are a stream."""
        return isinstance(self.train_split, IterableDataset)

    @property
    def views_per_step(self) -> int:
        """Views that all processes see in a step."""
        args = self.args.optimization
        count = args.batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return count * self.args.augmentation.num_sample

    def _steps_per_epoch(self) -> int:
        args = self.args
        if self.streaming:
            if args.run.steps_per_epoch is None:
                raise ValueError("--streaming needs --steps-per-epoch: the length of a stream is not known")
            return args.run.steps_per_epoch
        if args.run.steps_per_epoch is not None:
            raise ValueError("--steps-per-epoch is for --streaming")
        examples = self.views_per_step // args.augmentation.num_sample
        available = self.examples_per_epoch()
        if available < examples:
            raise ValueError(f"fewer training examples ({available}) than one step takes ({examples})")
        return available // examples

    # The run

    def train(self) -> None:
        """Trains, and writes what belongs to the model: `best`, `last`, pictures, `summary.json`."""
        with self._own_folder():
            self.trainer.train()
            self.trainer.save_last()
            if self.accelerator.is_main_process:
                with writing(self.args.run.output_dir):
                    self._report()
                self._upload()
        self.accelerator.end_training()

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """No other run writes to the folder meanwhile."""
        if not self.accelerator.is_main_process:
            yield
            return
        output_dir = self.args.run.output_dir
        with ExitStack() as stack:
            with writing(output_dir):
                stack.enter_context(lock(output_dir))
                try:
                    self._check_output_dir(has_begun=True)  # again, as another run may have ended since
                except ValueError as error:
                    raise RunError(str(error)) from error
                remove_unfinished(output_dir)
            self.write_first(output_dir)
            yield

    def write_first(self, output_dir: Path) -> None:
        """Writes what a resumed run needs besides its states."""
        text = json.dumps(self.recorded(), indent=2)
        replace_files(output_dir, lambda folder: (folder / ARGUMENTS_FILE).write_text(text, "utf-8"))

    def save_model(
        self, model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, metrics: dict[str, float]
    ) -> None:
        """Writes model, processor and card."""
        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)
        (folder / CARD).write_text(seal(str(self._card(metrics))), "utf-8", newline="\n")

    def _card(self, metrics: dict[str, float]) -> ModelCard:
        """Of the model as it is now."""
        args, progress, start = self.args, self.trainer.progress, self.start()
        broken = len(progress.broken)
        model_name = args.run.push_to_hub or public_name(str(args.run.output_dir))
        return model_card(
            model_name=model_name,
            pipeline_tag=self.pipeline_tag(),
            dataset_name=public_name(args.data.data),
            split=self.evaluation_name,
            examples=self.evaluated,
            results=metrics,
            use=self.card_use(model_name),
            start=f"from `{public_name(start)}`" if start is not None else "from scratch",
            classes=self.classes(),
            **self._origin,
            steps=progress.step,
            views_per_step=self.views_per_step,
            processes=self.accelerator.num_processes,
            seed=args.run.seed,
            broken=f"; {broken} broken files were left out" if broken else "",
            command=public_command(sys.argv),
        )

    @cached_property
    def _origin(self) -> dict[str, Any]:
        return origin_of(self.start())

    def _report(self) -> None:
        output_dir, trainer = self.args.run.output_dir, self.trainer
        progress, statistics = trainer.progress, trainer.statistics
        draw_curves(trainer.records(), output_dir / "curves.png")
        summary = {
            "steps": progress.step,
            "metrics": trainer.metrics,
            "best": progress.best,
            "skipped_steps": progress.skipped,
            "data_wait": statistics.waited_in_all / max(statistics.seconds_in_all, 1e-9),
            "broken": progress.broken,
            "evaluated": self.evaluated,
            **self.report(),
        }
        text = json.dumps(summary, indent=2)
        replace_files(output_dir, lambda folder: (folder / "summary.json").write_text(text, "utf-8"))
        print(f"saved {output_dir / 'best'} ({trainer.metric} {progress.best:.4f}) and {output_dir / 'last'}")
        print(f"waited for data {summary['data_wait']:.1%} of the time; {progress.skipped} steps skipped, not finite")
        print(f"{len(progress.broken)} broken files" + "".join(f"\n  {reason}" for reason in progress.broken.values()))

    def _upload(self) -> None:
        run = self.args.run
        if run.push_to_hub is None:
            return
        best, api = run.output_dir / "best", HfApi()
        try:
            check_card(api, run.push_to_hub, (best / CARD).read_text("utf-8"))
            names = [path.name for path in best.iterdir() if reason_to_keep(path) is None]
            api.upload_folder(repo_id=run.push_to_hub, folder_path=best, allow_patterns=names)
        except (OSError, ValueError) as error:
            reason = without_signatures(" ".join(str(error).split()))
            raise RunError(f"{best} is saved, but not uploaded: {reason}. Go on with scripts/push_to_hub.py") from error
        print(f"uploaded to {run.push_to_hub}")


def run_or_exit(make_run: Callable[[], TrainingRun]) -> None:
    """Trains; what is wrong with the arguments, the folder or the numbers ends the process with a line."""
    with errors_as_lines():
        try:
            run = make_run()
        except (OSError, ValueError, StrictDataclassError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")  # a configuration's errors have two lines
        run.train()
