"""What training would read from a source: its images and masks, not yet decoded, found by training's own code.

In a folder of pictures, a sample is its files. Parquet files, tars, data sets on the Hub and the built-in images are
tables, as for fine-tuning, and a sample is a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_dbp.data.folders import Folder, open_folder
from hf_dbp.data.images import BUILT_IN, find_column, read_splits
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.pairing import UnpairedError, pair_folders
from hf_dbp.data.sources import pick_splits
from hf_dbp.data.tables import encoded_column
from hf_dbp.data.tars import OTHER_PICTURES
from hf_dbp.downstream.segmentation.data import built_in_pairs, mask_column
from hf_dbp.downstream.segmentation.source import SegmentationSource
from hf_dbp.errors import UserError

__all__ = ["Content", "Row", "Sample", "Samples", "read_source", "value_of"]


@dataclass(frozen=True, eq=False)
class Row:
    """A sample in a table."""

    table: Any
    column: str
    index: int


Sample = tuple[str, ...] | Row  # the files of a picture, one per channel if there are several; or a row
Samples = Mapping[str, Sample]  # samples by name


def value_of(sample: Sample) -> Any:
    """The stored value of a sample, in the form that `hf_dbp.data.decoding.decode` reads."""
    if isinstance(sample, Row):
        return sample.table[sample.index][sample.column]
    return {"bytes": None, "path": sample[0], "more": list(sample[1:])}


@dataclass
class Content:
    """The content of a source.

    Attributes:
        images: ``train`` and maybe ``validation``: all images by name.
        pairs: the same splits, with image and mask of those that have one; None if there are no masks or they do not
            fit.
        left_out: what else lies there.
        problem: why the masks do not fit.
        files: the files opened on disk.
        flags: flags of both recipes, besides the folder or the data set.
        mask_flags: flags of fine-tuning.
    """

    images: Mapping[str, Samples]
    pairs: Mapping[str, Mapping[str, tuple[Sample, Sample]]] | None
    left_out: LeftOut
    problem: str = ""
    files: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    mask_flags: dict[str, Any] = field(default_factory=dict)


def read_source(args: argparse.Namespace) -> Content:
    """The content of the folder or the data set of `hf-dbp inspect`.

    Raises:
        UserError: as in training, or the masks lie in the folder of the images.
    """
    if args.masks is not None and (args.dataset_name is not None or args.folder is None):
        raise UserError(
            "--masks is for a folder of pictures; the masks of a table are a column, --annotation_column_name"
        )
    content = read_content(args)
    if args.background_dir is not None and content.pairs is None and not content.problem:
        raise UserError(f"--background_dir {args.background_dir} goes with masks of defects: give --masks")
    return content


def read_content(args: argparse.Namespace) -> Content:
    """The content of what is given, with masks if there are any."""
    if args.dataset_name is not None:
        return read_tables(args, None)
    if args.masks is None:
        folder = open_folder(args.folder)
        return read_pictures(args, folder) if folder.kind == "imagefolder" else read_tables(args, folder)
    if Path(args.folder).resolve() in Path(args.masks).resolve().parents:
        raise UserError(f"{args.masks} lies in {args.folder}, all of whose pictures are images; move it out")
    flags = {"train_mask_dir": args.masks, "mask_suffix": args.mask_suffix}
    try:
        pairing = pair_folders(args.folder, args.masks, args.mask_suffix, args.channel_files)
    except UnpairedError as error:
        return read_pictures(args, open_folder(args.folder), str(error))
    files = [file for samples in pairing.images.values() for sample in samples.values() for file in sample]
    return Content(pairing.images, pairing.pairs, pairing.left_out, "", files, mask_flags=flags)


def read_pictures(args: argparse.Namespace, folder: Folder, problem: str = "") -> Content:
    """A folder of pictures without masks, or with masks that have a ``problem``."""
    images = pick_splits(folder.pictures(args.channel_files, args.mask_suffix), args.folder, folder.left_out)
    files = [file for samples in images.values() for sample in samples.values() for file in sample]
    return Content(images, None, folder.left_out, problem, files)


def read_tables(args: argparse.Namespace, folder: Folder | None) -> Content:
    """The tables that fine-tuning would read, with masks if there is a column of them."""
    source = SegmentationSource(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_dir=args.folder if args.dataset_name is None else None,
        image_column_name=args.image_column_name,
        channel_files=args.channel_files,
    )
    flags = {"image_column_name": args.image_column_name}
    splits: dict[str, Any]
    masks: str | None
    if source.dataset_name == BUILT_IN:
        splits, left_out = built_in_pairs(source), LeftOut()
        column, masks = "image", "annotation"
    else:
        splits, left_out = read_splits(source)
        column = find_column(splits["train"], args.image_column_name)
        masks = mask_column(splits["train"], column, args.annotation_column_name)
        if masks is not None:
            left_out.use(OTHER_PICTURES, f".{masks}", sum(map(len, splits.values())))
        for split in splits:
            for name in filter(None, (column, masks)):
                splits[split] = encoded_column(splits[split], name)
    images = {
        split: {f"image {i}": Row(table, column, i) for i in range(len(table))} for split, table in splits.items()
    }
    pairs = masks and {
        split: {name: (row, Row(row.table, masks, row.index)) for name, row in rows.items()}
        for split, rows in images.items()
    }
    files = [] if folder is None else [str(Path(folder.path, file)) for file in folder.files]
    return Content(images, pairs or None, left_out, "", files, flags, {"annotation_column_name": masks})
