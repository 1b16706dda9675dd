import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba.training.masks import MASK_TYPES, make_masks, token_grid
from tests.conftest import tiny_config
from tests.models import video

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


def random(batch, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, *grid, generator=generator)
    attention = torch.rand(batch, grid[0], grid[1] * grid[2], generator=generator).softmax(-1)
    return noise, attention


def share(ratio, number):
    """Rounded down, of the decimal number that was written."""
    return math.floor(Decimal(str(ratio)) * number)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MASK_TYPES),
    GRIDS,
    st.integers(0, 99).map(lambda percent: percent / 100),
    st.integers(1, 3),
    st.integers(0, 100),
)
def test_every_sample_hides_the_same_number_of_tokens_as_its_type_says(mask_type, grid, ratio, batch, seed):
    steps, rows, columns = grid
    noise, attention = random(batch, grid, seed)
    mask = make_masks(noise, mask_type, ratio, attention)
    assert mask.dtype == torch.bool and mask.shape == (batch, steps * rows * columns)
    assert torch.equal(mask, make_masks(noise, mask_type, ratio, attention))
    assert torch.equal(mask[:1], make_masks(noise[:1], mask_type, ratio, attention[:1]))
    frames = mask.view(batch, *grid)
    in_frame, in_rows = share(ratio, rows * columns), columns * share(ratio, rows)
    if mask_type == "random":
        assert set(mask.sum(1).tolist()) == {share(ratio, steps * rows * columns)}
    elif mask_type in ("tube", "attention"):
        assert set(frames.sum((2, 3)).flatten().tolist()) == {in_frame}
        if mask_type == "tube":
            assert (frames == frames[:, :1]).all()
    else:
        assert (frames == frames[..., :1]).all()  # whole rows
        assert set(mask.sum(1).tolist()) == {steps * in_rows}
        if mask_type == "frame_row":
            assert set(frames.sum((2, 3)).flatten().tolist()) == {in_rows}


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_every_token_has_its_turn_and_samples_differ(mask_type):
    noise, attention = random(400, (2, 4, 4))
    mask = make_masks(noise, mask_type, 0.75, torch.full_like(attention, 1 / 16))
    shares = mask.float().mean(0)
    assert shares.min() > 0.65 and shares.max() < 0.85
    assert len(mask.unique(dim=0)) > (3 if "row" in mask_type else 100)


def test_rows_of_a_clip_are_not_as_many_in_every_frame():
    noise, _ = random(20, (4, 4, 4))
    counts = make_masks(noise, "clip_row", 0.5).view(20, 4, 16).sum(2)
    assert counts.min() < 8 < counts.max()
    assert not (make_masks(noise, "frame_row", 0.5).view(20, 4, 16).diff(dim=1) == 0).all()


def test_attention_is_the_probability_of_drawing_without_replacement():
    """As `torch.multinomial`, which the original uses, does."""
    weights, draws = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 100_000
    noise, _ = random(draws, (1, 1, 5))
    visible = ~make_masks(noise, "attention", 0.6, weights.expand(draws, 1, 5))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(weights.expand(draws, 5), 2, generator=generator)
    expected = torch.zeros(draws, 5).scatter_(1, drawn, 1.0).mean(0)
    torch.testing.assert_close(visible.float().mean(0), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_that_is_all_on_one_token_keeps_the_number(dtype):
    noise, _ = random(3, (2, 3, 3))
    attention = torch.zeros(3, 2, 9, dtype=dtype)
    attention[..., 4] = 1
    mask = make_masks(noise, "attention", 0.7, attention).view(3, 2, 9)
    assert (mask.sum(-1) == 6).all() and not mask[..., 4].any()


def test_what_does_not_fit_is_explained():
    noise, attention = random(2, (2, 3, 3))
    with pytest.raises(ValueError, match="`mask_type` must be one of random, tube.*got block"):
        make_masks(noise, "block", 0.5)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`mask_ratio` must be at least 0 and below 1"):
            make_masks(noise, "tube", ratio)
    with pytest.raises(ValueError, match=r"`attention` must be of shape \(2, 2, 9\), got None"):
        make_masks(noise, "attention", 0.5)
    with pytest.raises(ValueError, match=r"got \(2, 2, 8\)"):
        make_masks(noise, "attention", 0.5, attention[..., :8])


def test_grids_of_tokens():
    assert token_grid(tiny_config(tubelet_size=2), video(height=32, width=48)) == (2, 2, 3)
    assert token_grid(tiny_config(num_frames=None), video()[:, 0]) == (1, 2, 2)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.29, 29), (0.57, 57), (0.295, 29)])
def test_a_ratio_is_the_decimal_number_that_was_written(ratio, hidden):
    """0.29 * 100 is below 29 in binary."""
    noise, _ = random(2, (1, 10, 10))
    assert make_masks(noise, "tube", ratio).sum(1).tolist() == [hidden, hidden]
