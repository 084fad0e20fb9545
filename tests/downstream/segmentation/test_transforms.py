"""Image and mask stay in step through scale, crop, padding and flip, for any channels and bit depth."""

import numpy as np
import pytest

from hf_dbp.data.augmentation import image_rng
from hf_dbp.downstream.segmentation.transforms import Augmentation, long_edge_size

STEADY = {"brightness": 0.0, "contrast": 0.0, "hue_degrees": 0.0, "saturation": 0.0, "value": 0.0}


def scene(channels, dtype, height=90, width=120):
    """A mask of 30-pixel squares with ids 0..4 and the image that shows id * 0.2 in every channel."""
    ids = np.random.default_rng(0).integers(0, 5, (height // 30, width // 30))
    mask = np.kron(ids, np.ones((30, 30), dtype=np.int32))
    top = {"u": np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1, "f": 1}[np.dtype(dtype).kind]
    return np.repeat((mask * 0.2 * top).astype(dtype)[..., None], channels, axis=2), mask


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (2, np.uint16), (3, np.uint8), (5, np.float32)])
def test_image_and_mask_stay_in_step(channels, dtype):
    image, mask = scene(channels, dtype)
    augmentation = Augmentation(crop_size=64, long_edge=100, ignore_index=255, **STEADY)
    mean = np.full(channels, 0.5, np.float32)
    flipped = padded = 0
    for index in range(40):
        pixels, labels = augmentation(image, mask, mean, image_rng(0, 0, index))
        assert pixels.shape == (64, 64, channels)
        assert labels.shape == (64, 64)
        void = labels == 255
        np.testing.assert_allclose(pixels[void], 0.5)
        shown = np.rint(pixels[..., 0] / 0.2)
        assert (shown == labels)[~void].mean() > 0.93, index  # all but the blurred seams between squares
        padded += void.any()
        flipped += void[:, 0].all() and not void[:, -1].all()
    assert 0 < flipped < padded < 40


def test_the_same_rng_gives_the_same_crop_and_another_epoch_another():
    image, mask = scene(3, np.uint8)
    augmentation = Augmentation(crop_size=64, long_edge=100, ignore_index=255)
    first, again, later = (augmentation(image, mask, np.zeros(3, np.float32), image_rng(0, e, 7)) for e in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], later[0])


def test_scales_cover_half_to_double_the_long_edge():
    image, mask = scene(1, np.uint8, 30, 120)  # a strip: the crop is never wider than the scaled image at factor >= 1
    augmentation = Augmentation(crop_size=240, long_edge=120, ignore_index=255, flip=0.0, **STEADY)
    widths = [
        int((augmentation(image, mask, np.zeros(1, np.float32), image_rng(0, 0, i))[1][0] != 255).sum())
        for i in range(300)
    ]
    assert 60 <= min(widths) < 64
    assert 234 < max(widths) <= 240


def test_native_resolution_keeps_the_scale_of_large_images():
    assert long_edge_size(2048, 1024, None) == (2048, 1024)
    assert long_edge_size(2048, 1024, 512) == (512, 256)
    assert long_edge_size(2, 4000, 512) == (1, 512)


@pytest.mark.parametrize("channels", [2, 3])
def test_colour_changes_stay_in_range_and_keep_grey_grey(channels):
    augmentation = Augmentation(crop_size=8, long_edge=8, ignore_index=255)
    grey = np.repeat(np.random.default_rng(0).random((8, 8, 1), dtype=np.float32), channels, axis=2)
    for index in range(50):
        changed = augmentation.recolored(grey, image_rng(0, 0, index))
        assert changed.min() >= 0
        assert changed.max() <= 1
        np.testing.assert_allclose(changed, np.repeat(changed[..., :1], channels, axis=2), atol=1e-6)
        assert not np.allclose(changed, grey)


def test_hue_turns_at_most_fifteen_degrees():
    red = np.zeros((4, 4, 3), np.float32)
    red[..., 0] = 0.8
    augmentation = Augmentation(crop_size=4, long_edge=4, ignore_index=255, **{**STEADY, "hue_degrees": 15.0})
    turned = np.array([augmentation.recolored(red, image_rng(0, 0, i))[0, 0] for i in range(200)])
    second = turned[:, 1:].max(axis=1) / turned[:, 0]  # a turn of h degrees raises green or blue to h / 60 of red
    assert 0.2 < second.max() <= 0.251
