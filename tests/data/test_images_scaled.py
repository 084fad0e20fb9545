"""Streaming, subset and cache: the same images and pixels as the plain way, from every kind of file."""

import random
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_dbp.data import cache
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.shards import ShardedImages
from hf_dbp.data.subset import chosen, content_key, keys_digest, split_rows

KINDS = ("parquet", "webdataset", "imagefolder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


def load(folder: Path, **fields: object):
    fields = {"cache_dir": None if fields.get("streaming") else str(folder / ".." / "arrow")} | fields
    if not fields.get("streaming"):
        fields.setdefault("image_column_name", "jpg" if list(folder.glob("*.tar")) else None)
    return load_images(ImageSource(train_dir=str(folder), **fields))


# ---- the subset ----


def test_a_share_is_near_its_size_and_part_of_a_larger_one():
    keys = np.array([content_key(str(i).encode()) for i in range(20_000)], np.uint64)
    tenth, fifth, other = chosen(keys, 0.1, 0), chosen(keys, 0.2, 0), chosen(keys, 0.1, 1)
    for mask, share in ((tenth, 0.1), (fifth, 0.2), (other, 0.1)):
        assert abs(mask.sum() - 20_000 * share) < 4 * np.sqrt(20_000 * share * (1 - share))
    assert not (tenth & ~fifth).any()
    assert 0.05 < (tenth & other).sum() / tenth.sum() < 0.2  # another seed, another tenth
    assert chosen(keys, 1.0, 0).all()


def test_the_subset_does_not_depend_on_how_the_images_are_stored(tmp_path, photographs, shuffled, write):
    expected = [key for key in map(content_key, photographs[20:]) if chosen(np.array([key], np.uint64), 0.3, 5)[0]]
    assert 30 < len(expected) < 80
    share = {"train_fraction": 0.3, "subset_seed": 5}
    for kind in KINDS:
        for name, images in (("plain", photographs), ("shuffled", shuffled)):
            folder = write(tmp_path / kind / name, kind, images, shards=3 if name == "plain" else 7)
            ways = [{"streaming": True}, {"streaming": True, "cache_dir": str(tmp_path / "c"), "cache_short_side": 24}]
            for way in [{}, *ways] if name == "plain" else ways:
                train, _ = load(folder, **share, **way)
                keys = train.keys.tolist()
                assert sorted(keys) == sorted(expected), (kind, name, way)
                if name == "plain":
                    assert keys == expected, "rows have the order of the files in every mode"
                assert train.subset["of"] == 180 and train.subset["images"] == len(train) == len(expected)
                assert train.subset["digest"] == keys_digest(expected)


def test_a_split_is_the_same_for_streamed_and_converted_data(tmp_path, photographs, write):
    folder = write(tmp_path / "data", "parquet", photographs)
    (folder / "validation-00000-of-00001.parquet").unlink()
    lists = [load(folder, train_val_split=0.2, max_train_samples=50, **way) for way in ({}, {"streaming": True})]
    for ours, theirs in zip(*lists, strict=True):
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    train, validation = split_rows(100, 0.25, 1)
    assert len(validation) == 25 and sorted([*train, *validation]) == list(range(100))


# ---- reading in place ----


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_images_are_the_converted_ones_in_any_order_of_access(tmp_path, photographs, write, kind):
    folder = write(tmp_path / "data", kind, photographs)
    plain, streamed = load(folder), load(folder, streaming=True)
    for ours, theirs in zip(plain, streamed, strict=True):
        assert len(ours) == len(theirs)
        order = list(range(len(ours)))
        random.Random(1).shuffle(order)
        assert all((ours[index] == theirs[index]).all() for index in order)


def test_a_piece_is_read_once_and_memory_is_bounded(tmp_path, photographs, write, monkeypatch):
    train, _ = load(write(tmp_path / "data", "parquet", photographs), streaming=True)
    reads: list[int] = []
    read = ShardedImages.read
    monkeypatch.setattr(ShardedImages, "read", lambda self, piece: reads.append(piece) or read(self, piece))
    counts, sizes = train.samples.blocks()
    assert counts.sum() == 180 and len(counts) == 24  # 4 files of 45 images in groups of 8
    for index in range(180):
        train[index]
    assert reads == sorted(set(reads)) and len(reads) <= 24
    monkeypatch.setattr("hf_dbp.data.shards.BUFFER_BYTES", int(3 * sizes.max()))
    fresh, _ = load(tmp_path / "data", streaming=True)
    for index in range(180):
        fresh[index]
    assert len(fresh.samples._buffer) <= 4


def test_what_cannot_be_streamed_is_said(tmp_path, photographs, write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "numbers").mkdir()
    pq.write_table(pa.table({"image": [[1, 2], [3, 4]]}), tmp_path / "numbers" / "train.parquet")
    with pytest.raises(ValueError, match="not encoded images; leave out --streaming"):
        load(tmp_path / "numbers", streaming=True)
    folder = write(tmp_path / "broken", "parquet", photographs)
    file = folder / "train-00001-of-00004.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="train-00001-of-00004"):
        load(folder, streaming=True)
    with pytest.raises(ValueError, match="not both"):
        ImageSource(train_dir="x", train_fraction=0.5, max_train_samples=3)
    with pytest.raises(ValueError, match="leaves none"):
        load(write(tmp_path / "data", "parquet", photographs), streaming=True, train_fraction=1e-6)


# ---- the cache ----


def test_a_cache_holds_the_same_pictures_smaller(tmp_path, photographs, write):
    folder = write(tmp_path / "data", "webdataset", photographs)
    streamed, _ = load(folder, streaming=True)
    same, _ = load(folder, streaming=True, cache_dir=str(tmp_path / "c"), cache_short_side=48)
    small, validation = load(folder, streaming=True, cache_dir=str(tmp_path / "c"), cache_short_side=24)
    assert (len(same), len(small), len(validation)) == (180, 180, 20)
    for index in (0, 1, 77, 179):
        assert (same[index] == streamed[index]).all()
        assert min(small[index].shape[:2]) == 24 and small[index].dtype == np.uint8
        assert abs(small[index].mean() - streamed[index].mean()) < 3


def test_a_cache_is_made_once_and_an_interrupted_one_is_finished(tmp_path, photographs, write, monkeypatch):
    monkeypatch.setattr(cache, "PART_ROWS", 50)
    monkeypatch.setattr(cache, "THREADS", 1)
    folder = write(tmp_path / "data", "parquet", photographs)
    way = {"streaming": True, "cache_dir": str(tmp_path / "c"), "train_fraction": 0.5}
    reads: list[int] = []
    read = ShardedImages.read

    def counted(self: ShardedImages, piece: int, stop_at: int = 10**9):
        if len(reads) == stop_at:
            raise ValueError("the connection broke")
        reads.append(piece)
        return read(self, piece)

    monkeypatch.setattr(ShardedImages, "read", lambda self, piece: counted(self, piece, 20))
    with pytest.raises(ValueError, match="the connection broke"):
        load(folder, **way)
    monkeypatch.setattr(ShardedImages, "read", counted)
    first, _ = load(folder, **way)
    done = len(reads)
    assert done <= 24 + 3 + 2 + 7 + 3, "parts that were done are not read again"
    again, _ = load(folder, **way)
    assert len(reads) <= done + 2, "only the first image of each list is looked at"
    streamed, _ = load(folder, streaming=True, train_fraction=0.5)
    assert first.keys.tolist() == again.keys.tolist() == streamed.keys.tolist()
    assert [image.tobytes() for image in first] == [image.tobytes() for image in streamed]


def test_unreadable_images_are_left_out_of_a_cache_and_listed(tmp_path, photographs, write):
    broken = list(photographs)
    broken[60], broken[100] = broken[60][:300], b"text"
    folder = write(tmp_path / "data", "imagefolder", broken)
    train, _ = load(folder, streaming=True, cache_dir=str(tmp_path / "c"))
    assert len(train) == 178
    found = train.unreadable_images()
    assert len(found) == 2 and all(path.endswith(".jpg") and reason for path, reason in found.items())
    with pytest.raises(ValueError, match="more than 1 unreadable"):
        load(folder, streaming=True, cache_dir=str(tmp_path / "d"), max_unreadable=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_none_readable_is_an_error(tmp_path, write, streaming):
    folder = write(tmp_path / "data", "imagefolder", [b"text %d" % i for i in range(20)])
    with pytest.raises(ValueError, match="none of the 18 images can be read"):
        load(folder, streaming=streaming)
