"""The built-in data set: a pure function of its arguments, the same scene at every size, two truly different lights."""

import cv2
import numpy as np
import pytest
import torch

from hf_dbp.data.wire_bonding import CLASS_NAMES, WireBonding, render
from hf_dbp.data.wire_bonding_canvas import Canvas


def test_is_a_pure_function_of_its_arguments() -> None:
    first = render(5, seed=3, size=64)
    np.random.seed(0)
    render(6, seed=3, size=64)
    again = render(5, seed=3, size=64)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (render(6, seed=3, size=64), render(5, seed=4, size=64), render(3, seed=5, size=64)):
        assert not np.array_equal(first[0], other[0])
        assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), (75, (75, 75)), ((40, 130), (40, 130)), (512, (512, 512))])
def test_shapes_and_types(size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    image_HW2, label_HW = render(0, size=size)
    assert image_HW2.shape == (*shape, 2)
    assert image_HW2.dtype == np.uint8
    assert label_HW.shape == shape
    assert label_HW.dtype == np.uint8
    assert label_HW.max() < len(CLASS_NAMES)


def test_sixteen_bits_refine_the_eight_bit_image() -> None:
    (image_8, label_8), (image_16, label_16) = render(2, size=96), render(2, size=96, bits=16)
    assert image_16.dtype == np.uint16
    assert np.abs(image_16 / 257.0 - image_8).max() <= 0.51
    assert len(np.unique(image_16)) > 1000
    assert np.array_equal(label_8, label_16)


def test_masks_agree_across_sizes() -> None:
    small, zoom = 128, 5  # odd, so that every pixel of the small mask has one at the same place in the large
    hits, union = np.zeros(5), np.zeros(5)
    for index in range(8):
        near = render(index, size=small)[1]
        far = render(index, size=small * zoom)[1][zoom // 2 :: zoom, zoom // 2 :: zoom]
        for label in range(5):
            hits[label] += np.sum((near == label) & (far == label))
            union[label] += np.sum((near == label) | (far == label))
    # measured on 12 images: 0.991, 0.938, 1.000, 0.991, 0.945; edges of thin parts take the rest
    assert (hits / union > (0.98, 0.91, 0.98, 0.96, 0.91)).all(), hits / union


def test_images_agree_across_sizes() -> None:
    for index in range(4):
        near = render(index, size=128)[0].astype(float)
        far = cv2.resize(render(index, size=512)[0], (128, 128), interpolation=cv2.INTER_AREA).astype(float)
        for channel in range(2):
            assert np.corrcoef(near[..., channel].ravel(), far[..., channel].ravel())[0, 1] > 0.85


def test_a_non_square_image_is_the_middle_of_the_square() -> None:
    wide, square = render(3, size=(96, 192))[1], render(3, size=192)[1]
    assert np.mean(wide == square[48:144]) > 0.995


def test_every_class_is_there_at_sensible_shares() -> None:
    share = np.stack([np.bincount(render(index, size=64)[1].ravel(), minlength=5) / 64**2 for index in range(60)])
    assert ((share > 0).mean(0) > 0.95).all()
    mean = share.mean(0)
    assert 0.6 < mean[0] < 0.9
    assert 0.05 < mean[1] < 0.2  # wires
    assert (mean[2:] > 0.01).all()


def test_wires_hold_together_when_small() -> None:
    """In a 64-pixel mask, wires joined by their bonds are the lines of the 512-pixel mask, not fragments."""
    for index in range(12):
        joined = [
            cv2.connectedComponents(np.isin(render(index, size=s)[1], (1, 2, 3)).astype(np.uint8))[0] for s in (64, 512)
        ]
        assert joined[0] <= joined[1] + 2


def test_the_two_lights_show_different_pictures() -> None:
    correlation = [np.corrcoef(*render(index, size=64)[0].reshape(-1, 2).T.astype(float))[0, 1] for index in range(20)]
    assert np.max(np.abs(correlation)) < 0.75
    assert np.mean(correlation) < 0.2
    for index in range(5):
        assert (render(index, size=64)[0].reshape(-1, 2).std(0) > 8).all()


def test_dataset_is_a_window_on_the_series() -> None:
    dataset = WireBonding(3, size=(32, 48), seed=7, bits=16, first=10)
    items = list(dataset)  # type: ignore[call-overload]
    assert len(dataset) == len(items) == 3
    image, annotation = render(11, seed=7, size=(32, 48), bits=16)
    assert np.array_equal(items[1]["image"], image)
    assert np.array_equal(items[1]["annotation"], annotation)
    batch = next(iter(torch.utils.data.DataLoader(WireBonding(2, size=32), batch_size=2)))
    assert batch["image"].shape == (2, 32, 32, 2)
    assert batch["annotation"].shape == (2, 32, 32)
    with pytest.raises(IndexError, match="3 is outside a data set of 3"):
        dataset[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "size=31.*at least 32"),
        ({"size": (64, 16)}, "at least 32"),
        ({"bits": 12}, "bits=12: choose 8 or 16"),
        ({"seed": -1}, "seed=-1"),
        ({"first": -2}, "index=-2"),
        ({"num_images": 0}, "num_images=0: must be at least 1"),
    ],
)
def test_mistakes_are_refused_at_once(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WireBonding(**({"num_images": 4, "size": 64} | arguments))
    if "num_images" not in arguments:
        options = {"size": 64} | arguments
        with pytest.raises(ValueError, match=message):
            render(options.pop("first", 0), **options)


def test_textures_agree_across_sizes() -> None:
    def texture(size: int, stretch: float) -> np.ndarray:
        canvas = Canvas(size, size, 1, angle=0.4, focus_2=np.zeros(2))
        return canvas.noise(np.random.default_rng(1), stretch=stretch, angle=0.1)

    for stretch in (1.0, 40.0):
        near, far = texture(150, stretch), cv2.resize(texture(450, stretch), (150, 150), interpolation=cv2.INTER_AREA)
        assert np.corrcoef(near.ravel(), far.ravel())[0, 1] > 0.9
        assert np.abs(np.diff(texture(512, stretch), axis=0)).mean() > 0.2  # as fine as the grid it is drawn on
