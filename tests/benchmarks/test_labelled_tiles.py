"""A tile has the class that covers more than half of it."""

import numpy as np
from benchmark_scripts import load_benchmark
from PIL import Image


def test_tiles_have_the_class_that_covers_more_than_half():
    ids = np.zeros((20, 30), np.uint8)
    ids[:10, 10:16] = 3  # 6 of 10 columns of the second tile
    ids[:10, 20:25] = 4  # half of the third: no class
    pixels = np.arange(20 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 30, 3)
    found = load_benchmark("labelled_tiles").tiles(Image.fromarray(pixels), Image.fromarray(ids), 10)
    assert [number for number, _ in found] == [0, 3, 0, 0, 0]
    np.testing.assert_array_equal(np.asarray(found[1][1]), pixels[:10, 10:20])
