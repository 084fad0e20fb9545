"""Labelled images from every kind of source, and a clear message for each that is wrong."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dbp.downstream.segmentation.data import LabelledImages, SegmentationSource, TrainingCrops, load_labelled_images
from hf_dbp.downstream.segmentation.transforms import Augmentation

CAMVID = Path(__file__).parents[3].parent / "shared" / "data" / "camvid"


def picture(seed, size=(20, 30), classes=3):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return image, Image.fromarray(rng.integers(0, classes, size, dtype=np.uint8))


def write_folders(root, count=6, split=""):
    for index in range(count):
        image, mask = picture(index)
        for folder, file in (("images", f"{index}.jpg"), ("masks", f"{index}.png")):
            (root / f"{folder}{split}" / "deep").mkdir(parents=True, exist_ok=True)
            (image if folder == "images" else mask).save(root / f"{folder}{split}" / "deep" / file)
    return {"train_dir": str(root / f"images{split}"), "train_mask_dir": str(root / f"masks{split}")}


def write_parquet(root, count=10):
    images, masks = zip(*(picture(i) for i in range(count)), strict=True)
    features = datasets.Features({"photo": datasets.Image(), "ids": datasets.Image()})
    root.mkdir()
    datasets.Dataset.from_dict({"photo": images, "ids": masks}, features).to_parquet(root / "train-00000.parquet")
    return {"train_dir": str(root), "image_column_name": "photo", "annotation_column_name": "ids"}


def test_image_and_mask_folders_pair_by_name(tmp_path):
    train, validation = load_labelled_images(SegmentationSource(**write_folders(tmp_path), num_labels=3))
    assert (len(train), len(validation)) == (5, 1)
    given = write_folders(tmp_path / "other")
    source = SegmentationSource(
        **write_folders(tmp_path),
        validation_dir=given["train_dir"],
        validation_mask_dir=given["train_mask_dir"],
        num_labels=3,
    )
    train, validation = load_labelled_images(source)
    assert (len(train), len(validation)) == (6, 6)
    image, mask = validation[2]
    assert image.shape == (20, 30, 3)
    np.testing.assert_array_equal(mask, np.asarray(picture(2)[1]))


def test_parquet_with_named_columns_and_a_seeded_part(tmp_path):
    flags = write_parquet(tmp_path / "set") | {"num_labels": 3, "train_val_split": 0.2}

    def drawn(**more: object):
        train, _ = load_labelled_images(SegmentationSource(**flags, **more))
        return [train[i][1].tobytes() for i in range(len(train))]

    assert len(drawn()) == 8
    assert len(drawn(max_train_samples=3)) == 3
    assert drawn(max_train_samples=3) == drawn(max_train_samples=3) != drawn(max_train_samples=3, seed=1)
    few, more = (drawn(train_fraction=share, subset_seed=1) for share in (0.4, 0.7))
    assert 0 < len(few) < len(more) < 8
    assert set(few) < set(more)
    with pytest.raises(ValueError, match=r"no column 'annotation' of masks.*ids, .*photo|photo, ids"):
        load_labelled_images(SegmentationSource(**(flags | {"annotation_column_name": None})))


def test_wire_bonding_is_built_in():
    source = SegmentationSource(dataset_name="wire_bonding", max_train_samples=4, max_eval_samples=2, built_in_size=48)
    train, validation = load_labelled_images(source)
    assert (len(train), len(validation)) == (4, 2)
    assert train[0][0].shape == (48, 48, 2)
    assert source.class_names() == {0: "background", 1: "wire", 2: "ball", 3: "wedge", 4: "epoxy"}
    assert not np.array_equal(train[0][0], validation[0][0])


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}")
def test_camvid_as_it_is():
    source = SegmentationSource(train_dir=str(CAMVID), num_labels=11, ignore_index=11)
    train, validation = load_labelled_images(source)
    assert (len(train), len(validation)) == (367, 101)
    assert train[0][0].shape == (360, 480, 3)
    assert set(np.unique(train[0][1])) <= set(range(12))


def labelled(mask, image=None, **options):
    sample = {"image": np.zeros((4, 6, 3), np.uint8) if image is None else image, "annotation": mask}
    options = {"num_labels": 3, "ignore_index": 255} | options
    return LabelledImages([sample], ("image", "annotation"), **options)


def test_label_reduction_moves_ids_down_and_ignores_zero():
    mask = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
    _, reduced = labelled(mask, np.zeros((2, 3, 3), np.uint8), reduce_labels=True)[0]
    assert reduced.tolist() == [[255, 0, 1], [2, 255, 0]]


def test_an_ignored_id_may_be_negative(tmp_path):
    """PyTorch's own -100, which no mask can hold but label reduction gives to 0."""
    flags = write_folders(tmp_path) | {"num_labels": 2, "ignore_index": -100, "reduce_labels": True}
    train, _ = load_labelled_images(SegmentationSource(**flags))
    ids = {tuple(np.unique(train[index][1])) for index in range(len(train))}
    assert ids == {(-100, 0, 1)}


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.full((4, 6), 7, np.uint8), {}, r"holds ids \[7\], but ids run from 0 to 2 and 255 is ignored"),
        (np.full((4, 6), 4, np.uint8), {"reduce_labels": True}, r"holds ids \[4\], but ids run from 1 to 3"),
        (np.zeros((4, 5), np.uint8), {}, "4 x 5 pixels .* but the image 4 x 6"),
        (np.zeros((4, 6, 3), np.uint8), {}, "not one class id a pixel"),
        (np.full((4, 6), 0.5, np.float32), {}, "float32.*whole numbers"),
        (np.int64(3), {}, r"shape \(\)"),
    ],
)
def test_a_wrong_mask_is_refused_with_its_image(mask, options, message):
    with pytest.raises(ValueError, match=rf"the data, image 0: .*{message}"):
        labelled(mask, **options)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_fraction": 0.0}, "--train_fraction .* got 0.0"),
        ({"train_fraction": 1.5}, "--train_fraction"),
        ({"validation_dir": "x", "train_mask_dir": "y"}, "--validation_mask_dir belong together"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        SegmentationSource(train_dir="somewhere", **flags)


def test_files_that_do_not_pair_are_named(tmp_path):
    flags = write_folders(tmp_path)
    (tmp_path / "images" / "deep" / "3.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 6 masks .* 5 in .* 'deep/3' .*name each mask like its image"):
        load_labelled_images(SegmentationSource(**flags, num_labels=3))


def test_class_names_come_from_a_file_or_a_number(tmp_path):
    names = tmp_path / "names.json"
    for content in (["sky", "road"], {"0": "sky", "1": "road"}):
        names.write_text(json.dumps(content))
        assert SegmentationSource(train_dir="x", id2label=str(names)).class_names() == {0: "sky", 1: "road"}
    assert SegmentationSource(train_dir="x", num_labels=2).class_names() == {0: "class 0", 1: "class 1"}
    names.write_text("sky road")
    with pytest.raises(ValueError, match="not a JSON list of names"):
        SegmentationSource(train_dir="x", id2label=str(names)).class_names()
    with pytest.raises(ValueError, match="pass --num_labels K"):
        SegmentationSource(train_dir="x").class_names()


def test_crops_follow_from_seed_epoch_and_index():
    source = SegmentationSource(dataset_name="wire_bonding", max_train_samples=3, max_eval_samples=1, built_in_size=48)
    images = load_labelled_images(source)[0]
    augmentation = Augmentation(crop_size=32, long_edge=48, ignore_index=255)
    crops = [TrainingCrops(images, augmentation, mean=[0.5] * 2, std=[0.2] * 2, seed=seed) for seed in (0, 0, 1)]
    samples = [data[0, 1] for data in crops] + [crops[0][1, 1]]
    assert samples[0]["pixel_values"].shape == (2, 32, 32)
    assert samples[0]["labels"].dtype == torch.int64
    assert torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])
    assert not torch.equal(samples[0]["pixel_values"], samples[2]["pixel_values"])
    assert not torch.equal(samples[0]["pixel_values"], samples[3]["pixel_values"])
