"""Reading images: what is skipped, what is counted, what ends the run."""

import io

import numpy as np
import pytest
from PIL import Image

from hf_dbp.data.decoding import UnreadableImageError, UnreadableImages, decode
from hf_dbp.data.images import ImageList
from hf_dbp.data.masked import EvaluationViews, MaskedImages


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> dict[str, object]:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


GOOD = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8))


@pytest.mark.parametrize(
    "broken",
    [
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        {"bytes": b"no picture at all", "path": None},
        {"bytes": encoded(GOOD, "JPEG")["bytes"][:200], "path": None},
        {"bytes": encoded(GOOD)["bytes"][:-30], "path": None},
        {"bytes": None, "path": "/nowhere/picture.jpg"},
    ],
    ids=["empty", "missing", "text", "half a JPEG", "cut PNG", "lost file"],
)
def test_what_cannot_be_decoded_is_named(broken):
    with pytest.raises(UnreadableImageError, match="picture 7"):
        decode(broken, None, "picture 7")


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(GOOD, "JPEG", exif=exif), None, "").shape == (20, 24, 3)


def views(values: list[dict[str, object]], limit: int = 100) -> MaskedImages:
    images = ImageList([{"image": value} for value in values], "image", 3, limit)
    return MaskedImages(images, size=(16, 16), patch_size=8, mean=[0.5] * 3, std=[0.5] * 3, seed=0)


def test_training_puts_the_next_image_in_place_and_evaluation_leaves_it_out():
    good, bad = encoded(GOOD), {"bytes": b"bad", "path": "bad.jpg"}
    data = views([good, bad, bad, good, bad])
    assert data[(0, 1)]["pixel_values"].shape == (3, 16, 16)
    assert data[(0, 4)]["pixel_values"].shape == (3, 16, 16)  # the first image follows the last
    evaluation = EvaluationViews(data, range(5))
    assert [evaluation[index] is None for index in range(5)] == [False, True, True, False, True]
    assert EvaluationViews.collate([evaluation[index] for index in range(5)])["pixel_values"].shape == (2, 3, 16, 16)
    assert EvaluationViews.collate([None, None]) == {}
    names = [f"bad.jpg (image {index})" for index in (1, 2, 4)]
    assert data.images.unreadable_images() == dict.fromkeys(names, "it is not a picture")


def test_too_many_or_nothing_but_unreadable_images_end_the_run():
    bad = {"bytes": b"bad", "path": "bad.jpg"}
    data = views([encoded(GOOD), bad, bad, bad], limit=2)
    with pytest.raises(ValueError, match=r"more than 2 unreadable images, the last: bad\.jpg.*--max_unreadable"):
        data[(0, 1)]
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        views([bad] * 3).images.readable(0)


def test_workers_share_the_count():
    import torch

    bad = {"bytes": b"bad", "path": "bad.jpg"}
    data = views([encoded(GOOD), bad] * 8)
    indices = [(0, index) for index in range(16)] * 2
    batches = torch.utils.data.DataLoader(data, batch_size=4, sampler=indices, num_workers=2)
    assert sum(len(batch["pixel_values"]) for batch in batches) == 32
    assert data.images.unreadable.indices() == list(range(1, 16, 2))


def test_counted_and_told_once_however_often_met(caplog):
    unreadable = UnreadableImages(5, limit=1)
    for _ in range(3):
        unreadable.add(2, UnreadableImageError("x"))
    assert len(unreadable) == len(caplog.records) == 1
