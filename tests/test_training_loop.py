import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modeling_videomamba.training import checkpoints, loop
from modeling_videomamba.training.checkpoints import last_checkpoint, replace_files, save_checkpoint
from modeling_videomamba.training.diagnosis import NonFiniteError
from modeling_videomamba.training.loop import MAX_SKIPPED, Trainer, make_accelerator
from modeling_videomamba.training.losses import classification_loss
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


def make_trainer(folder, *, rows=4, steps=6, spoil=keep, resume=False, save_steps=2, model=None, **options):
    """A trainer of a tiny model on random videos; `spoil` changes the loss of a step."""
    optimization = OptimizationArguments(**{"epochs": steps, "warmup_epochs": 0, "batch_size": rows, **options})
    run = RunArguments(folder, report_to="none", resume=resume, save_steps=save_steps, log_steps=1)
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

    trainer = Trainer(
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
    next((tmp_path / "cut").rglob("random_states_0.pkl")).unlink()
    second = make_trainer(tmp_path / "cut", model=build(seed=9, **changes), resume=True, **options)
    second.train()
    second.save_last()
    files = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "cut")]
    assert_same(*files)
    assert [record["step"] for record in second.records() if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert second.progress.broken == {"b.mp4": "b.mp4: broken"}


def test_sigterm_saves_the_state(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=100)
    real = trainer._step

    def step(*args):
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    trainer._step = step
    with pytest.raises(SystemExit) as error:
        trainer.train()
    assert error.value.code == 143
    assert last_checkpoint(tmp_path / "states").name == "step-00000003"


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
    assert last_checkpoint(tmp_path / "states") is not None


# States on disk


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_while_saving_leaves_a_whole_state(tmp_path, monkeypatch, moment):
    """Every change of a name or removal of a folder is a moment at which the process may end."""
    trainer = make_trainer(tmp_path)
    folder, save = tmp_path / "states", lambda path: (path / "more").write_text("whole")
    save_checkpoint(trainer.accelerator, folder, 1, save, {"step": 1})
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
        patch.setattr(checkpoints.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(trainer.accelerator, "save_state", dying(trainer.accelerator.save_state))
        for step in (2, 2, 3):  # the second as after a resumption
            try:
                save_checkpoint(trainer.accelerator, folder, step, save, {"step": step})
            except Killed:
                break
    last = last_checkpoint(folder)
    assert (last / "more").read_text() == "whole"
    assert f"step-{json.loads((last / 'state.json').read_text())['step']:08}" == last.name
    assert (last / "optimizer.bin").exists() and (last / "model.safetensors").exists()
    save_checkpoint(trainer.accelerator, folder, 9, save, {"step": 9})  # and what is left over doesn't disturb
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]


def test_files_are_replaced_whole(tmp_path):
    replace_files(tmp_path / "best", lambda folder: (folder / "a").write_text("old"))

    def write_and_die(folder):
        (folder / "a").write_text("half")
        raise Killed

    with pytest.raises(Killed):
        replace_files(tmp_path / "best", write_and_die)
    assert (tmp_path / "best" / "a").read_text() == "old"
    replace_files(tmp_path / "best", lambda folder: (folder / "a").write_text("new"))
    assert (tmp_path / "best" / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
