import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modeling_videomamba.training import loop, output, signals
from modeling_videomamba.training.checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from modeling_videomamba.training.diagnosis import NonFiniteError, RunError
from modeling_videomamba.training.loop import MAX_SKIPPED, TrainingLoop, make_accelerator
from modeling_videomamba.training.losses import classification_loss
from tests.conftest import forget_accelerator
from tests.models import build, video
from videomamba_arguments import OptimizationArguments, RunArguments

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(loop, "Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="2 processes were launched.*ACCELERATE_USE_CPU=true"):
        make_accelerator(RunArguments(tmp_path), OptimizationArguments())


def keep(step, loss):
    return loss


def names(folder):
    """Of the states in a folder, the newest first."""
    return [path.name for path in list_checkpoints(folder)]


def make_trainer(
    folder, *, rows=4, steps=6, spoil=keep, resume=False, save_steps=2, save_minutes=5, model=None, **options
):
    """A trainer of a tiny model on random videos; `spoil` changes the loss of a step."""
    optimization = OptimizationArguments(**{"epochs": steps, "warmup_epochs": 0, "batch_size": rows, **options})
    run = RunArguments(folder, report_to="none", resume=resume, save_steps=save_steps, log_steps=1)
    run.save_minutes = save_minutes
    accelerator = make_accelerator(run, optimization)

    def batches(start, end):
        for number in range(start, end):
            yield {
                "pixel_values": video(rows, seed=number),
                "labels": torch.arange(rows) % 5,
                "valid": torch.ones(rows, dtype=torch.bool),
                "broken": [("b.mp4", "b.mp4: broken")] if number == 1 else [],
            }

    def objective(model, batch):
        targets = torch.nn.functional.one_hot(batch["labels"], 5).float()
        loss = classification_loss(model(batch["pixel_values"]).logits, targets)
        return {"loss": spoil(trainer.progress.step, loss)}

    def save_model(model, weights, path, metrics):
        model.save_pretrained(path, state_dict=weights)

    trainer = TrainingLoop(
        accelerator=accelerator,
        model=model or build(),
        objective=objective,
        batches=batches,
        steps_per_epoch=1,
        evaluate=lambda model: ({"accuracy": 0.5}, {}),
        save_model=save_model,
        metric="accuracy",
        minimize=False,
        run=run,
        optimization=optimization,
        views_per_step=rows * optimization.gradient_accumulation_steps,
    )
    return trainer


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.bare_model.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_learning_rate_is_scaled_and_decays_by_layers(tmp_path):
    options = {"learning_rate": 1e-3, "base_batch_size": 2, "layer_decay": 0.5, "warmup_epochs": 2}
    trainer = make_trainer(tmp_path, warmup_learning_rate=1e-4, min_learning_rate=1e-5, **options)
    trainer.train()
    rates = [record["learning_rate"] for record in trainer.records() if "loss" in record]
    assert rates[:3] == pytest.approx([2e-4, 2e-3, 2e-3]) and rates[-1] > 2e-5
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} == {rates[-1] * 0.5**distance for distance in range(5)}


def test_batches_of_a_step_make_one_gradient(tmp_path):
    """Four batches of two rows are one of eight, also where a row is broken."""
    whole = {"pixel_values": video(8), "labels": torch.arange(8) % 5, "valid": torch.arange(8) != 3}

    def train(folder, rows, count):
        trainer = make_trainer(folder, rows=rows, steps=1, gradient_accumulation_steps=count)
        trainer.batches = lambda start, end: (
            {**{name: tensor[i * rows :][:rows] for name, tensor in whole.items()}, "broken": []}
            for i in range(start, end)
        )
        trainer.train()
        return trainer

    one, parts = train(tmp_path / "one", 8, 1), train(tmp_path / "parts", 2, 4)
    for name in ("loss", "gradient_norm"):
        assert one.records()[0][name] == pytest.approx(parts.records()[0][name], rel=1e-5)
    assert_same(weights(one), weights(parts), rtol=1e-3, atol=1e-5)


def test_an_average_of_the_weights_is_saved_and_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    seen, real = [], trainer._apply
    trainer._apply = lambda *args: (real(*args), seen.append(weights(trainer)))
    trainer.evaluate = lambda model: ({"accuracy": float(model is trainer.ema.module)}, {})
    trainer.train()
    trainer.save_last()
    expected = seen[0]
    for step in seen[1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * step[name] for name in expected}
    assert_same(load_file(tmp_path / "last" / "model.safetensors"), expected, rtol=1e-5, atol=1e-6)
    assert trainer.metrics == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.9}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    changes = {"drop_path_rate": 0.5}
    whole = make_trainer(tmp_path / "whole", model=build(**changes), **options)
    whole.train()
    whole.save_last()

    first = make_trainer(tmp_path / "cut", model=build(**changes), **options)
    real = first._step

    def step_until_stopped(*args):
        real(*args)
        if first.progress.step == 3:
            raise KeyboardInterrupt

    first._step = step_until_stopped
    with pytest.raises(KeyboardInterrupt):
        first.train()
    # the random choices of a step follow from its number, not from a generator that accelerate restores
    assert not list((tmp_path / "cut").rglob("random_states_0.pkl"))
    second = make_trainer(tmp_path / "cut", model=build(seed=9, **changes), resume=True, **options)
    second.train()
    second.save_last()
    files = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "cut")]
    assert_same(*files)
    assert [record["step"] for record in second.records() if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert second.progress.broken == {"b.mp4": "b.mp4: broken"}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_ends_with_a_line(tmp_path, capsys, signum, code):
    trainer = make_trainer(tmp_path, save_steps=100)
    real, handler = trainer._step, signal.getsignal(signum)

    def step(*args):
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)  # by the terminal and by the launcher
        real(*args)

    trainer._step = step
    with pytest.raises(SystemExit) as error:
        trainer.train()
    assert error.value.code == code and signal.getsignal(signum) == handler
    assert f"stopped by {signum.name} after step 3, the state is saved: go on with --resume" in capsys.readouterr().out
    assert names(tmp_path / "states") == ["step-00000003"]


def test_a_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    clock, codes = iter([0.0, 0.5, 1.5]), []
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    with signals.StopSignals() as stop:
        for expected in ([], [], [130]):
            os.kill(os.getpid(), signal.SIGINT)
            assert codes == expected and stop.received == signal.SIGINT
    assert capfd.readouterr().err == "\nends after this step and saves its state; Ctrl-C again ends at once\n"


def test_ctrl_c_that_ends_the_reader_of_the_output_too(monkeypatch):
    """As in `2>&1 | tee log`."""

    def write(*_):
        raise BrokenPipeError

    monkeypatch.setattr(signals.os, "write", write)
    with signals.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_states_are_saved_by_time(tmp_path, monkeypatch):
    """A step takes a minute here, and the clock of the state starts when it is saved."""
    minute, saved = [0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: 60 * minute[0])
    trainer = make_trainer(tmp_path, steps=8, save_steps=5, save_minutes=3)
    real, save = trainer._step, trainer._save_state

    def step(*args):
        minute[0] += 1
        real(*args)

    trainer._step, trainer._save_state = step, lambda: (saved.append(trainer.progress.step), save())
    trainer.train()
    assert saved == [3, 5, 8]
    assert names(tmp_path / "states") == ["step-00000008", "step-00000005"]


# Which model is the best


NAN = math.nan


@pytest.mark.parametrize("minimize", [False, True])
@pytest.mark.parametrize(
    ("metrics", "losses", "best"),
    [
        ([1, 3, 2], None, 2),
        ([1, 3, 3, 2, 3], None, 5),
        ([3, 3, 3, 3], [5, 4, 4.5, 6], 2),
        ([3, 3, 3, 4, 3], [5, 4, 4, 6, 1], 4),
        ([3, 3, 3], [5, 4, 4], 3),
        ([3, 3, 3], [NAN, 4, NAN], 2),
        ([NAN, 1, NAN], None, 2),
        ([3, 3, 3], [NAN, NAN, NAN], 3),
    ],
)
def test_ties_go_to_the_loss_and_then_to_the_later(tmp_path, capsys, minimize, metrics, losses, best):
    """Also over a resumption after each step."""
    evaluations = [
        {"accuracy": -value if minimize else value} | ({} if losses is None else {"evaluation_loss": losses[index]})
        for index, value in enumerate(metrics)
    ]
    trainer = make_trainer(tmp_path, steps=len(metrics))
    trainer.minimize = minimize
    saved = []
    trainer._save_model = lambda name: saved.append(trainer.progress.step)
    for step, found in enumerate(evaluations, start=1):
        trainer.progress = loop.Progress(**json.loads(json.dumps(dataclasses.asdict(trainer.progress))))
        trainer.progress.step, trainer.evaluate = step, lambda model, found=found: (found, {})
        trainer._evaluate()
    assert saved[-1] == best and trainer.progress.best == evaluations[best - 1]["accuracy"]
    assert capsys.readouterr().out.count("(best)") == len(saved)


# Losses that are not finite


def test_a_step_that_is_not_finite_is_left_out(tmp_path):
    def spoil(step, loss):
        return loss * (math.nan if step == 2 else 1)

    before = []
    trainer = make_trainer(tmp_path, spoil=spoil)
    real = trainer._apply
    trainer._apply = lambda batch, finite: (before.append(weights(trainer)), real(batch, finite))
    trainer.train()
    assert trainer.progress.skipped == 1 and trainer.progress.step == 6
    assert_same(before[2], before[3])  # the step from 2 to 3
    records = [record for record in trainer.records() if "loss" in record]
    assert records[2]["loss"] is None and records[-1]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    trainer = make_trainer(tmp_path, spoil=lambda step, loss: Infinite.apply(loss) if step == 1 else loss)
    trainer.train()
    assert trainer.progress.skipped == 1
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_a_run_that_stays_broken_stops_with_a_diagnosis(tmp_path):
    model = build()
    with torch.no_grad():
        model.videomamba.layers[1].mixer.scans[0].D[3] = math.nan
    trainer = make_trainer(tmp_path, steps=50, model=model)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert f"in {MAX_SKIPPED} steps in a row, to step {MAX_SKIPPED - 1}" in message
    assert "weights: not finite in 1 of" in message and "layers.1.mixer.scans.0.D" in message
    assert "outputs: not finite" in message and "gradients: not finite" in message
    found = json.loads((tmp_path / "diagnosis.json").read_text("utf-8"))
    assert found["weights"]["videomamba.layers.1.mixer.scans.0.D"]["non_finite"] == pytest.approx(1 / 64)
    assert found["outputs"]["videomamba.layers.0"]["non_finite"] == 0
    assert found["outputs"]["videomamba.layers.1"]["non_finite"] > 0
    assert names(tmp_path / "states") == ["step-00000004", "step-00000002"]


# States on disk


class Killed(BaseException):
    pass


def save_text(text):
    return lambda path: (path / "more").write_text(text)


@pytest.mark.parametrize("moment", range(26))
def test_a_kill_while_saving_leaves_a_whole_state(tmp_path, monkeypatch, moment):
    """Every change of a name or removal of a folder is a moment at which the process may end."""
    trainer = make_trainer(tmp_path)
    folder = tmp_path / "states"
    save_checkpoint(trainer.accelerator, folder, 1, save_text("whole"), {"step": 1})
    changes = iter(range(100))

    def dying(real):
        def change(*args, **kwargs):
            if next(changes) == moment:
                raise Killed
            return real(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "write_text"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(output.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(trainer.accelerator, "save_state", dying(trainer.accelerator.save_state))
        try:
            for step in (2, 2, 3):  # the second as after a resumption
                save_checkpoint(trainer.accelerator, folder, step, save_text("whole"), {"step": step})
        except Killed:
            pass
        else:
            assert moment >= next(changes) > 20
    last, damaged = find_checkpoint(folder)
    assert (last / "more").read_text() == "whole" and damaged == []
    assert last.name.startswith(f"step-{json.loads((last / 'state.json').read_text())['step']:08}")
    assert (last / "optimizer.bin").exists() and (last / "model.safetensors").exists()
    before = list_checkpoints(folder)[0].name
    save_checkpoint(trainer.accelerator, folder, 9, save_text("whole"), {"step": 9})  # what is left doesn't disturb
    assert sorted(path.name for path in folder.iterdir()) == [before, "step-00000009"]


def test_a_state_that_replaces_the_only_one_does_not_put_it_at_risk(tmp_path, monkeypatch):
    trainer, folder = make_trainer(tmp_path), tmp_path / "states"
    save_checkpoint(trainer.accelerator, folder, 4, save_text("first"), {"step": 4})
    real, calls = Path.rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        save_checkpoint(trainer.accelerator, folder, 4, save_text("second"), {"step": 4})
    monkeypatch.undo()
    assert (find_checkpoint(folder)[0] / "more").read_text() == "first"
    for text in ("second", "third"):
        save_checkpoint(trainer.accelerator, folder, 4, save_text(text), {"step": 4})
        assert names(folder) == ["step-00000004"] and (folder / "step-00000004" / "more").read_text() == text


# States that the disk has damaged


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


FILES = ("model.safetensors", "optimizer.bin", "ema.safetensors", "state.json", "checksums.json")
DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "a bit, at the start": lambda path: flip(path, 0),
    "a bit, in the middle": flip,
    "a bit, near the end": lambda path: flip(path, 0.99),
    "other JSON": lambda path: path.write_text("[1, 2]"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no checksums": lambda path: path.write_text("{}"),
    "a folder": replace_by_folder,
}


@pytest.fixture(scope="module")
def two_states(tmp_path_factory):
    """What a run of four steps leaves, with the states of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        trainer = make_trainer(folder, steps=4, ema_decay=0.5)
        trainer.train()
        forget_accelerator()
    assert {path.name for path in (folder / "states" / "step-00000004").iterdir()} == set(FILES)
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(two_states, tmp_path, file, damage):
    """And named, with the step; the state before it takes its place, and without one the run ends with a line."""
    shutil.copytree(two_states / "states", tmp_path / "states")
    newest, before = list_checkpoints(tmp_path / "states")
    DAMAGE[damage](newest / file)
    found, (line,) = find_checkpoint(tmp_path / "states")
    assert found == before
    assert line.startswith("the state of step 4 is damaged: ") and "\n" not in line
    assert ("bytes instead of" in line) == (
        file != "checksums.json" and damage in ("empty", "cut", "other JSON", "no checksums")
    )
    # what the checksums say first where they are damaged themselves, is about another file
    assert str(newest / file) in line or (file == "checksums.json" and str(newest) in line)
    DAMAGE[damage](before / file)
    with pytest.raises(
        RunError, match=r"step 4 is damaged: .*; the state of step 2 is damaged: .*\. There is no state"
    ):
        find_checkpoint(tmp_path / "states")


def test_a_damaged_state_makes_way(two_states, tmp_path, capsys):
    """A run goes on from the state before it, ends as it would have ended, and removes what is damaged."""
    shutil.copytree(two_states, tmp_path / "run")
    states = tmp_path / "run" / "states"
    flip(states / "step-00000004" / "optimizer.bin")
    (states / ".DS_Store").write_text("x")
    (states / "step-notes.txt").write_text("x")
    (states / "step-00000009").write_text("x")
    trainer = make_trainer(tmp_path / "run", steps=4, save_steps=3, ema_decay=0.5, resume=True, model=build(seed=9))
    trainer.train()
    text = capsys.readouterr().out
    for step, path in ((9, "step-00000009"), (4, "step-00000004/optimizer.bin")):
        assert re.search(
            rf"warning: the state of step {step} is damaged: .*{path}.*; going on from .*step-00000002", text
        )
    assert "resumed after step 2 of 4" in text
    first = load_file(two_states / "states" / "step-00000004" / "model.safetensors")
    assert_same(first, load_file(states / "step-00000004" / "model.safetensors"))
    left = sorted(path.name for path in states.iterdir())
    assert left == [".DS_Store", "step-00000003", "step-00000004", "step-notes.txt"]


def test_a_state_of_another_model_is_named(two_states, tmp_path):
    shutil.copytree(two_states, tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", steps=4, ema_decay=0.5, resume=True, model=build(hidden_size=48))
    with pytest.raises(RunError, match="step-00000004 can't be loaded, it is of step 4: .*size mismatch"):
        trainer.train()


def test_lines_that_are_not_whole_are_reported(two_states, tmp_path, capsys):
    shutil.copytree(two_states, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes().splitlines()
    path.write_bytes(
        b"\n".join([whole[0][:9] + whole[1], *whole[:2], b"[3]", b"\xff\x00", b"", *whole[2:-1], whole[-1][:-5]])
    )
    trainer = make_trainer(tmp_path / "run", steps=4, ema_decay=0.5, resume=True)
    trainer.train()
    text = capsys.readouterr().out
    for number in (1, 4, 5, len(whole) + 4):
        assert text.count(f"metrics.jsonl, line {number} is left out, it is not a whole record: ") == 1
    assert text.count("is left out") == 4
    steps = [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 4


def test_resuming_without_a_state_is_said(tmp_path, capsys):
    make_trainer(tmp_path, steps=1, resume=True).train()
    line = f"--resume: {tmp_path / 'states'} has no state yet, so the run begins at its first step"
    assert line in capsys.readouterr().out
