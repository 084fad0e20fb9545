"""The images of one split as one list, for commands that look at images and do not train: embed, export, select."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from hf_dbp.data.arguments import FolderFlags
from hf_dbp.data.images import BUILT_IN, ImageList, ImageSource, value_name
from hf_dbp.data.sources import encoded_splits
from hf_dbp.data.wire_bonding import WireBonding
from hf_dbp.errors import UserError
from hf_dbp.flags import flags_of
from hf_dbp.hub.arguments import HubFlags

__all__ = ["image_name", "image_source", "open_images", "split_flags"]

logger = logging.getLogger(__name__)


def split_flags() -> list[argparse.ArgumentParser]:
    """Parsers of the flags of `image_source` and of ``--split``, for the ``parents`` of a command's parser."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--split", default="train", help="Split of the data; a folder without splits is all train.")
    own.add_argument("--max_samples", type=int, help="Number of built-in images.")
    names = ("num_channels", "channel_files", "image_column_name", "max_unreadable", "built_in_size")
    return [own, flags_of(FolderFlags, *names), flags_of(HubFlags, "cache_dir", "token")]


def image_source(args: argparse.Namespace) -> ImageSource:
    """The source that ``args.images`` names: a folder, the built-in images or a Hub id."""
    local = args.images != BUILT_IN and (
        Path(args.images).is_dir() or "/" not in args.images or args.images[0] in "./~"
    )
    where = {"train_dir": args.images} if local else {"dataset_name": args.images}
    given = {name: value for name, value in vars(args).items() if name in ImageSource.__dataclass_fields__}
    return ImageSource(**where, **given, max_train_samples=args.max_samples)


def open_images(source: ImageSource, split: str = "train") -> ImageList:
    """All images of one split, in order and encoded; a folder without splits is all ``train``.

    Raises:
        UserError: there is no such data or split, or no image in it.
    """
    if source.dataset_name == BUILT_IN:
        count = source.max_train_samples or 200
        scenes = WireBonding(
            count, size=source.built_in_size, seed=source.seed, first=0 if split == "train" else 10_000_000
        )
        return ImageList(scenes, "image", 2)
    splits, column, left_out = encoded_splits(source)
    left_out.warn(source.name)
    if split not in splits:
        raise UserError(f"{source.name} has no split {split!r}, only {', '.join(splits)}; pass --split")
    for other in splits.keys() - {split}:
        logger.warning("%s: its %d images of the split %r are left out; --split names another", source.name,
                       len(splits[other]), other)  # fmt: skip
    data = splits[split]
    images = ImageList(data, column, source.num_channels, source.max_unreadable, f"{split} image")
    images.left_out = left_out
    return images


def image_name(images: ImageList, row: int) -> str:
    """The path of an image's file, else the number of its row with whatever path it has."""
    if isinstance(images.samples, WireBonding):
        return f"{images.name} {row}"
    return value_name(images.samples[row][images.column], f"{images.name} {row}")
