"""Training views: the paper's distribution of crops, Pillow's pixels, whichever way a file is decoded or resized."""

import io
import math
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from hf_dbp.data import parts
from hf_dbp.data.augmentation import image_rng, random_resized_crop, resized
from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.images import ImageList
from hf_dbp.data.masked import MaskedImages, collate
from hf_dbp.data.parts import FLAGS, decode_part, jpeg_part
from hf_dbp.data.resampling import augments_on_device
from hf_dbp.pretraining import main

WHOLE_SCALE = patch.dict(parts.FLAGS, {1: FLAGS[1]}, clear=True)  # a decoder that does not scale
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def encoded(picture, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def smooth(height, width, channels=3, seed=0):
    """A picture with detail of every size down to a few pixels, away from black and white."""
    rng = np.random.default_rng(seed)
    sums = sum(
        resized(rng.random((side, side, channels)).astype(np.float32), (height, width)) for side in (4, 9, 20, 40)
    )
    return (70 + 30 * sums).clip(0, 255).astype(np.uint8)


def masked_images(values, size=(32, 32), channels=3, **options):
    images = ImageList([{"image": value} for value in values], "image", channels)
    return MaskedImages(images, size=size, patch_size=8, mean=[0.4] * channels, std=[0.2] * channels, seed=7, **options)


def stored_values(pixels):
    """Normalised pixels of `masked_images` as values from 0 to 255."""
    return (pixels * 0.2 + 0.4) * 255


def view(data, epoch, index):
    """A training view, finished on the device if views are finished there."""
    if not data.on_device:
        return data[epoch, index]["pixel_values"]
    return data.finished(collate([data[epoch, index]]))["pixel_values"][0]


# ---- the distribution of crops ----

SIDES = (100, 140)  # height, width


def reference_crop(rng):
    """He et al.'s random resized crop (torchvision's): left, top, width, height; scale [0.2, 1], ratio [3/4, 4/3]."""
    height, width = SIDES
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    w = min(width, round(height * 4 / 3))
    return (width - w) // 2, 0, w, height


def seen_crop(pixels_CHW):
    """Left, top, width, height and whether it is flipped, read from a view of `coordinates`."""
    found = []
    for channel, axis, side in ((0, 0, SIDES[1]), (1, 1, SIDES[0])):
        profile = stored_values(pixels_CHW[channel]).mean(axis).numpy() / 200 * side - 0.5  # pixel coordinates
        n = len(profile)
        inner = np.arange(n // 4, n - n // 4)
        slope, start = np.polyfit(inner + 0.5, profile[inner] + 0.5, 1)
        found.append((start, slope * n))
    (left, width), (top, height) = found
    return (min(left, left + width), top, abs(width), height, width < 0)


def coordinates():
    """A picture whose red tells the column and whose green tells the row."""
    height, width = SIDES
    red, green = np.meshgrid((np.arange(width) + 0.5) / width * 200, (np.arange(height) + 0.5) / height * 200)
    return Image.fromarray(np.stack([red, green, np.full(SIDES, 128.0)], -1).round().astype(np.uint8))


def drawn_crop(data, epoch):
    """Left, top, width, height and whether it is flipped, as the generator of image 0 draws them."""
    rng = image_rng(7, epoch, 0)
    rng.random(data.num_patches, dtype=np.float32)
    left, top, right, bottom = random_resized_crop(rng, SIDES, data.size)
    return left, top, right - left, bottom - top, rng.random() < 0.5


def test_crops_have_the_papers_distribution():
    """Area, aspect and position of one image over many epochs, against the definition."""
    data = masked_images([np.zeros((*SIDES, 3), np.uint8)])
    drawn = np.array([drawn_crop(data, epoch) for epoch in range(20_000)])
    rng = np.random.default_rng(1)
    expected = np.array([reference_crop(rng) for _ in range(20_000)])
    assert abs(drawn[:, 4].mean() - 0.5) < 0.015
    for name, figure in (
        ("area", lambda left, top, width, height: width * height),
        ("aspect", lambda left, top, width, height: width / height),
        ("left", lambda left, top, width, height: left),
        ("top", lambda left, top, width, height: top),
        ("share of the room on the left", lambda left, top, width, height: left / np.maximum(SIDES[1] - width, 1)),
    ):
        difference = ks_2samp(figure(*drawn[:, :4].T), figure(*expected.T)).statistic
        assert difference < 0.0163, f"{name}: 1 % of equal samples differ more"


@pytest.mark.parametrize("way", ["scaled JPEG", "whole JPEG", "array", "on the device"])
def test_the_crop_that_is_drawn_is_the_one_that_is_seen(way):
    """Read from the resulting pixels, flips included; in a scaled file, edges are whole pixels of the scale."""
    value = np.asarray(coordinates()) if way == "array" else encoded(coordinates(), quality=95, subsampling=0)
    data = masked_images([value], size=(24, 24), on_device=way == "on the device")
    with WHOLE_SCALE if way == "whole JPEG" else patch.dict(parts.FLAGS):
        found = np.array([seen_crop(view(data, epoch, 0)) for epoch in range(200)])
    expected = np.array([drawn_crop(data, epoch) for epoch in range(200)])
    error = (found - expected)[:, :4]
    rounded = way in ("scaled JPEG", "on the device")
    assert np.array_equal(found[:, 4], expected[:, 4]) and 50 < found[:, 4].sum() < 150
    assert np.abs(error).max() < (4.5 if rounded else 1.2) and np.abs(error.mean(0)).max() < (0.25 if rounded else 0.05)


def test_a_view_follows_from_seed_epoch_and_image():
    value = encoded(coordinates())
    data, again, other = (masked_images([value] * 2) for _ in range(3))
    other.seed = 8
    for index in ((0, 0), (3, 1)):
        assert torch.equal(view(data, *index), view(again, *index))
        assert not torch.equal(view(data, *index), view(other, *index))
    assert not torch.equal(view(data, 0, 0), view(data, 1, 0)) and not torch.equal(view(data, 0, 0), view(data, 0, 1))


# ---- the pixels ----


def pillow_view(value, size, epoch, data):
    """The plain way: decode, crop, resize, flip; values from 0 to 255."""
    picture = Image.open(io.BytesIO(value["bytes"])).convert("RGB")
    rng = image_rng(7, epoch, 0)
    rng.random(data.num_patches, dtype=np.float32)
    box = random_resized_crop(rng, (picture.height, picture.width), size)
    seen = picture.crop(tuple(int(edge) for edge in box)).resize(size[::-1], Image.Resampling.BICUBIC)
    seen = np.asarray(seen).astype(float)
    return np.moveaxis(seen[:, ::-1] if rng.random() < 0.5 else seen, 2, 0)


@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_at_full_scale_views_are_pillows(size):
    """Within two of 255 steps, and seldom that many: both round twice."""
    value = encoded(Image.fromarray(smooth(110, 150)), quality=90)
    data = masked_images([value], size=size)
    with WHOLE_SCALE:
        for epoch in range(8):
            difference = np.abs(stored_values(view(data, epoch, 0)).numpy() - pillow_view(value, size, epoch, data))
            assert difference.max() < 2.01 and difference.mean() < 0.1


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_enough_pixels():
    value = encoded(Image.fromarray(smooth(400, 600)), quality=90)
    for box, size, divisor in (
        ((0, 0, 600, 400), (224, 224), 1),
        ((0, 0, 600, 400), (200, 200), 2),
        ((40, 80, 440, 380), (75, 100), 4),
        ((40, 80, 440, 380), (76, 100), 2),
        ((8, 16, 520, 400), (32, 32), 8),
        ((8, 16, 520, 400), (400, 600), 1),
    ):
        part = jpeg_part(value, lambda _, box=box: box, size)  # type: ignore[misc]
        assert part.shape[:2] == (round((box[3] - box[1]) / divisor), round((box[2] - box[0]) / divisor))
        small = Image.open(io.BytesIO(value["bytes"])).reduce(divisor)
        expected = np.asarray(small.crop(tuple(round(edge / divisor) for edge in box))).astype(float)
        assert np.abs(part - expected).mean() < 0.8


def test_scaled_views_are_nearly_pillows():
    value = encoded(Image.fromarray(smooth(700, 900)), quality=90)
    data = masked_images([value], size=(48, 64))
    seen = []
    for epoch in range(10):
        seen.append(stored_values(view(data, epoch, 0)).numpy() - pillow_view(value, (48, 64), epoch, data))
        with WHOLE_SCALE:
            assert np.abs(view(data, epoch, 0).numpy() - data[epoch, 0]["pixel_values"].numpy()).max() == 0
    assert np.abs(seen).mean() < 1.5 and abs(np.mean(seen)) < 0.1


# ---- files that are not plain colour JPEGs ----


def test_other_files_are_read_as_they_were(tmp_path):
    picture = Image.fromarray(smooth(90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0110] = "a camera"
    (tmp_path / "picture.jpg").write_bytes(encoded(picture)["bytes"])
    (tmp_path / "picture.png").write_bytes(encoded(picture, "PNG")["bytes"])
    ours = {
        "JPEG": encoded(picture),
        "progressive": encoded(picture, progressive=True),
        "not subsampled": encoded(picture, subsampling=0),
        "with EXIF": encoded(picture, exif=upright),
        "a file": {"bytes": None, "path": str(tmp_path / "picture.jpg")},
    }
    others = {
        "turned": encoded(picture, exif=turned),
        "grey": encoded(picture.convert("L")),
        "CMYK": encoded(picture.convert("CMYK")),
        "PNG": encoded(picture, "PNG"),
        "palette": encoded(picture.convert("P"), "PNG"),
        "16 bits": encoded(Image.fromarray((np.arange(5400) * 12).astype(np.uint16).reshape(90, 60)), "PNG"),
        "TIFF": encoded(picture, "TIFF"),
        "garbage behind": {"bytes": encoded(picture)["bytes"] + b"\0\0", "path": None},
        "a PNG file": {"bytes": None, "path": str(tmp_path / "picture.png")},
        "array": np.asarray(picture),
    }
    for name, value in (ours | others).items():
        whole = decode(value, 3, name)
        for box in ((0, 0, whole.shape[1], whole.shape[0]), (11, 7, 52, 60)):
            part = decode_part(value, 3, name, lambda _, box=box: box, (40, 40))  # type: ignore[misc]
            assert part.dtype == whole.dtype and np.array_equal(part, whole[box[1] : box[3], box[0] : box[2]]), name
        assert (jpeg_part(value, lambda size: (0, 0, *size[::-1]), (40, 40)) is not None) == (name in ours), name


def test_a_damaged_file_is_refused_as_it_was():
    """Cut anywhere, or with bytes changed: the same files are unreadable, the others have the same pixels."""
    rng = np.random.default_rng(0)
    refused = 0
    for progressive in (False, True):
        content = encoded(Image.fromarray(smooth(90, 60)), progressive=progressive)["bytes"]
        for case in range(150):
            damaged = bytearray(content)
            if case % 3 == 0:
                damaged = damaged[: rng.integers(len(content))]
            for _ in range(3 if case % 3 else 0):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            value = {"bytes": bytes(damaged), "path": None}
            try:
                whole = decode(value, 3, "it")
            except UnreadableImageError:
                refused += 1
                with pytest.raises(UnreadableImageError):
                    decode_part(value, 3, "it", lambda size: (0, 0, *size[::-1]), (60, 60))
            else:
                part = decode_part(value, 3, "it", lambda size: (0, 0, *size[::-1]), (60, 60))
                assert np.array_equal(part, whole)
    assert 100 < refused < 250


# ---- views made on the device ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_views_of_the_device_are_those_of_the_loader(device, channels, size):
    """Parts of all sizes in one batch, flipped or not, enlarged and made smaller."""
    values = [smooth(height, width, channels, k) for k, (height, width) in enumerate([(30, 90), (64, 64), (300, 200)])]
    ours, loaders = (masked_images(values, size, channels, on_device=flag) for flag in (True, False))
    indices = [(epoch, index) for epoch in range(6) for index in range(3)]
    batch = collate([ours[index] for index in indices])
    assert batch["pixel_values"].dtype == torch.uint8 and batch["flip"].any() and not batch["flip"].all()
    assert batch["pixel_values"].shape[1] <= 2 * size[0] and batch["pixel_values"].shape[2] <= 2 * size[1]
    expected = collate([loaders[index] for index in indices])
    found = ours.finished({key: value.to(device) for key, value in batch.items()})
    assert torch.equal(found["noise"].cpu(), expected["noise"]) and found.keys() == expected.keys()
    difference = stored_values(found["pixel_values"].cpu()) - stored_values(expected["pixel_values"])
    assert found["pixel_values"].dtype == torch.float32 and difference.abs().max() < 1.6  # one rounding, and Pillow's
    assert difference.abs().mean() < 0.3 and difference.mean().abs() < 0.02


def test_a_view_of_the_device_does_not_depend_on_its_batch(monkeypatch):
    values = [smooth(40 + k, 90 - k, seed=k) for k in range(7)]
    data = masked_images(values, on_device=True)
    together = data.finished(collate([data[1, k] for k in range(7)]))["pixel_values"]
    monkeypatch.setattr("hf_dbp.data.resampling.CHUNK", 3)
    chunks = data.finished(collate([data[1, k] for k in range(7)]))["pixel_values"]
    alone = torch.stack([view(data, 1, k) for k in range(7)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, chunks, rtol=0, atol=1e-5)


def test_views_stay_in_the_range_of_8_bits():
    """Where the kernel overshoots, at edges from black to white, both ways clip."""
    stripes = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 2, (10, 10, 3)) * 255, 6, 0), 6, 1)
    for flag in (True, False):
        pixels = stored_values(view(masked_images([stripes.astype(np.uint8)], on_device=flag), 0, 0))
        assert pixels.min() == pytest.approx(0, abs=1e-3) and pixels.max() == pytest.approx(255, abs=1e-3)


def test_only_8_bit_images_are_fed_to_the_device():
    data = masked_images([np.zeros((40, 40, 3), np.uint16)], on_device=True)
    with pytest.raises(ValueError, match="uint16 among 8-bit ones; pass --augment_on_device false"):
        data[0, 0]


@pytest.mark.slow
def test_a_run_learns_the_same_from_views_of_the_device(tmp_path, photographs, write, monkeypatch):
    """With a worker, losses equal those of the loader's views up to the rounding of their pixels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = write(tmp_path / "images", "imagefolder", photographs[:40])
    given = {"train_dir": folder, "method": "bp", "model_size": "mini", "image_size": 32, "patch_size": 8, "seed": 3}
    given |= {"per_device_train_batch_size": 12, "max_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    given |= {"save_steps": 5, "dataloader_num_workers": 1, "report_to": "none", "do_train": True, "use_cpu": True}
    given |= {"disable_tqdm": True, "logging_steps": 1}
    records = []
    for name in ("true", "false"):
        flags = given | {"augment_on_device": name, "output_dir": tmp_path / name}
        records.append(main([part for flag, value in flags.items() for part in (f"--{flag}", str(value))]))
    ours, loaders = (record.rows[-1] for record in records)
    assert records[0].data["augmented_on_device"] and not records[1].data["augmented_on_device"]
    assert ours["train_loss"] == pytest.approx(loaders["train_loss"], rel=1e-3)
    assert ours["train_loss"] != loaders["train_loss"]
    assert ours["eval_loss"] == pytest.approx(loaders["eval_loss"], rel=1e-3)
    assert records[0].results["input"]["images"] == 60


def test_when_the_device_makes_the_views():
    eight, sixteen = (ImageList([{"image": np.zeros((4, 4, 3), kind)}], "image", 3) for kind in (np.uint8, np.uint16))
    cpu, gpu = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    assert [augments_on_device(None, args, eight) for args in (cpu, gpu)] == [False, True]
    assert [augments_on_device(asked, gpu, eight) for asked in (True, False)] == [True, False]
    assert not augments_on_device(None, gpu, sixteen) and augments_on_device(True, cpu, eight)
    with pytest.raises(ValueError, match="8-bit images, these are uint16"):
        augments_on_device(True, gpu, sixteen)
