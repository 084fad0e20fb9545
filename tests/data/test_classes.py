"""Labels from folders, tables and CSV files; every kind of label that nothing can be learned from is refused in one
line."""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dbp.data.classes import ClassSource, class_labels, load_classified, ordered
from hf_dbp.errors import UserError


def pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), 10 * number, np.uint8)).save(path)


def csv_file(folder, text, name="labels.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def source(folder, path, **options):
    return ClassSource(train_dir=path, cache_dir=str(folder / "cache"), **options)


@pytest.fixture
def eight(tmp_path):
    """Eight pictures; the first four may be one class and the last four another."""
    pictures(tmp_path, [f"images/{n}.png" for n in range(8)])
    return tmp_path


def rows(labels, start=0):
    return "".join(f"images/{start + n}.png,{label}\n" for n, label in enumerate(labels))


def test_a_csv_file_of_paths_and_labels(eight):
    path = csv_file(eight, "path,class\n" + rows(["cat"] * 4 + ["dog"] * 4))
    train, validation = load_classified(source(eight, path, train_val_split=0.25))
    assert (train.names, train.counts_K.tolist(), validation.counts_K.tolist()) == (["cat", "dog"], [3, 3], [1, 1])
    seen = sorted(int(images.images[n].mean()) // 10 for images in (train, validation) for n in range(len(images)))
    assert seen == list(range(8))
    for images in (train, validation):
        for number in range(len(images)):
            assert images.labels_N[number] == (images.images[number].mean() >= 40)


def test_two_files_columns_of_other_names_and_tabs(eight):
    train = csv_file(eight, "photo\tkind\n" + rows(["10", "9"] * 3).replace(",", "\t"), "train.tsv")
    test = csv_file(eight, "photo\tkind\n" + rows(["9", "9"], 6).replace(",", "\t"), "test.tsv")
    names = {"image_column_name": "photo", "label_column_name": "kind"}
    found, tested = load_classified(source(eight, train, validation_dir=test, **names))
    assert found.names == ["9", "10"]  # numbers by value, not by letters
    assert (len(found), tested.labels_N.tolist()) == (6, [0, 0])


def test_a_table_with_classes_keeps_their_order_and_names(tmp_path, caplog):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant", "bee"])}
    )
    image = Image.new("RGB", (8, 8))
    for split, labels in (("train", [0, 1, 0, 1]), ("validation", [0])):
        data = datasets.Dataset.from_dict({"image": [image] * len(labels), "label": labels}, features)
        (tmp_path / "set").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "set" / f"{split}.parquet")
    train, validation = load_classified(source(tmp_path, str(tmp_path / "set")))
    assert (train.names, train.labels_N.tolist(), validation.labels_N.tolist()) == (
        ["zebra", "ant", "bee"], [0, 1, 0, 1], [0],
    )  # fmt: skip
    assert "no training image of 1 classes (bee): what they are cannot be learned" in caplog.text
    assert "no validation image of 1 classes (ant)" in caplog.text


@pytest.mark.parametrize(
    ("labels", "order"),
    [(["b", "a"], ["a", "b"]), (["10", "9", "-1"], ["-1", "9", "10"]), (["10", "9", "x"], ["10", "9", "x"])],
)
def test_the_order_of_names(labels, order):
    assert ordered(labels) == order


def table(values, kind=None):
    features = None if kind is None else datasets.Features({"label": kind})
    return datasets.Dataset.from_dict({"label": values}, features)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1, None, 2, None], None, "2 of 4 images have no label in column 'label', the first in row 1"),
        (["a", " ", "b"], None, "1 of 3 images have no label"),
        ([1.0, float("nan")], None, "1 of 2 images have no label"),
        ([0, -1, 1], datasets.ClassLabel(names=["a", "b"]), "1 of 3 images have no label"),  # as the Hub's test sets
        ([1.0, 2.5], None, "column 'label' holds 2.5; a label is a name or a whole number"),
        ([["a"], ["a", "b"]], None, "give each image one class, a name or a number"),
        (["Cat", "cat", "dog"], None, "the classes 'Cat', 'cat' differ only in case or spaces"),
    ],
)
def test_labels_that_are_none_are_refused(values, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        class_labels(table(values, kind), None, "the data")
    assert "\n" not in str(caught.value)


def test_whole_numbers_may_come_as_floats_and_truth_values_as_they_are():
    assert class_labels(table([1.0, 2.0]), None, "the data") == (["1", "2"], ["1", "2"])
    assert class_labels(table([True, False]), None, "the data") == (["True", "False"], ["False", "True"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'image'; pass --image_column_name with one of nothing"),
        ("path,class\n", "has a header and no row"),
        ("where,class\n" + rows("ab"), "has no column 'image'; pass --image_column_name with one of where, class"),
        ("path,kind\n" + rows("ab"), "has no column 'label'; pass --label_column_name with one of path, kind"),
        ("path,class\n" + rows("ab") + "images/99.png,a\n", "names 1 files of 3 that are not there, e.g. .*99.png"),
        ("path,class\n" + rows("ab") + ",a\n", "names 1 files of 3 that are not there"),
        ("path,class\n" + rows("ab") + "images/0.png,b\n", "names 1 files more than once, e.g. .*0.png"),
        ('path,class\n"images/0.png,a\n', "cannot be read as a CSV file"),
        ("path,class\n" + rows(["a", ""]), "1 of 2 images have no label in column 'label', the first in row 1"),
        ("path,class\n" + rows("aaaa"), "the training images have 1 class .a.; a classifier needs two"),
        ("path,class\n" + rows("abcd"), "none of the 4 classes has two images"),
    ],
)
def test_csv_files_that_cannot_be_are_refused_by_one_line(eight, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_classified(source(eight, csv_file(eight, text)))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_no_csv_file(eight):
    (eight / "odd.csv").write_bytes(b"path,class\nimages/0.png,\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        load_classified(source(eight, str(eight / "odd.csv")))


def test_classes_that_training_lacks_and_flags_that_do_not_fit(eight):
    train = csv_file(eight, "path,class\n" + rows("aabb"), "train.csv")
    test = csv_file(eight, "path,class\n" + rows("ac", 4), "test.csv")
    for options, message in (
        ({"validation_dir": test}, "1 validation classes are not in training, e.g. 'c'"),
        ({"validation_dir": str(eight)}, "both CSV files or both folders"),
        ({"channel_files": ["*_a.png"]}, "names the files of a folder, not those of a CSV file"),
    ):
        with pytest.raises(UserError, match=message):
            load_classified(source(eight, train, **options))
    with pytest.raises(UserError, match="have masks but no class"):
        ClassSource(dataset_name="wire_bonding")


def test_pictures_outside_of_class_folders_are_refused(tmp_path):
    pictures(tmp_path, ["images/cat/0.png", "images/dog/0.png", "images/stray.png"])
    with pytest.raises(UserError, match=r"1 of 3 pictures lie in no class folder, e.g. .*stray.png"):
        load_classified(source(tmp_path, str(tmp_path / "images")))


def test_a_share_of_the_training_images_is_chosen_by_their_content(tmp_path):
    pictures(tmp_path, [f"images/{name}/{n}.png" for name in ("cat", "dog") for n in range(12)])
    whole, tested = load_classified(source(tmp_path, str(tmp_path / "images")))
    part, same = load_classified(source(tmp_path, str(tmp_path / "images"), train_fraction=0.5))
    assert 0 < len(part) < len(whole) and len(same) == len(tested)
    few, _ = load_classified(source(tmp_path, str(tmp_path / "images"), max_train_samples=7))
    assert len(few) == 7 and few.counts_K.sum() == 7
