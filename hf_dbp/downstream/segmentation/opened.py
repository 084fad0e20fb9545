"""An image to predict, opened: its view, large TIFFs a few rows at a time, and its true mask.

Shapes: C channels; H, W the image's height and width.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hf_dbp.data.augmentation import resized
from hf_dbp.data.decoding import stored
from hf_dbp.data.folders import open_pictures
from hf_dbp.data.masks import Palette, index_mask
from hf_dbp.data.windows import TiffRows
from hf_dbp.downstream.segmentation.inference import Preparation
from hf_dbp.downstream.segmentation.sliding import View
from hf_dbp.downstream.segmentation.transforms import long_edge_size
from hf_dbp.errors import UserError

__all__ = ["Opened", "RowsView", "Truth", "adapted"]

BLOCK = 2**25  # values of a large image scaled at a time


@dataclasses.dataclass(frozen=True)
class Truth:
    """True masks by the names of their images."""

    folder: str
    suffix: str
    palette: Palette | None
    ignore_index: int
    classes: int

    @functools.cached_property
    def files(self) -> dict[str, tuple[str, ...]]:
        folder = open_pictures(self.folder, "--masks")
        named = folder.named(Path(self.folder), folder.files, None)
        return {name.removesuffix(self.suffix): files for name, files in named.items() if name.endswith(self.suffix)}

    def mask(self, name: str, size: tuple[int, int]) -> npt.NDArray[np.int32]:
        """The mask (H, W). UserError if there is none or it has another size."""
        if name not in self.files:
            raise UserError(
                f"{self.folder} has no mask for {name!r}; name each mask like its image, or leave out --masks"
            )
        mask = stored({"bytes": None, "path": self.files[name][0]})
        ids = (index_mask(mask) if self.palette is None else self.palette(mask)).astype(np.int32)
        if ids.shape != size:
            raise UserError(f"{self.files[name][0]} has {ids.shape} pixels (height x width), its image {size}")
        outside = (ids != self.ignore_index) & ((ids < 0) | (ids >= self.classes))
        if outside.any():
            raise UserError(
                f"{self.files[name][0]} holds the id {ids[outside][0]}, but the model has classes 0 to "
                f"{self.classes - 1} and {self.ignore_index} is ignored; give masks of these classes, or --ignore_index"
            )
        return ids


class RowsView:
    """A view of a large TIFF, read and scaled only as far as windows need it; windows side by side share their rows."""

    def __init__(self, rows: TiffRows, preparation: Preparation, channels: int) -> None:
        self.rows, self.preparation, self.channels = rows, preparation, channels
        self.target = rows.shape[0], rows.shape[1]
        self.size = long_edge_size(*self.target, preparation.long_edge)
        self.lock, self.kept = threading.Lock(), ((0, 0), np.zeros(0, rows.dtype))

    def crop(self, top: int, left: int, side: int) -> Tensor:
        bottom = min(top + side, self.size[0])
        if self.size == self.target:
            part = adapted(self.rows.rows(top, bottom, left, left + side), self.channels)
        else:
            with self.lock:
                if self.kept[0] != (top, bottom):
                    self.kept = (top, bottom), self.scaled(top, bottom)
                part = self.kept[1][:, left : left + side]
        pixels = self.preparation.normalized(part, self.rows.dtype)
        return nn.functional.pad(pixels, (0, side - pixels.shape[2], 0, side - pixels.shape[1]))

    def scaled(self, top: int, bottom: int) -> npt.NDArray[Any]:
        """Rows of the scaled image, from at most `BLOCK` values at a time; the bicubic kernel reaches twice the scale
        beyond them."""
        scale = self.target[0] / self.size[0]
        block = max(1, int(BLOCK / (self.rows.shape[1] * self.rows.shape[2] * scale)))
        parts = []
        for start in range(top, bottom, block):
            end = min(start + block, bottom)
            above = max(0, int(start * scale - 2 * max(scale, 1) - 1))
            below = min(self.target[0], int(end * scale + 2 * max(scale, 1)) + 2)
            part = adapted(self.rows.rows(above, below), self.channels)
            box = (0.0, start * scale - above, float(self.target[1]), end * scale - above)
            parts.append(resized(part, (end - start, self.size[1]), box))
        return np.concatenate(parts)

    def small(self, side: int) -> npt.NDArray[Any]:
        """A subsampled image (every n-th pixel) for an overlay."""
        step = -(-max(self.target) // side)
        kept = [self.rows.rows(top, top + 1)[:, ::step].copy() for top in range(0, self.target[0], step)]
        return adapted(np.concatenate(kept), self.channels)


def adapted(image_HWC: npt.NDArray[Any], channels: int) -> npt.NDArray[Any]:
    """Convert a grey image to RGB if the segmenter needs it."""
    return np.repeat(image_HWC, 3, axis=2) if image_HWC.shape[2] == 1 and channels == 3 else image_HWC


@dataclasses.dataclass
class Opened:
    """An opened image: its view, what its overlay needs, and its true mask."""

    name: str
    file: str
    view: View
    small_HWC: npt.NDArray[Any] | None
    truth_HW: npt.NDArray[np.int32] | None
