"""The data flags, each declared once, with its help text and its nature.

`ImageFlags` are the flags of every task; each class below adds to the one above it, and a command uses those that make
sense for it. `hf_dbp.data.sources.ImageSource` takes them all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from hf_dbp.natures import Nature

__all__ = ["FolderFlags", "ImageFlags", "StreamingFlags", "SubsetFlags", "fields_of"]


@dataclass
class ImageFlags:
    """Which images."""

    dataset_name: Annotated[str | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "Hub id of a data set."}
    )
    dataset_config_name: Annotated[str | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "Configuration of the Hub data set."}
    )
    train_dir: Annotated[str | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "Folder of images, parquet files or tars."}
    )
    validation_dir: Annotated[str | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "The same for validation."}
    )
    image_column_name: Annotated[str | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "Column of the images (default: image)."}
    )
    train_val_split: Annotated[float, Nature("data", "told")] = field(
        default=0.15,
        metadata={"help": "Share of the training images held out for validation if there is no validation split."},
    )
    max_train_samples: Annotated[int | None, Nature("data")] = field(
        default=None, metadata={"help": "Maximum number of training images."}
    )
    max_eval_samples: Annotated[int | None, Nature("data", "told")] = field(
        default=None, metadata={"help": "Maximum number of validation images."}
    )
    num_channels: Annotated[int | None, Nature("data")] = field(
        default=None, metadata={"help": "Channels of the images (default: 3 for pictures, otherwise the array's own)."}
    )
    max_unreadable: Annotated[int, Nature("nothing")] = field(
        default=100,
        metadata={
            "help": "Maximum number of unreadable images, which are skipped and counted; more of them end the run."
        },
    )


@dataclass
class SubsetFlags(ImageFlags):
    """Which of the images to use, and which files form one."""

    channel_files: Annotated[list[str] | None, Nature("data", "told")] = field(
        default=None,
        metadata={
            "help": "For one file per channel: a name pattern each, e.g. '*_ch0.tif' '*_ch1.tif'; * matches the "
            "sample's name."
        },
    )
    train_fraction: Annotated[float, Nature("data")] = field(
        default=1.0, metadata={"help": "Share of the training images to use, chosen by a hash of their content."}
    )
    subset_seed: Annotated[int, Nature("data")] = field(
        default=0, metadata={"help": "Seed of the draws and the split (not of training)."}
    )


@dataclass
class FolderFlags(SubsetFlags):
    """Folders that also hold masks, and the built-in images."""

    mask_suffix: Annotated[str, Nature("data", "told")] = field(
        default="",
        metadata={"help": "What the names of masks add to those of their images, e.g. _mask."},
    )
    built_in_size: Annotated[int, Nature("data", "told")] = field(
        default=128, metadata={"help": "Side in pixels of the built-in images, --dataset_name wire_bonding."}
    )


@dataclass
class StreamingFlags(FolderFlags):
    """Images read in place."""

    streaming: Annotated[bool, Nature("nothing")] = field(
        default=False,
        metadata={
            "help": "Read images in place, on the Hub or on disk (parquet, webdataset, pictures), instead of "
            "converting all of them first. With --cache_dir each is read once and kept there, decoded."
        },
    )
    cache_short_side: Annotated[int, Nature("data", "told")] = field(
        default=256,
        metadata={"help": "Shorter side in pixels to which larger images are scaled down in the streamed cache."},
    )


def fields_of(kind: type, given: Any) -> dict[str, Any]:
    """The values in ``given``, a dataclass instance, of the fields that the dataclass ``kind`` also has."""
    names = {known.name for known in dataclasses.fields(kind) if known.init}
    return {known.name: getattr(given, known.name) for known in dataclasses.fields(given) if known.name in names}
