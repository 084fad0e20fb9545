"""Count the connected parts of each class of a mask in bands of rows, so memory does not grow.

Parts are 8-connected. OpenCV labels them in each band; a part that touches one in the band above is united with it, and
each such union subtracts one from the count.

Shapes: K classes; H, W height and width; n rows of a band.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Components", "class_pixels"]

BAND = 2**22  # pixels


class Components:
    """Counts the parts of ``classes`` classes."""

    def __init__(self, classes: int) -> None:
        self.counts_K = np.zeros(classes, np.int64)

    def counted(self, ids_HW: NDArray[Any], band: int = BAND) -> NDArray[np.int64]:
        """The number of parts of each class (K).

        Args:
            ids_HW: class ids.
            band: pixels labelled at a time.
        """
        rows = max(1, band // ids_HW.shape[1])
        for chosen in np.flatnonzero(class_pixels(ids_HW, len(self.counts_K))):
            above: NDArray[Any] | None = None
            parents: list[int] = [0]
            for top in range(0, ids_HW.shape[0], rows):
                count, labels = cv2.connectedComponents((ids_HW[top : top + rows] == chosen).astype(np.uint8))
                first = len(parents)
                parents.extend(range(first, first + count - 1))
                labels = np.where(labels > 0, labels + first - 1, 0)
                self.counts_K[chosen] += count - 1
                if above is not None:
                    self.counts_K[chosen] -= joined(above, labels[0], parents)
                above = labels[-1]
        return self.counts_K


def class_pixels(ids_HW: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """The number of pixels of each class (K), counted row by row because bincount copies eight bytes per value."""
    pixels_K = np.zeros(classes, np.int64)
    for ids_W in ids_HW:
        pixels_K += np.bincount(ids_W, minlength=classes)
    return pixels_K


def joined(above_W: NDArray[Any], below_W: NDArray[Any], parents: list[int]) -> int:
    """Unite the parts of a mask in two rows that touch, corners included; return the number of unions."""
    width, pairs = len(above_W), []
    for shift in (-1, 0, 1):
        over, under = above_W[max(0, -shift) : width - max(0, shift)], below_W[max(0, shift) : width - max(0, -shift)]
        touching = (over > 0) & (under > 0)
        pairs.append(np.stack([over[touching], under[touching]], axis=1))
    unions = 0
    for one, other in np.unique(np.concatenate(pairs), axis=0).tolist():
        roots = root(one, parents), root(other, parents)
        if roots[0] != roots[1]:
            parents[roots[1]] = roots[0]
            unions += 1
    return unions


def root(part: int, parents: list[int]) -> int:
    """The representative of all parts of a mask united with this one."""
    while parents[part] != part:
        parents[part] = parents[parents[part]]
        part = parents[part]
    return part
