"""Images with one class each: class folders, parquet files and Hub data sets with labels, CSV files of paths.

`load_classified` makes the training and validation lists and refuses labels that cannot be learned from. A folder of
pictures, or each of its ``train``, ``validation`` ... if it has them, holds one folder per class. A CSV (or TSV) file
has a header, a column of paths relative to its own folder, and a column of labels. Labels are names or whole numbers;
class ids follow the order of the names (numbers by value), or of the data set's own class labels.

If there is no validation set, a share of each class is held out.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_dbp.data.folders import file_table
from hf_dbp.data.images import ImageList, shared_keys
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.sources import BUILT_IN, ImageSource, find_column, read_splits
from hf_dbp.data.subset import chosen, draw
from hf_dbp.data.tables import encoded_column
from hf_dbp.errors import UserError

__all__ = [
    "ClassSource",
    "ClassifiedImages",
    "class_labels",
    "image_list",
    "load_classified",
    "ordered",
    "split_classes",
]

logger = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LABEL_COLUMNS = ("label", "class", "labels", "target")
PATH_COLUMNS = ("image", "path", "file", "file_name", "filename")


@dataclasses.dataclass
class ClassSource(ImageSource):
    """Which images of which classes to load: the flags of `ImageSource` and these.

    Args:
        train_dir, validation_dir: may both be CSV files.
        label_column_name: column of the classes; default: the first of label, class, labels, target.
    """

    label_column_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name == BUILT_IN:
            raise UserError(f"the images of {BUILT_IN} have masks but no class; give --train_dir or a Hub data set")
        if self.validation_dir is not None and is_csv(self.train_dir) != is_csv(self.validation_dir):
            raise UserError("--train_dir and --validation_dir are both CSV files or both folders")
        if is_csv(self.train_dir) and self.channel_files:
            raise UserError("--channel_files names the files of a folder, not those of a CSV file")


@dataclasses.dataclass
class ClassifiedImages:
    """Images and their class ids.

    Args:
        images: the images.
        labels_N: class ids.
        names: class names by id.
    """

    images: ImageList
    labels_N: NDArray[np.int64]
    names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def counts_K(self) -> NDArray[np.int64]:
        """The number of images of each class."""
        return np.bincount(self.labels_N, minlength=len(self.names))


def is_csv(path: str | None) -> bool:
    return path is not None and Path(path).suffix.lower() in SEPARATORS


# ---- labels of a table ----


def class_labels(data: datasets.Dataset, wanted: str | None, name: str) -> tuple[list[str], list[str]]:
    """The class name of each row, and the names in order.

    Args:
        data: a table.
        wanted: the column of the labels; None for the first of `LABEL_COLUMNS`.
        name: how messages refer to the table.

    Raises:
        UserError: there is no such column, an image has no label or several, a label is neither a name nor a whole
            number, or names differ only in case or spaces.
    """
    column = next((one for one in ([wanted] if wanted else LABEL_COLUMNS) if one in data.column_names), None)
    if column is None:
        columns = ", ".join(data.column_names)
        raise UserError(f"no column {wanted or 'label'!r}; pass --label_column_name with one of {columns}")
    feature, values = data.features[column], data[column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    if any(isinstance(value, list | dict | bytes) for value in values):
        raise UserError(f"{name}: column {column!r} holds {feature}; give each image one class, a name or a number")
    bare = [row for row, value in enumerate(values) if is_missing(value)]
    if bare:
        raise UserError(
            f"{name}: {len(bare)} of {len(values)} images have no label in column {column!r}, the first in row "
            f"{bare[0]}; label them or remove them"
        )
    odd = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if odd:
        raise UserError(f"{name}: column {column!r} holds {odd[0]}; a label is a name or a whole number")
    labels = [str(int(value) if isinstance(value, float) else value).strip() for value in values]
    order = list(feature.names) if isinstance(feature, datasets.ClassLabel) else ordered(labels)
    alike = Counter(" ".join(one.casefold().split()) for one in order)
    if len(alike) < len(order):
        key = next(key for key, count in alike.items() if count > 1)
        same = [one for one in order if " ".join(one.casefold().split()) == key]
        raise UserError(
            f"{name}: the classes {', '.join(map(repr, same))} differ only in case or spaces; spell them the same"
        )
    return labels, order


def is_missing(value: Any) -> bool:
    """Whether a label is missing: null, NaN or empty text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (value == "" or str(value).isspace())


def ordered(labels: Sequence[str]) -> list[str]:
    """The distinct labels, sorted: whole numbers by value, names alphabetically."""
    found = set(labels)
    return sorted(found, key=int) if all(one.removeprefix("-").isdecimal() for one in found) else sorted(found)


def csv_table(file: str, source: ClassSource) -> datasets.Dataset:
    """A CSV file of paths and labels as a table with the columns ``image`` and ``label``.

    Raises:
        UserError: it is not a CSV file, lacks a column, names missing files, or names a file twice.
    """
    path = Path(file)
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, delimiter=SEPARATORS[path.suffix.lower()], strict=True)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a CSV file: {' '.join(str(error).split())}") from error
    found = []
    for wanted, usual, flag in (
        (source.image_column_name, PATH_COLUMNS, "--image_column_name"),
        (source.label_column_name, LABEL_COLUMNS, "--label_column_name"),
    ):
        column = next((one for one in ([wanted] if wanted else usual) if one in columns), None)
        if column is None:
            there = ", ".join(columns) or "nothing: its first line names the columns"
            raise UserError(f"{file} has no column {wanted or usual[0]!r}; pass {flag} with one of {there}")
        found.append(column)
    if not rows:
        raise UserError(f"{file} has a header and no row")
    paths = [str((path.parent / (row[found[0]] or "")).absolute()) for row in rows]
    gone = [one for one, row in zip(paths, rows, strict=True) if not row[found[0]] or not Path(one).is_file()]
    if gone:
        raise UserError(
            f"{file} names {len(gone)} files of {len(paths)} that are not there, e.g. {gone[0]}; paths count from its "
            "folder"
        )
    if twice := [one for one, count in Counter(paths).items() if count > 1]:
        raise UserError(f"{file} names {len(twice)} files more than once, e.g. {twice[0]}; leave one line of each")
    table = file_table({"image": [(one,) for one in paths]}, source.cache_dir)
    return table.add_column("label", [row[found[1]] for row in rows])


# ---- lists ----


def split_classes(labels: Sequence[str], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and test rows, both in order: the share ``share`` of each class, at least one image and never all, is
    for testing.

    Raises:
        UserError: no class has two images.
    """
    rng, classes = np.random.default_rng(seed), np.asarray(labels)
    tested = np.zeros(len(classes), np.bool_)
    for name in np.unique(classes):
        rows = rng.permutation(np.flatnonzero(classes == name))
        tested[rows[: min(max(1, round(len(rows) * share)), len(rows) - 1)]] = True
    if not tested.any():
        raise UserError(
            f"none of the {len(classes)} classes has two images, one to train and one to test on; add images, or give "
            f"test images with --validation_dir"
        )
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def image_list(data: datasets.Dataset, source: ImageSource, name: str) -> ImageList:
    """The images of a table, kept encoded, so a damaged one is detected when it is decoded."""
    column = find_column(data, source.image_column_name)
    data = encoded_column(data, column)
    return ImageList(data, column, source.num_channels, source.max_unreadable, name)


def tables_of(source: ClassSource) -> tuple[dict[str, datasets.Dataset], LeftOut]:
    """``train`` and maybe ``validation``, and what is left out."""
    if not is_csv(source.train_dir):
        return read_splits(source, classes=True)
    files = {"train": source.train_dir, "validation": source.validation_dir}
    return {split: csv_table(file, source) for split, file in files.items() if file is not None}, LeftOut()


def load_classified(source: ClassSource) -> tuple[ClassifiedImages, ClassifiedImages]:
    """The training and the validation images with their classes; the first of each is read.

    Raises:
        UserError: there are no such data, or the labels cannot be learned from: see `class_labels`; or there is only
            one class, or training lacks a class of the validation images.
    """
    splits, left_out = tables_of(source)
    left_out.warn(source.name)
    column = None if is_csv(source.train_dir) else source.label_column_name
    if is_csv(source.train_dir):
        source = dataclasses.replace(source, image_column_name=None)  # now it is ``image``
    found = {split: class_labels(data, column, f"{source.name} ({split})") for split, data in splits.items()}
    labels = {split: np.asarray(rows) for split, (rows, _) in found.items()}
    names = found["train"][1]
    rows = {split: np.arange(len(data)) for split, data in splits.items()}
    if "validation" not in splits:
        rows["train"], rows["validation"] = split_classes(found["train"][0], source.train_val_split, source.seed)
        splits, labels = dict.fromkeys(rows, splits["train"]), dict.fromkeys(rows, labels["train"])
    rows["validation"] = draw(rows["validation"], source.max_eval_samples, source.seed)
    rows["train"] = draw(rows["train"], source.max_train_samples, source.seed)
    if source.train_fraction < 1.0:  # the images that pre-training would choose
        image_column = find_column(splits["train"], source.image_column_name)
        data = encoded_column(splits["train"], image_column).select_columns(image_column)
        keys = shared_keys(data, image_column)[rows["train"]]
        rows["train"] = rows["train"][chosen(keys, source.train_fraction, source.subset_seed)]
    labels = {split: labels[split][rows[split]] for split in ("train", "validation")}
    check_classes(labels["train"].tolist(), labels["validation"].tolist(), names, source)
    number = {name: index for index, name in enumerate(names)}
    lists = []
    for split, kind in (("train", "training image"), ("validation", "validation image")):
        images = image_list(splits[split].select(rows[split]), source, kind)
        lists.append(ClassifiedImages(images, np.array([number[one] for one in labels[split]], np.int64), names))
    check_images(lists[0].images, lists[1].images, source)
    lists[0].images.left_out = left_out
    return lists[0], lists[1]


def check_classes(train: Sequence[str], validation: Sequence[str], names: Sequence[str], source: ClassSource) -> None:
    """Refuse labels that leave nothing to learn or to measure, and report affected classes."""
    there, tested = Counter(train), Counter(validation)
    if len(there) < 2:
        raise UserError(
            f"{source.name}: the training images have {len(there)} class ({', '.join(there) or 'none'}); a classifier "
            "needs two"
        )
    unknown = sorted(tested.keys() - set(names))
    if unknown:
        raise UserError(
            f"{source.name}: {len(unknown)} validation classes are not in training, e.g. {unknown[0]!r}; add images "
            f"of them to training or remove them from validation"
        )
    for absent, what, effect in (
        ([name for name in names if not there[name]], "training", "cannot be learned"),
        ([name for name in names if there[name] and not tested[name]], "validation", "is not part of the scores"),
    ):
        if absent:
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            logger.warning("%s: no %s image of %d classes (%s): what they are %s", source.name, what, len(absent),
                           shown, effect)  # fmt: skip


def check_images(train: ImageList, validation: ImageList, source: ClassSource) -> None:
    """Read the first image of each list, and set channels and kind of values."""
    first = train.readable(0)
    for images in (train, validation):
        channels = images.readable(0).shape[2]
        if channels != first.shape[2]:
            raise UserError(
                f"{source.name}: training images have {first.shape[2]} channels, validation images {channels}; pass "
                "--num_channels"
            )
        images.num_channels, images.kind = channels, first.dtype.kind
