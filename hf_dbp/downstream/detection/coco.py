"""COCO's measures, by pycocotools: average precision and recall of boxes and masks.

Average precision (AP) of a class: predictions of all images, most confident first, are matched to the nearest true
object that is free, if they overlap by at least a threshold (intersection over union); AP is the mean precision at 101
recalls. ``map`` is its mean over classes and the thresholds 0.50, 0.55 ... 0.95; ``map_50`` and ``map_75`` are those of
one threshold; small objects have fewer than 32 x 32 pixels of their image, large ones more than 96 x 96. ``mar_n`` is
the mean recall with n predictions per image.

Shapes: N objects of an image; M predictions; K classes; H, W the image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.downstream.detection.objects import Objects
from hf_dbp.downstream.detection.runs import Runs, tools

__all__ = ["FIGURES", "LARGE", "SMALL", "Found", "Scores", "coco_scores"]

SMALL = 32**2  # pixels: smaller objects are small
LARGE = 96**2  # and larger ones large

#: of `COCOeval.stats`, in order
FIGURES = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """What a model finds in an image, most confident first.

    Args:
        boxes_M4: left, top, right, bottom in pixels of the image.
        classes_M: class ids.
        scores_M: in [0, 1].
        runs: the pixels of each; empty if it finds only boxes.
    """

    boxes_M4: NDArray[np.float64]
    classes_M: NDArray[np.int64]
    scores_M: NDArray[np.float64]
    runs: Sequence[Runs] = ()

    def __len__(self) -> int:
        return len(self.classes_M)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The figures of an evaluation: those of `FIGURES` by name, None where there is no such object; of each class by
    id ``ap``, ``ap_50``, ``recall`` (with 100 predictions per image) and the number of ``objects``."""

    figures: dict[str, float | None]
    classes: list[dict[str, float | int | None]]


def coco_scores(
    truth: Mapping[int, Objects], found: Mapping[int, Found], classes: int, *, masks: bool = False
) -> Scores:
    """The scores of predictions.

    Args:
        truth: the true objects of each image, by its number.
        found: the predictions for each image, by its number.
        classes: K.
        masks: compare pixels, not boxes.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        true, predicted = tools("coco").COCO(), tools("coco").COCO()
        common = {
            "images": [
                {"id": image, "height": objects.size[0], "width": objects.size[1]} for image, objects in truth.items()
            ],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
        }
        true.dataset = {**common, "annotations": true_rows(truth, masks)}
        predicted.dataset = {**common, "annotations": found_rows(found, masks)}
        true.createIndex()
        predicted.createIndex()
        judged = tools("cocoeval").COCOeval(true, predicted, "segm" if masks else "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    precision_TRKAM, recall_TKAM = judged.eval["precision"], judged.eval["recall"]
    counts_K = np.zeros(classes, np.int64)
    for objects in truth.values():
        np.add.at(counts_K, objects.classes_N[~objects.crowd_N], 1)
    rows: list[dict[str, float | int | None]] = [
        {
            "ap": mean(precision_TRKAM[:, :, k, 0, -1]),
            "ap_50": mean(precision_TRKAM[0, :, k, 0, -1]),
            "recall": mean(recall_TKAM[:, k, 0, -1]),
            "objects": int(counts_K[k]),
        }
        for k in range(classes)
    ]
    figures = {name: None if value < 0 else float(value) for name, value in zip(FIGURES, judged.stats, strict=True)}
    return Scores(figures, rows)


def mean(values: NDArray[Any]) -> float | None:
    """The mean of the figures that there are (others are -1)."""
    there = values[values > -1]
    return float(np.mean(there)) if there.size else None


def true_rows(truth: Mapping[int, Objects], masks: bool) -> list[dict[str, Any]]:
    """True objects as COCO's annotations; their ids begin at 1, as 0 means unmatched."""
    rows: list[dict[str, Any]] = []
    for image, objects in truth.items():
        for number in range(len(objects)):
            row = {
                "id": len(rows) + 1, "image_id": image, "category_id": int(objects.classes_N[number]) + 1,
                "bbox": as_sides(objects.boxes_N4[number]), "area": float(objects.areas_N[number]),
                "iscrowd": int(objects.crowd_N[number]),
            }  # fmt: skip
            rows.append(row | ({"segmentation": objects.runs[number].coco()} if masks else {}))
    return rows


def found_rows(found: Mapping[int, Found], masks: bool) -> list[dict[str, Any]]:
    """Predictions as COCO's annotations; their area is that of the box or of the pixels, as `COCO.loadRes` says."""
    rows: list[dict[str, Any]] = []
    for image, one in found.items():
        for number in range(len(one)):
            box = as_sides(one.boxes_M4[number])
            row: dict[str, Any] = {
                "id": len(rows) + 1, "image_id": image, "category_id": int(one.classes_M[number]) + 1,
                "score": float(one.scores_M[number]), "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            }  # fmt: skip
            if masks:
                runs = one.runs[number]
                row |= {"segmentation": runs.coco(), "area": runs.area}
            rows.append(row)
    return rows


def as_sides(box: NDArray[np.float64]) -> list[float]:
    """COCO's left, top, width, height."""
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]
