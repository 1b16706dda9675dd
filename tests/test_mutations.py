"""A short version of mutations.py: `python -m tests.mutations 6000` reads 6,000 damaged files."""

import numpy as np
import pytest

from tests import mutations

COUNT = len(mutations.KINDS)


@pytest.mark.parametrize("kind", range(COUNT), ids=mutations.KINDS)
def test_damaged_files_give_frames_or_our_error(kind):
    assert mutations.read(mutations.whole(kind), np.random.default_rng(0)) == "frames"
    assert {mutations.read_mutation(seed) for seed in range(kind, 20 * COUNT, COUNT)} != {"frames"}
