"""Count the connected parts of each class of a mask in bands of rows, so memory grows with neither height nor parts.

Parts are 8-connected. OpenCV labels them in each band; a graph joins those that touch a part in the band above, and
each such union subtracts one from the count. Only the parts that reach the last row of a band are carried to the next.

Shapes: K classes; H, W height and width; n rows of a band.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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
            above_W = np.zeros(ids_HW.shape[1], np.int64)  # parts that reach the row above, from 1; 0 for none
            for top in range(0, ids_HW.shape[0], rows):
                count, labels_nW = cv2.connectedComponents((ids_HW[top : top + rows] == chosen).astype(np.uint8))
                self.counts_K[chosen] += count - 1
                if rows < ids_HW.shape[0]:
                    unions, above_W = united(above_W, labels_nW, count - 1)
                    self.counts_K[chosen] -= unions
        return self.counts_K


def class_pixels(ids_HW: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """The number of pixels of each class (K), counted row by row because bincount copies eight bytes per value."""
    pixels_K = np.zeros(classes, np.int64)
    for ids_W in ids_HW:
        pixels_K += np.bincount(ids_W, minlength=classes)
    return pixels_K


def united(above_W: NDArray[Any], labels_nW: NDArray[Any], parts: int) -> tuple[int, NDArray[np.int64]]:
    """Unite a band's parts with those of the row above that they touch, corners included.

    Args:
        above_W: parts in the row above, numbered from 1; 0 for none.
        labels_nW: parts in the band, likewise.
        parts: number of parts in the band.

    Returns:
        The number of unions, and the united parts in the band's last row, numbered anew from 1.
    """
    width, before = len(above_W), int(above_W.max())
    pairs = []
    for shift in (-1, 0, 1):
        over = above_W[max(0, -shift) : width - max(0, shift)]
        under = labels_nW[0][max(0, shift) : width - max(0, -shift)]
        touching = (over > 0) & (under > 0)
        pairs.append(np.stack([over[touching] - 1, before + under[touching] - 1]))
    nodes, (ones, others) = before + parts, np.concatenate(pairs, axis=1)
    if not nodes:
        return 0, np.zeros(width, np.int64)
    graph = coo_array((np.ones(len(ones), np.bool_), (ones, others)), shape=(nodes, nodes))
    left, group_N = connected_components(graph, directed=False)
    last_W = np.zeros(width, np.int64)
    there = labels_nW[-1] > 0
    last_W[there] = np.unique(group_N[before + labels_nW[-1][there] - 1], return_inverse=True)[1] + 1
    return nodes - left, last_W
