"""What a run leaves for its reader: curves and the card of its model."""

import itertools
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HTTPError
from matplotlib.figure import Figure

from modeling_videomamba.training.reports import draw_curves, model_card, origin_of

FACTS = {
    "start": "from `best`",
    "examples": 8,
    "steps": 3,
    "views_per_step": 2,
    "processes": 1,
    "seed": 0,
    "broken": "",
    "command": "finetune.py",
}


def card(**options):
    described = {"model_name": "org/x", "pipeline_tag": "video-classification", "dataset_name": "d", "split": "test"}
    return model_card(**described, results={"accuracy": 0.5}, use="pass", **FACTS, **options)


def test_a_card_has_base_model_licence_and_classes():
    made = card(classes=["a b", "c|d"], base_model="org/base", licence="cc-by-4.0")
    assert (made.data.base_model, made.data.license) == ("org/base", "cc-by-4.0")
    assert "## Classes\n\n2: `a b`, `c|d`\n" in made.text and "licence" not in made.text


def test_a_card_without_them_says_what_is_to_be_done():
    made = card()
    assert (made.data.base_model, made.data.license) == (None, "unknown")
    assert "set `license` in the first lines" in made.text and "## Classes" not in made.text


@pytest.mark.parametrize(
    ("first_lines", "expected"),
    [
        ("license: mit\nbase_model: org/base", {"base_model": "org/base", "licence": "mit"}),
        ("license: mit", {"base_model": None, "licence": "mit"}),
        ("tags:\n- video", {"base_model": None, "licence": "unknown"}),
        (None, {"base_model": None, "licence": "unknown"}),
        ("license: [", {"base_model": None}),
    ],
)
def test_a_directory_passes_on_what_its_card_says(first_lines, expected, tmp_path):
    if first_lines is not None:
        (tmp_path / "README.md").write_text(f"---\n{first_lines}\n---\n# X\n")
    assert origin_of(str(tmp_path)) == expected


def test_a_model_of_the_hub_is_the_base_model(monkeypatch):
    answer = SimpleNamespace(card_data=ModelCardData(license="apache-2.0", base_model="org/before"))

    def model_info(_, name, timeout):
        if isinstance(answer.card_data, Exception):
            raise answer.card_data
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert origin_of("org/x") == {"base_model": "org/x", "licence": "apache-2.0"}
    for missing in (None, ModelCardData()):
        answer.card_data = missing
        assert origin_of("org/x") == {"base_model": "org/x", "licence": "unknown"}
    for error in (HTTPError("no route"), OSError("offline")):
        answer.card_data = error
        assert origin_of("org/x") == {"base_model": "org/x"}
    assert origin_of(None) == {}


def test_no_curve_hides_another_of_the_same_values(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    names = ("accuracy", "top5_accuracy", "mean_class_accuracy")
    records = [{"step": step, "loss": 1.0, **dict.fromkeys(names, step / 10)} for step in range(5)]
    draw_curves(records, tmp_path / "curves.png")
    (axis,) = (axis for axis in figures[0].axes if axis.get_title() == "evaluation")
    lines = sorted(axis.lines, key=lambda line: line.get_zorder())
    assert [line.get_label() for line in lines] == list(reversed(names))
    widths = [line.get_linewidth() for line in lines]
    assert all(behind >= before + 2 for behind, before in itertools.pairwise(widths))
