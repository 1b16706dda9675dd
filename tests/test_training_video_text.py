"""VideoTextRun and evaluate_retrieval.py in this process, where nothing needs a launcher."""

import io
import json
import shutil
import sys
import tarfile
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate_retrieval
from modeling_videomamba import VideoMambaForVideoTextRetrieval, VideoMambaProcessor
from modeling_videomamba.training.tensor_store import TensorStore
from modeling_videomamba.training.video_text import CaptionedArguments, VideoTextRun
from modeling_videomamba.training.video_text_models import image_processor_of
from modeling_videomamba.video_decoding import read_frames
from moving_digits import FPS, write_mp4
from pretrain_video_text import CLASSES
from tests.models import save_video_text

COUNT = 12


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_video_text(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos and images, all different, with two captions each, as lists and as shards."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind, suffix in (("video", "mp4"), ("image", "png")):
        (folder / kind / "shards").mkdir(parents=True)
        lines = []
        for index in range(COUNT):
            path = folder / kind / f"{index}.{suffix}"
            frames = rng.integers(0, 255, (2 * FPS, 1, 1, 3), np.uint8).repeat(32, 1).repeat(32, 2)
            if kind == "video":
                write_mp4(path, frames)
            else:
                Image.fromarray(frames[0]).save(path)
            lines.append({"path": path.name, "captions": [f"a {kind} moves {index}", f"seven {kind} up {index}"]})
        for split in ("train", "test"):
            (folder / kind / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for shard in range(2):
            write_shard(folder / kind / "shards" / f"train-{shard}.tar", folder / kind, lines[shard::2])
    return folder


def write_shard(path, folder, lines):
    with tarfile.open(path, "w") as archive:
        for line in lines:
            archive.add(folder / line["path"], line["path"])
            content = json.dumps({"captions": line["captions"]}).encode()
            info = tarfile.TarInfo(f"{line['path'].split('.')[0]}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def make_run(folder, **values):
    values = {"batch_size": 2, "num_workers": 0, "report_to": "none", "warmup_epochs": 0, **values}
    values["output_dir"] = folder
    names = [{item.name for item in fields(group)} for group in CLASSES]
    assert set(values) <= set().union(*names)
    groups = [
        group(**{name: value for name, value in values.items() if name in known})
        for group, known in zip(CLASSES, names, strict=True)
    ]
    return VideoTextRun(CaptionedArguments(*groups[:-1]), groups[-1])


@pytest.fixture
def streams(data, model_folder, tmp_path):
    """A run on a stream of each kind, of which a quarter is images."""
    return make_run(
        tmp_path / "run",
        data=str(data / "video" / "shards"),
        more_data=[str(data / "image" / "shards")],
        evaluation_data=str(data / "video"),
        model=str(model_folder),
        streaming=True,
        steps_per_epoch=8,
        image_share=0.25,
        epochs=2,
    )


def test_the_share_of_images_is_that_of_every_epoch(streams):
    kinds = [batch["pixel_values"].ndim for batch in streams.batches(0, 16)]
    assert len(kinds) == 16 and set(kinds) == {4, 5}
    assert kinds[:8].count(4) == kinds[8:].count(4) == 2 and kinds[:8] != kinds[8:]


@pytest.mark.parametrize("start", [1, 6, 11])
def test_two_streams_go_on_where_they_were(streams, start):
    whole, rest = list(streams.batches(0, 14)), list(streams.batches(start, 14))
    assert len(rest) == 14 - start
    for one, other in zip(whole[start:], rest, strict=True):
        assert one["captions"] == other["captions"] and torch.equal(one["pixel_values"], other["pixel_values"])
    captions = {caption for batch in whole for caption in batch["captions"]}
    assert len({caption.split()[-1] for caption in captions if "image" in caption}) > 3


def test_a_step_takes_batches_of_both_kinds(data, model_folder, tmp_path):
    options = {"data": str(data / "video"), "more_data": [str(data / "image")], "model": str(model_folder)}
    options |= {"gradient_accumulation_steps": 12, "epochs": 1, "mlm_probability": 0.0, "weight_decay": 0.0}
    run = make_run(tmp_path / "run", **options, min_crop_area=1.0)
    batches = list(run.batches(0, 12))
    assert {batch["pixel_values"].ndim for batch in batches} == {4, 5}
    model = VideoMambaForVideoTextRetrieval.from_pretrained(model_folder)
    run.train()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    trained = VideoMambaForVideoTextRetrieval.from_pretrained(tmp_path / "run" / "last")
    moved = {name for name, weight in trained.named_parameters() if not weight.equal(model.get_parameter(name))}
    assert any("temporal_position" in name for name in moved)  # which images don't have
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_contrastive" in line for line in logged)


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (4, 0)])
def test_the_contrastive_loss_weighs_by_the_pairs_of_all_processes(counts):
    """The loop weighs a row by one over the valid rows of all, and gradients are means over processes."""
    mean = torch.tensor(counts).float().mean()
    accelerator = SimpleNamespace(reduce=lambda value, reduction: {"mean": mean}[reduction])
    run = SimpleNamespace(accelerator=accelerator)
    shares = [VideoTextRun._share(run, torch.arange(4) < count) for count in counts]
    weights = [count * share / mean for count, share in zip(counts, shares, strict=True)]
    assert weights == [1.0 if count else 0.0 for count in counts]


# evaluate_retrieval.py


def evaluate(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["evaluate_retrieval.py", *map(str, options), "--num-workers", "0"])
    evaluate_retrieval.main()
    return capsys.readouterr().out


def directions(folder, kind, top_k=0):
    parts = TensorStore(folder / ("videos" if top_k else "videos-without-tokens"))
    return TensorStore.read([place for _, place in sorted(parts.places().items(), key=lambda item: int(item[0]))], kind)


def test_images_are_retrieved(monkeypatch, capsys, data, model_folder, tmp_path):
    text = evaluate(monkeypatch, capsys, model_folder, "--data", data / "image", "--output-dir", tmp_path)
    assert "12 videos, 24 texts" in text
    model = VideoMambaForVideoTextRetrieval.from_pretrained(model_folder).eval()
    processor = VideoMambaProcessor.from_pretrained(model_folder)
    images = [Image.open(data / "image" / f"{index}.png") for index in range(COUNT)]
    pixels = image_processor_of(processor.video_processor)(images, return_tensors="pt")["pixel_values"]
    captions = [f"{text} {index}" for index in range(COUNT) for text in ("a image moves", "seven image up")]
    with torch.no_grad():
        videos = F.normalize(model.get_video_features(pixels).pooler_output, dim=-1)[:, 0]
        texts = model.get_text_features(**processor(text=captions, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(directions(tmp_path, "direction", 1).float(), videos, atol=1e-3, rtol=0)
    scores = videos @ F.normalize(texts, dim=-1).T
    found = json.loads((tmp_path / "metrics.json").read_text())["dual_encoder"]
    best = scores.argmax(0) == torch.arange(2 * COUNT) // 2
    assert found["text_to_video_r1"] == pytest.approx(100 * best.float().mean().item(), abs=8.4)  # half precision


def test_shards_that_changed_are_no_longer_those_encoded(monkeypatch, capsys, exit_of, data, model_folder, tmp_path):
    for shard in (data / "image" / "shards").iterdir():
        shutil.copy(shard, tmp_path / shard.name.replace("train", "test"))
    common = (model_folder, "--data", tmp_path, "--output-dir", tmp_path / "out", "--top-k", 0)
    evaluate(monkeypatch, capsys, *common)
    evaluate(monkeypatch, capsys, *common)  # as it was
    folder, lines = tmp_path / "other", (data / "image" / "test.jsonl").read_text().splitlines()
    folder.mkdir()
    for line in map(json.loads, lines):
        Image.new("RGB", (32, 32), "green").save(folder / line["path"])
    write_shard(tmp_path / "test-0.tar", folder, list(map(json.loads, lines))[0::2])
    message = exit_of(evaluate_retrieval, *common)
    assert "with other settings: videos 12 (" in message and "texts" not in message


def test_only_the_first_seconds_are_seen(monkeypatch, capsys, exit_of, data, model_folder, tmp_path):
    common = (model_folder, "--data", data / "video", "--top-k", 0)
    model = VideoMambaForVideoTextRetrieval.from_pretrained(model_folder).eval()
    processor = VideoMambaProcessor.from_pretrained(model_folder).video_processor
    for seconds, options in ((2, ()), (0.75, ("--first-seconds", 0.75))):
        out = tmp_path / str(seconds)
        evaluate(monkeypatch, capsys, *common, "--output-dir", out, *options)
        frames = [read_frames(data / "video" / f"{index}.mp4")[0][: int(seconds * FPS)] for index in range(COUNT)]
        with torch.no_grad():
            features = model.get_video_features(processor(frames, return_tensors="pt")["pixel_values"]).pooler_output
        expected = F.normalize(features, dim=-1).mean(1)
        torch.testing.assert_close(directions(out, "direction").float(), expected, atol=1e-3, rtol=0)
    message = exit_of(evaluate_retrieval, *common, "--output-dir", tmp_path / "2", "--first-seconds", 1)
    assert "with other settings: first_seconds None -> 1.0" in message
    message = exit_of(evaluate_retrieval, model_folder, "--data", data / "image", "--output-dir", tmp_path / "2")
    assert "other settings: videos 12 (" in message and "texts 24 (" in message
