"""Rare classes: which classes are rare, and training crops of which a given share contains one.

A class is rare if it has less than a quarter of an even share of the labelled training pixels, 1 / (4 K). With
probability ``share`` a training crop is drawn for a rare class, as nnU-Net does for a third of its crops: draw one of
the rare classes, one of the images that hold it, one of its pixels there, and a crop among those with that pixel
inside. All other crops are drawn as usual and contain a rare class only by chance. (nnU-Net keeps the image and draws
among its classes; a class in one image of fifty would then stay rare.) If a crop is scaled down, an object of a pixel
or two may vanish from it.

Every draw comes from the given generator, a function of (seed, epoch, index).

Shapes: M images; K classes; H, W height and width of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["RareCrops", "a_pixel", "rare_classes"]


def rare_classes(pixels_K: NDArray[np.int64], names: Mapping[int, str], wanted: Sequence[str] | None) -> list[int]:
    """The ids of the named classes, or else of those below a quarter of an even share that occur at all.

    Raises:
        UserError: a name is unknown, no mask holds a named class, or no class is rare.
    """
    if wanted:
        ids = {name: k for k, name in names.items()}
        unknown = [name for name in wanted if name not in ids]
        if unknown:
            raise UserError(f"--rare_classes {unknown[0]}: there is no such class; the classes are {', '.join(ids)}")
        absent = [name for name in wanted if not pixels_K[ids[name]]]
        if absent:
            raise UserError(f"--rare_classes {absent[0]}: no training mask holds it; leave it out or label it")
        return sorted(ids[name] for name in set(wanted))
    found = [k for k in range(len(pixels_K)) if 0 < pixels_K[k] < pixels_K.sum() / (4 * len(pixels_K))]
    if not found:
        raise UserError(
            f"--rare_crops: every class holds a quarter of an even share of the pixels ({1 / (4 * len(pixels_K)):.2%}) "
            "or more; leave it out, or name the classes with --rare_classes"
        )
    return found


@dataclasses.dataclass(frozen=True)
class RareCrops:
    """Decides which crops are drawn for a rare class.

    Args:
        counts_MK: pixels of each class in each training mask.
        classes: ids of the rare classes, each of which occurs in some mask.
        share: share of the crops, in (0, 1].
    """

    counts_MK: NDArray[np.int64]
    classes: Sequence[int]
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"--rare_crops is a share above 0 and at most 1, got {self.share}")

    def draw(self, index: int, rng: np.random.Generator) -> tuple[int, int | None]:
        """The image and the rare class for a crop; ``index`` and None for an ordinary crop."""
        if rng.random() >= self.share:
            return index, None
        chosen = int(rng.choice(self.classes))
        return int(rng.choice(np.flatnonzero(self.counts_MK[:, chosen]))), chosen


def a_pixel(mask_HW: NDArray[np.int32], chosen: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Row and column of one pixel of a rare class; None if the mask holds none."""
    found = np.flatnonzero(mask_HW == chosen)
    if not found.size:
        return None
    row, column = divmod(int(rng.choice(found)), mask_HW.shape[1])
    return row, column
