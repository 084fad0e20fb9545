"""Training survives a folder as found in the wild; run.json lists each unreadable image once, with the reason."""

import gc
import io
import json
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_pretraining import flags
from torch._utils import ExceptionWrapper

from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.errors import message_of as user_message
from hf_dbp.pretraining import main

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core

GOOD = 20
RNG = np.random.default_rng(0)


def picture(mode="RGB", size=(50, 40)):
    return Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_claiming(width, height):
    """A PNG file of a hundred bytes that claims this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff_claiming(rows, **options):
    """A TIFF file whose header claims so many rows."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, RNG.integers(0, 255, (24, 20, 3), np.uint8), photometric="rgb", **options)
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        tag = tiff.pages[0].tags["ImageLength"]
        offset, kind = tag.valueoffset, {3: "<H", 4: "<I"}[tag.dtype]
    content = bytearray(stream.getvalue())
    content[offset : offset + struct.calcsize(kind)] = struct.pack(kind, rows)
    return bytes(content)


def npy_claiming(*shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    return stream.getvalue() + bytes(64)


TURNED = Image.Exif()
TURNED[0x0112] = 6
READ = {  # what must be read, and the height and width it has
    "cmyk.jpg": (encoded(picture("CMYK"), "JPEG"), (40, 50)),
    "sixteen.png": (encoded(Image.fromarray(RNG.integers(0, 65535, (40, 50), np.uint16)), "PNG"), (40, 50)),
    "palette.png": (encoded(picture("P"), "PNG", transparency=bytes(256)), (40, 50)),
    "bilevel.png": (encoded(picture("1"), "PNG"), (40, 50)),
    "alpha.png": (encoded(picture("RGBA"), "PNG"), (40, 50)),
    "rotated.jpg": (encoded(picture(), "JPEG", exif=TURNED), (50, 40)),
    "pixel.png": (encoded(picture(size=(1, 1)), "PNG"), (1, 1)),
    "line.png": (encoded(picture(size=(500, 1)), "PNG"), (1, 500)),
    "really_png.jpg": (encoded(picture(), "PNG"), (40, 50)),
    "really_jpeg.TIFF": (encoded(picture(), "JPEG"), (40, 50)),
}
SKIPPED = {  # what cannot be read, and a word of the reason
    "truncated.jpg": (encoded(picture(), "JPEG")[:700], "truncated"),
    "cut.png": (encoded(picture(), "PNG")[:3000], "truncated|broken"),
    "zero.jpg": (b"", "not a picture"),
    "text.jpg": (b"Dear colleague, the images are on the other disk.", "not a picture"),
    "bomb.png": (png_claiming(60_000, 60_000), "decompression bomb"),
    "tiff_bomb.tif": (tiff_claiming(2**31, compression="zlib"), "more than 536870912"),
    "npy_bomb.npy": (npy_claiming(10**6, 10**6, 3), "length is greater than file size"),
    "nothing.tif": (tiff_claiming(0), "damaged"),
    "noise.webp": (b"RIFF\x40\0\0\0WEBPVP8 " + bytes(50), ""),
}
LINKS = {"loop.jpg": "symbolic links", "lost.jpg": "No such file"}
REASONS = {name: reason for name, (_, reason) in SKIPPED.items()} | LINKS


@pytest.fixture
def dirty(tmp_path):
    """Good images among bad ones, nested, with links in circles and files that are no images."""
    folder = tmp_path / "dirty"
    (folder / "lot").mkdir(parents=True)
    for index in range(GOOD):
        picture().save(folder / "lot" / f"{index}.png")
    for name, (content, _) in (READ | SKIPPED).items():
        (folder / name).write_bytes(content)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "lost.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "lot" / "circle").symlink_to("..", target_is_directory=True)
    (folder / ".hidden.jpg").write_bytes(b"hidden")
    (folder / "Thumbs.db").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_odd_images_are_read(tmp_path, name, as_bytes):
    content, (height, width) = READ[name]
    (tmp_path / name).write_bytes(content)
    value = {"bytes": content, "path": None} if as_bytes else {"bytes": None, "path": str(tmp_path / name)}
    assert decode(value, 3, name).shape == (height, width, 3)


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_images_are_refused_whether_file_or_bytes(tmp_path, name):
    content, reason = SKIPPED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"^here: .*({reason})"):
        decode({"bytes": None, "path": str(tmp_path / name)}, 3, "here")
    with pytest.raises(UnreadableImageError, match=r"^here: "):
        decode({"bytes": content, "path": None}, 3, "here")


@pytest.fixture
def uncollected(monkeypatch):
    """What is in a reference cycle stays."""
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "how",
    [
        {"dataloader_num_workers": 0},
        {"dataloader_num_workers": 2},
        pytest.param({"dataloader_num_workers": 2, "streaming": True}, marks=pytest.mark.slow),
        pytest.param({"streaming": True, "cache_dir": "{tmp}/cache", "cache_short_side": 36}, marks=pytest.mark.slow),
    ],
    ids=["one process", "two workers", "streamed", "cached"],
)
def test_a_dirty_folder_trains_to_the_end_and_is_counted_exactly(tmp_path, dirty, how, uncollected):
    how = {key: str(value).format(tmp=tmp_path) for key, value in how.items()}
    run = tmp_path / "run"
    main(
        flags(
            run,
            dataset_name=None,
            train_dir=dirty,
            train_val_split=0.3,
            max_train_samples=None,
            max_eval_samples=None,
            dataloader_drop_last=False,
            num_train_epochs=2,
            **how,
        )
    )
    assert not multiprocessing.active_children(), "workers that a garbage collection would wait for in vain"
    record = json.loads((run / "run.json").read_text())
    assert record["results"]["finished"] and record["rows"][-1]["epoch"] == 2.0
    unreadable = record["results"]["unreadable"]
    assert unreadable["count"] == len(unreadable["images"])
    assert {os.path.relpath(path, dirty) for path in unreadable["images"]} == REASONS.keys()
    for path, reason in unreadable["images"].items():
        assert reason and not reason.startswith(path), (path, reason)
    assert {entry["examples"][0] for entry in record["data"]["left_out"]["reasons"].values()} == {
        "lot/circle",
        ".hidden.jpg",
    }
    assert record["data"]["left_out"]["other_files"] == {".db": 1}
    left_out = len(REASONS) if "cache_dir" in how else 0  # a cache is made of the readable ones
    assert record["data"]["train_images"] + record["data"]["validation_images"] == GOOD + len(READ | REASONS) - left_out


def test_the_limit_ends_the_run_with_one_line(tmp_path, dirty, capsys):
    how = {"train_val_split": 0.3, "max_train_samples": None, "max_eval_samples": None, "max_unreadable": 3}
    for more in ({}, {"dataloader_num_workers": 2}, {"streaming": True, "cache_dir": tmp_path / "cache"}):
        with pytest.raises(SystemExit) as stop:
            main(flags(tmp_path / "run", dataset_name=None, train_dir=dirty, **how, **more))
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: more than 3 unreadable images, the last: ") and "--max_unreadable" in error


def test_a_reason_that_names_an_error_stays_whole_on_its_way_out_of_a_worker():
    for error in (ValueError("more than 3, the last: a.tif: damaged (ZeroDivisionError: by zero)"), ValueError("x")):
        try:
            raise error
        except ValueError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(ValueError) as caught:
            wrapped.reraise()
        assert user_message(caught.value) == user_message(error) == str(error)


def test_a_cache_is_of_one_depth(tmp_path, dirty):
    """Images of 8 and 16 bits are converted into each other; white stays white."""
    for name in os.listdir(dirty):
        if (dirty / name).is_file() and name != "sixteen.png":
            (dirty / name).unlink()
    Image.fromarray(np.full((40, 50), 65535, np.uint16)).save(dirty / "sixteen.png")
    source = ImageSource(train_dir=str(dirty), streaming=True, cache_dir=str(tmp_path / "cache"), train_val_split=0.1)
    images = [image for part in load_images(source) for image in part]
    assert len(images) == GOOD + 1
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert sum(int(image.min()) == 255 for image in images) == 1


def test_a_name_that_is_no_text_is_refused(tmp_path):
    picture().save(tmp_path / "good.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(picture(), "PNG"))
    with pytest.raises(ValueError, match=r"whose name is not UTF-8, 'caf\\udce9.png'; rename it"):
        load_images(ImageSource(train_dir=str(tmp_path)))


def test_images_of_one_name_in_two_files_are_counted_apart(tmp_path, write, photographs):
    """Rows of parquet files and members of tars may share their names."""
    broken = [*photographs[:50]]
    for index in (0, 10, 40):
        broken[index] = b"text"
    for kind, streaming in (("parquet", False), ("parquet", True), ("webdataset", True)):
        folder = write(tmp_path / kind, kind, broken, shards=2)
        lists = load_images(ImageSource(train_dir=str(folder), streaming=streaming))
        for images in lists:
            images.readable(0)
            for index in range(len(images)):
                images.readable(index)
        assert len({**lists[0].unreadable_images(), **lists[1].unreadable_images()}) == 3
