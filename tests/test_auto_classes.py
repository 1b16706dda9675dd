"""What the rest of Transformers sees: Auto classes, pipelines, remote code, the cost of the import."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BertTokenizer,
    pipeline,
)

from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaForVideoTextRetrieval,
    VideoMambaImageProcessor,
    VideoMambaModel,
    VideoMambaProcessor,
    VideoMambaVideoProcessor,
)
from tests.conftest import ROOT, moving_square, tiny_config, write_video
from tests.models import save_video_text


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A saved video model, a saved image model and one of masked pretraining."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_class, processor_class, num_frames in (
        ("video", VideoMambaForVideoClassification, VideoMambaVideoProcessor, 4),
        ("image", VideoMambaForImageClassification, VideoMambaImageProcessor, None),
        ("pretraining", VideoMambaForMaskedPreTraining, VideoMambaVideoProcessor, 4),
    ):
        torch.manual_seed(0)
        model = model_class(tiny_config(num_frames=num_frames)).eval()
        model.save_pretrained(folder / name)
        processor_class.for_model(model.config).save_pretrained(folder / name)
    save_video_text(folder / "video_text")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def python(code, *arguments, **environment):
    """Runs code in a process of its own, outside the repository."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=os.environ.get("TMPDIR", "/tmp"),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def test_auto_classes(directories):
    assert type(AutoModel.from_pretrained(directories / "video")) is VideoMambaModel
    for auto_class, name, expected in (
        (AutoModelForVideoClassification, "video", VideoMambaForVideoClassification),
        (AutoModelForImageClassification, "image", VideoMambaForImageClassification),
        (AutoModel, "video_text", VideoMambaForVideoTextRetrieval),
        (AutoProcessor, "video_text", VideoMambaProcessor),
        (AutoVideoProcessor, "video_text", VideoMambaVideoProcessor),
        (AutoTokenizer, "video_text", BertTokenizer),
        (AutoVideoProcessor, "video", VideoMambaVideoProcessor),
        (AutoImageProcessor, "image", VideoMambaImageProcessor),
        (AutoModel, "pretraining", VideoMambaModel),
        (AutoModelForPreTraining, "pretraining", VideoMambaForMaskedPreTraining),
        (AutoModelForVideoClassification, "pretraining", VideoMambaForVideoClassification),
    ):
        assert type(auto_class.from_pretrained(directories / name)) is expected


def test_the_video_pipeline_agrees_with_the_model_and_warns_of_nothing(directories, video):
    code = """
import json, sys
import modeling_videomamba
from transformers import pipeline
print(json.dumps(pipeline("video-classification", model=sys.argv[1])(sys.argv[2], top_k=5)))
"""
    result = python(code, directories / "video", video)
    assert "not supported" not in result.stderr and "Warning" not in result.stderr and "deprecated" not in result.stderr
    scores = {item["label"]: item["score"] for item in json.loads(result.stdout)}
    model = AutoModelForVideoClassification.from_pretrained(directories / "video")
    processor = AutoVideoProcessor.from_pretrained(directories / "video")
    with torch.no_grad():
        expected = model(**processor(video, return_tensors="pt")).logits[0].softmax(-1)
    assert scores == pytest.approx({model.config.id2label[i]: value for i, value in enumerate(expected.tolist())})
    several = pipeline("video-classification", model=str(directories / "video"))([str(video)] * 2, num_frames=6)
    assert [item["label"] for item in several[0]] == [item["label"] for item in several[1]] and len(several) == 2


def test_the_image_pipeline_agrees_with_the_model_and_warns_of_nothing(directories, picture):
    code = """
import json, sys
import modeling_videomamba
from transformers import pipeline
print(json.dumps(pipeline("image-classification", model=sys.argv[1])(sys.argv[2], top_k=5)))
"""
    result = python(code, directories / "image", picture)
    assert "not supported" not in result.stderr and "Warning" not in result.stderr
    scores = {item["label"]: item["score"] for item in json.loads(result.stdout)}
    model = AutoModelForImageClassification.from_pretrained(directories / "image")
    processor = AutoImageProcessor.from_pretrained(directories / "image")
    with torch.no_grad():
        expected = model(**processor(Image.open(picture), return_tensors="pt")).logits[0].softmax(-1)
    assert scores == pytest.approx({model.config.id2label[i]: value for i, value in enumerate(expected.tolist())})


@pytest.fixture
def zero_shot(directories):
    return pipeline("zero-shot-video-classification", model=str(directories / "video_text"))


def test_the_zero_shot_pipeline_agrees_with_the_model(directories, zero_shot, video, tmp_path):
    labels = ["seven", "a seven moves", "moves"]
    model = AutoModel.from_pretrained(directories / "video_text")
    processor = AutoProcessor.from_pretrained(directories / "video_text")
    texts = [f"a {label}" for label in labels]
    with torch.no_grad():
        logits = model(**processor(videos=str(video), text=texts, padding=True, return_tensors="pt")).logits_per_video
    expected = dict(zip(labels, logits[0].softmax(-1).tolist(), strict=True))
    found = zero_shot(str(video), candidate_labels=labels, hypothesis_template="a {}")
    assert {item["label"]: item["score"] for item in found} == pytest.approx(expected, rel=1e-4)
    assert [item["label"] for item in found] == sorted(labels, key=expected.get, reverse=True)
    other = write_video(tmp_path / "other.mp4", moving_square(45)[::-1])
    videos, options = [str(video), str(other), str(video)], {"candidate_labels": labels, "hypothesis_template": "a {}"}
    several = zero_shot(videos, **options, batch_size=2)
    for result, path in zip(several, videos, strict=True):
        for item, expected in zip(result, zero_shot(path, **options), strict=True):
            assert item == {"label": expected["label"], "score": pytest.approx(expected["score"], rel=1e-4)}
    assert several[0] != several[1] and len(zero_shot(videos, **options, top_k=1)[2]) == 1
    again = {item["label"]: item["score"] for item in zero_shot(str(video), candidate_labels=labels)}
    assert again != {item["label"]: item["score"] for item in found}  # by another template


def test_the_zero_shot_pipeline_refuses_what_it_can_not_do(zero_shot, video):
    for wrong, message in (
        ({}, "`candidate_labels` must name at least one label"),
        ({"candidate_labels": "a, b"}, "`candidate_labels` must be a list of texts, got 'a, b'"),
        ({"candidate_labels": ["a"], "hypothesis_template": "a video"}, "must contain {} for the label, got 'a video'"),
        ({"candidate_labels": ["a"], "top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"candidate_labels": ["a " * 600]}, "`input_ids` must have at most 512 tokens a text"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(str(video), **wrong)


def test_the_video_pipeline_needs_no_ffmpeg_and_no_torchcodec(directories, video):
    code = """
import sys
sys.modules["torchcodec"] = None
import modeling_videomamba
from transformers import pipeline
assert len(pipeline("video-classification", model=sys.argv[1])(sys.argv[2])) == 5
"""
    python(code, directories / "video", video, PATH="/nonexistent")


def test_remote_code_loads_without_the_package(directories, video, picture, tmp_path):
    code = """
import sys
sys.modules["modeling_videomamba"] = None  # as if it were not installed
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForPreTraining, AutoModelForVideoClassification, AutoProcessor, AutoVideoProcessor, pipeline)
video_model, image_model, pretraining_model, video_text_model, video, picture, out = sys.argv[1:]
for auto_class, source in ((AutoConfig, video_model), (AutoModel, video_model), (AutoModel, image_model),
    (AutoModelForVideoClassification, video_model), (AutoModelForImageClassification, image_model),
    (AutoVideoProcessor, video_model), (AutoImageProcessor, image_model), (AutoModel, pretraining_model),
    (AutoModelForPreTraining, pretraining_model), (AutoModelForVideoClassification, pretraining_model),
    (AutoModel, video_text_model), (AutoProcessor, video_text_model)):
    loaded = auto_class.from_pretrained(source, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
first = pipeline("video-classification", model=video_model, trust_remote_code=True)
assert len(pipeline("image-classification", model=image_model, trust_remote_code=True)(picture)) == 5
first.model.save_pretrained(out)  # what was loaded from code can be saved and loaded again
first.video_processor.save_pretrained(out)
again = pipeline("video-classification", model=out, trust_remote_code=True)
scores = [{item["label"]: round(item["score"], 4) for item in classifier(video)} for classifier in (first, again)]
assert scores[0] == scores[1] and len(scores[0]) == 5
model = AutoModel.from_pretrained(video_text_model, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(video_text_model, trust_remote_code=True)
inputs = processor(videos=video, text=["a seven", "moves"], padding=True, return_tensors="pt")
assert model(**inputs).logits_per_video.shape == (1, 2)
zero_shot = pipeline("zero-shot-video-classification", model=video_text_model, trust_remote_code=True)
assert type(zero_shot).__module__.startswith("transformers_modules.")
assert len(zero_shot(video, candidate_labels=["a seven", "moves"])) == 2
"""
    result = python(
        code,
        directories / "video",
        directories / "image",
        directories / "pretraining",
        directories / "video_text",
        video,
        picture,
        tmp_path / "out",
        HF_MODULES_CACHE=str(tmp_path),
    )
    assert "not supported" not in result.stderr


def test_what_travels_to_the_hub_imports_flatly(directories):
    for folder in directories.iterdir():
        names = {path.stem for path in folder.glob("*.py")}
        assert {"configuration_videomamba", "modeling_videomamba", "selective_scan"} <= names
        for path in folder.glob("*.py"):
            for line in path.read_text("utf-8").splitlines():
                if line.strip().startswith("from ."):
                    assert line.split()[1].removeprefix(".") in names, f"{path.name}: {line}"


def test_importing_loads_no_optional_dependency_and_opens_no_connection():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection at import")
socket.socket.connect = socket.create_connection = refuse
for name in ("datasets", "accelerate", "evaluate", "mamba_ssm", "causal_conv1d", "torchcodec", "av", "matplotlib"):
    sys.modules[name] = None
import modeling_videomamba
"""
    python(code)


def test_importing_loads_little_more_than_videomae_does():
    """Counts modules, which does not depend on the load of the machine as seconds do."""
    code = "import sys; {}; print(len(sys.modules))"
    videomae = """from transformers import (AutoImageProcessor, AutoModel, AutoVideoProcessor,
    VideoMAEForVideoClassification, VideoMAEImageProcessor, VideoMAEVideoProcessor)"""
    ours = int(python(code.format("import modeling_videomamba")).stdout)
    theirs = int(python(code.replace("; {}; ", "\n{}\n").format(videomae)).stdout)
    assert ours <= theirs * 1.02
