"""What other libraries write is read exactly, or refused in one line: never with another shape, type or channel."""

import struct

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps
from reading_table import PAGE, with_table
from test_readers import png_by_hand
from written import Layout, drawn, layouts, write_tiff

from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.readers import read_picture
from hf_dbp.data.values import pixel_values

RNG = np.random.default_rng(0)
TABLE = layouts()


def values(source):
    """The values in a file (H, W, C) as stored."""
    array = np.asarray(read_picture(source))
    return array if array.ndim == 3 else array[..., None]


def check_tiff(path, image, kind):
    write_tiff(path, image, kind)
    for source in (str(path), path.read_bytes()):
        found = values(source)
        if kind.lossy:
            np.testing.assert_allclose(found, gdal(path), atol=3)
        else:
            assert (found.dtype, found.shape) == (image.dtype, image.shape), kind
            assert np.array_equal(found, image), kind


def gdal(path):
    import rasterio

    with rasterio.open(path) as file:
        return np.moveaxis(file.read().astype(int), 0, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_every_tiff_of_the_table(tmp_path):
    for kind in TABLE:
        check_tiff(tmp_path / "a.tif", drawn(RNG, kind.depth, 37, 43, kind.channels), kind)


@pytest.mark.parametrize("kind", TABLE[:: len(TABLE) // 40], ids=str)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_some_tiffs_of_the_table(tmp_path, kind):
    check_tiff(tmp_path / "a.tif", drawn(RNG, kind.depth, 37, 43, kind.channels), kind)


@pytest.mark.parametrize("compression", ["LZW", "ZSTD", "DEFLATE"])
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_beyond_pictures_keep_depth_and_number(tmp_path, compression, channels):
    """The main case, two channels of 16 bits, which OpenCV turned into one channel of 8 bits."""
    image = drawn(RNG, "uint16", 24, 20, channels)
    write_tiff(tmp_path / "a.tif", image, Layout(compression, "uint16", channels, "predictor 2"))
    found = decode({"bytes": None, "path": str(tmp_path / "a.tif")}, None, "a")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, image)


# ---- any array, any writer ----


def png_of_opencv(path, image):
    done, content = cv2.imencode(".png", image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] > 1 else image)
    path.write_bytes(content.tobytes() if done else b"")


def npy_by_hand(path, image):
    """By the format's definition, Fortran order and big-endian included."""
    descr = image.dtype.newbyteorder(">").str
    header = f"{{'descr': '{descr}', 'fortran_order': True, 'shape': {image.shape}, }}"
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    data = image.astype(descr).tobytes(order="F")
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data)


def by_pillow(suffix, **options):
    def write(path, image):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture.save(path, suffix, **options)

    return write


ANY = (
    (*np.sctypeDict.values(),)
    if False
    else ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
)
WRITERS = {  # name -> writer, its depths and channels; None for any up to 5
    "PNG of OpenCV": (png_of_opencv, ("uint8", "uint16"), (1, 3, 4)),
    "npy": (npy_by_hand, (*ANY, "int64", "uint64", "float16"), None),
    "PNG of Pillow": (by_pillow("PNG"), ("uint8",), (1, 3, 4)),
    "16-bit PNG of Pillow": (by_pillow("PNG"), ("uint16",), (1,)),
    "TIFF of Pillow": (by_pillow("TIFF"), ("uint8",), (1, 3, 4)),
    "LZW of Pillow": (by_pillow("TIFF", compression="tiff_lzw"), ("uint8", "uint16", "float32"), (1,)),
    "BMP of Pillow": (by_pillow("BMP"), ("uint8",), (1, 3)),
    "WebP of Pillow": (by_pillow("WEBP", lossless=True, exact=True), ("uint8",), (3, 4)),
}


@st.composite
def cases(draw):
    """A writer's name or a TIFF's layout, and an array that it can hold."""
    name = draw(st.sampled_from([*WRITERS, *["GDAL"] * 8]))
    kind = draw(st.sampled_from([kind for kind in TABLE if not kind.lossy])) if name == "GDAL" else None
    _, depths, channels = WRITERS.get(name, (None, (), None))
    depth = kind.depth if kind else draw(st.sampled_from(depths))
    count = kind.channels if kind else draw(st.sampled_from(channels or (1, 2, 3, 4, 5)))
    shape = (draw(st.integers(6, 40)), draw(st.integers(6, 40)), count)
    numbers = {"elements": {"allow_nan": False, "allow_infinity": False}} if depth.startswith("float") else {}
    if draw(st.booleans()):
        return name, kind, drawn(np.random.default_rng(draw(st.integers(0, 10**6))), depth, *shape)
    return name, kind, draw(arrays.arrays(depth, shape, **numbers))  # type: ignore[call-overload]


def read_or_refused(folder, case):
    """Whether the array came back as it was; one line that names the file, if it was refused."""
    name, kind, image = case
    path = folder / "a.tif"
    if kind is None:
        WRITERS[name][0](path, image)
    else:
        write_tiff(path, image, kind)
    for value in ({"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": None}):
        try:
            found = decode(value, image.shape[2], "a.tif")
        except UnreadableImageError as error:
            assert str(error).startswith("a.tif: ") and "\n" not in str(error)
            return False
        with np.errstate(over="ignore"):
            expected = pixel_values(image)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    return True


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **QUICK)
@given(case=cases())
def test_any_array_of_any_writer(tmp_path_factory, case):
    read_or_refused(tmp_path_factory.getbasetemp(), case)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(3))
def test_five_hundred_arrays_of_any_writer(tmp_path_factory, start):
    read = []

    @seed(start)
    @settings(max_examples=500, database=None, **QUICK)
    @given(case=cases())
    def look(case):
        read.append(read_or_refused(tmp_path_factory.getbasetemp(), case))

    look()
    assert len(read) >= 500 and sum(read) > 0.95 * len(read)


# ---- WhiteIsZero, few bits, orientation, colours, thumbnails ----


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("compression", ["NONE", "LZW", "PACKBITS", "DEFLATE", "CCITTFAX4", "CCITTFAX3"])
def test_white_is_zero_is_one_rule_on_every_path(tmp_path, bits, compression):
    """As Pillow and, where it can read them, OpenCV do; both leave 16-bit values as stored, which the rule inverts."""
    if "CCITT" in compression and bits > 1:
        pytest.skip("fax has one bit")
    depth, top = ("uint16" if bits == 16 else "uint8"), 2**bits - 1
    stored = RNG.integers(0, top, (24, 20, 1), dtype=depth, endpoint=True)
    found = {}
    for colours in ("MINISBLACK", "MINISWHITE"):
        more = {"photometric": colours} | ({"NBITS": bits} if bits < 8 else {})
        kind = Layout(compression, depth, 1, more=more)
        write_tiff(path := tmp_path / f"{colours}.tif", stored, kind)
        found[colours] = decode({"bytes": None, "path": str(path)}, 1, "a")[..., 0]
        if bits <= 8:
            with Image.open(path) as picture:
                np.testing.assert_array_equal(found[colours], np.asarray(picture.convert("L")))
        if bits in (1, 8):
            np.testing.assert_array_equal(found[colours], cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    full = 65535 if bits == 16 else 255
    np.testing.assert_array_equal(found["MINISWHITE"], full - found["MINISBLACK"])
    np.testing.assert_allclose(found["MINISBLACK"], stored[..., 0] * (full / top), atol=0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_turned_tiff_is_upright_as_pillow_has_it(tmp_path, orientation, compression):
    picture = Image.fromarray(drawn(RNG, "uint8", 12, 20, 3))
    picture.save(tmp_path / "a.tif", compression=compression, tiffinfo={274: orientation})
    with Image.open(tmp_path / "a.tif") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    for value in (
        {"bytes": None, "path": str(tmp_path / "a.tif")},
        {"bytes": (tmp_path / "a.tif").read_bytes(), "path": None},
    ):
        np.testing.assert_array_equal(decode(value, 3, "a"), expected)


def test_inks_become_rgb_or_are_refused(tmp_path):
    picture = Image.fromarray(drawn(RNG, "uint8", 12, 20, 3)).convert("CMYK")
    for compression in ("raw", "tiff_lzw"):
        picture.save(tmp_path / "a.tif", compression=compression)
        found = decode({"bytes": None, "path": str(tmp_path / "a.tif")}, None, "a")
        np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))
    tifffile.imwrite(tmp_path / "b.tif", drawn(RNG, "uint16", 12, 20, 4), photometric="separated")
    tifffile.imwrite(tmp_path / "c.tif", drawn(RNG, "uint8", 12, 20, 3), photometric="cielab")
    for name, colours in (("b", "SEPARATED of 16 bits"), ("c", "CIELAB of 8 bits")):
        with pytest.raises(UnreadableImageError, match=f"its colours are {colours}; write it as RGB or grey"):
            decode({"bytes": None, "path": str(tmp_path / f"{name}.tif")}, None, "a")


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
def test_a_thumbnail_before_the_image_is_passed_over(tmp_path, compression):
    image = cv2.GaussianBlur(drawn(RNG, "uint8", 48, 64, 3), (0, 0), 5)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(image, photometric="rgb", compression=compression)
    found = decode({"bytes": None, "path": str(tmp_path / "a.tif")}, None, "a")
    assert found.shape == image.shape
    np.testing.assert_allclose(found, image.astype(int), atol=20 if compression == "jpeg" else 0)


def test_a_codec_that_gives_something_else_than_the_page_states_is_refused(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", drawn(RNG, "uint16", 12, 20, 2), Layout("LZW", "uint16", 2))
    whole = tifffile.TiffPageSeries.asarray
    for change in (lambda a: a[..., 0], lambda a: a.astype(np.uint8)):
        monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda self, change=change: change(whole(self)))
        with pytest.raises(UnreadableImageError, match=r"but its pages declare uint16 of \(12, 20, 2\)"):
            decode({"bytes": None, "path": str(tmp_path / "a.tif")}, None, "a")


def test_a_compression_without_codec_is_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16), np.uint8))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    at = content.index(struct.pack("<HHL", 259, 3, 1))
    content[at + 8 : at + 10] = struct.pack("<H", 34661)  # JBIG
    with pytest.raises(UnreadableImageError, match=r"a: compression JBIG of 8-bit .* cannot be read"):
        decode({"bytes": bytes(content), "path": None}, None, "a")


def test_sixteen_bit_grey_with_alpha_keeps_its_depth():
    grey = drawn(RNG, "uint16", 12, 20, 2)
    found = decode({"bytes": png_by_hand(grey), "path": None}, 1, "a")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[..., 0], grey[..., 0])


def test_the_table_in_the_docs_is_what_happens():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "write it anew: python tests/data/reading_table.py"
