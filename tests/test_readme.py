"""The README's figures and Python snippets."""

import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_videomamba import (
    VIDEOMAMBA_SIZES,
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
)
from tests.conftest import NANO, NANO_VIDEO_TEXT, ROOT

README = (ROOT / "README.md").read_text("utf-8")


def scan_flops(x, dt, A, B, C, *args, **kwargs):
    """Two for each multiply-add: `dt * A`, `dt * x * B`, `decay * h + ...` and `C . h`, for each state of each step."""
    (batch, length, channels), state = x, A[1]
    return 2 * 4 * batch * length * channels * state


def multiply_adds(model, shape):
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.videomamba.reference_scan: scan_flops})
    with counter, torch.no_grad():
        model.eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("row", "size"), list(zip(("Ti", "S", "M", "B"), VIDEOMAMBA_SIZES, strict=True)))
def test_the_table_of_sizes(row, size):
    shape = VIDEOMAMBA_SIZES[size]
    with torch.device("meta"):
        image = VideoMambaForImageClassification(VideoMambaConfig(num_frames=None, num_labels=1000, **shape))
        video = VideoMambaForVideoClassification(VideoMambaConfig(num_frames=8, num_labels=400, **shape))
    cells = (
        row,
        str(shape["hidden_size"]),
        str(shape["num_hidden_layers"]),
        f"{image.num_parameters():,}",
        f"{multiply_adds(image, (1, 3, 224, 224)) / 1e9:.1f} G",
        f"{multiply_adds(video, (1, 8, 3, 224, 224)) / 1e9:.1f} G",
    )
    assert f"| {' | '.join(cells)} |" in README


@pytest.mark.parametrize("page", [ROOT / "README.md", NANO / "README.md", NANO_VIDEO_TEXT / "README.md"])
def test_python_snippets_run(page):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    runnable = [snippet for snippet in snippets if "videomamba-nano" in snippet]
    assert runnable
    for snippet in runnable:
        result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        if "shape" in snippet:
            assert "[1, 48]" in result.stdout and "[1, 129, 48]" in result.stdout
        if "zero-shot" in snippet:
            best, *others = re.findall(r"'label': '(.*?)'", result.stdout)
            assert best in ("down", "a white zero moves down, fast, over purple") and len(others) >= 2
