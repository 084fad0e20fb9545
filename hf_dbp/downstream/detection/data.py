"""Images with objects: label files (COCO, YOLO, LabelMe, CVAT), or masks whose connected parts are objects.

`load_objects` makes the training and the validation list. Labels are read once, before training; what is odd about the
boxes is counted and reported. With labels, an image that they do not list is left out, and one that they list without
an object teaches the model what is no object. Masks come from any source that fine-tuning for segmentation reads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_dbp.data.decoding import UnreadableImageError, stored
from hf_dbp.data.folders import file_table, open_pictures
from hf_dbp.data.images import ImageList, value_name
from hf_dbp.data.labels.formats import read_labels
from hf_dbp.data.labels.masks import is_labels, named
from hf_dbp.data.labels.shapes import Labelled
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.sources import any_split, pick_splits
from hf_dbp.data.threads import in_threads
from hf_dbp.downstream.detection.objects import TINY, Objects, Oddities, labelled_objects, mask_objects
from hf_dbp.downstream.segmentation.data import LabelledImages, drawn_splits, load_labelled_images
from hf_dbp.downstream.segmentation.source import SegmentationSource
from hf_dbp.errors import UserError

__all__ = ["BARE", "ObjectImages", "ObjectList", "ObjectSource", "load_objects"]

logger = logging.getLogger(__name__)

BARE = "images hold no object"
LOOKED_AT = 5  # images, to see whether labels are of their sizes


@dataclasses.dataclass
class ObjectSource(SegmentationSource):
    """Which images with which objects to load.

    Args:
        classes: names of the classes to find; default: all, of masks all but id 0.
        min_area: objects with fewer pixels are left out.
        instances: keep the pixels of each object.
    """

    classes: list[str] | None = None
    min_area: int = 0
    instances: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_area < 0:
            raise UserError(f"--min_area is a number of pixels, got {self.min_area}")
        given = [one for one in (self.train_mask_dir, self.validation_mask_dir) if one is not None]
        if missing := [one for one in given if not Path(one).exists()]:
            raise UserError(f"{missing[0]}: there is no such file of labels, or folder of labels or masks")
        if len({is_labels(one) for one in given}) > 1:
            raise UserError("--train_mask_dir and --validation_mask_dir are both labels or both masks")
        if self.labelled and self.background_dir is not None:
            raise UserError(
                "--background_dir is for masks; with labels, list such images without an object (YOLO: an empty file)"
            )

    @property
    def labelled(self) -> bool:
        """Whether there are labels, not masks."""
        return self.train_mask_dir is not None and is_labels(self.train_mask_dir)

    def _draw_labels(self) -> None:
        """Labels stay labels."""


class ObjectList:
    """The objects of a list of images, counted.

    Args:
        objects: those of each image; None where the labels cannot be read.
        names: class names by id.
        odd: what is odd about them.
    """

    def __init__(self, objects: Sequence[Objects | None], names: list[str], odd: Oddities) -> None:
        self.objects, self.names, self.odd = objects, names, odd

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def counts_K(self) -> NDArray[np.int64]:
        """The number of objects of each class, crowds left out."""
        classes = [one.classes_N[~one.crowd_N] for one in self.objects if one is not None]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *classes]), minlength=len(self.names))

    def thickness(self, view: tuple[int, int] | None) -> NDArray[np.float64]:
        """The shorter side of every object, crowds left out, in pixels of images resized to a view; None: as they
        are."""
        sides = [np.zeros(0)]
        for one in self.objects:
            if one is not None:
                sides_N2 = (one.boxes_N4[:, 2:] - one.boxes_N4[:, :2])[~one.crowd_N]
                height, width = one.size
                factors = np.ones(2) if view is None else np.array([view[1] / width, view[0] / height])
                sides.append((sides_N2 * factors).min(axis=1, initial=np.inf))
        return np.concatenate(sides)

    def tiny(self, view: tuple[int, int]) -> int:
        """The number of objects whose shorter side is below `TINY` pixels when images are resized to a view."""
        return int((self.thickness(view) < TINY).sum())

    def report(self, view: tuple[int, int]) -> list[str]:
        """One line for each thing that is odd about the objects."""
        bare = sum(one is not None and not len(one) for one in self.objects)
        lines = [f"{bare} of {len(self)} {BARE}"] if bare else []
        if tiny := self.tiny(view):
            lines.append(
                f"{tiny} of {int(self.counts_K.sum())} boxes are thinner than {TINY:g} pixels as the model sees them "
                f"({view[0]} x {view[1]}); raise --image_size to find such objects"
            )
        return [*self.odd.lines(), *lines]


class ObjectImages(ObjectList):
    """Images and their objects.

    Args:
        images: the images.
        objects, names, odd: as in `ObjectList`.
        masks: the masks that they come from; None for labels.
    """

    def __init__(
        self,
        images: ImageList,
        objects: Sequence[Objects | None],
        names: list[str],
        odd: Oddities,
        masks: LabelledImages | None = None,
    ) -> None:
        super().__init__(objects, names, odd)
        self.images, self.masks = images, masks

    def of(self, index: int, size: tuple[int, int]) -> Objects:
        """The objects of an image that has this height and width. UnreadableImageError if they are not for it."""
        objects = self.objects[index]
        if objects is None:
            raise UnreadableImageError(f"{self.name_of(index)}: its mask cannot be read")
        if objects.size != size:
            labelled, found = (f"{height} x {width}" for height, width in (objects.size, size))
            raise UnreadableImageError(
                f"{self.name_of(index)}: its labels are for {labelled} pixels (height x width), but it has {found}; "
                "label it again at its size"
            )
        return objects

    def name_of(self, index: int) -> str:
        """How messages refer to an image."""
        return value_name(self.images.samples[int(index)][self.images.column], f"{self.images.name} {index}")

    def images_alone(self) -> ImageList:
        """The images."""
        return self.images

    def unreadable_images(self) -> dict[str, str]:
        """The unreadable images and masks found so far, each with the reason."""
        found = {} if self.masks is None else self.masks.unreadable_images()
        for index in self.images.unreadable.indices():
            if self.objects[index] is None:
                continue  # its mask is among them
            where, reason = self.name_of(index), "it could be read later"
            try:
                image_HWC = self.images[index]
                self.of(index, (image_HWC.shape[0], image_HWC.shape[1]))
            except UnreadableImageError as error:
                where, _, reason = str(error).partition(": ")
            found[where] = reason
        return found


def load_objects(source: ObjectSource) -> tuple[ObjectImages, ObjectImages]:
    """The training and the validation images with their objects; the first image of each is read.

    Raises:
        UserError: there are no such data, labels cannot be read or name images that are not there, there is no such
            class, or there is no object to learn or to measure.
    """
    train, validation = labels_lists(source) if source.labelled else masks_lists(source)
    for data, what in ((train, "training"), (validation, "validation")):
        counts_K = data.counts_K
        if not counts_K.sum():
            raise UserError(f"{source.name}: the {len(data)} {what} images hold no object of {', '.join(data.names)}")
        absent = [name for name, count in zip(data.names, counts_K, strict=True) if not count]
        if absent:
            effect = "cannot be learned" if data is train else "is not part of the scores"
            logger.warning("%s: no object of %s in the %s images; it %s", source.name, ", ".join(absent), what, effect)
    first = train.images.readable(0)
    for data in (train, validation):
        channels = data.images.readable(0).shape[2]
        if channels != first.shape[2]:
            raise UserError(
                f"{source.name}: training images have {first.shape[2]} channels, validation images {channels}; pass "
                "--num_channels"
            )
        data.images.num_channels, data.images.kind = channels, first.dtype.kind
        check_sizes(data)
    return train, validation


def check_sizes(data: ObjectImages) -> None:
    """UserError if the first `LOOKED_AT` readable images all have another size than their labels."""
    wrong = ""
    for index in range(min(LOOKED_AT, len(data))):
        if data.objects[index] is None:
            continue
        try:
            image_HWC = data.images[index]
        except UnreadableImageError:
            continue
        try:
            data.of(index, (image_HWC.shape[0], image_HWC.shape[1]))
            return
        except UnreadableImageError as error:
            wrong = wrong or str(error)
    if wrong:
        raise UserError(wrong)


def chosen_names(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The wanted class names in the order of the known ones; all without a wish. UserError for an unknown one."""
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise UserError(f"--classes {unknown[0]}: there is no such class; there are {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


# ---- masks ----


def masks_lists(source: ObjectSource) -> tuple[ObjectImages, ObjectImages]:
    """The lists, objects being the connected parts of the classes of masks."""
    by_id = source.class_names()
    known = [name for k, name in by_id.items() if k or source.reduce_labels or name in (source.classes or ())]
    names = chosen_names(known, source.classes)
    ids = {k: names.index(name) for k, name in by_id.items() if name in names}
    lists = []
    for masks, kind in zip(load_labelled_images(source), ("training image", "validation image"), strict=True):
        odd, images = Oddities(), masks.images_alone()
        images.name, images.left_out = kind, masks.left_out
        how = {"instances": source.instances, "min_area": source.min_area}
        look = functools.partial(parts_of, masks, ids, odd, how)
        progress = tqdm(in_threads(look, range(len(masks))), "Objects", len(masks), leave=False)
        lists.append(ObjectImages(images, list(progress), names, odd, masks))
    return lists[0], lists[1]


def parts_of(
    masks: LabelledImages, ids: dict[int, int], odd: Oddities, how: dict[str, Any], index: int
) -> Objects | None:
    """The objects of a mask; None if it cannot be read."""
    try:
        mask_HW = masks.mask(index)
    except UnreadableImageError:
        return None
    return mask_objects(mask_HW, ids, f"{masks.name}, image {index}", odd, **how)


# ---- labels ----

Entry = tuple[tuple[str, ...], Labelled]  # files of an image, and its labels


def labels_lists(source: ObjectSource) -> tuple[ObjectImages, ObjectImages]:
    """The lists, every label an object."""
    left_out = LeftOut()
    splits, known = labelled_splits(str(source.train_dir), str(source.train_mask_dir), source, left_out)
    splits = pick_splits(splits, source.name, left_out, source.validation_dir is not None)
    names = chosen_names(known, source.classes)
    if source.validation_dir is not None:
        there, others = labelled_splits(
            source.validation_dir, str(source.validation_mask_dir), source, validation_left := LeftOut()
        )
        splits["validation"] = any_split(there, validation_left)
        left_out.merge(validation_left)
        unknown = [name for name in others if name not in known]
        if unknown:
            raise UserError(f"{source.validation_mask_dir} holds the class {unknown[0]!r}, which training lacks")
    left_out.warn(source.name)
    tables = {split: table_of(entries, source.cache_dir) for split, entries in splits.items()}
    chosen = drawn_splits(tables, source)
    lists = []
    for split, kind in (("train", "training image"), ("validation", "validation image")):
        entries, odd = splits.get(split, splits["train"]), Oddities()
        images = ImageList(chosen[split], "image", source.num_channels, source.max_unreadable, kind)
        how: dict[str, Any] = {"instances": source.instances, "min_area": source.min_area}
        ids = {name: k for k, name in enumerate(names)}
        objects = [labelled_objects(entries[row][1], ids, odd, **how) for row in chosen[split]["entry"]]
        lists.append(ObjectImages(images, objects, names, odd))
    lists[0].images.left_out = left_out
    return lists[0], lists[1]


def table_of(entries: Sequence[Entry], cache_dir: str | None) -> datasets.Dataset:
    """Images as a table with the column ``image``, and ``entry``, their numbers."""
    table = file_table({"image": [files for files, _ in entries]}, cache_dir)
    return table.add_column("entry", list(range(len(entries))))


def labelled_splits(
    image_dir: str, labels: str, source: ObjectSource, left_out: LeftOut
) -> tuple[dict[str, list[Entry]], list[str]]:
    """The labelled images of each split that has any, and the class names.

    Raises:
        UserError: labels cannot be read, name an image that is not there, or name one twice.
    """
    folder = open_pictures(image_dir)
    pictures = folder.pictures(source.channel_files)
    files = {
        f"{split}/{name}" if len(pictures) > 1 else name: found
        for split, samples in pictures.items()
        for name, found in samples.items()
    }
    first = {name: found[0] for name, found in files.items()}

    def size_of(name: str) -> tuple[int, int]:
        shape = np.asarray(stored({"bytes": None, "path": first[named(name, first, labels)]})).shape
        return shape[0], shape[1]

    images, names = read_labels(labels, size_of)
    found: dict[str, Labelled] = {}
    for image in images:
        name = named(image.file, first, labels)
        if name in found:
            raise UserError(f"{labels} lists the image {image.file!r} more than once; join its entries")
        found[name] = image
    left_out.merge(folder.left_out)
    splits: dict[str, list[Entry]] = {}
    for split in pictures:
        mine = [name for name in files if len(pictures) == 1 or name.startswith(f"{split}/")]
        unlabelled = [first[name] for name in mine if name not in found]
        left_out.add(f"images without labels, of the {len(mine)} in {image_dir} ({split})", unlabelled)
        if len(unlabelled) < len(mine):
            splits[split] = [(files[name], found[name]) for name in mine if name in found]
    if not splits:
        raise UserError(f"none of the images in {image_dir} is labelled in {labels}")
    return splits, names
