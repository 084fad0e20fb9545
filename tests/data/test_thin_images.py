"""Views of long thin images cover them, and those of ordinary ones are the paper's."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dbp.data.augmentation import random_resized_crop
from hf_dbp.downstream.segmentation.sliding import window_origins
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.inspection.folder import main as inspect
from hf_dbp.recipes import read_yaml


def seen(size, view=(64, 64), draws=2000):
    """How often each row and each column was part of a view."""
    rng, rows, columns = np.random.default_rng(0), np.zeros(size[0]), np.zeros(size[1])
    for _ in range(draws):
        left, top, right, bottom = (int(edge) for edge in random_resized_crop(rng, size, view))
        assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
        if min(size) >= 30:  # rounding to whole pixels apart
            assert 0.7 < (right - left) / (bottom - top) * view[0] / view[1] < 1.42
        rows[top:bottom] += 1
        columns[left:right] += 1
    return rows, columns


@pytest.mark.parametrize("size", [(128, 2048), (2048, 128), (64, 640), (30, 300)])
def test_each_pixel_of_a_strip_has_its_chance(size):
    for counts in seen(size):
        assert counts.min() > 0.3 * counts.mean(), "the ends half as often as the middle"


@given(st.integers(1, 300), st.floats(4, 40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_views_cover_whatever_shape(short, ratio, upright):
    long = round(short * ratio)
    rows, columns = seen((long, short) if upright else (short, long), draws=400)
    assert rows.min() > 0 and columns.min() > 0


@pytest.mark.parametrize("size", [(224, 224), (375, 500), (480, 360), (400, 500)])
def test_views_of_ordinary_shapes_are_the_papers(size):
    """By the definition: area uniform in [0.2, 1], aspect log-uniform in [3/4, 4/3], where the box fits."""
    for draw in range(500):
        box, rng = random_resized_crop(np.random.default_rng(draw), size, (64, 64)), np.random.default_rng(draw)
        for _ in range(10):
            area = size[0] * size[1] * rng.uniform(0.2, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width <= size[1] and height <= size[0]:
                top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
                assert box == (left, top, left + width, top + height)
                break
        else:
            pytest.fail("an ordinary shape needs no more than ten draws")


def strips(folder, size, spot, count=6):
    rng = np.random.default_rng(0)
    for number in range(count):
        image, mask = rng.integers(90, 110, size, dtype=np.uint8), np.zeros(size, np.uint8)
        top, left = rng.integers(size[0] - spot), rng.integers(size[1] - spot)
        image[top : top + spot, left : left + spot] = 200
        mask[top : top + spot, left : left + spot] = 255
        for name, array in (("images", image), ("masks", mask)):
            (folder / name).mkdir(exist_ok=True)
            cv2.imwrite(str(folder / name / f"{number}.png"), array)


@pytest.mark.parametrize(
    ("size", "spot", "long_edge", "why"),
    [
        ((128, 1024), 12, 0, "images are long and thin; scaled down to 128 pixels they would be 16 high"),
        ((256, 400), 4, 0, "scaled down to 256 pixels the smallest objects (4.0 pixels thick) would be 2.6"),
        ((256, 400), 40, 256, "the smallest objects (40.0 pixels thick) are then 25.6"),
    ],
)
def test_inspect_chooses_the_scale_by_both_sides_and_the_smallest_objects(
    tmp_path, monkeypatch, capsys, size, spot, long_edge, why
):
    monkeypatch.chdir(tmp_path)
    strips(tmp_path, size, spot)
    inspect(["images", "--masks", "masks"])
    assert why in capsys.readouterr().out
    assert read_yaml(Path("outputs/inspection/finetune.yaml"))["long_edge"] == str(long_edge)


# ---- fine-tuning and evaluation ----


def shown(size, crop, draws):
    """How often each pixel was in a training crop at native resolution; the mask holds the numbers of the pixels."""
    augmentation = Augmentation(crop, None, -1)
    numbers = np.arange(size[0] * size[1], dtype=np.int32).reshape(size)
    image, counts = np.zeros((*size, 1), np.uint8), np.zeros(numbers.size, int)
    for draw in range(draws):
        _, labels = augmentation(image, numbers, np.zeros(1, np.float32), np.random.default_rng(draw))
        counts[np.unique(labels[labels >= 0])] += 1
    return counts.reshape(size)


@pytest.mark.parametrize("size", [(32, 640), (640, 32), (8, 400), (70, 90)])
def test_training_crops_reach_both_ends(size):
    counts = shown(size, 32, 1500)
    along = counts.sum(axis=int(size[0] < size[1]) ^ 1)
    third = len(along) // 3
    assert counts.max() > 0 and (along > 0).mean() > 0.99 and along[:5].any() and along[-5:].any()
    for part in (along[:third], along[third:-third], along[-third:]):  # the thirds alike, but for the ends
        assert 0.6 < part.mean() / along.mean() < 1.6


@given(st.integers(1, 3000), st.integers(8, 512))
@settings(max_examples=100, deadline=None)
def test_windows_of_evaluation_cover_any_length(length, crop):
    seen_by = np.zeros(max(length, crop), int)
    for start in window_origins(length, crop):
        assert 0 <= start <= max(length, crop) - crop
        seen_by[start : start + crop] += 1
    assert seen_by.min() >= 1
