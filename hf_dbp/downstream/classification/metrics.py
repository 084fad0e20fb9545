"""Streamed figures of a classifier: accuracies, the scores of each class, calibration.

With p_NK the probabilities of N images, y_N their classes, and n_KK[i, j] the images of class i predicted as class j:

    accuracy            sum_k n[k, k] / N                        top-1
    top-5 accuracy      the share of images whose class is among the five most probable; for more than 5 classes
    recall_k            n[k, k] / sum_j n[k, j]                  precision_k  n[k, k] / sum_i n[i, k]
    balanced accuracy   the mean recall of the classes that occur
    ECE                 sum_b N_b / N * |accuracy_b - confidence_b|, over 15 bins of equal width of the confidence
                        max_k p[n, k] (Guo et al. 2017): 0.03 means that stated probabilities are off by 3 % on average
    loss                the mean of -log p[n, y_n]

The names are those of `evaluate` and scikit-learn. Memory is O(K^2), whatever N.

Shapes: N images; K classes.
"""

from __future__ import annotations

from typing import Any, TypedDict

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_dbp.errors import UserError

__all__ = ["BINS", "ClassificationScores", "Scores", "Tally", "class_figures"]

BINS = 15  # of confidence
TOP = 5


class Scores(TypedDict):
    """The figures of an evaluation; top5_accuracy is absent for 5 classes or fewer."""

    accuracy: float
    balanced_accuracy: float
    top5_accuracy: float | None
    expected_calibration_error: float
    loss: float


class Tally:
    """Counts from which every figure follows; counts of several processes are added.

    Args:
        classes: K.

    Attributes:
        confusion_KK: images by true (rows) and predicted class.
        bins_3B: for each bin of confidence: images, sum of the confidence, correct ones.
        rest: images whose class is among the five most probable, and the sum of the loss.
    """

    def __init__(self, classes: int) -> None:
        self.confusion_KK = np.zeros((classes, classes))
        self.bins_3B = np.zeros((3, BINS))
        self.rest = np.zeros(2)

    def add(self, logits_BK: Tensor, labels_B: Tensor) -> None:
        """Count a batch.

        Args:
            logits_BK: float logits, or the logarithms of probabilities.
            labels_B: class ids.
        """
        chance_BK = logits_BK.double().log_softmax(dim=1)
        labels_B = labels_B.to(chance_BK.device)
        best_B, predicted_B = chance_BK.max(dim=1)
        own_B = chance_BK.gather(1, labels_B[:, None])[:, 0]
        confidence_B, hits_B = best_B.exp(), predicted_B == labels_B
        pairs = labels_B * chance_BK.shape[1] + predicted_B
        self.confusion_KK += pairs.bincount(minlength=self.confusion_KK.size).cpu().numpy().reshape(
            self.confusion_KK.shape
        )  # fmt: skip
        bin_B = (confidence_B * BINS).ceil().long().clamp(1, BINS) - 1  # a bin includes its upper edge
        for row, weight_B in enumerate((torch.ones_like(confidence_B), confidence_B, hits_B.double())):
            self.bins_3B[row] += bin_B.bincount(weight_B, minlength=BINS).cpu().numpy()
        top_B = (chance_BK.topk(min(TOP, chance_BK.shape[1])).indices == labels_B[:, None]).any(dim=1)
        self.rest += [float(top_B.sum()), float(-own_B.sum())]

    def vector(self) -> NDArray[np.float64]:
        """All counts as one vector."""
        return np.concatenate([self.confusion_KK.ravel(), self.bins_3B.ravel(), self.rest])

    @classmethod
    def of(cls, vector: NDArray[np.float64], classes: int) -> Tally:
        """The tally from such a vector."""
        tally = cls(classes)
        confusion, bins, tally.rest = np.split(vector, [classes**2, classes**2 + 3 * BINS])
        tally.confusion_KK, tally.bins_3B = confusion.reshape(classes, classes), bins.reshape(3, BINS)
        return tally

    def scores(self) -> Scores:
        """The figures.

        Raises:
            UserError: nothing was counted.
        """
        true_K, total = self.confusion_KK.sum(axis=1), self.confusion_KK.sum()
        if not total:
            raise UserError("no image was evaluated: none could be read")
        hits_K, (count_B, confidence_B, right_B) = np.diag(self.confusion_KK), self.bins_3B
        return {
            "accuracy": float(hits_K.sum() / total),
            "balanced_accuracy": float((hits_K[true_K > 0] / true_K[true_K > 0]).mean()),
            "top5_accuracy": float(self.rest[0] / total) if len(true_K) > TOP else None,
            "expected_calibration_error": float(np.abs(right_B - confidence_B)[count_B > 0].sum() / total),
            "loss": float(self.rest[1] / total),
        }


def class_figures(confusion_KK: NDArray[Any], names: dict[int, str]) -> dict[str, dict[str, float | int | None]]:
    """Recall, precision, F1 and images of each class, by name; None if a denominator is 0."""
    hits_K, true_K, found_K = np.diag(confusion_KK), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)

    def share(part: float, whole: float) -> float | None:
        return float(part / whole) if whole else None

    return {
        name: {
            "recall": share(hits_K[k], true_K[k]),
            "precision": share(hits_K[k], found_K[k]),
            "f1": share(2 * hits_K[k], true_K[k] + found_K[k]),
            "images": int(true_K[k]),
        }
        for k, name in names.items()
    }


class ClassificationScores(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """The figures as an `evaluate.Metric` that needs no network: `add_batch` counts, `compute` scores and starts over.

    With `num_process` > 1, process 0 collects the tallies of all processes through evaluate's exchange, as in
    `hf_dbp.downstream.segmentation.mean_iou.MeanIoU`. Processes joined by torch.distributed add `tally.vector()`.

    Args:
        num_labels: K.
        evaluate_options: evaluate.Metric's own options.
    """

    def __init__(self, num_labels: int, **evaluate_options: Any) -> None:
        self.num_labels, self.tally = num_labels, Tally(num_labels)
        super().__init__(keep_in_memory=evaluate_options.get("num_process", 1) == 1, **evaluate_options)

    def _info(self) -> evaluate.EvaluationModuleInfo:
        row = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.EvaluationModuleInfo(
            description="Accuracies and calibration of a classifier, streamed into counts.",
            citation="",
            inputs_description="predictions: logits (B, K). references: class ids (B).",
            features=datasets.Features(row),
        )

    def add_batch(self, *, predictions: Tensor, references: Tensor) -> None:
        """Count a batch of logits (B, K) and class ids (B)."""
        self.tally.add(torch.as_tensor(predictions), torch.as_tensor(references))

    def compute(self, *, predictions: Tensor | None = None, references: Tensor | None = None) -> Scores | None:
        """The figures of all batches since the last call, including these; None on processes other than 0."""
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        elif predictions is not None or references is not None:
            raise UserError("predictions and references belong together: give both or neither")
        evaluate.Metric.add_batch(self, predictions=self.tally.vector()[None], references=np.zeros(1, np.int64))
        self.tally = Tally(self.num_labels)
        scores: Scores | None = evaluate.Metric.compute(self)
        return scores

    def _compute(self, *, predictions: list[list[float]], references: list[int]) -> Scores:
        return Tally.of(np.asarray(predictions).sum(axis=0), self.num_labels).scores()
