"""What the tests of search_videos.py have in common."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from datasets import load_from_disk

import search_videos
from modeling_videomamba.training.collection import Collection
from moving_digits import FPS
from tests.conftest import forget_accelerator

TEXT = "a seven moves"
OPTIONS = ("--clip-seconds", 2, "--num-workers", 0)


def draw(seed, num_frames=2 * FPS):
    """Frames of a colour and a brightness of their own, with a square that moves."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_frames, 48, 48, 3), rng.integers(0, 200, 3), np.uint8)
    top, left, color = rng.integers(0, 32), rng.integers(0, 16), rng.integers(0, 255, 3)
    for index, frame in enumerate(frames):
        frame[top : top + 16, left + index % 16 : left + index % 16 + 16] = color
    return frames


def write_shard(path, videos):
    with tarfile.open(path, "w") as archive:
        for name, video in videos.items():
            for member, data in ((name, video.read_bytes()), (f"{name}.txt", b"a text")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def call_script(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["search_videos.py", *map(str, options)])
        search_videos.main()
    forget_accelerator()


def rows(out):
    """Embeddings by path and start."""
    table = load_from_disk(str(Collection(out).table_folder()))
    return {(row["path"], row["start"]): row for row in table.with_format("numpy")}


def counts(text):
    """Numbers of the last line: clips and videos embedded, videos kept, changed, removed, broken."""
    return [int(word) for word in text.splitlines()[-1].replace(",", "").split() if word.isdigit()]


def paths(hits):
    return [hit["path"] for hit in hits]


def ask(search, out, *options):
    return json.loads(search("query", out, *options, "--json"))


def window_of(hit):
    return round(hit["start"] * FPS), round(hit["end"] * FPS)
