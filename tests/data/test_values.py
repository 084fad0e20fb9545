"""The same picture in any depth gives the same views, crops, evaluation and processor output; nothing erases data."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image
from transformers import AutoImageProcessor

from hf_dbp.data.augmentation import image_rng
from hf_dbp.data.images import ImageList, channel_statistics, share_value_range
from hf_dbp.data.masked import MaskedImages
from hf_dbp.data.values import UNIT, in_unit_range, processor_scaling
from hf_dbp.downstream.segmentation.data import LabelledImages, TrainingCrops
from hf_dbp.downstream.segmentation.finetuning import image_processor
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.hub.untrusted import read_statistics, read_value_range

FORMS = {
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "float in [0, 1]": lambda a: (a / 255).astype(np.float32),
    "float 0..255": lambda a: a.astype(np.float32),
    "float64": lambda a: a / 3.0 - 2.0,
    "int64": lambda a: a.astype(np.int64),
    "int16": lambda a: a.astype(np.int16) * 8 - 1024,
    "int32": lambda a: a.astype(np.int32) * 1000,
}


def pictures(channels, count=4):
    images = np.random.default_rng(0).integers(0, 256, (count, 40, 56, channels), dtype=np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255  # the range is measured, so both ends are there
    return images


def prepared(images):
    """All that training and evaluation make of the images: crops, evaluation pixels, views, the stock processor."""
    rows = [{"image": image, "annotation": np.zeros(image.shape[:2], np.uint8)} for image in images]
    labelled = LabelledImages(rows, ("image", "annotation"), num_labels=2, ignore_index=255)
    labelled.num_channels = images[0].shape[2]
    share_value_range(labelled)
    mean, std = channel_statistics(labelled.images_alone(), "measured")
    crops = TrainingCrops(labelled, Augmentation(32, None, 255), mean=mean, std=std, seed=0)
    whole = WholeImages(labelled, 48, mean, std)
    alone = MaskedImages(labelled.images_alone(), size=(32, 32), patch_size=8, mean=mean, std=std, seed=0)
    found = {
        "crops": [crops[epoch, i]["pixel_values"].numpy() for epoch in range(6) for i in range(len(rows))],
        "evaluation": [whole[i][0].numpy() for i in range(len(rows))],
        "views": [alone[epoch, i]["pixel_values"].numpy() for epoch in range(3) for i in range(len(rows))],
        "central": [alone[i]["pixel_values"].numpy() for i in range(len(rows))],
    }
    processor = image_processor(WholeImages(labelled, None, mean, std))
    stored = [labelled[i][0].transpose(2, 0, 1) for i in range(len(rows))]
    found["processor"] = [processor(s, input_data_format="channels_first")["pixel_values"][0] for s in stored]
    unscaled = WholeImages(labelled, None, mean, std)
    found["native"] = [unscaled[i][0].numpy() for i in range(len(rows))]
    return found, processor


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_the_same_in_every_form(form, channels):
    images = pictures(channels)
    expected, _ = prepared(FORMS["uint16"](images))
    found, processor = prepared(FORMS[form](images))
    for kind, views in expected.items():
        assert_allclose(found[kind], views, atol=0.02 if kind == "crops" else 2e-3, err_msg=kind)
        assert np.std(views[1]) > 0.4, kind
    assert_allclose(found["processor"], found["native"], atol=1e-4, err_msg="the processor does what evaluation does")
    assert ("value_range" in processor.to_dict()) == (form != "uint16")


@given(
    low=st.floats(-1e5, 1e5), span=st.floats(0.01, 1e5), channels=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_augmentation_never_erases_values(low, span, channels, seed):
    """Not even those of a picture beyond the range that was measured on others."""
    pixels = np.random.default_rng(seed).random((24, 24, channels))
    image, mask = (low + span * pixels).astype(np.float32), np.zeros((24, 24), np.int32)
    augmentation, mean = Augmentation(24, None, 255, scale=(1, 1)), np.full(channels, 0.5, np.float32)
    for value_range in ((low, low + span), UNIT):
        expected = in_unit_range(image, image.dtype, value_range)
        if expected.std() < 1e-3 * np.abs(expected).max():
            continue  # float32 itself holds little of it
        found, _ = augmentation(image, mask, mean, image_rng(seed, 0, 0), value_range)
        assert found.std() > 0.3 * expected.std()


def test_the_range_is_measured_once_and_kept(tmp_path, monkeypatch, caplog):
    images = [{"image": image.astype(np.int16) * 8 - 1024} for image in pictures(2)]
    train, validation = ImageList(images, "image", 2), ImageList(images[:1], "image", 2)
    share_value_range(train, validation, folder=tmp_path)
    assert train.value_range == validation.value_range == (-1024, 1016)
    assert "-1024 to 1016, the range measured on the training images, are taken as 0 to 1" in caplog.text
    monkeypatch.setattr("hf_dbp.data.images.measured_range", lambda *_: pytest.fail("measured again"))
    share_value_range(again := ImageList(images, "image", 2), folder=tmp_path)
    assert again.value_range == (-1024, 1016)
    share_value_range(again, kept=(-2000.0, 2000.0))
    assert again.value_range == (-2000, 2000)
    share_value_range(unsigned := ImageList([{"image": pictures(2)[0]}], "image", 2), kept=(-2000.0, 2000.0))
    assert unsigned.value_range == UNIT


def test_statistics_that_a_killed_run_left_are_measured_again(tmp_path, monkeypatch):
    """Earlier versions could leave an empty or truncated file; now it is written under another name and renamed."""
    images = ImageList([{"image": image} for image in pictures(2)], "image", 2)
    expected = channel_statistics(images, "measured", tmp_path)
    (file,) = tmp_path.glob("statistics-*.json")
    content = file.read_text()
    for left in ("", content[:9], "null", "[1]"):
        file.write_text(left)
        assert channel_statistics(images, "measured", tmp_path) == expected
        assert file.read_text() == content

    def killed(self, target):
        raise KeyboardInterrupt

    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            channel_statistics(images, "measured", tmp_path)
    assert not file.exists()


def test_the_processor_keeps_the_range(tmp_path):
    images = [{"image": image.astype(np.int16) * 8 - 1024, "m": image[..., 0]} for image in pictures(2)]
    labelled = LabelledImages(images, ("image", "m"), num_labels=256, ignore_index=999)
    share_value_range(labelled)
    image_processor(WholeImages(labelled, None, [0.4, 0.5], [0.2, 0.3])).save_pretrained(tmp_path)
    assert read_value_range(tmp_path) == (-1024, 1016)
    mean, std = read_statistics(tmp_path)
    assert (mean, std) == (pytest.approx([0.4, 0.5]), [0.2, 0.3])
    assert AutoImageProcessor.from_pretrained(tmp_path).value_range == [-1024, 1016]
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text())
    for value in ([1, 1], [0], "wide", [0, float("inf")]):
        file.write_text(json.dumps(content | {"value_range": value}))
        with pytest.raises(ValueError, match=r"value_range is \[low, high\]"):
            read_value_range(tmp_path)
    del content["value_range"]
    file.write_text(json.dumps(content | {"do_rescale": False}))
    assert read_value_range(tmp_path) == UNIT, "version 0.1.0 took float images as they are"
    file.write_text(json.dumps(content | {"do_rescale": True}))
    assert read_value_range(tmp_path) is None


def test_unsigned_and_float_images_are_not_mixed(caplog):
    images = ImageList([{"image": image} for image in pictures(1)] + [{"image": pictures(1)[0] / 255}], "image", 1, 1)
    images.kind = "u"
    assert images.readable(4).dtype == np.uint8
    assert "image 4: its values are float32, those of the first image are unsigned integers" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_make_an_image_unreadable(value, tmp_path, caplog):
    stored = pictures(1).astype(np.float32)
    stored[1, 3, 5] = value
    for number, image in enumerate(stored):
        np.save(tmp_path / f"{number}.npy", image)
    rows = [{"image": {"bytes": None, "path": str(tmp_path / f"{n}.npy")}, "m": image[..., 0]}
            for n, image in enumerate(pictures(1))]  # fmt: skip
    images = LabelledImages(rows, ("image", "m"), num_labels=256, ignore_index=999, num_channels=1, max_unreadable=1)
    assert np.isfinite(images.readable(1)[0]).all()
    assert "1.npy" in caplog.text and "1 of its values (0.045%) are NaN or infinite; replace them" in caplog.text
    (reason,) = images.unreadable_images().values()
    assert "NaN" in reason
    data = MaskedImages(images.images_alone(), size=(32, 32), patch_size=8, mean=[0.5], std=[0.2], seed=0)
    data.images.unreadable.limit = 1
    for epoch in range(20):
        assert np.isfinite(data[epoch, 1]["pixel_values"].numpy()).all()
    assert len(data.images.unreadable) == 1


def test_stock_processors_take_up_the_low_end_in_their_mean():
    scaling = processor_scaling(np.dtype(np.float32), (-1024.0, 1016.0), [0.25], [0.5])
    value = 500.0
    expected = ((value + 1024) / 2040 - 0.25) / 0.5
    assert (value * scaling["rescale_factor"] - scaling["image_mean"][0]) / 0.5 == pytest.approx(expected)
    assert processor_scaling(np.dtype(np.uint16), UNIT, [0.25], [0.5]) == {
        "do_rescale": True, "rescale_factor": 1 / 65535, "image_mean": [0.25], "image_std": [0.5]
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
def test_the_processor_takes_any_picture_as_reading_does(mode, tmp_path):
    picture = Image.fromarray(pictures(3)[0]).convert(mode)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (file,) = tmp_path.iterdir()
    rgb = [{"image": {"bytes": None, "path": str(file)}, "m": pictures(3)[0, ..., 0]}]
    images = LabelledImages(rgb, ("image", "m"), num_labels=256, ignore_index=999, num_channels=3)
    data = WholeImages(images, None, [0.4] * 3, [0.2] * 3)
    with Image.open(file) as opened:
        found = image_processor(data)(opened)["pixel_values"][0]
    assert_allclose(found, data[0][0].numpy(), atol=1e-5)
