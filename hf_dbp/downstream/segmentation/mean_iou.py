"""Mean intersection over union, streamed into a confusion matrix.

For class k, with n_KK[i, j] the pixels of true class i predicted as class j:

    IoU_k      = n[k, k] / (sum_j n[k, j] + sum_i n[i, k] - n[k, k])
    accuracy_k = n[k, k] / sum_j n[k, j]

The means are over classes that occur (a class with an empty denominator is NaN and left out); overall accuracy is
sum_k n[k, k] / sum n. These are the figures, under the same names, of `evaluate.load("mean_iou")`, which needs the
network, keeps every label map and counts three histograms per image. Here each map is counted on arrival and then
dropped: memory is O(classes^2).

Shapes: K classes; H, W height and width of one map; N pixels of a piece of a map.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import Any, TypedDict

import cv2
import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

from hf_dbp.errors import UserError

__all__ = ["MeanIoU", "SegmentationScores", "class_scores", "confusion_matrix", "scores_from_confusion"]

IntArray = npt.NDArray[np.integer[Any]]
LabelMaps = IntArray | torch.Tensor | Sequence[IntArray | torch.Tensor]
Piece = tuple[IntArray, IntArray]  # predicted and true ids of the same N pixels

_PIECE = 1 << 17  # pixels counted and then checked, while they are in the cache
_AT_ONCE = 1 << 7  # pieces distributed at a time: OpenCV's float32 counts are exact up to 2^24 pixels


class SegmentationScores(TypedDict):
    """Results under evaluate's names; per-category arrays are NaN for classes that never occur."""

    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float
    per_category_iou: npt.NDArray[np.float64]
    per_category_accuracy: npt.NDArray[np.float64]


def scores_from_confusion(confusion_KK: npt.NDArray[np.int64]) -> SegmentationScores:
    """Return the scores of a confusion matrix (rows: true class, columns: predicted class).

    Raises:
        ValueError: the matrix is empty, so every score would be NaN.
    """
    total = confusion_KK.sum()
    if total == 0:
        raise UserError("no labelled pixel was counted: every reference pixel is ignore_index, or no map was added")
    hits_K = np.diag(confusion_KK).astype(np.float64)
    true_K, predicted_K = confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    union_K = true_K + predicted_K - hits_K
    nan_K = np.full_like(hits_K, np.nan)
    iou_K = np.divide(hits_K, union_K, out=nan_K.copy(), where=union_K > 0)
    accuracy_K = np.divide(hits_K, true_K, out=nan_K.copy(), where=true_K > 0)
    return {
        "mean_iou": float(np.nanmean(iou_K)),
        "mean_accuracy": float(np.nanmean(accuracy_K)),
        "overall_accuracy": float(hits_K.sum() / total),
        "per_category_iou": iou_K,
        "per_category_accuracy": accuracy_K,
    }


def confusion_matrix(
    predictions: LabelMaps, references: LabelMaps, num_labels: int, ignore_index: int
) -> npt.NDArray[np.int64]:
    """Count (true class, predicted class) pairs over label maps of any shapes, ids of any integer type.

    Returns:
        K x K counts; pixels whose reference is `ignore_index` are left out.

    Raises:
        ValueError: maps differ in number or shape, are not integers, or hold ids outside 0..num_labels-1.
    """
    confusion_KK = np.zeros((num_labels, num_labels), dtype=np.int64)
    pieces = _pieces(predictions, references)
    while shared := list(islice(pieces, _AT_ONCE)):
        waiting = iter(shared)
        helpers = [
            _helpers(os.getpid()).submit(_count, waiting, num_labels, ignore_index)
            for _ in range(min(torch.get_num_threads(), len(shared)) - 1)
        ]
        confusion_KK += _count(waiting, num_labels, ignore_index)
        for helper in helpers:
            confusion_KK += helper.result()
    return confusion_KK


def _pieces(predictions: LabelMaps, references: LabelMaps) -> Iterator[Piece]:
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions but {len(references)} references: give one of each per image")
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, true = _integers(prediction, "prediction"), _integers(reference, "reference")
        if predicted.shape != true.shape:
            raise UserError(
                f"prediction of shape {predicted.shape} against reference of shape {true.shape}: "
                "resize the logits to the reference's height and width before the argmax"
            )
        predicted_N, true_N = np.ascontiguousarray(predicted).reshape(-1), np.ascontiguousarray(true).reshape(-1)
        for start in range(0, true_N.size, _PIECE):
            yield predicted_N[start : start + _PIECE], true_N[start : start + _PIECE]


def _integers(label_map: IntArray | torch.Tensor, role: str) -> IntArray:
    if isinstance(label_map, torch.Tensor):
        label_map = label_map.detach().cpu()
        label_map = (label_map.float() if label_map.is_floating_point() else label_map).numpy()  # NumPy has no bfloat16
    array = np.asarray(label_map)
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{role} holds {array.dtype}, not class ids: pass integers (for logits, their argmax)")
    return array


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked process inherits none.

    NumPy and OpenCV release the interpreter lock while they count, so PyTorch's thread count pays off here. The calling
    thread counts too: merely waiting, it would take the lock from the workers and slow them down.
    """
    return ThreadPoolExecutor(thread_name_prefix="mean_iou")


def _count(waiting: Iterator[Piece], num_labels: int, ignore_index: int) -> npt.NDArray[np.int64]:
    """Count pieces with a 2-D histogram of their ids' lowest bytes; fall back if an id is not a byte or not a class."""
    counts, counted, bytes_only = np.zeros((256, 256), dtype=np.float32), [], True
    for piece in waiting:
        counted.append(piece)
        bytes_only &= _count_bytes(*piece, counts)
    if 0 <= ignore_index < 256:
        counts[ignore_index] = 0
    confusion_KK = np.zeros((num_labels, num_labels), dtype=np.int64)
    if bytes_only and not (counts[num_labels:].any() or counts[:, num_labels:].any()):
        confusion_KK[:256, :256] = counts[:num_labels, :num_labels]
        return confusion_KK
    for piece in counted:
        confusion_KK += _count_any_ids(*piece, num_labels, ignore_index)
    return confusion_KK


def _count_bytes(predicted_N: IntArray, true_N: IntArray, counts: npt.NDArray[np.float32]) -> bool:
    """Add the pairs of lowest bytes, read in place as channels of images; False if an id has other non-zero bytes."""
    sides = true_N, predicted_N
    images = [ids_N.view(np.uint8).reshape(-1, 1, ids_N.itemsize) for ids_N in sides]
    channels = [_low_byte(true_N.dtype), true_N.itemsize + _low_byte(predicted_N.dtype)]
    cv2.calcHist(images, channels, None, [256, 256], [0, 256, 0, 256], counts, accumulate=True)
    return all(ids_N.dtype == np.uint8 or 0 <= np.bitwise_or.reduce(ids_N) < 256 for ids_N in sides)


@cache
def _low_byte(dtype: np.dtype[np.integer[Any]]) -> int:
    return int(np.ones(1, dtype).view(np.uint8).argmax())


def _count_any_ids(
    predicted_N: IntArray, true_N: IntArray, num_labels: int, ignore_index: int
) -> npt.NDArray[np.int64]:
    labelled = true_N != ignore_index
    true_N, predicted_N = true_N[labelled], predicted_N[labelled]
    for name, ids_N in (("reference", true_N), ("prediction", predicted_N)):
        outside = np.unique(ids_N[(ids_N < 0) | (ids_N >= num_labels)])
        if outside.size:
            raise UserError(
                f"{name} holds ids {outside[:5].tolist()} outside the classes 0..{num_labels - 1} and different from "
                f"ignore_index {ignore_index}: set num_labels or ignore_index, or reduce the labels"
            )
    pairs_N = true_N.astype(np.int64) * num_labels + predicted_N.astype(np.int64)
    return np.bincount(pairs_N, minlength=num_labels**2).reshape(num_labels, num_labels)


class MeanIoU(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Mean IoU as an `evaluate.Metric` that needs no network: `add_batch` counts, `compute` scores and starts over.

    With `num_process` > 1, each process (`process_id`) adds its own maps, and `compute` sums their matrices on process
    0 through evaluate's exchange (files in a shared cache folder); the others get None, as in evaluate. As there, the
    next evaluation may begin only when process 0 has finished this one. Processes joined by torch.distributed need no
    files: sum `confusion_KK` over them and call `scores_from_confusion`.

    Args:
        num_labels: number of classes K; ids run from 0 to K - 1.
        ignore_index: reference id of pixels that are not counted, e.g. 255.
        allow_ignored_class: accept an `ignore_index` that is also a class id. Its pixels are then left out, predictions
            of it elsewhere count as errors, and false alarms on it go unnoticed: IoU drifts towards recall.
        evaluate_options: evaluate.Metric's own options: num_process, process_id, experiment_id, cache_dir, timeout.

    Raises:
        ValueError: there is no class, or `ignore_index` is a class id.
    """

    def __init__(
        self, num_labels: int, ignore_index: int = 255, *, allow_ignored_class: bool = False, **evaluate_options: Any
    ) -> None:
        if num_labels < 1:
            raise UserError(f"num_labels is {num_labels}: give the number of classes, at least 1")
        if 0 <= ignore_index < num_labels and not allow_ignored_class:
            raise UserError(
                f"ignore_index {ignore_index} is also a class id (num_labels {num_labels}), "
                "which turns IoU into recall: choose an id outside the classes or pass allow_ignored_class=True"
            )
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.confusion_KK = np.zeros((num_labels, num_labels), dtype=np.int64)
        super().__init__(keep_in_memory=evaluate_options.get("num_process", 1) == 1, **evaluate_options)

    def _info(self) -> evaluate.EvaluationModuleInfo:
        # evaluate stores and exchanges one row of the confusion matrix per example, never a label map.
        row = {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.EvaluationModuleInfo(
            description="Mean intersection over union of semantic segmentation, streamed into a confusion matrix.",
            citation="",
            inputs_description="predictions, references: integer label maps of equal shapes, one of each per image.",
            features=datasets.Features(row),
        )

    def add_batch(self, *, predictions: LabelMaps, references: LabelMaps) -> None:
        """Count a batch of label maps (a B x H x W array or tensor, or a list of H x W maps of any sizes)."""
        self.confusion_KK += confusion_matrix(predictions, references, self.num_labels, self.ignore_index)

    def add(self, *, prediction: IntArray | torch.Tensor, reference: IntArray | torch.Tensor) -> None:
        """Count one H x W label map."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(
        self, *, predictions: LabelMaps | None = None, references: LabelMaps | None = None
    ) -> SegmentationScores | None:
        """Return the scores of all maps since the last call, including these; None on processes other than 0."""
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        elif predictions is not None or references is not None:
            raise UserError("predictions and references belong together: give both or neither")
        evaluate.Metric.add_batch(self, predictions=self.confusion_KK, references=np.arange(self.num_labels))
        self.confusion_KK = np.zeros_like(self.confusion_KK)
        scores: SegmentationScores | None = evaluate.Metric.compute(self)
        return scores

    def _compute(self, *, predictions: list[list[int]], references: list[int]) -> SegmentationScores:
        confusion_KK = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)
        np.add.at(confusion_KK, references, np.asarray(predictions, dtype=np.int64))
        return scores_from_confusion(confusion_KK)


def class_scores(
    hits_K: npt.NDArray[np.int64],
    true_K: npt.NDArray[np.int64],
    predicted_K: npt.NDArray[np.int64],
    names: Mapping[int, str],
) -> dict[str, dict[str, float | int | None]]:
    """IoU, accuracy, precision, recall, Dice and pixels of each class, by name; None if a denominator is 0.

    With h the correctly found pixels of a class, t its true and p its predicted pixels: precision h / p, recall (also
    called accuracy) h / t, Dice 2 h / (t + p), IoU h / (t + p - h).
    """
    return {
        names[k]: {
            "iou": _share(hits_K[k], true_K[k] + predicted_K[k] - hits_K[k]),
            "accuracy": _share(hits_K[k], true_K[k]),
            "precision": _share(hits_K[k], predicted_K[k]),
            "recall": _share(hits_K[k], true_K[k]),
            "dice": _share(2 * hits_K[k], true_K[k] + predicted_K[k]),
            "pixels": int(true_K[k]),
        }
        for k in range(len(names))
    }


def _share(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
