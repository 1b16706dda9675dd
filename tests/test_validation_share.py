"""--validation-share: what is held back of training data that come without another split."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from modeling_videomamba.training.classification import ClassificationRun, LabelledArguments
from tests.conftest import forget_accelerator, tiny_config
from videomamba_arguments import (
    LabelledAugmentationArguments,
    LabelledDataArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
)


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of two classes below `train`."""
    for index in range(12):
        path = tmp_path / "data" / "train" / ("left" if index < 8 else "right") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_frames=None).to_dict()))

    def make(data, seed=0, **options):
        args = LabelledArguments(
            LabelledDataArguments(str(data), num_workers=0, **options),
            ModelArguments(config=tmp_path / "config.json"),
            LabelledAugmentationArguments(),
            OptimizationArguments(epochs=1, batch_size=4),
            RunArguments(tmp_path / "model", report_to="none", seed=seed),
        )
        try:
            return ClassificationRun(args, teacher_hidden_size=None)
        finally:
            forget_accelerator()

    return make


def paths(split):
    return [row["image"]["path"] for row in split]


def test_a_share_of_each_class_is_held_back(pictures, make_run, capsys):
    run = make_run(pictures, validation_share=0.25)
    assert "evaluates on 3 of 12 training examples, drawn of each class alike" in capsys.readouterr().out
    assert run.evaluation_name == "validation" and sorted(run.test_split["label"]) == [0, 0, 1]
    trained, held_back = paths(run.train_split), paths(run.test_split)
    assert len(trained) == 9 and not set(trained) & set(held_back)
    assert paths(make_run(pictures, validation_share=0.25).test_split) == held_back
    others = [paths(make_run(pictures, seed, validation_share=0.25).test_split) for seed in (1, 2)]
    assert any(other != held_back for other in others)


def test_lists_with_values_are_held_back_at_random(pictures, make_run, capsys):
    rows = [f"{path.relative_to(pictures)},{index}.5" for index, path in enumerate(sorted(pictures.rglob("*.png")))]
    (pictures / "train.csv").write_text("\n".join(["path,label", *rows]))
    run = make_run(pictures, validation_share=0.5)
    assert "evaluates on 6 of 12 training examples, drawn at random" in capsys.readouterr().out
    assert len(run.train_split) == len(run.test_split) == 6


def test_what_does_not_fit_is_explained(pictures, make_run):
    with pytest.raises(ValueError, match="has no split validation or test: --validation-share 0.2 evaluates on a"):
        make_run(pictures)
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"--validation-share must be above 0 and below 1, got {share}"):
            LabelledDataArguments("x", validation_share=share)
    for path in [*sorted((pictures / "train" / "left").iterdir())[1:], *sorted((pictures / "train").glob("r*/*"))[1:]]:
        path.unlink()
    with pytest.raises(ValueError, match="--validation-share 0.2 of 2 training examples holds none back"):
        make_run(pictures, validation_share=0.2)
    shutil.copytree(pictures / "train", pictures / "test")
    with pytest.raises(ValueError, match=r"--validation-share 0.2: .* has a split test to evaluate on"):
        make_run(pictures, validation_share=0.2)
