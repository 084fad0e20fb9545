"""Pictures of a classifier's results: the confusion matrix, calibration, the most confident mistakes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_dbp.data.values import displayed
from hf_dbp.downstream.classification.metrics import BINS
from hf_dbp.downstream.classification.trainer import Mistake
from hf_dbp.downstream.classification.views import CentralViews
from hf_dbp.figures import literal_names

__all__ = ["plot_calibration", "plot_confusion", "plot_mistakes"]

LONGEST = 24  # characters of a name beside the matrix
NUMBERED = 20  # maximum number of classes for which cells show counts and rows names


@literal_names
def plot_confusion(
    confusion_KK: NDArray[Any], names: Sequence[str], path: str | os.PathLike[str], *, numbered: int = NUMBERED
) -> None:
    """Write a PNG of the confusion matrix, each row as shares of its class; counts and names for few classes."""
    true_K1 = confusion_KK.sum(axis=1, keepdims=True)
    share_KK = np.divide(confusion_KK, true_K1, out=np.zeros_like(confusion_KK, dtype=float), where=true_K1 > 0)
    side = min(12.0, 3 + 0.45 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share_KK, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="share of the true class")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(names) <= numbered:
        names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        for i, j in np.argwhere(confusion_KK > 0):
            colour = "white" if share_KK[i, j] > 0.5 else "black"
            axis.text(j, i, f"{int(confusion_KK[i, j])}", ha="center", va="center", color=colour, fontsize="small")
    figure.savefig(path, dpi=100)


def plot_calibration(bins_3B: NDArray[Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG of accuracy by confidence, and of the number of images per bin; the diagonal is perfect
    calibration."""
    count_B, confidence_B, right_B = bins_3B
    there = count_B > 0
    figure = Figure(figsize=(5, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfect")
    above.plot(confidence_B[there] / count_B[there], right_B[there] / count_B[there], marker="o", label="model")
    above.set_ylabel("accuracy")
    above.legend()
    edges = np.arange(BINS) / BINS
    below.bar(edges, count_B, width=1 / BINS, align="edge", edgecolor="white")
    below.set_xlabel("stated probability of the predicted class")
    below.set_ylabel("images")
    figure.savefig(path, dpi=100)


@literal_names
def plot_mistakes(mistakes: Sequence[Mistake], data: CentralViews, path: str | os.PathLike[str]) -> None:
    """Write a PNG of the most confident mistakes, each with a caption, or a PNG that says there are none."""
    columns = 4
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(10, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = data.data.names
    for axis in axes:
        axis.set_axis_off()
    for axis, mistake in zip(axes, mistakes, strict=False):
        axis.imshow(displayed(data.images[mistake.index], data.images.value_range), interpolation="nearest")
        told = f"{names[mistake.predicted]} ({mistake.confidence:.2f})\ntrue: {names[mistake.true]}"
        axis.set_title(told, fontsize="small")
    if not mistakes:
        figure.suptitle("no mistake on the validation images")
    figure.savefig(path, dpi=100)
