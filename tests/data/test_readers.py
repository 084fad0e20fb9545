"""Every kind of file is read back unchanged; if possible, another library than the reader wrote it."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.folders import file_table, open_pictures
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.readers import read_picture

RNG = np.random.default_rng(0)


def pixels(dtype, *shape):
    if np.dtype(dtype).kind == "f":
        return RNG.random(shape).astype(dtype)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def read(path, channels=None, content=False):
    """Read as a file and as bytes; both must agree."""
    as_bytes = decode({"bytes": path.read_bytes(), "path": None}, channels, "bytes")
    as_file = decode({"bytes": None, "path": str(path)}, channels, str(path))
    np.testing.assert_array_equal(as_bytes, as_file)
    return as_file


# ---- TIFF: read by tifffile, written by Pillow, OpenCV and by hand ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("compression", [1, 5, 8, 32946], ids=["raw", "lzw", "adobe_deflate", "deflate"])
def test_tiff_of_opencv(tmp_path, dtype, channels, compression):
    image = pixels(dtype, 12, 20, channels)
    stored = image[..., [2, 1, 0, 3][:channels]] if channels > 1 else image
    assert cv2.imwrite(str(tmp_path / "a.tif"), stored, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    np.testing.assert_array_equal(read(tmp_path / "a.tif", channels), image)
    unasked = 3 if dtype == np.uint8 and channels == 1 else channels  # 8-bit grey is RGB unless told otherwise
    assert read(tmp_path / "a.tif").shape[2] == unasked


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "F", "1", "P", "LA"])
def test_tiff_of_pillow(tmp_path, mode):
    base = Image.fromarray(pixels(np.uint8, 12, 20, 3))
    picture = Image.fromarray(pixels(np.uint16, 12, 20)) if mode == "I;16" else base.convert(mode)
    picture.save(tmp_path / "a.tif")
    array = read(tmp_path / "a.tif")
    if mode in ("I;16", "F"):
        np.testing.assert_array_equal(array[..., 0], np.asarray(picture))
    elif mode == "LA":  # what Pillow would make of two channels, a TIFF keeps apart
        np.testing.assert_array_equal(array, np.asarray(picture))
    else:
        np.testing.assert_array_equal(array, np.asarray(picture.convert("RGB")))


def tiff_by_hand(planes, bits, big_endian):
    """A baseline TIFF 6.0 file, planar, written from the specification: header, one directory, strips."""
    order = ">" if big_endian else "<"
    channels, height, width = planes.shape
    data = planes.astype(planes.dtype.newbyteorder(order)).tobytes()
    arrays = struct.pack(f"{order}{channels}H", *[bits] * channels)
    size = len(data) // channels
    start = 8 + len(data)
    bits_at, offsets_at, counts_at = start, start + 2 * channels, start + 6 * channels
    arrays += struct.pack(f"{order}{channels}L", *[8 + i * size for i in range(channels)])
    arrays += struct.pack(f"{order}{channels}L", *[size] * channels)
    arrays += struct.pack(f"{order}{channels - 1}H", *[0] * (channels - 1))
    extra_at = counts_at + 4 * channels
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits_at), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, channels, offsets_at), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, channels, counts_at),
        (284, 3, 1, 2), (338, 3, channels - 1, extra_at),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        inline = kind == 3 and count <= 2  # two shorts at most lie in the entry itself
        short = {258: [bits] * count, 338: [0] * count}.get(tag, [value])
        packed = struct.pack(f"{order}{count}H", *short).ljust(4, b"\0") if inline else struct.pack(f"{order}L", value)
        directory += struct.pack(f"{order}HHL", tag, kind, count) + packed
    mark = b"MM\0*" if big_endian else b"II*\0"
    return mark + struct.pack(f"{order}L", start + len(arrays)) + data + arrays + directory + b"\0\0\0\0"


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_tiff_of_two_and_more_channels_by_hand(tmp_path, channels, big_endian):
    planes = pixels(np.uint16, channels, 12, 20)
    (tmp_path / "a.tif").write_bytes(tiff_by_hand(planes, 16, big_endian))
    array = read(tmp_path / "a.tif")
    assert array.dtype == np.uint16 and array.dtype.isnative
    np.testing.assert_array_equal(array, np.moveaxis(planes, 0, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"photometric": "minisblack"},  # a page per channel
        {"imagej": True, "metadata": {"axes": "CYX"}},
        {"ome": True, "metadata": {"axes": "CYX"}},
        {"photometric": "minisblack", "compression": "zlib", "tile": (16, 16)},
        {"photometric": "minisblack", "bigtiff": True},
    ],
)
def test_the_layouts_in_which_microscopes_store_channels(tmp_path, options):
    """No other library than tifffile, which reads them, writes these."""
    planes = pixels(np.uint16, 2, 24, 40)
    tifffile.imwrite(tmp_path / "a.tif", planes, **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), np.moveaxis(planes, 0, 2))
    interleaved = np.ascontiguousarray(np.moveaxis(planes, 0, 2))
    tifffile.imwrite(tmp_path / "b.tif", interleaved, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(read(tmp_path / "b.tif"), interleaved)
    tifffile.imwrite(tmp_path / "c.tif", interleaved, photometric="minisblack")  # 24 pages of 40 x 2 pixels
    np.testing.assert_array_equal(read(tmp_path / "c.tif"), interleaved)


def test_a_large_image_is_not_read_as_a_whole(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 64, 64), np.uint16), photometric="minisblack")
    np.save(tmp_path / "a.npy", np.zeros((64, 64, 2), np.uint16))
    for name in ("a.tif", "a.npy"):
        array = read_picture(str(tmp_path / name))
        while not isinstance(array, np.memmap):
            array = array.base
        assert array.filename


def test_a_stack_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 2, 8, 8), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(UnreadableImageError, match=r"shape \(3, 2, 8, 8\) is not an image.*separate files"):
        decode({"bytes": None, "path": str(tmp_path / "a.tif")}, None, "a")


# ---- the others: read by Pillow, written by OpenCV; 16-bit colour PNG the other way; .npy by its format ----


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 12, 3), level, np.uint8)) for level in (255, 0, 85)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / f"a.{suffix}") as written:
        assert written.n_frames == 3  # type: ignore[attr-defined]
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), np.full((8, 12, 3), 255, np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg"])
def test_pictures_of_opencv(tmp_path, suffix):
    image = cv2.GaussianBlur(pixels(np.uint8, 24, 32, 3), (0, 0), 6)
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == "webp" else []
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), image[..., ::-1], options)
    error = np.abs(read(tmp_path / f"a.{suffix}").astype(int) - image).max()
    assert error <= (6 if suffix == "jpg" else 0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_png(tmp_path, channels):
    image = pixels(np.uint16, 12, 20, channels)
    if channels == 1:
        cv2.imwrite(str(tmp_path / "a.png"), image)  # read by Pillow
    else:  # read by OpenCV, so written by the format's definition
        (tmp_path / "a.png").write_bytes(png_by_hand(image))
    np.testing.assert_array_equal(read(tmp_path / "a.png"), image)


def png_by_hand(image):
    import zlib

    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    height, width, channels = image.shape
    header = struct.pack(">LLBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 2), (2, 12, 20), (7, 12, 20)])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2", "<f4", "<f8", "<i4"])
def test_npy_by_its_format(tmp_path, shape, dtype):
    array = (RNG.random(shape) * 200).astype(dtype)
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + array.tobytes()
    (tmp_path / "a.npy").write_bytes(content)
    expected = array[..., None] if len(shape) == 2 else np.moveaxis(array, 0, 2) if shape[0] < 12 else array
    found = read(tmp_path / "a.npy")
    assert found.dtype == (dtype[1:] if dtype[1:] in ("u1", "u2") else np.float32)
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


# ---- what goes wrong ----


@pytest.mark.parametrize("kind", ["cut", "cut directory", "nonsense", "empty", "pickle"])
def test_damaged_files_are_named(tmp_path, kind):
    path = tmp_path / ("a.npy" if kind == "pickle" else "a.tif")
    if kind == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        tifffile.imwrite(path, pixels(np.uint16, 2, 40, 40), photometric="minisblack")
        content = path.read_bytes()
        cuts = {
            "cut": content[:4000],
            "cut directory": content[:100],
            "nonsense": content[:8] + b"x" * 50,
            "empty": b"",
        }
        path.write_bytes(cuts.get(kind, b""))
    with pytest.raises(UnreadableImageError, match=r"a\.(tif|npy)"):
        decode({"bytes": None, "path": str(path)}, None, str(path))


# ---- folders ----


def test_nested_folders_of_mixed_files(tmp_path):
    for number, name in enumerate(["b/x.PNG", "a/test_1.tif", "a/.hidden/y.png", "._a.png", "z.txt", "train-1.bmp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(np.full((8 + number, 8, 3), number, np.uint8)).save(buffer, "PNG")
        (tmp_path / name).write_bytes(buffer.getvalue())  # the content counts, not the name
    assert list(open_pictures(str(tmp_path)).pictures()["train"]) == ["a/test_1", "b/x", "train-1"]
    train, validation = load_images(ImageSource(train_dir=str(tmp_path), train_val_split=0.34, cache_dir=str(tmp_path)))
    assert sorted(image.shape[0] for image in [*train, *validation]) == [8, 9, 13]
    assert set(open_pictures(str(tmp_path)).pictures()) == {"train"}
    (tmp_path / "train").mkdir()
    (tmp_path / "b").rename(tmp_path / "train" / "b")
    (tmp_path / "a").rename(tmp_path / "val")
    (tmp_path / "train-1.bmp").rename(tmp_path / "train" / "train-1.bmp")
    assert {split: list(samples) for split, samples in open_pictures(str(tmp_path)).pictures().items()} == {
        "train": ["b/x", "train-1"],
        "val": ["test_1"],
    }


@pytest.mark.parametrize("patterns", [("*_ch0.png", "*_ch1.png"), ("bright/*.png", "dark/*.png")])
def test_a_file_per_channel(tmp_path, patterns):
    planes = pixels(np.uint8, 3, 2, 10, 12)
    for number in range(3):
        for channel in range(2):
            path = tmp_path / "images" / patterns[channel].replace("*", f"lot/{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), planes[number, channel])
    folder, cache = str(tmp_path / "images"), str(tmp_path / "cache")
    source = ImageSource(train_dir=folder, channel_files=list(patterns), cache_dir=cache, train_val_split=0.3)
    train, validation = load_images(source)
    found = sorted(image.tobytes() for image in [*train, *validation])
    assert found == sorted(np.ascontiguousarray(np.moveaxis(image, 0, 2)).tobytes() for image in planes)
    path.unlink()
    with pytest.raises(ValueError, match=r"1 of the 3 samples in .* have no file .*, e\.g\. .*lot/2"):
        open_pictures(folder).pictures(patterns)
    with pytest.raises(ValueError, match="write one \\* for the name of the sample"):
        open_pictures(folder).pictures(["a.png", "b.png"])
    with pytest.raises(ValueError, match="matches none of the 5 files"):
        open_pictures(folder).pictures(["*_x.png"])


def test_channels_that_do_not_fit_together_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), pixels(np.uint8, 8, 8))
    cv2.imwrite(str(tmp_path / "b.png"), pixels(np.uint16, 8, 9))
    value = {"bytes": None, "path": str(tmp_path / "a.png"), "more": [str(tmp_path / "b.png")]}
    with pytest.raises(UnreadableImageError, match=r"8 x 8 pixels of uint8 in .*a\.png, 8 x 9 pixels of uint16 in"):
        decode(value, None, "a")


def ome_set(folder, planes):
    """An OME-TIFF with one file per channel, as microscopes write it: each file describes all of them."""
    names = [f"a_ch{channel}.ome.tif" for channel in range(len(planes))]
    blocks = "".join(
        f'<TiffData FirstC="{c}" FirstZ="0" FirstT="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{c:08d}-0000-0000-0000-000000000000</UUID></TiffData>'
        for c, name in enumerate(names)
    )
    height, width = planes[0].shape
    channels = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(len(planes)))
    for c, (name, plane) in enumerate(zip(names, planes, strict=True)):
        description = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{c:08d}-0000-0000-0000-000000000000"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYCZT" Type="uint16" SizeX="{width}" SizeY="{height}" SizeC="{len(planes)}" SizeZ="1" '
            f'SizeT="1">{channels}{blocks}</Pixels></Image></OME>'
        )
        tifffile.imwrite(folder / name, plane, description=description, metadata=None)
    return names


def test_an_ome_tiff_of_a_file_per_channel(tmp_path):
    """Neither one of its files nor all of them are separate images; joined by --channel_files they are one image."""
    planes = pixels(np.uint16, 2, 24, 40)
    first, second = (str(tmp_path / name) for name in ome_set(tmp_path, planes))
    for value in ({"bytes": None, "path": first}, {"bytes": Path(second).read_bytes(), "path": None}):
        with pytest.raises(
            UnreadableImageError, match=r"part of an OME-TIFF of 2 files, a_ch0\.ome\.tif.*--channel_files"
        ):
            decode(value, None, "a")
    joined = decode({"bytes": None, "path": first, "more": [second]}, None, "a")
    np.testing.assert_array_equal(joined, np.moveaxis(planes, 0, 2))


def test_a_table_follows_its_files(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), pixels(np.uint8, 8, 8))
    sample = [(str(tmp_path / "a.png"),)] * 3
    tables = [file_table({"image": sample}, str(tmp_path / "cache"))]
    cv2.imwrite(str(tmp_path / "a.png"), pixels(np.uint8, 9, 9))
    tables.append(file_table({"image": sample}, str(tmp_path / "cache")))
    assert [len(table) for table in tables] == [3, 3]
    assert tables[0]._fingerprint != tables[1]._fingerprint, "keys and statistics are cached under it"
