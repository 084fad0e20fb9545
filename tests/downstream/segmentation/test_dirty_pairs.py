"""Images and masks as they are found: what cannot be read is left out and counted, what would mislead is refused."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_finetuning import FLAGS

from hf_dbp.downstream.segmentation.data import SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.finetuning import main

GOOD = 14
BROKEN = {"cut image", "text image", "lost image", "cut mask", "zero mask", "other size"}
rng = np.random.default_rng(0)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def pair(height=40):
    image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8))
    return image, Image.fromarray(rng.integers(0, 3, (height, 48), np.uint8))


@pytest.fixture
def dirty(tmp_path):
    """Folders of images and masks; some of each are broken, one image has no mask."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        folder.mkdir()
    for name in [*map(str, range(GOOD)), *sorted(BROKEN), "no mask"]:
        image, mask = pair(38 if name == "other size" else 40)
        image.save(images / f"{name}.png")
        if name != "no mask":
            mask.save(masks / f"{name}.png")
    (images / "cut image.png").write_bytes((images / "cut image.png").read_bytes()[:2000])
    (images / "text image.png").write_text("see the other folder")
    (images / "lost image.png").unlink()
    (images / "lost image.png").symlink_to("nowhere.png")
    (masks / "cut mask.png").write_bytes((masks / "cut mask.png").read_bytes()[:100])
    (masks / "zero mask.png").write_bytes(b"")
    return {"train_dir": str(images), "train_mask_dir": str(masks)}


def as_parquet(dirty, folder):
    """The same pairs as rows of a file."""
    names = sorted(os.listdir(dirty["train_mask_dir"]))

    def rows(key):
        files = [Path(dirty[key]) / name for name in names]
        return [{"bytes": file.read_bytes() if file.exists() else b"", "path": file.name} for file in files]

    features = datasets.Features({"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": rows("train_dir"), "mask": rows("train_mask_dir")}, features)
    folder.mkdir()
    table.cast(datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})).to_parquet(
        folder / "a.parquet"
    )
    return {"train_dir": str(folder)}


def arguments(tmp_path, **changed):
    given = {
        "num_labels": 3,
        "model_size": "mini",
        "patch_size": 8,
        "train_val_split": 0.3,
        "output_dir": tmp_path / "run",
    }
    flags = [part for key, value in (given | changed).items() for part in (f"--{key}", str(value))]
    own = {flag.removeprefix("--") for flag in flags if flag.startswith("--")} | {"dataset_name", "built_in_size"}
    own |= {"max_train_samples", "max_eval_samples"}
    kept, skip = [], False
    for part in FLAGS:
        if part.startswith("--"):
            skip = part.removeprefix("--") in own
        if not skip:
            kept.append(part)
    return [*kept, *flags]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_dirty_pairs_train_to_the_end_and_are_counted_exactly(tmp_path, dirty, kind, workers):
    flags = dirty if kind == "folders" else as_parquet(dirty, tmp_path / "parquet")
    main(arguments(tmp_path, **flags, dataloader_num_workers=workers, max_steps=8))
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    unreadable = record["data"]["unreadable"]
    assert unreadable["count"] == len(unreadable["images"]) == len(BROKEN)
    for name in BROKEN:
        assert sum(f"{name}.png)" in where for where in unreadable["images"]) == 1, name
    assert all(unreadable["images"].values())
    total = record["data"]["train_images"] + record["data"]["validation_images"]
    assert total == GOOD + len(BROKEN)  # the image without a mask is none of them
    assert record["data"]["validation_pixels"] % (40 * 48) == 0


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_masks_with_unknown_ids_are_refused_before_training(tmp_path, dirty, kind, capsys):
    mask = np.asarray(Image.open(os.path.join(dirty["train_mask_dir"], "9.png"))).copy()
    mask[3, 5] = 77
    Image.fromarray(mask).save(os.path.join(dirty["train_mask_dir"], "9.png"))
    flags = dirty if kind == "folders" else as_parquet(dirty, tmp_path / "parquet")
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path, **flags))
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "9.png" in error and "holds ids [77]" in error


def test_too_many_end_the_run_with_one_line(tmp_path, dirty, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path, **dirty, max_unreadable=0))
    assert stop.value.code == 2
    assert "more than 0 unreadable images, the last: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_mask_without_an_image_is_refused(tmp_path, dirty):
    os.unlink(os.path.join(dirty["train_dir"], "3.png"))
    with pytest.raises(ValueError, match=r"1 of the 20 masks .* have no image of that name .* e.g. '3'"):
        load_labelled_images(SegmentationSource(**dirty, num_labels=3))
