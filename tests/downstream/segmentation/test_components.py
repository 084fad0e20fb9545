"""Parts of a mask, counted in bands, against OpenCV over the whole."""

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dbp.downstream.segmentation.components import Components


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 41),
    share=st.sampled_from([0.2, 0.5, 0.8]),
)  # fmt: skip
def test_bands_count_what_the_whole_holds(seed, height, width, rows, share):
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((height, width)) < share, rng.integers(1, 3, (height, width)), 0).astype(np.uint8)
    whole = [cv2.connectedComponents((ids == k).astype(np.uint8))[0] - 1 for k in range(4)]
    assert Components(4).counted(ids, band=rows * width).tolist() == whole


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_a_spiral_is_one_part(rows):
    """Parts that meet only far below are united across many bands."""
    spiral = np.zeros((9, 9), np.uint8)
    for ring in range(0, 4, 2):
        spiral[ring, ring : 9 - ring] = spiral[ring : 9 - ring, 8 - ring] = spiral[8 - ring, ring : 9 - ring] = 1
        spiral[ring + 2 : 9 - ring, ring] = 1
        spiral[ring + 2, ring : ring + 3] = 1
    assert Components(2).counted(spiral, band=9 * rows)[1] == cv2.connectedComponents(spiral)[0] - 1 == 1


def test_however_many_parts_there_are_those_of_a_band_are_held():
    ids = np.zeros((1600, 1600), np.uint8)
    ids[::2, ::2] = 1
    tracemalloc.start()
    try:
        assert Components(2).counted(ids, band=2**15)[1] == 800**2
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
