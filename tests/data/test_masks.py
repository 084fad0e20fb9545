"""The meaning of masks from any program: one meaning for a set, or a refusal that says what to do."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_dbp.data.decoding import stored
from hf_dbp.data.masks import Palette, index_mask
from hf_dbp.downstream.segmentation.data import load_labelled_images
from hf_dbp.downstream.segmentation.source import SegmentationSource
from hf_dbp.inspection.folder import main as inspect
from hf_dbp.recipes import read_yaml

RNG = np.random.default_rng(0)
COLOURS = {0: (0, 0, 0), 1: (255, 165, 0), 2: (0, 128, 255)}
SHAPE = (16, 20)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def with_palette(ids, order):
    """A palette PNG of these ids with its palette in another order: the same picture with other indices."""
    place = {number: index for index, number in enumerate(order)}
    picture = Image.fromarray(np.vectorize(place.get)(ids).astype(np.uint8), "P")
    picture.putpalette([part for number in order for part in COLOURS[number]])
    return picture


def write(masks, images=Path("images"), folder=Path("masks"), name="{}.png"):
    """Write images, and masks that ``masks`` makes from number and ids; return the ids."""
    drawn = []
    for number in range(6):
        for place in (images, folder):
            place.mkdir(exist_ok=True)
        drawn.append(RNG.integers(0, 3, SHAPE, dtype=np.uint8))
        Image.fromarray(RNG.integers(0, 255, (*SHAPE, 3), np.uint8)).save(images / f"{number}.png")
        mask = masks(number, drawn[-1])
        file = folder / name.format(number)
        mask.save(file) if isinstance(mask, Image.Image) else file.write_bytes(mask)
    return drawn


def png(array) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def labelled(**flags):
    flags = {"num_labels": 3, "train_val_split": 0.2} | flags
    return load_labelled_images(SegmentationSource(train_dir="images", train_mask_dir="masks", **flags))


def ids(**flags):
    return sorted(images[index][1].astype(int).tolist() for images in labelled(**flags) for index in range(len(images)))


def expected(drawn):
    return sorted(mask.astype(int).tolist() for mask in drawn)


def report(capsys, *flags):
    inspect(["images", "--masks", "masks", *flags])
    return capsys.readouterr().out


# ---- every writer ----

WRITERS = {
    "png": lambda file, ids: file.with_suffix(".png").write_bytes(png(ids)),
    "palette": lambda file, ids: with_palette(ids, [0, 1, 2]).save(file.with_suffix(".png")),
    "png16": lambda file, ids: file.with_suffix(".png").write_bytes(png(ids.astype(np.uint16))),
    "tiff16": lambda file, ids: tifffile.imwrite(file.with_suffix(".tif"), ids.astype(np.uint16)),
    "float": lambda file, ids: tifffile.imwrite(file.with_suffix(".tif"), ids.astype(np.float32)),
    "npy": lambda file, ids: np.save(file.with_suffix(".npy"), ids.astype(np.int64)),
    "double": lambda file, ids: np.save(file.with_suffix(".npy"), ids.astype(np.float64)),
}
FULL = {"png": 255, "png16": 65535, "tiff16": 65535, "float": 1, "npy": 7, "double": 0.5}
drawn_masks = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn_masks, st.sampled_from(sorted(WRITERS)))
def test_whole_numbers_are_ids_and_two_values_are_binary(tmp_path, numbers, writer):
    truth = np.array(numbers, np.uint8).reshape(3, 4)
    for old in tmp_path.glob("m.*"):
        old.unlink()

    def read():
        return stored({"bytes": None, "path": str(next(tmp_path.glob("m.*")))})

    WRITERS[writer](tmp_path / "m", truth)
    np.testing.assert_array_equal(index_mask(read()), truth)
    truth = truth > 0
    if writer in FULL:
        np.save(tmp_path / "m.npy", truth * FULL[writer]) if "npy" in writer else WRITERS[writer](
            tmp_path / "m", truth * np.asarray(FULL[writer], np.float64 if writer == "double" else np.uint16)
            if writer != "png" else truth.astype(np.uint8) * 255,
        )  # fmt: skip
        if writer == "double":
            if truth.any():
                with pytest.raises(ValueError, match="not all of its values are whole numbers"):
                    Palette("binary", 255)(read())
            return
        np.testing.assert_array_equal(Palette("binary", 255)(read()), truth)


# ---- a palette per file ----


def test_palettes_that_differ_are_read_as_colours_or_refused(capsys):
    drawn = write(lambda number, ids: with_palette(ids, [[0, 1, 2], [2, 0, 1], [1, 2, 0]][number % 3]))
    with pytest.raises(ValueError, match=r"give an id different colours, e\.g\. masks/.*pass --palette FILE"):
        labelled()
    out = report(capsys)
    assert "the masks hold 3 colours, not ids" in out
    palette = read_yaml(Path("outputs/inspection/finetune.yaml"))["palette"]
    names = {"#000000": "none", "#ffa500": "wire", "#0080ff": "pad"}
    Path(palette).write_text("\n".join(f'{name}: "{colour}"' for colour, name in names.items()))
    assert ids(palette=palette, num_labels=None) == expected(drawn)
    out = report(capsys, "--palette", palette)
    assert "wire" in out and "not in the palette" not in out


def test_palettes_that_are_cut_short_agree(capsys):
    drawn = write(lambda number, ids: with_palette(ids % 2 if number % 2 else ids, [0, 1] if number % 2 else [0, 1, 2]))
    drawn = [ids % 2 if number % 2 else ids for number, ids in enumerate(drawn)]
    assert ids() == expected(drawn)
    assert "PROBLEM" not in report(capsys)


# ---- one bit, sixteen bits, floats ----


def test_one_bit_beside_0_and_255(capsys):
    drawn = write(lambda n, ids: Image.fromarray((ids > 0).astype(np.uint8) * 255).convert("1" if n % 2 else "L"))
    drawn = [ids > 0 for ids in drawn]
    with pytest.raises(ValueError, match=r"3 masks have 1 bit per pixel.*others hold 255.*pass --palette binary"):
        labelled()
    out = report(capsys)
    assert "palette: binary" in out and "255 (ignored)" not in out and "PROBLEM" not in out
    assert read_yaml(Path("outputs/inspection/finetune.yaml"))["palette"] == "binary"
    assert ids(palette="binary", num_labels=None) == expected(drawn)


def test_one_bit_alone(capsys):
    drawn = [ids > 0 for ids in write(lambda n, ids: Image.fromarray(ids > 0))]
    out = report(capsys)
    assert "palette: binary" in out and "class False" not in out
    assert ids(palette="binary", num_labels=None) == ids(num_labels=2) == expected(drawn)


@pytest.mark.parametrize("value", [65535, 200])
def test_two_values_of_sixteen_bits(capsys, value):
    drawn = [ids > 0 for ids in write(lambda n, ids: png((ids > 0).astype(np.uint16) * value))]
    out = report(capsys)
    assert "palette: binary" in out and "PROBLEM" not in out and "foreground" in out
    assert ids(palette="binary", num_labels=None) == expected(drawn)


def test_grey_values_of_sixteen_bits(capsys):
    drawn = write(lambda n, ids: png(ids.astype(np.uint16) * 20_000))
    assert "the masks hold 3 grey values, not ids" in report(capsys)
    palette = Path("outputs/inspection/palette.yaml")
    assert set(labelled(palette=str(palette), num_labels=None)[0][0][1].ravel()) == {0, 1, 2}
    palette.write_text("a: 0\nb: 20000\nc: 40000\n")
    assert ids(palette=str(palette), num_labels=None) == expected(drawn)
    assert "not in the palette" not in report(capsys, "--palette", str(palette))


def test_float_ids(capsys):
    drawn = write(lambda n, ids: b"")
    for number, mask in enumerate(drawn):
        Path(f"masks/{number}.png").unlink()
        tifffile.imwrite(f"masks/{number}.tif", mask.astype(np.float32))
    assert ids() == expected(drawn)
    out = report(capsys)
    assert "PROBLEM" not in out and "class 2" in out and not Path("outputs/inspection/palette.yaml").exists()
    tifffile.imwrite("masks/0.tif", np.full(SHAPE, 0.5, np.float32))
    out = report(capsys)
    with pytest.raises(ValueError, match="not all of its values are whole numbers") as error:
        labelled()
    reason = str(error.value).partition("): ")[2]
    assert f"1 masks are not understood, which ends fine-tuning, e.g. masks/0.tif: {reason}" in out
    assert out.count(reason) == 1


def test_binary_masks_of_different_values():
    write(lambda n, ids: png((ids > 0).astype(np.uint8) * (1 if n % 2 else 2)))
    with pytest.raises(ValueError, match=r"holds 2 besides 0, masks/.\.png 1: these are more than two values"):
        labelled(palette="binary", num_labels=None)


def test_lossy_masks_are_named(capsys, caplog):
    write(lambda n, ids: cv2.imencode(".jpg", ids, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes(), name="{}.jpg")
    labelled(num_labels=9)
    message = "6 of 6 masks are stored as JPEG or lossy WebP, which changes values at edges"
    assert message in caplog.text
    assert message in report(capsys)


# ---- files of an earlier inspection ----


def test_an_earlier_palette_is_not_taken_for_the_users(capsys):
    write(lambda n, ids: Image.fromarray(np.array([COLOURS[k] for k in range(3)], np.uint8)[ids]))
    report(capsys)
    palette = Path("outputs/inspection/palette.yaml")
    for stale in (None, "", "# Name the classes\n"):
        if stale is not None:
            palette.write_text(stale)
        write(lambda n, ids: Image.fromarray(np.array([(9, 9, 9), (1, 2, 3), (7, 7, 0)], np.uint8)[ids]))
        assert "not in the palette" not in report(capsys)
        assert "#090909" in palette.read_text()
    palette.write_text('low: "#090909"\nwire: "#010203"\npad: "#070700"\n')
    assert "wire" in report(capsys) and "wire" in palette.read_text()
    for file in Path("masks").iterdir():
        file.rename(file.with_stem("not_" + file.stem))
    report(capsys)
    assert not Path("outputs/inspection/finetune.yaml").exists()


# ---- label reduction ----


def test_names_move_with_ids(capsys):
    names = ["background", "wire", "pad"]
    Path("names.json").write_text(json.dumps(names))
    Path("palette.yaml").write_text("background: 0\nwire: 1\npad: 2\n")

    def source(**flags):
        return SegmentationSource(train_dir="images", train_mask_dir="masks", reduce_labels=True, **flags)

    moved = {0: "wire", 1: "pad"}
    assert source(palette="palette.yaml").class_names() == moved
    assert source(id2label="names.json", num_labels=2).class_names() == moved
    assert source(id2label="names.json", num_labels=3).class_names() == dict(enumerate(names))  # of the ids that remain
    with pytest.raises(
        ValueError, match=r"--num_labels 3 if .* remaining classes, or --num_labels 2 if the first, 'background'"
    ):
        source(id2label="names.json").class_names()
    drawn = write(lambda n, ids: png(ids))
    train, _ = load_labelled_images(source(palette="palette.yaml"))
    assert train.num_labels == 2 and set(np.unique(train[0][1])) == {0, 1, 255}
    assert len(drawn) == 6


# ---- one folder ----


@pytest.mark.parametrize("suffix", ["_mask", "-mask"])
def test_images_and_masks_in_one_folder(capsys, suffix):
    drawn = write(lambda n, ids: png(ids), folder=Path("images"), name="{}" + suffix + ".png")
    inspect(["images", "--masks", "images", f"--mask_suffix={suffix}"])
    out = capsys.readouterr().out
    assert "images     6 in 6 files" in out and "masks      6; 0 images have none" in out and "PROBLEM" not in out
    recipe = read_yaml(Path("outputs/inspection/pretrain.yaml"))
    assert recipe["mask_suffix"] == suffix
    flags = {"train_mask_dir": "images", "mask_suffix": suffix, "num_labels": 3}
    lists = load_labelled_images(SegmentationSource(train_dir="images", **flags))
    found = sorted(images[i][1].astype(int).tolist() for images in lists for i in range(len(images)))
    assert found == expected(drawn)
