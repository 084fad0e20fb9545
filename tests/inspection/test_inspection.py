"""`hf-dbp inspect` says what is there; a newcomer's mistakes each get what was found and what to do."""

import contextlib
import dataclasses
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_dbp.data import images as lists
from hf_dbp.data.images import ImageSource, built_in_images, load_images
from hf_dbp.data.masks import Palette, index_mask
from hf_dbp.downstream.segmentation.data import SegmentationSource, built_in_pairs, load_labelled_images
from hf_dbp.inspection import reading
from hf_dbp.inspection.folder import main as inspect
from hf_dbp.inspection.mask_survey import crop_chances
from hf_dbp.inspection.survey import duplicates
from hf_dbp.recipes import read_yaml
from hf_dbp.training.arguments import DataArguments, ModelArguments

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(count=6, size=(32, 40), mask_size=None, mask=None):
    """Two-channel 16-bit TIFFs and masks of classes 0..2."""
    for number in range(count):
        for folder in ("images", "masks"):
            Path(folder).mkdir(exist_ok=True)
        image = RNG.integers(0, 65535, (2, *size), dtype=np.uint16)
        tifffile.imwrite(f"images/{number}.tif", image, photometric="minisblack")
        drawn = RNG.integers(0, 3, mask_size or size, dtype=np.uint8) if mask is None else mask(number)
        cv2.imwrite(f"masks/{number}.png", drawn)


def report(capsys, *flags):
    inspect(["images", *flags])
    return capsys.readouterr().out


def labelled(**flags):
    flags = {"num_labels": 3} | flags
    return load_labelled_images(SegmentationSource(train_dir="images", train_mask_dir="masks", **flags))


def test_what_is_there_and_what_will_be_done(real_pictures, capsys):
    write()
    Path("masks/5.png").unlink()
    out = report(capsys, "--masks", "masks")
    for line in ("6 in 6 files: .tif (6)", "32 x 40 (6)", "2 of uint16 (6)", "masks      5; 1 images have none",
                 "class 2", "in 5 masks", "measured once"):  # fmt: skip
        assert line in out
    assert "PROBLEM" not in out
    recipe = read_yaml(Path("outputs/inspection/pretrain.yaml"))
    assert (recipe["train_dir"], recipe["num_channels"], recipe["mask_ratio"]) == ("images", "2", "0.4")
    assert set(recipe) <= {f for group in (DataArguments, ModelArguments) for f in group.__dataclass_fields__} | set(
        read_yaml(Path(__file__).parents[2] / "hf_dbp/recipes/industrial.yaml")
    )
    finetuning = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert (finetuning["num_labels"], finetuning["train_mask_dir"]) == ("3", "masks")
    sheet = cv2.imread("outputs/inspection/contact_sheet.png")
    assert sheet.shape[1] > 1000 and sheet.std() > 10


@pytest.mark.parametrize(("gpu", "side"), [(True, 512), (False, 256)])
def test_large_images_are_seen_as_tiles(capsys, monkeypatch, gpu, side):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    write(2, (1100, 1030))
    out = report(capsys)
    assert f"random tiles of {side} x {side} pixels at native resolution" in out
    assert ("for this machine has no GPU (with one: 512)" in out) is not gpu
    recipe = read_yaml(Path("outputs/inspection/pretrain.yaml"))
    assert (recipe["native_tiles"], recipe["image_size"]) == ("true", str(side))


@pytest.mark.parametrize(("gpu", "side", "batch"), [(True, 352, 10), (False, 256, 8)])
def test_without_a_gpu_crops_and_batches_are_small(capsys, monkeypatch, gpu, side, batch):
    """Else a thousand steps of fine-tuning on photographs take 85 minutes of a core; whether tiles are native stays."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    write(24, (360, 480))
    assert (f"batches of at most {batch} in fine-tuning" in report(capsys, "--masks", "masks")) is not gpu
    pretraining, finetuning = (read_yaml(Path(f"outputs/inspection/{name}.yaml")) for name in ("pretrain", "finetune"))
    assert (pretraining["image_size"], finetuning["crop_size"]) == (str(side), str(side))
    assert (pretraining["native_tiles"], finetuning["per_device_train_batch_size"]) == ("false", str(batch))


@pytest.mark.parametrize("gpu", [True, False])
def test_without_a_gpu_model_and_head_are_small(capsys, monkeypatch, gpu):
    """On a CPU the head of the recipe takes most of the time; on a GPU the recipes stay as they are."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    write()
    assert ("no GPU: model_size: mini (the recipe's own: tiny)" in report(capsys)) is not gpu
    out = report(capsys, "--masks", "masks")
    wanted = ("tiny", "256", "128") if gpu else ("mini", "64", "32")
    said = "model_size: mini, head_size: 64, auxiliary_head_size: 32 (the recipe's own: tiny, 256, 128)"
    assert (said in out) is not gpu
    pretraining, finetuning = (read_yaml(Path(f"outputs/inspection/{name}.yaml")) for name in ("pretrain", "finetune"))
    assert (pretraining["model_size"], finetuning["head_size"], finetuning["auxiliary_head_size"]) == wanted


def test_corrupt_files_and_copies(capsys, caplog):
    write()
    Path("images/2.tif").write_bytes(Path("images/2.tif").read_bytes()[:900])
    Path("images/copy.tif").write_bytes(Path("images/0.tif").read_bytes())
    out = report(capsys)
    assert "1 of 7 images cannot be read and will be left out of training, e.g. images/2.tif: " in out
    assert "repair them or move them away" in out and "refuse" not in out  # fine-tuning skips and counts them
    assert "1 files are copies of others, e.g. images/0.tif = images/copy.tif" in out
    data = labelled(train_val_split=0.2)
    with pytest.raises(ValueError, match=r"images/2\.tif"):
        [images[index] for images in data for index in range(len(images))]


def test_equal_pieces_are_not_yet_copies(tmp_path):
    block = bytes(2**16)
    for name, byte in (("a", b"x"), ("b", b"y"), ("c", b"x")):  # differ between the pieces that are read first
        (tmp_path / name).write_bytes(block * 2 + byte + block * 4)
    assert duplicates(str(tmp_path / name) for name in "abc") == [[str(tmp_path / "a"), str(tmp_path / "c")]]


def test_masks_that_do_not_match_by_name(capsys):
    write()
    for file in list(Path("masks").iterdir()):
        file.rename(file.with_stem(f"{file.stem}_gt"))
    message = "6 of the 6 masks in masks have no image of that name among the 6 in images"
    out = report(capsys, "--masks", "masks")
    assert message in out and "pass --mask_suffix _gt" in out
    with pytest.raises(ValueError, match=f"{message}.*pass --mask_suffix _gt"):
        labelled()
    assert len(labelled(mask_suffix="_gt")[0]) == 5
    Path("masks/0_gt.png").rename("masks/other_gt.png")
    with pytest.raises(ValueError, match=r"1 of the 6 masks .* 'other' .*name each mask like its image"):
        labelled(mask_suffix="_gt")


def coloured(number):
    return np.array([[0, 0, 0], [0, 0, 255], [0, 128, 0]], np.uint8)[RNG.integers(0, 3, (32, 40))]


def test_colour_masks_taken_for_indices(capsys):
    write(mask=coloured)
    with pytest.raises(ValueError, match=r"has 3 colours \(#000000, #008000, #ff0000 ...\), not one class.*--palette"):
        labelled()
    out = report(capsys, "--masks", "masks")
    assert "the masks hold 3 colours, not ids; outputs/inspection/palette.yaml lists them" in out
    train, _ = labelled(palette="outputs/inspection/palette.yaml", num_labels=None)
    assert set(np.unique(train[0][1])) == {0, 1, 2}
    Path("palette.yaml").write_text('a: "#000000"\nb: [255, 0, 0]\n')
    with pytest.raises(ValueError, match=r"masks/\d\.png\): .*1 colours without a class, mainly #008000: add"):
        labelled(palette="palette.yaml")


def test_validation_masks_without_a_class():
    write(mask=lambda number: np.full((32, 40), 255, np.uint8))
    void = {"validation_dir": "images", "validation_mask_dir": "masks"}
    for folder in ("images", "masks"):
        Path(folder).rename(f"void_{folder}")
    write(mask=lambda number: RNG.integers(0, 2, (32, 40), dtype=np.uint8))
    void = {name: f"void_{folder}" for name, folder in void.items()}
    with pytest.raises(ValueError, match=r"masks of void_images \(validation\) hold no class: give --validation_dir"):
        labelled(**void)


def test_masks_of_0_and_255_taken_for_indices(capsys):
    write(mask=lambda _: RNG.integers(0, 2, (32, 40), dtype=np.uint8) * 255)
    with pytest.raises(ValueError, match=r"no class but class 0, and 255, which is ignored: nothing to learn.*binary"):
        labelled()
    assert "palette: binary" in report(capsys, "--masks", "masks")
    assert read_yaml(Path("outputs/inspection/finetune.yaml"))["palette"] == "binary"
    assert set(np.unique(labelled(palette="binary", num_labels=None)[0][0][1])) == {0, 1}


@pytest.mark.parametrize("shape", [(8, 10, 3), (8, 10)])
def test_jpeg_masks(capsys, shape):
    block = np.ones((4, 4, 1)[: len(shape)])
    write(mask=lambda n: cv2.GaussianBlur(np.kron(RNG.integers(0, 256, shape), block), (0, 0), 0.5).astype(np.uint8))
    assert "different values, as from JPEG or smooth scaling: save masks as PNG" in report(capsys, "--masks", "masks")


def rare_class(*holders):
    """Masks of two classes, and of a third in those of these numbers."""
    write(8, mask=lambda n: np.arange(1280, dtype=np.uint8).reshape(32, 40) % (3 if n in holders else 2))


def missing(caplog, **flags):
    caplog.clear()
    labelled(**flags)
    return [r.getMessage() for r in caplog.records if "in none of the" in r.getMessage()]


@pytest.mark.slow
def test_a_class_missing_in_validation(capsys, caplog):
    rare_class(3, 5)
    found = {seed: missing(caplog, subset_seed=seed, seed=seed) for seed in range(30)}
    lost = [message for messages in found.values() for message in messages]
    assert any("images (validation): class 2 in none of the 1 masks" in message for message in lost)
    assert all("another --subset_seed or a --validation_dir" in message for message in lost)
    assert "PROBLEM" not in report(capsys, "--masks", "masks")
    seed = int(read_yaml(Path("outputs/inspection/finetune.yaml"))["subset_seed"])
    assert not missing(caplog, subset_seed=seed, seed=seed)


def test_a_class_in_one_mask_is_learned_and_what_training_says_of_it_is_said(capsys, caplog):
    rare_class(3)
    out = report(capsys, "--masks", "masks")
    seed = int(read_yaml(Path("outputs/inspection/finetune.yaml"))["subset_seed"])
    (message,) = missing(caplog, subset_seed=seed, seed=seed)
    assert "(validation)" in message and f"PROBLEM    {message}" in out


def test_masks_smaller_than_images(capsys):
    write(mask_size=(16, 20))
    out = report(capsys, "--masks", "masks")
    assert "6 masks differ in size from their images; both will be left out of fine-tuning" in out
    with pytest.raises(
        ValueError, match=r"masks/.*has 16 x 20 pixels .* the image 32 x 40; .*scale it without"
    ) as error:
        labelled()
    assert str(error.value).partition(".png): ")[2] in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "not a mapping of class names"),
        ("a: '#12'", "'#12' is not a colour"),
        ("a: -3", "-3 is not a colour"),
        ("a: 0\nb: '#000000'", "#000000 has two names"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_no_palette(content, message):
    Path("p.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"--palette p.yaml.*{message}"):
        Palette("p.yaml", 255)


def test_palettes_of_grey_values_and_several_colours():
    Path("p.yaml").write_text('low: 0\nhigh: [127, "#ffffff"]\nignore: [[1, 2, 3]]\n')
    palette = Palette("p.yaml", 99)
    assert palette.names == {0: "low", 1: "high"}
    assert palette(np.array([[0, 127, 255]], np.uint8)).tolist() == [[0, 1, 1]]
    assert palette(np.array([[[1, 2, 3], [127, 127, 127]]], np.uint8)).tolist() == [[99, 1]]
    assert index_mask(np.array([[[3], [4]]], np.uint8)).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "lies in"),
        (["texts"], "texts holds nothing; expected pictures"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, capsys):
    write(2)
    Path("texts").mkdir()
    with pytest.raises(SystemExit) as stop:
        inspect([*flags, "--masks", "masks"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def in_splits(count=8):
    """The images and masks of `write`, the last two moved to folders ``validation``, the others to ``train``."""
    write(count)
    for folder in ("images", "masks"):
        for file in sorted(Path(folder).iterdir()):
            split = "validation" if int(file.stem) >= count - 2 else "train"
            Path(folder, split).mkdir(exist_ok=True)
            file.rename(Path(folder, split, file.name))


def seen(images):
    return {images[index][0].tobytes() for index in range(len(images))}


def test_folders_train_and_validation_are_the_splits(capsys):
    """As in pre-training: images of the validation folder are not trained on."""
    in_splits()
    train, validation = labelled()
    assert [len(train), len(validation)] == [6, 2]
    stored = {np.moveaxis(tifffile.imread(f"images/validation/{n}.tif"), 0, 2).tobytes() for n in (6, 7)}
    assert seen(validation) == stored and not seen(train) & stored
    out = report(capsys, "--masks", "masks")
    assert "images     8 in 8 files" in out and "masks      8; 0 images have none" in out
    assert "PROBLEM" not in out
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert (recipe["train_mask_dir"], recipe["per_device_train_batch_size"]) == ("masks", "3")


def test_splits_without_masks_or_without_a_class(capsys, caplog):
    in_splits()
    for number in (6, 7):
        cv2.imwrite(f"masks/validation/{number}.png", np.zeros((32, 40), np.uint8) + number % 2)
    assert "images (validation): class 2 in none of the 2 masks" in report(capsys, "--masks", "masks")
    for number in (6, 7):
        Path(f"masks/validation/{number}.png").unlink()
    Path("masks/validation").rmdir()
    train, validation = labelled()
    assert [len(train), len(validation)] == [5, 1]  # set aside from those of `train`
    assert "2 left out: images without a mask, of the 2 in images (validation)" in caplog.text
    assert "masks      6; 2 images have none and are used only for pre-training" in report(capsys, "--masks", "masks")
    Path("masks/test").mkdir()
    Path("masks/train/0.png").rename("masks/test/0.png")
    message = "masks has the folders train, test, images has train, validation: give both the same"
    with pytest.raises(ValueError, match=message):
        labelled()
    assert message in report(capsys, "--masks", "masks")


def test_the_range_of_the_values_and_what_is_done_with_it(capsys):
    write(2)
    assert "of uint16 (2 images): divided by 65535" in report(capsys)
    for number in range(3):
        Path(f"images/{number}.tif").unlink(missing_ok=True)
        image = RNG.integers(-1000, 2000, (32, 40)).astype(np.int16)
        image[0, 0], image[0, 1] = -1000, 2000
        np.save(f"images/{number}.npy", image)
    out = report(capsys)
    assert "-1000 to 2000 of int16 (3 images): this range, measured on the training images, becomes 0 to 1" in out
    far = RNG.random((32, 40)).astype(np.float32)
    far[3, 3] = -9999
    np.save("images/0.npy", far)
    far[3, 3] = np.nan
    np.save("images/1.npy", far)
    out = report(capsys)
    assert "values of float32 reach from -9999 to" in out and "outliers, or markers of missing data" in out
    assert "images/1.npy: 1 of its values (0.078%) are NaN or infinite" in out


@pytest.mark.parametrize("orientation", [3, 6])
def test_photographs_turned_by_exif_whose_masks_are_not(capsys, caplog, orientation):
    """Half a turn, or a quarter turn of a square, would misalign silently; training uses the same words."""
    write(size=(40, 40))
    for number in range(6):
        Path(f"images/{number}.tif").unlink()
        exif = Image.Exif()
        exif[0x0112] = orientation if number < 2 else 1
        Image.fromarray(RNG.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(f"images/{number}.jpg", exif=exif)
    message = "2 images are turned upright by their EXIF data, e.g. images/0.jpg, but their masks have none"
    out = report(capsys, "--masks", "masks")
    assert message in out and out.count("EXIF") == 1
    labelled(train_val_split=0.2, seed=3)
    assert "turned upright by their EXIF data" in caplog.text


# ---- every source that training reads ----


def png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def in_table(kind, count=6):
    """The pictures and masks of a table of this kind, in the folder ``table``."""
    Path("table").mkdir()
    ids = (np.arange(1280).reshape(32, 40) // 100 % 3).astype(np.uint8)
    samples = [(RNG.integers(0, 256, (32, 40, 3), dtype=np.uint8), ids) for _ in range(count)]
    if kind == "parquet":
        columns = {name: [png(sample[n]) for sample in samples] for n, name in enumerate(("image", "mask"))}
        pq.write_table(pa.table(columns | {"label": list(range(count))}), "table/part.parquet")
        return ["table"], {}
    with tarfile.open("table/part.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for extension, array in zip(("png", "seg.png"), sample, strict=True):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(png(array))
                tar.addfile(member, io.BytesIO(png(array)))
    return ["table", "--annotation_column_name", "seg.png"], {"annotation_column_name": "seg.png"}


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_tables_are_inspected_by_the_reading_of_training(capsys, kind):
    flags, recipe_flags = in_table(kind)
    inspect(flags)
    out = capsys.readouterr().out
    for line in (f"6 in 1 files: .{kind} (1)", "32 x 40 (6)", "masks      6; 0 images have none", "class 2"):
        assert line in out
    assert "PROBLEM" not in out
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert {name: recipe[name] for name in recipe_flags} == recipe_flags
    own = {name: recipe[name] for name in ("train_dir", "annotation_column_name")}
    train, validation = load_labelled_images(SegmentationSource(**own, num_labels=int(recipe["num_labels"])))
    assert (len(train), len(validation)) == (5, 1) and set(np.unique(train[0][1])) == {0, 1, 2}


def test_the_built_in_images_are_inspected(capsys, monkeypatch):
    few = {"max_train_samples": 16, "max_eval_samples": 4}
    monkeypatch.setattr(reading, "built_in_pairs", lambda source: built_in_pairs(dataclasses.replace(source, **few)))
    monkeypatch.setattr(lists, "built_in_images", lambda source: built_in_images(dataclasses.replace(source, **few)))
    inspect(["--dataset_name", "wire_bonding"])
    out = capsys.readouterr().out
    assert "images     20\n" in out and "2 of uint8 (20)" in out and "masks      20; 0 images have none" in out
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert (recipe["dataset_name"], recipe["num_labels"]) == ("wire_bonding", "5") and "train_dir" not in recipe


def test_damaged_rows_and_copies_are_named_as_training_names_them(capsys):
    in_table("parquet")
    table = pq.read_table("table/part.parquet")
    images = table["image"].to_pylist()
    images[1], images[4] = images[1][:60], images[0]
    pq.write_table(table.set_column(0, "image", pa.array(images)), "table/part.parquet")
    inspect(["table"])
    out = capsys.readouterr().out
    with pytest.raises(ValueError, match=r"image 1: ") as error:
        images = load_images(ImageSource(train_dir="table", num_channels=3, max_unreadable=0))[0]
        [images[index] for index in range(len(images))]
    reason = str(error.value).partition("image 1: ")[2].partition(";")[0]
    assert f"1 of 6 images cannot be read and will be left out of training, e.g. image 1: {reason}" in out
    assert "1 images are copies of others, e.g. image 0 = image 4" in out


def test_what_cannot_be_inspected(capsys):
    in_table("parquet")
    for flags, message in (
        ([], "name what to inspect: a folder, or --dataset_name HUB_ID (not both)"),
        (["table", "--dataset_name", "wire_bonding"], "(not both)"),
        (["--dataset_name", "wire_bonding", "--masks", "masks"], "--masks is for a folder of pictures"),
        (["table", "--masks", "table"], "e.g. --mask_suffix _mask"),
        (["table", "--image_column_name", "photo"], "no column 'photo'"),
    ):
        with pytest.raises(SystemExit):
            inspect(flags)
        assert message in capsys.readouterr().err


# ---- what it says of images ----


def test_aspect_by_both_sides_and_the_smallest_objects(capsys):
    for number, size in enumerate([(32, 640), (32, 640), (640, 32), (64, 64)]):
        mask = np.zeros(size, np.uint8)
        mask[4:8, 4:20] = mask[20, 20] = 1  # 4 pixels thick, and a single pixel, which is none
        for folder, array in (("images", RNG.integers(0, 255, size, dtype=np.uint8)), ("masks", mask)):
            Path(folder).mkdir(exist_ok=True)
            cv2.imwrite(f"{folder}/{number}.png", array)
    out = report(capsys, "--masks", "masks")
    assert "the long side is 20 times the short one (1 to 20); sides of 32 and 640 pixels (medians)" in out
    assert "objects    4 outside the most common class; the smallest are 4.0 pixels thick" in out
    assert "native resolution (long_edge: 0), crops of 32: 3 of 4 images are long and thin" in out


@pytest.mark.parametrize(("share", "wanted"), [(0.05, True), (0.6, False)])
def test_crops_are_drawn_around_classes_that_few_crops_hold(capsys, share, wanted):
    """Judged by the crops, not by the masks: every mask holds the class."""

    def strip(number):
        mask = np.zeros((32, 1000), np.uint8)
        mask[10:13, : round(1000 * share)] = 1
        return mask

    write(size=(32, 1000), mask=strip)
    out = report(capsys, "--masks", "masks")
    assert ("class 1: in less than 20% of the crops" in out) == wanted
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert recipe["rare_crops"] == "0.33" and recipe["loss"] == "ce+dice"
    assert ("class_weights" in recipe) == (not wanted)


@given(st.integers(0, 2**31), st.integers(4, 40), st.integers(4, 60), st.integers(2, 64))
@settings(max_examples=40, deadline=None)
def test_the_share_of_the_crops_that_hold_a_class(seed, height, width, crop):
    mask = (np.random.default_rng(seed).random((height, width)) < 0.02).astype(np.uint8)
    tall, wide, step = min(height, crop), min(width, crop), max(1, crop // 8)
    corners = [
        mask[top : top + tall, left : left + wide].any()
        for top in range(0, height - tall + 1, step)
        for left in range(0, width - wide + 1, step)
    ]
    assert crop_chances(mask, crop).get(1, 0.0) == pytest.approx(np.mean(corners))


@pytest.mark.parametrize("size", [(10, 200), (3, 90), (200, 10)])
def test_views_of_the_thinnest_images_hold_several_patches(capsys, size):
    write(size=size)
    report(capsys, "--masks", "masks")
    sides = [read_yaml(Path(f"outputs/inspection/{name}.yaml")) for name in ("pretrain", "finetune")]
    assert (sides[0]["image_size"], sides[0]["patch_size"], sides[1]["crop_size"]) == ("32", "8", "32")
    assert sides[1]["long_edge"] == "0"


def test_mixed_kinds_and_channels_in_the_words_of_training(capsys):
    write(4)
    np.save("images/9.npy", RNG.random((32, 40, 2), dtype=np.float32))
    np.save("images/8.npy", RNG.integers(0, 9, (32, 40, 5), dtype=np.uint8))
    out = report(capsys)
    images = load_images(ImageSource(train_dir="images", train_val_split=0.01, num_channels=2))
    said = {name: reason for part in images for name, reason in unreadable(part).items()}
    assert f"1 of 6 images will be left out, e.g. images/9.npy: {said['images/9.npy']}" in out
    assert f"1 of 6 images will be left out, e.g. images/8.npy: {said['images/8.npy']}" in out


def unreadable(images):
    for index in range(len(images)):
        with contextlib.suppress(ValueError):
            images[index]
    return images.unreadable_images()


def test_what_training_says_is_said(capsys):
    """For a mistake that inspection itself does not look for, it passes on the loader's message."""
    write(4, mask=lambda number: np.full((32, 40), 3, np.uint8))
    out = report(capsys, "--masks", "masks")
    with pytest.raises(ValueError, match="nothing to learn") as error:
        labelled(num_labels=4)
    assert f"PROBLEM    {error.value}" in out


# ---- good images, and labels in place of masks ----


def defects(number):
    mask = np.zeros((32, 40), np.uint8)
    mask[4:10, number : number + 12] = 1
    return mask


def good_images(count=5, channels=2):
    Path("good").mkdir()
    for number in range(count):
        image = RNG.integers(0, 65535, (channels, 32, 40), dtype=np.uint16)
        tifffile.imwrite(f"good/{number}.tif", image, photometric="minisblack")


def test_good_images_are_reported_and_named_in_the_recipe(capsys):
    write(count=8, mask=defects)
    good_images()
    tifffile.imwrite("good/odd.tif", RNG.integers(0, 65535, (4, 32, 40), dtype=np.uint16), photometric="minisblack")
    out = report(capsys, "--masks", "masks", "--background_dir", "good")
    assert "background 5 good images in good: they count as class 0" in out
    assert "1 of 6 good images will be left out of training, e.g. good/odd.tif: " in out
    assert "class 1                3.462% of the pixels, in 8 masks" in out  # 8 * 72 / (13 * 32 * 40)
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert recipe["background_dir"] == "good"
    flags = {name: recipe[name] for name in ("train_dir", "train_mask_dir", "background_dir")}
    train, validation = load_labelled_images(SegmentationSource(**flags, num_labels=2, max_unreadable=1))
    assert (train.background, validation.background) == (5, 1)
    with pytest.raises(SystemExit):
        inspect(["images", "--background_dir", "good"])
    assert "--background_dir good goes with masks of defects: give --masks" in capsys.readouterr().err


def test_good_images_make_a_class_rare(capsys):
    """A defect in every mask, and of a quarter of its pixels, is in few crops beside forty good images."""
    write(count=4, mask=lambda number: np.pad(np.ones((16, 20), np.uint8), ((0, 16), (0, 20))))
    good_images(40)
    assert "balance" not in report(capsys, "--masks", "masks")
    out = report(capsys, "--masks", "masks", "--background_dir", "good")
    assert "balance    class 1: less than 12.50% of the pixels each" in out
    assert "class 1: in less than 20% of the crops" in out
    assert read_yaml(Path("outputs/inspection/finetune.yaml"))["rare_crops"] == "0.33"


def test_labels_are_inspected_as_the_masks_drawn_from_them(capsys):
    """Classes by their names, balance of what they outline, and a recipe that names the labels."""
    Path("images").mkdir()
    shapes = [
        {"label": "pit", "points": [[2, 2], [8, 2], [8, 8], [2, 8]], "shape_type": "polygon"},
        {"label": "scratch", "points": [[10, 2], [38, 2], [38, 30], [10, 30]], "shape_type": "polygon"},
    ]
    for number in range(6):
        cv2.imwrite(f"images/{number}.png", RNG.integers(0, 255, (32, 40, 3), dtype=np.uint8))
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{number}.png"}
        content |= {"imageData": None, "imageHeight": 32, "imageWidth": 40}
        Path("labels").mkdir(exist_ok=True)
        Path(f"labels/{number}.json").write_text(json.dumps(content), encoding="utf-8")
    out = report(capsys, "--masks", "labels")
    assert "drawn as masks of background, pit, scratch" in out and "PROBLEM" not in out
    recipe = read_yaml(Path("outputs/inspection/finetune.yaml"))
    assert recipe["train_mask_dir"] == "labels" and "num_labels" not in recipe
    source = SegmentationSource(train_dir="images", train_mask_dir=recipe["train_mask_dir"])
    train, validation = load_labelled_images(source)
    assert list(source.class_names().values()) == ["background", "pit", "scratch"]
    masks = [images[index][1] for images in (train, validation) for index in range(len(images))]
    shares = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=3) / (6 * 32 * 40)
    for name, share in zip(("background", "pit", "scratch"), shares, strict=True):
        assert f"{name:<20} {share:8.3%} of the pixels" in out
    assert "balance    pit: less than 8.33% of the pixels each" in out
