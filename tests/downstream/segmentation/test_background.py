"""Good images without masks: class 0 in training, and in validation where that is split off."""

import numpy as np
import pytest
from PIL import Image

from hf_dbp.downstream.segmentation.balance import count_classes
from hf_dbp.downstream.segmentation.data import SegmentationSource, TrainingCrops, load_labelled_images
from hf_dbp.downstream.segmentation.evaluation import summary
from hf_dbp.downstream.segmentation.finetuning import main
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.errors import UserError

QUICK = [
    *("--num_labels", "2", "--crop_size", "32", "--long_edge", "0", "--model_size", "mini", "--head_size", "8"),
    *("--auxiliary_head_size", "8", "--per_device_train_batch_size", "4", "--max_steps", "2", "--do_train"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "--report_to", "none", "--disable_tqdm", "1"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"),
]


def write(folder, count, masks=False, size=(40, 48)):
    """Noise in which a defect is bright; in ``masks`` class 1 where it is."""
    rng = np.random.default_rng(count)
    for number in range(count):
        image, mask = rng.integers(0, 90, (*size, 3), dtype=np.uint8), np.zeros(size, np.uint8)
        if masks:
            mask[5:15, number : number + 12] = 1
            image[mask == 1] += 150
        for kind, array in (("images", image), ("masks", mask))[: 1 + masks]:
            (folder / kind / "deep").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / "deep" / f"{number}.png")


@pytest.fixture
def folders(tmp_path):
    write(tmp_path / "bad", 8, masks=True)
    write(tmp_path / "good", 10, size=(30, 36))
    labelled = {"train_dir": str(tmp_path / "bad/images"), "train_mask_dir": str(tmp_path / "bad/masks")}
    return labelled | {"background_dir": str(tmp_path / "good/images")}


def test_they_are_class_0_in_training_and_in_the_held_out_share(folders):
    source = SegmentationSource(**folders, num_labels=2, train_val_split=0.25)
    train, validation = load_labelled_images(source)
    assert (len(train), len(validation)) == (6 + 8, 2 + 2)
    assert (train.background, validation.background) == (8, 2)
    counts_MK = count_classes(train)
    assert counts_MK[:6, 1].tolist() == [120] * 6
    assert counts_MK[6:].tolist() == [[30 * 36, 0]] * 8
    image_HWC, mask_HW = train[10]
    assert image_HWC.shape == (30, 36, 3) and not mask_HW.any()
    held_out = {validation.samples[index]["image"]["path"] for index in (2, 3)}
    assert not held_out & {train.samples[index]["image"]["path"] for index in range(6, 14)}
    crops = TrainingCrops(train, Augmentation(32, None, 255), mean=[0.5] * 3, std=[0.5] * 3, seed=0)
    labels = crops[(0, 12)]["labels"]
    assert set(labels.unique().tolist()) <= {0, 255}


def test_given_validation_images_stay_as_they_are(folders, tmp_path):
    write(tmp_path / "more", 3, masks=True)
    given = {"validation_dir": str(tmp_path / "more/images"), "validation_mask_dir": str(tmp_path / "more/masks")}
    train, validation = load_labelled_images(SegmentationSource(**folders, **given, num_labels=2))
    assert (len(train), len(validation)) == (8 + 10, 3)
    assert (train.background, validation.background) == (10, 0)


def test_what_cannot_be_read_is_counted_and_what_cannot_be_meant_is_refused(folders, tmp_path):
    (tmp_path / "good/images/deep/3.png").write_bytes(b"no picture")
    train, validation = load_labelled_images(SegmentationSource(**folders, num_labels=2, max_unreadable=1))
    (path,) = (train.unreadable_images() | validation.unreadable_images()).keys()
    assert "deep/3.png" in path
    with pytest.raises(UserError, match=r"--background_dir labels images as class 0, which --reduce_labels ignores"):
        SegmentationSource(**folders, num_labels=2, reduce_labels=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--background_dir"):
        load_labelled_images(SegmentationSource(**folders | {"background_dir": str(tmp_path / "empty")}, num_labels=2))


def test_what_lies_in_the_folder_and_is_not_used_is_counted_in_record_and_summary(tmp_path):
    """A picture of no channel among the good images; all labelled images are used."""
    flags = ["--channel_files", "*_a.png", "*_b.png"]
    for kind, count in (("images", 4), ("masks", 4), ("good", 6)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            if kind == "masks":
                mask = np.zeros((40, 48), np.uint8)
                mask[5:15, number : number + 12] = 1
                Image.fromarray(mask).save(tmp_path / kind / f"{number}.png")
                continue
            for channel in "ab":
                noise = np.random.default_rng(number).integers(0, 255, (40, 48), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / kind / f"{number}_{channel}.png")
    (tmp_path / "good/3_a.png").rename(tmp_path / "good/overview.png")
    (tmp_path / "good/3_b.png").unlink()
    flags += ["--train_dir", str(tmp_path / "images"), "--train_mask_dir", str(tmp_path / "masks")]
    flags += ["--background_dir", str(tmp_path / "good"), *QUICK, "--output_dir", str(tmp_path / "out")]
    record = main(flags)
    left_out = record["data"]["left_out"]
    ((reason, entry),) = left_out["reasons"].items()
    assert left_out["count"] == entry["count"] == 1
    assert reason.startswith("in --background_dir, ") and "overview.png" in entry["examples"][0]
    assert "in --background_dir" in summary(record, tmp_path / "out")
    assert reason in record["asked_used"]["images of the source"]["why"]


def test_with_them_fine_tuning_answers_whether_there_is_any(folders, tmp_path, caplog):
    """Every labelled image holds a defect: without good images there is nothing to tell them from."""
    flags = [part for name, value in folders.items() for part in (f"--{name}", value)]
    flags += [*QUICK, "--output_dir", str(tmp_path / "out")]
    record = main(flags)
    assert record["data"]["background_images"] == {"train": 8, "validation": 2}
    assert (record["detection"]["images_with_any"], record["detection"]["images_without"]) == (1, 2)
    assert "8 and 2 images of class 0 alone join train images and validation images" in caplog.text
    without = [part for part in flags if "good" not in part and part != "--background_dir"]
    assert main([*without[:-1], str(tmp_path / "without")])["detection"] is None
