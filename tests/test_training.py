import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_videomamba import VideoMambaForVideoClassification
from modeling_videomamba.training.losses import distillation_loss
from modeling_videomamba.training.metrics import retrieval_recall
from modeling_videomamba.training.optimization import cosine_schedule, parameter_groups
from tests.conftest import GOLDEN, tiny_config


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


def test_norms_biases_embeddings_and_the_state_matrix_do_not_decay():
    model = VideoMambaForVideoClassification(tiny_config(teacher_hidden_size=8))
    model.classifier.bias.requires_grad_(False)
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)].split(".", 1)[1] for parameter in decay["params"]}
    suffixes = ("projection.weight", "in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight",
                "conv1d.weight", "1.weight", "weight")  # fmt: skip
    assert all(name.endswith(suffixes) for name in decaying)
    staying = {names[id(parameter)] for parameter in no_decay["params"]}
    for part in ("A_log", "D", "norm.weight", "bias", "cls_token", "position_embeddings"):
        assert any(part in name for name in staying) and not any(part in name for name in decaying), part
    assert len(decay["params"]) + len(no_decay["params"]) == len(names) - 1


def test_distillation_compares_directions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(distillation_loss(student, teacher), (2 - 2 * cosine).mean(-1))
    torch.testing.assert_close(distillation_loss(3 * teacher, teacher), torch.zeros(2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="student_features.*teacher_features"):
        distillation_loss(student, teacher[:, :4])


def test_recall_is_that_of_the_original():
    case = json.loads((GOLDEN / "protocol.json").read_text("utf-8"))["retrieval_metrics"]
    scores = torch.tensor(case["scores_video_to_text"]), torch.tensor(case["scores_text_to_video"])
    recall = retrieval_recall(*scores, torch.tensor(case["text_to_video"]))
    names = {"video_to_text": "txt", "text_to_video": "img"}
    for direction, name in names.items():
        for k in (1, 5, 10):
            assert round(recall[f"{direction}_r{k}"], 2) == case["expected"][f"{name}_r{k}"]
        mean = sum(recall[f"{direction}_r{k}"] for k in (1, 5, 10)) / 3
        assert round(mean, 2) == case["expected"][f"{name}_r_mean"]
    assert round(sum(recall.values()) / 6, 2) == case["expected"]["r_mean"]


def test_recall_of_equal_scores_and_of_wrong_shapes():
    texts = torch.arange(20)
    assert set(retrieval_recall(torch.zeros(20, 20), torch.zeros(20, 20), texts).values()) == {0.0}
    assert set(retrieval_recall(torch.eye(20), torch.eye(20), texts).values()) == {100.0}
    with pytest.raises(ValueError, match="text_to_video"):
        retrieval_recall(torch.zeros(20, 20), torch.zeros(20, 19), texts)
    with pytest.raises(ValueError, match=r"no text to the videos \[19\]"):
        retrieval_recall(torch.zeros(20, 20), torch.zeros(20, 20), texts.clamp(max=18))


def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, torch
from modeling_videomamba.training.memory import keep_freed_memory
def step():
    tensors = [torch.zeros(2_000_000) for _ in range(10)]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = keep_freed_memory()
faults()
print(int(kept), *[faults() for _ in range(3)])
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kept, *faults = map(int, output.split())
    if not kept:
        pytest.skip("a C library that can't be told to keep memory")
    assert min(faults) < 5000  # of 20,000 pages that every step would otherwise fault in
