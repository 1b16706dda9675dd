import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# Nothing in the tests may use or fill the user's own cache, which `datasets` looks for when it is imported.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

# Nothing in the tests may look for anything on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU the Triton kernels run under Triton's interpreter, which is chosen when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open

from modeling_videomamba import VideoMambaConfig, selective_scan_backends, video_decoding
from modeling_videomamba.cpu_library import load_library

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
NANO = ROOT / "hub_cards" / "videomamba-nano"
NANO_VIDEO_TEXT = NANO.with_name("videomamba-nano-video-text")

_kernel = selective_scan_backends()["cpu"]
needs_kernel = pytest.mark.skipif(not _kernel.usable, reason=_kernel.reason)

VARIANTS = ("baseline", "avx2", "avx512")


def load_variant(variant: str):
    """The CPU kernels for one kind of vectors; without them, or without such vectors, the test is skipped."""
    capability = torch.backends.cpu.get_cpu_capability()
    if variant not in VARIANTS[: 1 + {"AVX2": 1, "AVX512": 2}.get(capability, 0)]:
        pytest.skip(f"this processor has no {variant}")
    try:
        return load_library(variant)
    except ImportError as error:
        pytest.skip(f"{variant}: {error}")


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch) -> None:
    """All CPU kernels but the matrix products are those for one kind of vectors."""
    kernels = load_variant(request.param)
    for name in ("tiles_cpu", "rms_norm_cpu", "selective_scan_cpu"):
        monkeypatch.setattr(import_module(f"modeling_videomamba.{name}"), "kernels", lambda: kernels)


TINY = {
    "image_size": 32,
    "patch_size": 16,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_labels": 5,
    "initializer_range": 0.2,
}


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a fixture."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    return tensors, metadata


def strip_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def tiny_config(**changes) -> VideoMambaConfig:
    return VideoMambaConfig(**{**TINY, **changes})


def moving_square(num_frames: int, size: int = 48) -> np.ndarray:
    """Frames `(num_frames, size, size, 3)`, each of another grey, with a square that moves."""
    frames = np.zeros((num_frames, size, size, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[:] = 40 + index * 160 // num_frames
        left = index * (size - 8) // max(num_frames - 1, 1)
        frame[8:16, left : left + 8] = (255, 0, 0)
    return frames


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", **options: str) -> Path:
    """Writes RGB frames with a keyframe every 10."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = 10
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def sigint():
    """For scripts that end at Ctrl-C, after which the next one ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def forget_accelerator():
    """As if no script had run in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """On the CPU, and gone after the test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    forget_accelerator()


@pytest.fixture
def exit_of(monkeypatch):
    """Calls a script in this process, which is faster than to launch it; returns what it ends with."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(script, *options) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, options)])
        with pytest.raises(SystemExit) as error:
            script.main()
        forget_accelerator()
        return str(error.value)

    return call


@contextmanager
def limited_files(limit):
    """The files of this process can't be larger; the libraries say of it what they say of a full disk."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> Path:
    """An mp4 of 45 frames of 48 x 48 with B-frames and 5 keyframes."""
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", moving_square(45))


@pytest.fixture
def without_torchcodec(monkeypatch):
    monkeypatch.setattr(video_decoding, "_torchcodec_decoder_class", lambda: None)
