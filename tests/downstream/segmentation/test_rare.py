"""Crops for rare classes: the stated share holds one, and nothing changes where none is asked for."""

import numpy as np
import pytest

from hf_dbp.data.augmentation import image_rng
from hf_dbp.downstream.segmentation.balance import balanced, count_classes
from hf_dbp.downstream.segmentation.data import LabelledImages, TrainingCrops
from hf_dbp.downstream.segmentation.rare import RareCrops, a_pixel, rare_classes
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.errors import UserError

NAMES = {0: "good", 1: "scratch", 2: "pit"}


def images(count=8, height=60, width=200):
    """Mostly good; one image in eight holds a pit of 4 x 4 pixels, two a scratch, each somewhere else."""
    rng, samples = np.random.default_rng(0), []
    for index in range(count):
        mask = np.zeros((height, width), np.uint8)
        if index % 8 == 0:
            mask[3:7, width - 8 : width - 4] = 2
        if index % 4 == 1:
            mask[height - 6 : height - 1, 20:60] = 1
        samples.append({"image": rng.integers(0, 256, (height, width, 3), np.uint8), "annotation": mask})
    return LabelledImages(samples, ("image", "annotation"), num_labels=3, ignore_index=255)


def crops(share, scale=(1.0, 2.0), **options):  # made smaller, a few pixels may vanish
    data = images(**options)
    rare = RareCrops(count_classes(data), [1, 2], share) if share else None
    augmentation = Augmentation(32, None, 255, scale=scale)
    return TrainingCrops(data, augmentation, mean=[0.5] * 3, std=[0.25] * 3, seed=3, rare=rare)


def held(data, epochs):
    """Which rare classes each crop holds."""
    seen = [data[epoch, index]["labels"] for epoch in range(epochs) for index in range(len(data))]
    return np.array([[bool((labels == k).any()) for k in (1, 2)] for labels in seen])


def test_every_crop_holds_one_if_all_are_to_and_each_class_alike():
    found = held(crops(1.0), 30)
    assert found.any(axis=1).all()
    assert 0.35 < found[:, 1].mean() < 0.65  # in one image of eight, in 0.03 % of the pixels


def test_the_share_is_the_stated_one():
    by_chance, found = held(crops(0.0), 30).any(axis=1).mean(), held(crops(0.33), 30).any(axis=1).mean()
    expected = 0.33 + 0.67 * by_chance
    assert found == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 240))
    assert by_chance < 0.2


def test_without_them_crops_are_those_of_before():
    plain = crops(0.0)
    image, mask = plain.images[5]
    expected, _ = plain.augmentation(image, mask, plain.mean_C, image_rng(3, 7, 5))
    np.testing.assert_array_equal(
        plain[7, 5]["pixel_values"].numpy(), np.moveaxis((expected - 0.5) / 0.25, 2, 0).astype(np.float32)
    )


@pytest.mark.parametrize("inside", [(0, 0), (59, 199), (30, 100), (0, 199)])
@pytest.mark.parametrize("scale", [(0.1, 0.1), (0.9, 0.9), (2.0, 2.0)])
def test_a_crop_around_a_pixel_holds_it(inside, scale):
    """A block of the pixel's own class, wide enough to survive the nearest sample, shows in every crop."""
    mask = np.zeros((60, 200), np.int32)
    top, left = (min(max(at - 8, 0), side - 17) for at, side in zip(inside, mask.shape, strict=True))
    mask[top : top + 17, left : left + 17] = 1
    augmentation = Augmentation(24, None, 255, scale=scale, flip=0.0)
    image, mean = np.zeros((60, 200, 1), np.uint8), np.zeros(1, np.float32)
    starts = set()
    for draw in range(40):
        _, labels = augmentation(image, mask, mean, np.random.default_rng(draw), inside=inside)
        assert (labels == 1).any()
        starts.add(labels.tobytes())
    middle = inside == (30, 100) and scale[0] > 0.5
    assert len(starts) > 5 or not middle  # anywhere in the crop, not always in its middle


def test_which_classes_are_rare():
    pixels = count_classes(images()).sum(axis=0)
    assert rare_classes(pixels, NAMES, None) == [1, 2]
    assert rare_classes(pixels, NAMES, ["pit"]) == [2]
    for wanted, message in ((["dent"], "no such class; the classes are good, scratch, pit"),):
        with pytest.raises(UserError, match=message):
            rare_classes(pixels, NAMES, wanted)
    with pytest.raises(UserError, match="no training mask holds it"):
        rare_classes(np.array([5, 5, 0]), NAMES, ["pit"])
    with pytest.raises(UserError, match="every class holds a quarter"):
        rare_classes(np.array([5, 5, 5]), NAMES, None)
    with pytest.raises(UserError, match="share above 0"):
        RareCrops(np.ones((2, 3)), [1], 1.5)


def test_a_pixel_is_one_of_the_class():
    mask = np.zeros((5, 7), np.int32)
    mask[4, 6] = mask[0, 1] = 2
    drawn = {a_pixel(mask, 2, np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {(4, 6), (0, 1)}
    assert a_pixel(mask, 1, np.random.default_rng(0)) is None


def test_only_what_is_asked_for_is_made(upernet, monkeypatch, caplog):
    model = upernet(3)
    model.config.id2label = NAMES
    assert balanced(model, None) == (None, None)  # no mask is read
    criterion, rare = balanced(model, images(), rare_crops=0.3)
    assert criterion is None and rare is not None and list(rare.classes) == [1, 2]
    assert "30 % of the training crops are drawn around a pixel of: scratch, pit" in caplog.text
    criterion, rare = balanced(model, images(), loss="ce+dice", class_weights="sqrt")
    assert rare is None and criterion.dice and criterion.weights[2] > criterion.weights[1] > criterion.weights[0]
