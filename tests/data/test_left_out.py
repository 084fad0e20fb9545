"""Images used + images left out, each with its reason = images that are there, whichever way they are read.

Folders are drawn: nested, with class folders called train or test, odd characters in every name, links, hidden files,
kinds that nothing reads, masks; parquet files and tars of mixed members whose names may speak of splits.
"""

import argparse
import io
import itertools
import json
import logging
import os
import tarfile
import tempfile
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_dbp.data.folders import open_folder, shard_splits
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.pairing import pair_folders
from hf_dbp.data.sources import encoded_splits, read_splits, streamed_splits
from hf_dbp.data.subset import content_key, readable_bytes
from hf_dbp.inspection.reading import read_source

several = settings(
    max_examples=int(os.environ.get("CASES", "25")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
ODD = "[ab]*?#%20 é日::&'\"{}~!$@+=,;()"
NAMES = st.one_of(
    st.sampled_from(["cat", "dog", "a b", "x[1]", "[ab]", "*", "50%", "#1", "é", "a::b", "{x}", "train", "test_1"]),
    st.text(st.sampled_from(ODD), min_size=1, max_size=4).filter(lambda name: name.strip() == name),
)
FOLDERS = st.one_of(st.sampled_from(["train", "val", "validation", "test", "unlabeled"]), NAMES)
FOREIGN = (".heic", ".dcm", ".jp2", ".npz", "")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


counter = itertools.count()


def png() -> bytes:
    """A picture unlike any other."""
    number = next(counter)
    pixels = np.array([[[number % 256, number // 256 % 256, number // 65536]] * 4] * 4, np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@st.composite
def trees(draw):
    """Files of a folder: relative path -> kind; no two pictures of one name in a folder."""
    found = {}
    for _ in range(draw(st.integers(3, 9))):
        parts = draw(st.lists(FOLDERS, max_size=3))
        kind = draw(st.sampled_from(["picture"] * 6 + ["foreign", "plain", "hidden"]))
        suffix = {
            "picture": draw(st.sampled_from([".png", ".PNG", ".jpg", ".tiff"])),
            "foreign": draw(st.sampled_from(FOREIGN)),
            "plain": ".txt",
            "hidden": ".png",
        }[kind]
        stem = f"{draw(NAMES)}{len(found)}"
        found["/".join([*parts, ("." if kind == "hidden" else "") + stem + suffix])] = kind
    return found


def keys_of(splits, column) -> dict[str, list[int]]:
    return {
        split: [content_key(readable_bytes(data[index][column])) for index in range(len(data))]
        for split, data in splits.items()
    }


def both_ways(folder: Path, cache: Path, **fields):
    """What is used and what is left out: the same converted and streamed."""
    source = ImageSource(train_dir=str(folder), cache_dir=str(cache), **fields)
    encoded, streamed = encoded_splits(source), streamed_splits(source)
    keys = keys_of(encoded.splits, encoded.column)
    assert keys == keys_of(streamed.splits, streamed.column)
    assert encoded.left_out.record() == streamed.left_out.record()
    return [key for part in keys.values() for key in part], encoded.left_out


@several
@given(trees(), NAMES, st.lists(st.sampled_from(["inside", "outside", "above", "loop"]), max_size=2, unique=True))
def test_folders_of_pictures(tree, name, links):
    with tempfile.TemporaryDirectory() as place:
        root, masks = Path(place, name, "images"), Path(place, name, "masks")
        for file, kind in tree.items():
            put(root / file, png())
            if kind == "picture":
                put((masks / file).with_suffix(".png"), cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes())
        there = [kind for kind in tree.values() if kind != "plain"]
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        for link in links:
            if link == "outside":
                put(Path(place, "elsewhere", "x.png"), png())
                put((masks / "zz_link" / "x.png"), cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes())
                there.append("picture")
                (root / "zz_link").symlink_to(Path(place, "elsewhere"), target_is_directory=True)
            elif link == "inside" and folders:
                (root / "zz_twice").symlink_to(folders[0], target_is_directory=True)
                there.append("link")
            elif link == "above":
                (root / "zz_above").symlink_to("..", target_is_directory=True)
                there.append("link")
            elif link == "loop":
                (root / "zz_loop").symlink_to("zz_loop")
                there.append("link")  # a file that cannot be read, without a suffix
        if "picture" not in there:
            with pytest.raises(ValueError, match="expected pictures"):
                open_folder(str(root))
            return
        used, left_out = both_ways(root, Path(place, "cache"))
        assert len(used) == len(set(used))
        assert len(used) + left_out.counts.total() == len(there)
        assert all(left_out.examples[reason] for reason in left_out.counts)
        assert left_out.other_files.total() == len(tree) - sum(kind != "plain" for kind in tree.values())

        pairing = pair_folders(str(root), str(masks))
        assert sum(map(len, pairing.pairs.values())) == len(used)
        of_masks = sum(n for reason, n in pairing.left_out.counts.items() if reason.startswith("masks: "))
        assert pairing.left_out.counts.total() - of_masks == left_out.counts.total()
        args = argparse.Namespace(
            folder=str(root), dataset_name=None, masks=None, mask_suffix="", channel_files=None, background_dir=None
        )
        content = read_source(args)
        assert sum(map(len, content.images.values())) == len(used)
        assert content.left_out.lines() == left_out.lines()
        splits, _ = read_splits(ImageSource(train_dir=str(root), cache_dir=str(Path(place, "cache"))))
        assert sum(map(len, splits.values())) == len(used)


SHARD_NAMES = st.sampled_from(["train", "test", "bus", "steam_train", "train-00000-of-00002", "val-00000-of-00001",
                               "validation", "trains", "[a]", "50%#", "é", "data_train", "data_test"])  # fmt: skip


@several
@given(
    st.lists(st.tuples(st.lists(FOLDERS, max_size=2), SHARD_NAMES, st.integers(1, 3)), min_size=1, max_size=5),
    st.sampled_from(["struct", "binary", "large", "paths", "struct of paths"]),
    NAMES,
)
def test_parquet_files(files, kind, name):
    with tempfile.TemporaryDirectory() as place:
        root, there = Path(place, name, "set"), []
        for number, (parts, stem, count) in enumerate(files):
            path = Path(root, *parts, f"{stem}_{number}.parquet")
            images = [png() for _ in range(count)]
            there += images
            path.parent.mkdir(parents=True, exist_ok=True)
            relative = [
                f"{number}_{index}.bin" for index in range(count)
            ]  # unlike pictures, to be found by paths alone
            if "paths" in kind:
                relative = [f"{number}_{index}.png" for index in range(count)]
                for file, image in zip(relative, images, strict=True):
                    put(path.parent / ".files" / file, image)
                relative = [f".files/{file}" for file in relative]
            column = {
                "struct": pa.array([{"bytes": image, "path": "x.png"} for image in images]),
                "binary": pa.array(images, pa.binary()),
                "large": pa.array(images, pa.large_binary()),
                "paths": pa.array(relative),
                "struct of paths": pa.array([{"bytes": None, "path": file} for file in relative],
                                            pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            }[kind]  # fmt: skip
            pq.write_table(pa.table({"image": column, "label": pa.array(["a"] * count)}), path)
        put(root / "beside.png", png())
        put(root / "README.md", b"")
        used, left_out = both_ways(root, Path(place, "cache"))
        hidden = sum(n for reason, n in left_out.counts.items() if reason.startswith("hidden"))
        assert hidden == ("paths" in kind) * len(there)
        assert set(used) <= {content_key(image) for image in there}
        assert len(used) + left_out.counts.total() - hidden == len(there) + 1
        assert left_out.other_files == {".md": 1}


MEMBERS = st.sampled_from([".jpg", ".png", ".jpeg", ".JPG", ".cls", ".txt", ".seg.png", ".heic", ".v2.jpg"])


@several
@given(
    st.lists(
        st.tuples(SHARD_NAMES, st.lists(st.lists(MEMBERS, min_size=1, max_size=3, unique=True), max_size=5)),
        min_size=1,
        max_size=3,
    ),
    NAMES,
)
def test_tars_of_mixed_members(tars, name):
    with tempfile.TemporaryDirectory() as place:
        root, there, clash = Path(place, name), 0, False
        for number, (stem, samples) in enumerate(tars):
            root.mkdir(exist_ok=True)
            with tarfile.open(root / f"{stem}_{number}.tar", "w") as tar:
                for index, members in enumerate(samples):
                    plain = {m.lower() for m in members if m.count(".") == 1 and m.lower() in (".jpg", ".png", ".jpeg")}
                    clash |= len(plain) > 1
                    for suffix in members:
                        content = b"7" if suffix == ".cls" else b"text" if suffix == ".txt" else png()
                        there += suffix not in (".cls", ".txt")
                        member = tarfile.TarInfo(f"./{index:03d}{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        source = ImageSource(train_dir=str(root), cache_dir=str(Path(place, "cache")))
        try:
            used, left_out = both_ways(root, Path(place, "cache"))
        except ValueError as error:
            assert (clash and "name the images by --image_column_name" in str(error)) or "no images" in str(error)
            with pytest.raises(ValueError, match=str(error)[-20:].replace("*", ".")):
                streamed_splits(source)
            return
        assert not clash and len(set(used)) == len(used)
        assert len(used) + left_out.counts.total() == there


# ---- the cases that were met in the field ----


def picture_folders(root: Path, **counts: int) -> str:
    for folder, count in counts.items():
        for index in range(count):
            put(root / folder.replace("_", "/") / f"{index}.png", png())
    return str(root)


def loaded(folder: str, cache: Path, **fields) -> tuple[int, dict]:
    train, validation = load_images(ImageSource(train_dir=folder, cache_dir=str(cache), **fields))
    return len(train) + len(validation), train.left_out.record()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_called_train_is_no_split(tmp_path, streaming, caplog):
    folder = picture_folders(tmp_path / "classes", train=3, bus=10, car=7)
    used, left_out = loaded(folder, tmp_path / "cache", streaming=streaming)
    assert (used, left_out["count"]) == (20, 0)
    assert "classes/train is not used as a split, because pictures lie beside it (bus/, car/)" in caplog.text
    assert left_out["notes"] and "--train_dir" in left_out["notes"][0]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_a_split_that_is_not_used_are_counted(tmp_path, streaming, caplog):
    folder = picture_folders(tmp_path / "splits", train_a=3, val_a=2, test_a=4)
    used, left_out = loaded(folder, tmp_path / "cache", streaming=streaming)
    assert used == 5
    assert left_out["reasons"] == {
        "images of a split used for neither training nor validation": {"count": 4, "examples": ["test"]}
    }
    assert "4 left out: images of a split used for neither training nor validation; e.g. test" in caplog.text


def test_names_of_shards():
    def splits(*files):
        return {split: len(part) for split, part in shard_splits(files)[0].items()}

    assert splits("train-00000-of-00002.parquet", "train-00001-of-00002.parquet") == {"train": 2}
    assert splits("data/train-0-of-1-ab12.parquet", "data/test-0-of-1-cd.parquet") == {"train": 1, "test": 1}
    assert splits("train/0.tar", "val/0.tar", "test/0.tar") == {"train": 1, "validation": 1, "test": 1}
    assert splits("food_train.parquet", "food_dev.parquet") == {"train": 1, "validation": 1}
    for ambiguous in (
        ["train.parquet", "bus.parquet", "car.parquet"],
        ["steam_train_01.parquet", "crash_test_01.parquet"],
        ["a/train.parquet", "b/test.parquet"],
        ["test.parquet", "val.parquet"],
    ):
        assert splits(*ambiguous) == {"train": len(ambiguous)}


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_of_three_extensions(tmp_path, streaming):
    for number, suffix in enumerate(("jpg", "png", "jpeg")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for index in range(10):
                member = tarfile.TarInfo(f"{index}.{suffix if index else 'jpg'}")
                member.size = len(content := png())
                tar.addfile(member, io.BytesIO(content))
    assert loaded(str(tmp_path), tmp_path / ".cache", streaming=streaming)[0] == 30
    used, left_out = loaded(str(tmp_path), tmp_path / ".cache", streaming=streaming, image_column_name="jpg")
    assert (used, left_out["count"]) == (12, 18)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_with_brackets_is_that_path(tmp_path, streaming):
    """The folder [ab] is not the folder a."""
    for name, count in (("a", 3), ("[ab]", 5)):
        table = pa.table({"image": pa.array([png() for _ in range(count)], pa.binary())})
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "x[1].parquet")
    assert loaded(str(tmp_path / "[ab]"), tmp_path / "cache", streaming=streaming)[0] == 5
    os.chdir(tmp_path)
    assert loaded("[ab]", tmp_path / "cache", streaming=streaming)[0] == 5


def test_the_folder_of_a_pattern_is_literal(tmp_path):
    folder = tmp_path / "x"
    for index, channel in itertools.product(range(4), ("l*t[1]/a_{}_ch0.png", "l*t[1]/a_{}_ch1.png", "{}.png")):
        put(folder / channel.format(index), png())
    patterns = ["l*t[1]/*_ch0.png", "l*t[1]/*_ch1.png"]
    used, left_out = loaded(str(folder), tmp_path / "cache", channel_files=patterns, num_channels=2)
    assert (used, left_out["count"]) == (4, 4)
    assert list(left_out["reasons"]) == ["pictures that fit no pattern of --channel_files"]


def test_masks_beside_their_images_are_not_trained_on(tmp_path, caplog):
    for index, name in itertools.product(range(5), ("{}.png", "{}-mask.png")):
        put(tmp_path / name.format(f"{index:02d}"), png())
    caplog.set_level(logging.WARNING)
    for streaming in (False, True):
        used, left_out = loaded(str(tmp_path), tmp_path / ".c", mask_suffix="-mask", streaming=streaming)
        assert (used, left_out["count"]) == (5, 5)
    pairing = pair_folders(str(tmp_path), str(tmp_path), "-mask")
    pairs = pairing.pairs["train"]
    assert pairs["00"] == ((str(tmp_path / "00.png"),), (str(tmp_path / "00-mask.png"),)) and len(pairs) == 5
    assert pairing.left_out.counts.total() == 0
    with pytest.raises(ValueError, match=r"in one folder.*--mask_suffix _mask"):
        pair_folders(str(tmp_path), str(tmp_path))


def test_masks_that_lie_with_the_images_of_another_folder_are_counted(tmp_path):
    for name in ("images/a.png", "images/a_mask.png", "images/b.png", "masks/a_mask.png", "masks/b_mask.png"):
        put(tmp_path / name, png())
    pairing = pair_folders(str(tmp_path / "images"), str(tmp_path / "masks"), "_mask")
    assert list(pairing.pairs["train"]) == ["a", "b"]
    assert pairing.left_out.record()["reasons"] == {
        "masks, recognised by their --mask_suffix": {"count": 1, "examples": [str(tmp_path / "images" / "a_mask.png")]}
    }


def test_the_record_comes_back(tmp_path):
    from hf_dbp.data.left_out import LeftOut

    folder = picture_folders(tmp_path / "a", train=2, bus=1)
    put(tmp_path / "a" / "x.heic", b"")
    put(tmp_path / "a" / "x.txt", b"")
    left_out = open_folder(folder).left_out
    assert LeftOut.of(json.loads(json.dumps(left_out.record()))) == left_out
    assert left_out.lines() == [
        "1 left out: .heic files, which are not supported; convert images to PNG or TIFF; e.g. x.heic"
    ]
