"""The loop that all training scripts share: steps, evaluations, states on disk, and what is said of them."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from videomamba_arguments import OptimizationArguments, RunArguments

from .checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from .data import derive_seed
from .diagnosis import NonFiniteError, RunError, diagnose, summarize
from .memory import keep_freed_memory
from .optimization import cosine_schedule, parameter_groups
from .output import read_records, replace_files, writing
from .signals import StopSignals

EMA_FILE = "ema.safetensors"
METRICS_FILE = "metrics.jsonl"
STATES = "states"
EVALUATION_LOSS = "evaluation_loss"
MAX_SKIPPED = 5  # non-finite steps in a row; with a loss scale, which has to come down first, MAX_SKIPPED_SCALED
MAX_SKIPPED_SCALED = 20

Batch = dict[str, Any]
Objective = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]


def start_accelerator(**options: Any) -> Accelerator:
    """
    `Accelerator(**options)`. Raises `ValueError` where several processes were launched that don't know of each other,
    as those on a CPU don't by themselves: each would do all of the work, and write over that of the others.
    """
    accelerator = Accelerator(**options)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each is by itself: several on a CPU need ACCELERATE_USE_CPU=true "
            "in the environment"
        )
    return accelerator


def make_accelerator(
    run: RunArguments, optimization: OptimizationArguments, find_unused_parameters: bool = False
) -> Accelerator:
    """An accelerator for a run, which then is on its way: its folder exists, its seeds are set."""
    report_to = None if run.report_to == "none" else run.report_to
    accelerator = start_accelerator(
        mixed_precision=optimization.mixed_precision,
        dynamo_backend=DynamoBackend.INDUCTOR if optimization.torch_compile else None,
        log_with=report_to,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        project_config=ProjectConfiguration(project_dir=str(run.output_dir), logging_dir=str(run.output_dir / "logs")),
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(run.seed)
    return accelerator


@dataclass
class Progress:
    """What of a run is not in the weights and the optimiser."""

    step: int = 0
    best: float | None = None
    best_loss: float | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    broken: dict[str, str] = field(default_factory=dict)


@dataclass
class TrainingLoop:
    r"""
    A run of training, from its first step or from its last state on disk to its end.

    Args:
        accelerator (`Accelerator`): Of [`make_accelerator`].
        model (`PreTrainedModel`): Not yet prepared.
        objective (`Callable`): From the prepared model and a batch to losses `(rows,)` by name, `"loss"` the one to
            minimise. Rows that are not `valid` don't count. `batch["seed"]` is for what all processes are to choose
            alike.
        batches (`Callable`): From the numbers of the first and the last batch of a run to an iterable of them.
        steps_per_epoch (`int`): Steps, each of `gradient_accumulation_steps` batches.
        evaluate (`Callable`): From a model to its metrics and the files that could not be read; on all processes.
        save_model (`Callable`): Writes a model, its weights given, and what belongs to it into a folder.
        metric (`str`): By which the best model is chosen; ties go to the lower `evaluation_loss`, then to the later.
        minimize (`bool`): Whether that is the one with the smallest.
        run, optimization: Arguments.
        views_per_step (`int`): By which the learning rate is scaled.
    """

    accelerator: Accelerator
    model: PreTrainedModel
    objective: Objective
    batches: Callable[[int, int], Iterable[Batch]]
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], tuple[dict[str, float], dict[str, str]]]
    save_model: Callable[[nn.Module, dict[str, torch.Tensor], Path, dict[str, float]], None]
    metric: str
    minimize: bool
    run: RunArguments
    optimization: OptimizationArguments
    views_per_step: int

    def __post_init__(self) -> None:
        args = self.optimization
        self.progress = Progress()
        self.total_steps = round(args.epochs * self.steps_per_epoch)
        self.output_dir = self.run.output_dir
        self.states = self.output_dir / STATES
        self.signals = StopSignals()
        self.must_stop = self.must_save = False
        self.statistics = StepStatistics()
        self.metrics: dict[str, float] = {}
        scale = self.views_per_step / args.base_batch_size if args.base_batch_size is not None else 1.0
        self.schedule: dict[str, Any] = {
            "base": args.learning_rate * scale,
            "final": args.min_learning_rate * scale,
            "start_warmup": args.warmup_learning_rate * scale,
            "epochs": args.epochs,
            "warmup_epochs": args.warmup_epochs,
            "steps_per_epoch": self.steps_per_epoch,
        }
        self.bare_model = self.model
        self.ema: Any = None
        if args.ema_decay is not None:
            if self.is_sharded:
                raise ValueError("`ema_decay` does not go with sharded weights (FSDP, DeepSpeed).")
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
            self.ema.to(self.accelerator.device)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = parameter_groups(self.model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.schedule["base"], betas=(0.9, args.adam_beta2))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if args.gradient_accumulation_steps > 1:
                raise ValueError("`gradient_accumulation_steps` does not go with DeepSpeed, which counts steps itself.")
            # which it knows from a data loader otherwise
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = args.batch_size
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all weights."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    # The run

    def train(self) -> None:
        """
        Trains to the end. On SIGTERM and SIGINT the state is saved and the process exits with status 143 or 130. Raises
        [`RunError`].
        """
        self._start()
        self._saved = time.monotonic()
        count = self.optimization.gradient_accumulation_steps
        batches = iter(self.batches(self.progress.step * count, self.total_steps * count))
        disable = not self.accelerator.is_main_process
        bar = tqdm(total=self.total_steps, initial=self.progress.step, unit="step", dynamic_ncols=True, disable=disable)
        statistics = self.statistics
        self.model.train()
        with self.signals, bar:
            while self.progress.step < self.total_steps:
                self._step(batches, statistics)
                bar.update()
                bar.set_postfix(statistics.postfix())
                self._log(statistics)
                self._after_step(statistics)
            if not self.metrics:  # resumed at its end
                self._evaluate()

    def _after_step(self, statistics: "StepStatistics") -> None:
        step, is_last = self.progress.step, self.progress.step == self.total_steps
        with statistics.paused():
            if step % (self.steps_per_epoch * self.run.evaluation_epochs) == 0 or is_last:
                self._evaluate()
            if self.must_stop or self.must_save or step % self.run.save_steps == 0 or is_last:
                self._save_state()
        if self.must_stop and not is_last:
            signum = self.signals.received or signal.SIGTERM  # of another process
            self._say(f"stopped by {signum.name} after step {step}, the state is saved: go on with --resume")
            self.accelerator.end_training()
            sys.exit(128 + signum)

    def _step(self, batches: Iterator[Batch], statistics: "StepStatistics") -> None:
        """One step of the optimiser, or none where the loss or a gradient is not finite."""
        rate = cosine_schedule(self.progress.step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        sums: dict[str, torch.Tensor] = {}
        count = self.optimization.gradient_accumulation_steps
        batch: Batch = {}
        for micro in range(count):
            batch = statistics.wait_for(batches)
            self.progress.broken.update(batch["broken"])
            batch = send_to_device(batch, self.accelerator.device)
            number = self.progress.step * count + micro
            batch["seed"] = derive_seed(self.run.seed, number, 0)
            self._seed(number)
            synced = nullcontext() if micro == count - 1 else self.accelerator.no_sync(self.model)
            with synced:
                losses = self.objective(self.model, batch)
                weights = batch["valid"].float()
                self.accelerator.backward((losses["loss"] * weights).mean() / count)
            for name, values in losses.items():
                sums[name] = sums.get(name, 0) + (values.detach() * weights).sum()
            sums["valid"] = sums.get("valid", 0) + weights.sum()
        max_norm = self.optimization.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if max_norm is None else max_norm)
        norm = 0.0 if norm is None else float(norm)  # DeepSpeed has made the step already
        means = self._global_means(sums)
        statistics.add(means, norm, rate)
        self._apply(batch, math.isfinite(norm) and math.isfinite(means["loss"]))
        self.progress.step += 1

    def _seed(self, batch: int) -> None:
        """The random choices of a step follow from its number, so that a resumed run makes the same."""
        torch.manual_seed(derive_seed(self.run.seed, batch, 1 + self.accelerator.process_index))  # 0 is for all

    def _global_means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Losses over the valid rows of all processes; learns whether any process is to stop or to save its state."""
        is_due = time.monotonic() - self._saved >= 60 * self.run.save_minutes
        flags = torch.tensor([self.signals.received is not None, is_due], device=self.accelerator.device)
        values = torch.stack([value.double() for value in (*sums.values(), *flags)])
        totals = self.accelerator.reduce(values)
        *values, stops, saves = totals.tolist()
        # all processes agree, whenever the signal has reached each and whatever its clock says
        self.must_stop, self.must_save = stops > 0, saves > 0
        total = dict(zip(sums, values, strict=True))
        valid = max(total.pop("valid"), 1.0)
        return {name: value / valid for name, value in total.items()}

    def _apply(self, batch: Batch, is_finite: bool) -> None:
        scaler = self.accelerator.scaler
        if is_finite or scaler is not None:  # a loss scale that is too large is noticed, and lowered, by the scaler
            self.optimizer.step()
        if is_finite and not self.accelerator.optimizer_step_was_skipped:
            self.progress.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update_parameters(self.bare_model)
        else:
            self.progress.skipped += 1
            self.progress.skipped_in_a_row += 1
            limit = MAX_SKIPPED if scaler is None else MAX_SKIPPED_SCALED
            if self.progress.skipped_in_a_row >= limit:
                self._give_up(batch)
        self.optimizer.zero_grad()

    def _give_up(self, batch: Batch) -> None:
        count = self.progress.skipped_in_a_row
        self._seed(self.progress.step)
        found = diagnose(self.accelerator.unwrap_model(self.model), lambda: self.objective(self.model, batch))
        path = self.output_dir / "diagnosis.json"
        if self.accelerator.is_main_process:
            with writing(self.output_dir):
                path.write_text(json.dumps(found, indent=1), "utf-8")
        self.progress.skipped_in_a_row = 0
        self._save_state()
        raise NonFiniteError(
            f"The loss or a gradient was not finite in {count} steps in a row, to step {self.progress.step}; none of "
            f"them was taken. The state before them is saved, statistics of every layer are in {path}.\n"
            f"{summarize(found)}"
        )

    # Evaluation and saving

    def _evaluate(self) -> None:
        model = self.model if self.ema is None else self.ema.module
        self.metrics, broken = self.evaluate(model)
        self.progress.broken.update(broken)
        is_best = self._is_best()
        if is_best:
            self.progress.best, self.progress.best_loss = self.metrics[self.metric], self.metrics.get(EVALUATION_LOSS)
            self._save_model("best")
        self._write({"step": self.progress.step, "epoch": self.epoch, **self.metrics})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        self._say(f"epoch {self.epoch:g}: {shown}{' (best)' if is_best else ''}")

    def _is_best(self) -> bool:
        """By the metric; among equal ones by the loss where the evaluation has one; among equal ones the later."""

        def rank(value: float, loss: float | None) -> tuple[float, float]:
            first, second = value if self.minimize else -value, 0.0 if loss is None else loss
            return math.inf if math.isnan(first) else first, math.inf if math.isnan(second) else second

        progress = self.progress
        now = rank(self.metrics[self.metric], self.metrics.get(EVALUATION_LOSS))
        return progress.best is None or now <= rank(progress.best, progress.best_loss)

    def _say(self, text: str) -> None:
        """Above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.progress.step / self.steps_per_epoch

    def _save_model(self, name: str) -> None:
        model = self.bare_model
        if self.ema is not None:
            weights = self.ema.module.state_dict()
        elif self.is_sharded:
            weights = self.accelerator.get_state_dict(self.model)
        else:
            weights = model.state_dict()
        if self.accelerator.is_main_process:
            metrics = self.metrics
            replace_files(self.output_dir / name, lambda folder: self.save_model(model, weights, folder, metrics))

    def save_last(self) -> None:
        """Writes the model as it is now, as `last`."""
        self._save_model("last")

    def _save_state(self) -> None:
        self._gather_broken()
        state = asdict(self.progress)
        save_checkpoint(self.accelerator, self.states, self.progress.step, self._save_ema, state)
        self._saved = time.monotonic()

    def _gather_broken(self) -> None:
        """Every process knows the broken files that any has met."""
        for path, reason in gather_object(list(self.progress.broken.items())):
            self.progress.broken[path] = reason

    def _save_ema(self, folder: Path) -> None:
        if self.ema is not None:
            save_model(self.ema, str(folder / EMA_FILE))

    def _load_ema(self, folder: Path) -> None:
        if self.ema is not None:
            load_model(self.ema, folder / EMA_FILE)

    # Beginning, and records

    def _start(self) -> None:
        if self.run.resume:
            self._resume()
        if self.accelerator.is_main_process:
            kept = [record for record in self.records() if record["step"] <= self.progress.step]
            lines = "".join(json.dumps(record) + "\n" for record in kept)
            replace_files(self.output_dir, lambda folder: (folder / METRICS_FILE).write_text(lines, "utf-8"))
        if self.run.report_to != "none":
            with writing(self.output_dir):
                self.accelerator.init_trackers(
                    "tracker", init_kwargs={"tensorboard": {"purge_step": self.progress.step + 1}}
                )

    def _resume(self) -> None:
        """Goes on from the newest state that is whole; from the beginning where there is none yet, and says so."""
        found: list[Any] = [None, ""]
        if self.accelerator.is_main_process:
            try:
                checkpoint, damaged = find_checkpoint(self.states)
                found = [checkpoint, None]
                for line in damaged:
                    self._say(f"warning: {line}; going on from the state before it, {checkpoint}")
            except RunError as error:
                found = [None, str(error)]
        checkpoint, problem = broadcast_object_list(found)  # the main process has looked for all
        if problem is not None:
            raise RunError(problem)
        if checkpoint is None:
            self._say(f"--resume: {self.states} has no state yet, so the run begins at its first step")
            return
        self.progress = Progress(**load_checkpoint(self.accelerator, checkpoint, self._load_ema))
        self._say(f"resumed after step {self.progress.step} of {self.total_steps}")

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` that are whole; the others are reported."""
        with writing(self.output_dir):
            records, warnings = read_records(self.output_dir / METRICS_FILE)
        for line in warnings:
            self._say(f"warning: {line}")
        return records

    def _log(self, statistics: "StepStatistics") -> None:
        step = self.progress.step
        if step % self.run.log_steps == 0 or step == self.total_steps:
            views = statistics.steps * self.views_per_step
            self._write(
                {"step": step, "epoch": self.epoch, **statistics.record(views), "skipped": self.progress.skipped}
            )
            statistics.restart()

    def _write(self, record: dict[str, Any]) -> None:
        with writing(self.output_dir):
            if self.run.report_to != "none":
                values = {name: value for name, value in record.items() if name != "step"}
                self.accelerator.log(values, step=record["step"])
            if self.accelerator.is_main_process:
                with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


class StepStatistics:
    """Means and times of the steps since the last line of the log, and times since the beginning."""

    def __init__(self) -> None:
        self.waited_in_all = self.seconds_in_all = 0.0
        self.last: dict[str, float] = {}
        self.restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def restart(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.sums: dict[str, float] = {}

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, losses: dict[str, float], norm: float, rate: float) -> None:
        self.steps += 1
        for name, value in {**losses, "gradient_norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.last = {"loss": losses["loss"], "rate": rate}

    def postfix(self) -> dict[str, str]:
        return {
            "loss": f"{self.last['loss']:.3f}",
            "lr": f"{self.last['rate']:.1e}",
            "data": f"{self.waited / max(time.perf_counter() - self.began, 1e-9):.0%}",
        }

    def record(self, views: int) -> dict[str, float | None]:
        seconds = time.perf_counter() - self.began
        self.waited_in_all += self.waited
        self.seconds_in_all += seconds
        means = {name: value / self.steps for name, value in self.sums.items()}
        return {
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
            "learning_rate": self.last["rate"],
            "views_per_second": views / seconds,
            "data_wait": self.waited / seconds,
        }
