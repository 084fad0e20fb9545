"""Does an image hold any class but background? Image-level detection by a segmentation model; figures of each image.

The score of an image is the highest probability, over its pixels, of any class but 0 (background). As a detector of
images that hold such a class (a defect, say), it has:

    ROC AUC    the probability that an image with a defect scores above one without; ties count half
    threshold  the highest score at which at least the wanted share of the images with a defect is found

Both need validation images of both kinds. The threshold is chosen on the validation images and applies to similar
images; measure its recall and precision on other images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from scipy import stats

from hf_dbp.downstream.segmentation.inference import ImageCounts

__all__ = ["ImageFigures", "detection", "image_figures", "worst_images"]

RECALL = 0.95  # default recall of the threshold


@dataclasses.dataclass(frozen=True)
class ImageFigures:
    """The figures of one validation image.

    Args:
        index: its position in the validation list.
        score: see the module's docstring.
        holds_any: whether a labelled pixel is of a class other than 0.
        right: share of its labelled pixels that are correct; None if it has none.
        mean_iou: mean over the classes in it or in its prediction; None if there are none.
    """

    index: int
    score: float
    holds_any: bool
    right: float | None
    mean_iou: float | None


def image_figures(counts: Mapping[int, ImageCounts]) -> list[ImageFigures]:
    """The figures of the images of all processes, in order."""
    found = []
    for index, image in counts.items():
        union_K, total = image.true_K + image.predicted_K - image.hits_K, image.true_K.sum()
        right = float(image.hits_K.sum() / total) if total else None
        mean_iou = float((image.hits_K[union_K > 0] / union_K[union_K > 0]).mean()) if total else None
        found.append(ImageFigures(index, image.foreground, bool(image.true_K[1:].any()), right, mean_iou))
    gathered: list[ImageFigures] = gather_object(found)
    return sorted(gathered, key=lambda image: image.index)


def detection(images: Sequence[ImageFigures], recall: float = RECALL) -> dict[str, Any] | None:
    """ROC AUC, and the threshold for a recall with the recall, false alarms and precision at it; None unless there are
    images of both kinds."""
    positive = np.array([image.score for image in images if image.holds_any])
    negative = np.array([image.score for image in images if not image.holds_any])
    if not (positive.size and negative.size):
        return None
    wins = stats.mannwhitneyu(positive, negative).statistic
    enough = np.arange(1, positive.size + 1) / positive.size >= recall
    threshold = float(np.sort(positive)[::-1][np.argmax(enough)])
    found, alarms = positive >= threshold, negative >= threshold
    return {
        "images_with_any": positive.size,
        "images_without": negative.size,
        "roc_auc": float(wins / (positive.size * negative.size)),
        "wanted_recall": recall,
        "threshold": threshold,
        "recall": float(found.mean()),
        "false_alarms": float(alarms.mean()),
        "precision": float(found.sum() / (found.sum() + alarms.sum())),
    }


def worst_images(images: Sequence[ImageFigures], count: int = 8) -> list[ImageFigures]:
    """The images with the lowest mean IoU, worst first; those without a labelled pixel are left out."""
    labelled = [image for image in images if image.mean_iou is not None]
    return sorted(labelled, key=lambda image: (image.mean_iou, image.index))[:count]
