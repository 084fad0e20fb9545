"""The pixels of objects as run lengths, as pycocotools packs them.

Shapes: H, W the image.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["Runs", "packed", "packed_polygons", "tools"]


def tools(module: str) -> Any:
    """A module of pycocotools. UserError if it is not installed."""
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "pycocotools":
            raise
        raise UserError("detection needs a package that is not installed: pip install pycocotools") from error


@dataclasses.dataclass(frozen=True)
class Runs:
    """The pixels of an object as packed run lengths of an image of ``size``, column after column."""

    size: tuple[int, int]
    counts: bytes

    def coco(self) -> dict[str, Any]:
        """As pycocotools takes it."""
        return {"size": list(self.size), "counts": self.counts}

    @property
    def area(self) -> int:
        """The number of pixels."""
        return int(tools("mask").area(self.coco()))

    def pixels(self) -> NDArray[np.uint8]:
        """The pixels (H, W), 0 or 1."""
        return np.asarray(tools("mask").decode(self.coco()))


def packed(pixels_HW: NDArray[np.uint8]) -> Runs:
    """Pixels, 0 or 1, as run lengths."""
    height, width = pixels_HW.shape
    return Runs((height, width), tools("mask").encode(np.asfortranarray(pixels_HW))["counts"])


def packed_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Runs:
    """The union of polygons x0, y0, x1, y1 ... as run lengths, filled as pycocotools does."""
    if not polygons:
        return packed(np.zeros(size, np.uint8))
    masks = tools("mask")
    return Runs(size, masks.merge(masks.frPyObjects(list(polygons), *size))["counts"])
