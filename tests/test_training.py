import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, Video
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from modeling_videomamba.training.evaluation import Predictions, compute_metrics
from modeling_videomamba.training.losses import classification_loss, distillation_loss, regression_loss
from modeling_videomamba.training.metrics import ClassificationMetric, retrieval_metrics, retrieval_recall
from modeling_videomamba.training.reranking import pairs_to_rank, rerank
from modeling_videomamba.training.retrieval import texts_of
from tests.conftest import GOLDEN


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


def test_rows_of_one_file_are_one_to_be_found():
    media = [{"path": path, "bytes": data} for path, data in (("a", None), ("b", b"x"), ("a", None), ("b", b"y"))]
    features = Features({"video": Video(decode=False), "captions": List(Value("string"))})
    captions = [["one"], ["two"], ["three", "four"], ["five"]]
    split = Dataset.from_dict({"video": media, "captions": captions}, features=features)
    assert texts_of(split) == ([0, 1, 3], ["one", "two", "three", "four", "five"], [0, 1, 0, 0, 2])
    assert texts_of(split.select([2, 0])) == ([0], ["three", "four", "one"], [0, 0, 0])
    wrong = Dataset.from_dict({"video": media[:1], "captions": [["one", None]]}, features=features)
    with pytest.raises(ValueError, match="a must have captions, and none that is empty, got"):
        texts_of(wrong)


def test_scores_that_are_no_numbers_are_refused():
    scores = torch.eye(4)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="must be numbers, 2 of them are NaN"):
        retrieval_metrics(scores, scores.T, torch.arange(4))


def test_median_ranks_and_ranking_again():
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.2], [0.8, 0.4, 0.3, 0.7], [0.0, 0.6, 0.5, 0.2], [0.1, 0.2, 0.3, 0.4]])
    owners = torch.arange(4)
    metrics = retrieval_metrics(scores, scores.T, owners)
    assert metrics["video_to_text_median_rank"] == 1.5 and metrics["text_to_video_median_rank"] == 1.5
    recall = retrieval_recall(scores, scores.T, owners)
    assert {name: metrics[name] for name in recall} == recall and set(metrics) > set(recall)
    pairs = pairs_to_rank(scores, 2)
    assert pairs.sum(0).min() >= 2 and pairs.sum(1).min() >= 2 and not pairs[0, 2]
    matches = torch.where(pairs, -scores, torch.nan)  # the other way round
    ranked = rerank(scores, matches, 2)
    assert ranked.argsort(dim=1, descending=True).tolist() == [[1, 0, 3, 2], [3, 0, 1, 2], [2, 1, 3, 0], [2, 3, 1, 0]]
    assert torch.equal(rerank(scores, -scores, 9).argsort(dim=1), (-scores).argsort(dim=1))


def test_losses_have_a_value_for_each_example():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    targets = torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.02
    torch.testing.assert_close(classification_loss(logits, targets), expected)
    values = torch.tensor([1.0, 0.0, -1.0, 2.0])
    torch.testing.assert_close(regression_loss(logits[:, :1], values), (logits[:, 0] - values) ** 2)


def test_metrics_of_classification_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((60, 7)).astype(np.float32), rng.integers(0, 6, 60)
    metrics = ClassificationMetric(keep_in_memory=True).compute(predictions=scores, references=labels)
    best = scores.argmax(1)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, best))
    assert metrics["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(7)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is predicted but not there
        assert metrics["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, best))


def test_windows_of_a_video_count_as_one():
    scores = {0: torch.tensor([0.6, 0.4]), 1: torch.tensor([0.1, 0.9]), 2: torch.tensor([0.8, 0.2])}
    predictions = Predictions(scores, {0: 1, 1: 1, 2: 1}).grouped({0: 0, 1: 0, 2: 5})
    torch.testing.assert_close(predictions.scores[0], torch.tensor([0.35, 0.65]))
    assert set(predictions.scores) == {0, 5}
    assert compute_metrics(predictions, regression=False)["accuracy"] == 0.5
    with pytest.raises(ValueError, match="no example of the given split can be read"):
        compute_metrics(Predictions(), regression=False)


def test_mean_squared_error():
    predictions = Predictions({0: torch.tensor([1.0]), 1: torch.tensor([2.0])}, {0: 0.0, 1: 4.0})
    assert compute_metrics(predictions, regression=True) == {"mse": 2.5}


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
