import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_videomamba import VideoMambaForVideoClassification
from modeling_videomamba.training.optimization import cosine_schedule, parameter_groups
from tests.conftest import GOLDEN, tiny_config
from videomamba_arguments import OptimizationArguments


def test_the_schedule_is_that_of_the_original():
    (case,) = json.loads((GOLDEN / "protocol.json").read_text("utf-8"))["cosine_schedule"]
    expected = case.pop("values")
    actual = [cosine_schedule(step, **case) for step in range(len(expected))]
    assert actual == pytest.approx(expected, rel=1e-12)
    assert cosine_schedule(len(expected), **case) == case["final"]


@given(
    epochs=st.integers(1, 10),
    steps=st.integers(1, 20),
    warmup=st.floats(0, 1),
    base=st.floats(1e-5, 1),
    step=st.integers(0, 300),
)
def test_the_schedule_stays_between_its_ends(epochs, steps, warmup, base, step):
    rate = cosine_schedule(step, base=base, final=1e-6, epochs=epochs, steps_per_epoch=steps, warmup_epochs=warmup)
    assert 0 <= rate <= base * (1 + 1e-9)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs"):
        cosine_schedule(0, base=1.0, final=0.0, epochs=2, steps_per_epoch=5, warmup_epochs=3)


# What a parameter is by its name: whether it decays, and its distance from the head in the tiny model of 3 layers.
DECAYS = {
    **dict.fromkeys(
        ("projection.weight", "in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight"), True
    ),
    **dict.fromkeys(("conv1d.weight", "classifier.weight", "distillation_head.1.weight"), True),
    **dict.fromkeys(("projection.bias", "conv1d.bias", "classifier.bias", "distillation_head.1.bias"), False),
    **dict.fromkeys(("A_log", ".D", "dt_bias", "norm.weight", "distillation_head.0.weight", "cls_token"), False),
    **dict.fromkeys((".position_embeddings", "temporal_position_embeddings"), False),
}
DISTANCES = {".embeddings.": 4, "layers.0.": 3, "layers.1.": 2, "layers.2.": 1}


def test_every_parameter_is_in_its_group():
    model = VideoMambaForVideoClassification(tiny_config(teacher_hidden_size=8, scan_order="spatiotemporal_v2"))
    model.classifier.bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1, 0.5)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    seen = set()
    for name, parameter in model.named_parameters():
        if name == "classifier.bias":
            assert id(parameter) not in found
            continue
        (suffix,) = {suffix for suffix in DECAYS if name.endswith(suffix)}
        seen.add(suffix)
        distance = next((value for part, value in DISTANCES.items() if part in name), 0)
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.1 if DECAYS[suffix] else 0.0), name
        assert group["lr_scale"] == 0.5**distance, name
    assert seen == set(DECAYS) - {"classifier.bias"}


def test_one_rate_for_all_without_layer_decay():
    groups = parameter_groups(VideoMambaForVideoClassification(tiny_config()), 0.1)
    assert {group["lr_scale"] for group in groups} == {1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1e-3}, {"weight_decay": -1}, {"layer_decay": 1.5}),
        *({"warmup_epochs": 50}, {"max_grad_norm": 0}, {"ema_decay": 1.0}, {"mixed_precision": "fp8"}),
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizationArguments(**wrong)
