"""Good images: a folder of images without any defect serves as labelled images that hold class 0 alone.

Where the validation images are split off the training images, so is the same share of the good images, for the
image-level question (is there any defect?) needs both kinds; validation images that are given stay as they are.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dbp.data.folders import open_pictures
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.subset import split_rows
from hf_dbp.downstream.segmentation.source import SegmentationSource

__all__ = ["Blank", "WithBackground", "background_files", "with_background"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Blank:
    """Stands for a mask of class 0 alone, of its image's size."""


class WithBackground:
    """Samples, followed by images whose mask is `Blank`.

    Args:
        samples: the labelled samples.
        columns: the columns of the image and of the mask.
        files: the files of each good image, one per channel if there are several.
    """

    def __init__(self, samples: Any, columns: tuple[str, str], files: Sequence[tuple[str, ...]]) -> None:
        self.samples, self.columns, self.files = samples, columns, files

    def __len__(self) -> int:
        return len(self.samples) + len(self.files)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index < len(self.samples):
            sample: Mapping[str, Any] = self.samples[index]
            return sample
        first, *more = self.files[index - len(self.samples)]
        return dict(zip(self.columns, ({"bytes": None, "path": first, "more": more}, Blank()), strict=True))


def background_files(folder: str, channel_files: Sequence[str] | None) -> tuple[list[tuple[str, ...]], LeftOut]:
    """The files of each image in a folder of good images, and what is left out. UserError if there are none."""
    found = open_pictures(folder, "--background_dir")
    named = found.named(Path(folder), found.files, channel_files)
    left_out = LeftOut()
    left_out.merge(found.left_out, "in --background_dir, ")
    return list(named.values()), left_out


def with_background(
    splits: Mapping[str, Any], columns: tuple[str, str], source: SegmentationSource, *, given: bool
) -> tuple[dict[str, Any], dict[str, int], LeftOut]:
    """The splits with the good images of ``source``, how many each has, and what of the folder is left out.

    Args:
        splits: the labelled samples, ``train`` and ``validation``.
        columns: the columns of the image and of the mask.
        source: names the folder.
        given: whether the validation images are given, not split off.

    Raises:
        UserError: there are no pictures in the folder, or too few to hold out a share.
    """
    files, left_out = background_files(str(source.background_dir), source.channel_files)
    left_out.warn(str(source.background_dir))
    rows = {"train": list(range(len(files)))}
    if not given and len(files) > 1:
        parts = split_rows(len(files), source.train_val_split, source.seed)
        rows = {split: part.tolist() for split, part in zip(("train", "validation"), parts, strict=True)}
    counts = {split: len(part) for split, part in rows.items()}
    logger.warning(
        "%s: %s images of %s alone join %s",
        source.background_dir,
        " and ".join(map(str, counts.values())),
        source.class_names()[0],
        " and ".join(f"{split} images" for split in counts),
    )
    found = {
        split: WithBackground(samples, columns, [files[row] for row in rows.get(split, [])])
        for split, samples in splits.items()
    }
    return found, counts, left_out
