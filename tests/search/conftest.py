"""A model, videos to index and the script, called in this process, which is faster than to launch it."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import searching
from modeling_videomamba import VideoMambaForVideoTextRetrieval, VideoMambaProcessor
from modeling_videomamba.training.collection import embed
from modeling_videomamba.video_decoding import read_frames
from modeling_videomamba.video_text_losses import similarities
from moving_digits import FPS, write_mp4
from tests.models import save_video_text
from tests.search.helpers import OPTIONS, TEXT, call_script, draw


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model whose similarities and matching probabilities differ from video to video."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_video_text(folder)
    model = VideoMambaForVideoTextRetrieval.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("crossattention" in name and weight.ndim == 2) or name == "matching_head.weight":
                weight.copy_(torch.randn_like(weight) / 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Seven short videos, one that is three windows long, and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for index in range(7):
        write_mp4(folder / ("sub" if index % 2 else ".") / f"{index}.mp4", draw(index))
    write_mp4(folder / "long.mp4", draw(7, 6 * FPS))
    (folder / "bad.mp4").write_text("no video")
    (folder / "notes.txt").write_text("no video either")
    return folder


@pytest.fixture
def search(capsys, monkeypatch):
    """Calls the script in this process; returns what it prints, and keeps its errors and the windows it embedded."""

    def count(model, pixel_values):
        call.embedded += len(pixel_values)
        return embed(model, pixel_values)

    monkeypatch.setattr(searching, "embed", count)

    def call(*options):
        call.embedded = 0
        capsys.readouterr()
        call_script(*options)
        printed, call.errors = capsys.readouterr()
        return printed

    call.embedded = 0
    return call


@pytest.fixture
def collection(search, model_folder, clips, tmp_path):
    """A copy of the clips, and the index of it, to be changed."""
    folder, out = tmp_path / "clips", tmp_path / "index"
    shutil.copytree(clips, folder)
    search("index", folder, out, "--model", model_folder, *OPTIONS)
    return folder, out


# What the model itself says


class Oracle:
    def __init__(self, folder):
        self.model = VideoMambaForVideoTextRetrieval.from_pretrained(folder).eval()
        self.processor = VideoMambaProcessor.from_pretrained(folder)
        self.tokens = self.processor(text=[TEXT], return_tensors="pt")

    def pixels(self, path, first=0, last=None):
        frames, _ = read_frames(path)
        return self.processor.video_processor(frames[first:last], return_tensors="pt")["pixel_values"]

    def frame_embeds(self, pixels):
        with torch.no_grad():
            return F.normalize(self.model.get_video_features(pixels).pooler_output, dim=-1)

    def similarity(self, pixels):
        with torch.no_grad():
            text = F.normalize(self.model.get_text_features(**self.tokens).pooler_output, dim=-1)
        return similarities(self.frame_embeds(pixels), text).item()

    def match(self, pixels):
        with torch.no_grad():
            return self.model.matching_logits(pixels, **self.tokens).softmax(-1)[0, 1].item()


@pytest.fixture(scope="session")
def oracle(model_folder):
    return Oracle(model_folder)
