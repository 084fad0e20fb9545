"""Labelled images for semantic segmentation: Hub sets, parquet folders, image and mask folders, `wire_bonding`.

`load_labelled_images` makes the training and the validation list; `TrainingCrops` serves augmented crops of one. Masks
hold one class id per pixel (index images, with or without a palette), or colours that a palette file explains. With
label reduction, id 0 becomes `ignore_index` and the others move down by one (ADE20K). All masks are read before
training, and ids that are neither a class nor `ignore_index` are refused. If an image or mask cannot be read or does
not fit the other, the pair is skipped and counted: in training the next pair takes its place, and evaluation leaves it
out. Images without masks may be class 0 as a whole (`background`).

Shapes: H, W height and width; C channels.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_dbp.data.augmentation import image_rng, normalized
from hf_dbp.data.decoding import (
    DECODING_ERRORS,
    UnreadableImageError,
    UnreadableImages,
    check_fit,
    check_kind,
    decode,
    stored,
    unturned_masks,
)
from hf_dbp.data.images import BUILT_IN, ImageList, find_column, read_splits, rendered, shared_keys
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.masks import MaskKind, Palette, check_kinds, index_mask, mask_kind
from hf_dbp.data.pairing import pair_folders, pair_tables
from hf_dbp.data.sources import UNUSED_SPLIT, any_split
from hf_dbp.data.subset import chosen, draw, split_rows
from hf_dbp.data.tables import encoded_column
from hf_dbp.data.tars import OTHER_PICTURES
from hf_dbp.data.threads import in_threads
from hf_dbp.data.values import UNIT
from hf_dbp.downstream.segmentation.background import Blank, with_background
from hf_dbp.downstream.segmentation.rare import RareCrops, a_pixel
from hf_dbp.downstream.segmentation.source import SegmentationSource
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.errors import UserError

__all__ = [
    "LabelledImages",
    "SegmentationSource",
    "TrainingCrops",
    "built_in_pairs",
    "drawn_splits",
    "load_labelled_images",
    "mask_column",
]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
ANNOTATION_COLUMNS = ("annotation", "mask", "label", "segmentation")


class LabelledImages:
    """Pairs of image (H, W, C) and mask (H, W) with ids 0..K-1 or `ignore_index`.

    Args:
        samples: maps an index to a mapping from column to picture or array.
        columns: the columns of the image and of the mask.
        num_channels: channels to convert images to; None means 3 for pictures and an array's own.
        num_labels, ignore_index, reduce_labels: as in `SegmentationSource`.
        palette: the meaning of colours; None for masks of ids.
        name: what error messages call it.
        max_unreadable: how many pairs that cannot be read are tolerated.

    Attributes:
        unreadable: unreadable pairs found so far.
        left_out: what lies in the source and is not used; of the training images alone.
        value_range: of float images, see `hf_dbp.data.values`.
        kind: kind of the values, as in `hf_dbp.data.images.ImageList`.
        kinds: kinds of the masks that `mask` has read, by name.
        background: how many of the images are good ones, see `hf_dbp.downstream.segmentation.background`.
    """

    def __init__(
        self,
        samples: Any,
        columns: tuple[str, str],
        *,
        num_labels: int,
        ignore_index: int,
        reduce_labels: bool = False,
        num_channels: int | None = None,
        palette: Palette | None = None,
        name: str = "the data",
        max_unreadable: int = 0,
    ) -> None:
        self.samples, self.columns, self.num_channels, self.name = samples, columns, num_channels, name
        self.num_labels, self.ignore_index, self.reduce_labels = num_labels, ignore_index, reduce_labels
        self.palette, self.value_range, self.kind = palette, UNIT, ""
        self.left_out, self.background = LeftOut(), 0
        self.kinds: dict[str, MaskKind] = {}
        self.unreadable = UnreadableImages(len(samples), max_unreadable)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Array, npt.NDArray[np.int32]]:
        """Return image and mask.

        Raises:
            UnreadableImageError: one of them cannot be read, or they differ in size.
            ValueError: that is one too many, or the mask has colours or ids outside the classes.
        """
        try:
            return self._pair(index)
        except UnreadableImageError as error:
            self.unreadable.add(index, error)
            raise

    def readable(self, index: int) -> tuple[Array, npt.NDArray[np.int32]]:
        """Return the pair, or the next one that can be read. UserError if none can."""
        for offset in range(len(self)):
            try:
                return self[(index + offset) % len(self)]
            except UnreadableImageError as error:
                last = str(error)
        raise UserError(f"none of the {len(self)} pairs of image and mask can be read, the last: {last}")

    def unreadable_images(self) -> dict[str, str]:
        """The unreadable images or masks found so far, each with the reason."""
        found = {f"{self.name}, image {index}": "it could be read later" for index in self.unreadable.indices()}
        for index in self.unreadable.indices():
            try:
                self._pair(index)
            except UnreadableImageError as error:  # a worker found it: its reason stayed there
                del found[f"{self.name}, image {index}"]
                where, _, reason = str(error).partition(": ")
                found[where] = reason
        return found

    def _pair(self, index: int) -> tuple[Array, npt.NDArray[np.int32]]:
        sample = self.samples[int(index)]
        value, labels = (sample[column] for column in self.columns)
        image_HWC = decode(value, self.num_channels, self._where(value, index))
        check_kind(image_HWC.dtype, self.kind, self._where(value, index))
        if isinstance(labels, Blank):
            return image_HWC, np.zeros(image_HWC.shape[:2], np.int32)
        mask_HW = self._ids(labels, index)
        check_fit(mask_HW.shape, image_HWC.shape, self._where(labels, index))
        return image_HWC, mask_HW

    def images_alone(self) -> ImageList:
        """The images without their masks."""
        images = ImageList(self.samples, self.columns[0], self.num_channels, self.unreadable.limit)
        images.value_range, images.kind = self.value_range, self.kind
        return images

    def mask(self, index: int) -> npt.NDArray[np.int32]:
        """Return only the mask. Errors as for the pair."""
        try:
            labels = self.samples[int(index)][self.columns[1]]
            return self._pair(index)[1] if isinstance(labels, Blank) else self._ids(labels, index, noted=True)
        except UnreadableImageError as error:
            self.unreadable.add(index, error)
            raise

    def _ids(self, value: Any, index: int, noted: bool = False) -> npt.NDArray[np.int32]:
        where = self._where(value, index)
        try:
            mask = stored(value)
            if noted:
                self.kinds[path_of(value) or where] = mask_kind(value, mask)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(f"{where}: the mask cannot be read: {error}") from error
        try:
            mask_HW = index_mask(mask) if self.palette is None else self.palette(mask)
        except DECODING_ERRORS as error:
            raise UserError(f"{where}: {error}") from error
        return self.checked(mask_HW.astype(np.int32), where)

    def _where(self, value: Any, index: int) -> str:
        path = path_of(value)
        return f"{self.name}, image {index}" + (f" ({path})" if path else "")

    def checked(self, mask_HW: npt.NDArray[np.int32], where: str) -> npt.NDArray[np.int32]:
        ignored = mask_HW == self.ignore_index
        if self.reduce_labels:
            ignored |= mask_HW == 0
            mask_HW = mask_HW - 1
        mask_HW = np.where(ignored, np.int32(self.ignore_index), mask_HW)
        outside = ~ignored & ((mask_HW < 0) | (mask_HW >= self.num_labels))
        if outside.any():
            shift = int(self.reduce_labels)
            raise UserError(
                f"{where}: the mask holds ids {(np.unique(mask_HW[outside]) + shift)[:5].tolist()}, but ids run from "
                f"{shift} to {self.num_labels - 1 + shift} and {self.ignore_index} is ignored; "
                "correct --num_labels, --ignore_index or --reduce_labels, or the masks; for masks of two values, pass "
                "--palette binary"
            )
        return mask_HW


def path_of(value: Any) -> str:
    """The file of a stored value; empty if there is none."""
    return str(value["path"] or "") if isinstance(value, dict) else ""


class TrainingCrops(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augmented crops, some around a rare class: pixel_values (C, S, S) and labels (S, S), indexed by (epoch,
    index)."""

    def __init__(
        self,
        images: LabelledImages,
        augmentation: Augmentation,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        rare: RareCrops | None = None,
    ) -> None:
        self.images, self.augmentation, self.seed, self.rare = images, augmentation, seed, rare
        self.mean_C, self.std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        rng = image_rng(self.seed, *index)
        number, chosen = (index[1], None) if self.rare is None else self.rare.draw(index[1], rng)
        image_HWC, mask_HW = self.images.readable(number)
        inside = None if chosen is None else a_pixel(mask_HW, chosen, rng)
        crop_HWC, labels_HW = self.augmentation(
            image_HWC, mask_HW, self.mean_C, rng, self.images.value_range, inside=inside
        )
        labels = torch.from_numpy(np.ascontiguousarray(labels_HW))
        return {"pixel_values": normalized(crop_HWC, self.mean_C, self.std_C), "labels": labels}


def load_labelled_images(source: SegmentationSource) -> tuple[LabelledImages, LabelledImages]:
    """Return the training and the validation images; the first of each is read, so mistakes show at once.

    Raises:
        UserError: there is no such data or column, images and masks do not pair, or the first image or mask is wrong.
    """
    left_out, given, background = LeftOut(), True, dict[str, int]()
    splits: dict[str, Any]
    if source.dataset_name == BUILT_IN:
        splits, columns = built_in_pairs(source), ("image", "annotation")
    else:
        pairs, left_out = _paired_folders(source) if source.train_mask_dir is not None else read_splits(source)
        columns = _find_columns(pairs["train"], source)
        left_out.use(OTHER_PICTURES, f".{columns[1]}", sum(map(len, pairs.values())))
        left_out.warn(source.name)
        given = "validation" in pairs
        splits = drawn_splits({split: _encoded(data, columns) for split, data in pairs.items()}, source)
    if source.background_dir is not None:
        splits, background, not_used = with_background(splits, columns, source, given=given)
        left_out.merge(not_used)
    lists: list[LabelledImages] = []
    for split, samples in splits.items():
        images = LabelledImages(
            samples, columns,
            num_labels=len(source.class_names()),
            ignore_index=source.ignore_index, reduce_labels=source.reduce_labels,
            num_channels=source.num_channels, max_unreadable=source.max_unreadable,
            palette=None if source.palette is None else Palette(source.palette, source.ignore_index),
            name=f"{(split == 'validation' and source.validation_dir) or source.name} ({split})",
        )  # fmt: skip
        if len(images) == 0:
            raise UserError(f"{images.name} has no images")
        images.background = background.get(split, 0)
        images.num_channels = images.readable(0)[0].shape[2]
        images.kind = (lists or [images])[0].readable(0)[0].dtype.kind
        lists.append(images)
    if lists[0].num_channels != lists[1].num_channels:
        raise UserError(
            f"{source.name}: training images have {lists[0].num_channels} channels, validation images "
            f"{lists[1].num_channels}; pass --num_channels"
        )
    lists[0].left_out = left_out
    if source.dataset_name != BUILT_IN:
        check_classes(lists[0], lists[1], source.class_names())
    return lists[0], lists[1]


def check_classes(train: LabelledImages, validation: LabelledImages, names: dict[int, str]) -> None:
    """Read all masks and report what would harm training: a missing class, or 0/255 taken for ids.

    Raises:
        UserError: a mask is wrong, or the masks leave nothing to learn or to measure.
    """
    ids = max(train.num_labels, train.ignore_index + 1)
    found = []
    for images in (train, validation):
        look = functools.partial(_ids_in, images, ids)  # counted in the threads, so no mask waits
        progress = tqdm(in_threads(look, range(len(images))), "Masks", len(images), leave=False)
        found.append(np.sum(list(progress), axis=0))
        if warning := unturned_masks(tuple(images.samples[i][c] for c in images.columns) for i in range(len(images))):
            logger.warning("%s: %s", images.name, warning)
    for warning in check_kinds(train.kinds | validation.kinds, None if train.palette is None else train.palette.source):
        logger.warning("%s: %s", train.name, warning)
    missing = [[name for k, name in names.items() if not masks_K[k]] for masks_K in found]
    if len(missing[0]) >= len(names) - 1:
        binary = train.ignore_index == 255 and found[0][255]
        hint = "; if they are masks of 0 and 255, pass --palette binary" if binary else ""
        raise UserError(
            f"the masks of {train.name} hold no class but {', '.join(set(names.values()) - set(missing[0])) or 'none'}"
            f"{', and ' + str(train.ignore_index) + ', which is ignored' if hint else ''}: nothing to learn{hint}"
        )
    if len(missing[1]) == len(names):
        raise UserError(f"the masks of {validation.name} hold no class: give --validation_dir or another --subset_seed")
    for images, absent in zip((train, validation), missing, strict=True):
        if absent:
            effect = "it cannot be learned" if images is train else "its IoU is left out of the mean, or 0"
            logger.warning(
                "%s: %s in none of the %d masks, so %s; take more images, another --subset_seed or a --validation_dir",
                images.name, ", ".join(absent), len(images), effect,
            )  # fmt: skip


def _ids_in(images: LabelledImages, ids: int, index: int) -> npt.NDArray[np.bool_]:
    """Which ids below ``ids`` a mask holds; none if it cannot be read."""
    try:
        mask_HW = images.mask(index)
    except UnreadableImageError:
        return np.zeros(ids, np.bool_)
    return np.bincount(mask_HW[mask_HW >= 0], minlength=ids)[:ids] > 0  # ignore_index may be negative


def built_in_pairs(source: SegmentationSource) -> dict[str, Any]:
    """The built-in images with their masks: training and validation render different scenes."""
    counts = {"train": (source.max_train_samples or 200, 0), "validation": (source.max_eval_samples or 50, 10_000_000)}
    return {
        split: rendered(count, source.built_in_size, source.seed, first) for split, (count, first) in counts.items()
    }


def _encoded(data: datasets.Dataset, columns: tuple[str, str]) -> datasets.Dataset:
    """The columns with pictures kept encoded, so a damaged one is detected when it is decoded."""
    for column in columns:
        data = encoded_column(data, column)
    return data


def _find_columns(data: datasets.Dataset, source: SegmentationSource) -> tuple[str, str]:
    image_column = find_column(data, source.image_column_name)
    column = mask_column(data, image_column, source.annotation_column_name)
    if column is None:
        raise UserError(
            f"no column {source.annotation_column_name or ANNOTATION_COLUMNS[0]!r} of masks; pass "
            f"--annotation_column_name with one of {', '.join(data.column_names)}, "
            "or --train_mask_dir for a folder of masks"
        )
    return image_column, column


def mask_column(data: datasets.Dataset, image_column: str, wanted: str | None) -> str | None:
    """The column of the masks: the wanted one, or else the first of the usual names that does not hold numbers."""
    for column in (wanted,) if wanted else ANNOTATION_COLUMNS:
        if column in data.column_names and column != image_column:
            feature = data.features[column]
            if wanted or not isinstance(feature, datasets.Value | datasets.ClassLabel) or feature.dtype == "binary":
                return column
    return None


def drawn_splits(splits: dict[str, datasets.Dataset], source: SegmentationSource) -> dict[str, datasets.Dataset]:
    """Split off a validation set if there is none, then draw the requested part of each."""
    train, validation = splits["train"], splits.get("validation")
    rows = np.arange(len(train))
    if validation is None:
        rows, validation_rows = split_rows(len(train), source.train_val_split, source.seed)
        validation = train.select(validation_rows)
    validation_rows = draw(np.arange(len(validation)), source.max_eval_samples, source.seed)
    rows = draw(rows, source.max_train_samples, source.seed)
    if source.train_fraction < 1.0:  # the images that pre-training would choose
        column = find_column(train, source.image_column_name)
        keys = shared_keys(train.select_columns(column), column)[rows]
        rows = rows[chosen(keys, source.train_fraction, source.subset_seed)]
    return {"train": train.select(rows), "validation": validation.select(validation_rows)}


def _paired_folders(source: SegmentationSource) -> tuple[dict[str, datasets.Dataset], LeftOut]:
    how = source.mask_suffix, source.channel_files
    pairing = pair_folders(str(source.train_dir), str(source.train_mask_dir), *how)
    splits, left_out = pair_tables(pairing), pairing.left_out
    if source.validation_dir is not None:
        pairing = pair_folders(source.validation_dir, str(source.validation_mask_dir), *how)
        left_out.add(UNUSED_SPLIT, ["validation"], len(splits.pop("validation", ())))
        splits["validation"] = any_split(pair_tables(pairing), pairing.left_out)
        left_out.merge(pairing.left_out)
    if "train" not in splits:
        raise UserError(f"none of the images in {source.train_dir} has a mask in {source.train_mask_dir}")
    return splits, left_out
