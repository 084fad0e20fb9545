"""The results of evaluating a classifier: the content of `eval.json`, and lines to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.comparison.statistics import wilson_interval
from hf_dbp.data.feeding import feeding
from hf_dbp.data.images import unreadable_images
from hf_dbp.data.sources import ImageSource
from hf_dbp.downstream.classification.metrics import class_figures
from hf_dbp.downstream.classification.trainer import ClassificationTrainer
from hf_dbp.downstream.finetuning import closing_lines
from hf_dbp.records import hardware, source_commit, versions

__all__ = ["evaluation_record", "summary"]

WHOLE = 100  # classes up to which eval.json has the whole confusion matrix
PRINTED = 30  # classes that are printed


def evaluation_record(
    trainer: ClassificationTrainer,
    metrics: Mapping[str, float],
    source: ImageSource,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `eval.json`.

    Scores are shares in [0, 1], see `hf_dbp.downstream.classification.metrics`; `per_class` has null where a class has
    no image, or no prediction; `majority_class_accuracy` is what predicting the commonest class would score;
    `asked_used` names what else was used than was asked for, augmentations that are not for such images included.
    ``history`` has a row per evaluation during training, `evaluations`.
    """
    confusion_KK, train = trainer.tally.confusion_KK, trainer.train_dataset
    assert trainer.sampler is not None
    true_K = confusion_KK.sum(axis=1)
    total, scores = int(true_K.sum()), trainer.tally.scores()
    data = {
        "source": source.name,
        "train_images": len(train),
        "validation_images": len(trainer.eval_dataset),
        "size": list(train.size),
        "channels": len(train.mean_C),
        "classes": {name: int(count) for name, count in zip(train.data.names, train.data.counts_K, strict=True)},
        "unreadable": unreadable_images({}, train.images, trainer.eval_dataset.images),
        "left_out": train.images.left_out.record(),
        "feeding": feeding(trainer.sampler, trainer.args),
    }
    record = {
        "schema": 1,
        "task": "classification",
        **{name: value for name, value in scores.items() if value is not None},
        "loss": metrics["eval_loss"],
        "accuracy_interval_95": list(wilson_interval(int(confusion_KK.trace()), total)),
        "majority_class_accuracy": float(true_K.max() / total),
        "per_class": class_figures(confusion_KK, trainer.model.config.id2label),
        "confusion": confusion(confusion_KK),
        "calibration": calibration(trainer),
        "data": data,
        "best_checkpoint": None if trainer.restored is None else trainer.state.best_model_checkpoint,
        "step": trainer.weights_step,
        "guards": trainer.skipped_steps(),
        "seed": trainer.args.seed,
        "arguments": {**trainer.arguments, "learning_rate": trainer.args.learning_rate},
        "commit": source_commit(),
        "versions": versions(),
        "hardware": hardware() | {"processes": trainer.args.world_size},
        **trainer.cost.costs(trainer.args),
        "energy": {**trainer.cost.energy},
    }
    if trainer.resumed_with:
        record["resumed_with"] = trainer.resumed_with
    return record | {"asked_used": accounts(trainer, record, history), "evaluations": [*history]}


def confusion(confusion_KK: NDArray[Any]) -> dict[str, Any]:
    """The confusion matrix in `eval.json`; of more than `WHOLE` classes its entries that are not 0, as [true,
    predicted, images]."""
    counts_KK = confusion_KK.astype(int)
    if len(counts_KK) <= WHOLE:
        return {"rows": "true", "columns": "predicted", "images": counts_KK.tolist()}
    return {"entries": [[int(i), int(j), int(counts_KK[i, j])] for i, j in np.argwhere(counts_KK)]}


def calibration(trainer: ClassificationTrainer) -> list[dict[str, float | int]]:
    """The calibration in `eval.json`: for each bin of confidence that has images their number, mean confidence and
    accuracy."""
    return [
        {"images": int(count), "confidence": float(confidence / count), "accuracy": float(right / count)}
        for count, confidence, right in trainer.tally.bins_3B.T
        if count
    ]


def accounts(
    trainer: ClassificationTrainer, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`asked_used` of a run, see `hf_dbp.training.accounting`."""
    asked = {**trainer.asked}
    if trainer.args.absolute_learning_rate is not None:
        asked["base_learning_rate"] = None
    rows = trainer.asked_used(record, history, asked)
    if trainer.args.randaugment_operations:
        for name, why in trainer.train_dataset.left_out.items():
            rows[f"RandAugment: {name}"] = {"asked": True, "used": False, "why": why}
    return rows


def summary(record: Mapping[str, Any], folder: Path) -> str:
    """The results of a classifier's run and where they are, to print at its end."""
    low, high = record["accuracy_interval_95"]
    rows = [
        f"\nclassifier on {record['data']['source']}: {folder}",
        f"  accuracy {record['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f}; most common class everywhere: "
        f"{record['majority_class_accuracy']:.4f}), balanced {record['balanced_accuracy']:.4f}"
        + (f", top-5 {record['top5_accuracy']:.4f}" if "top5_accuracy" in record else ""),
        f"  calibration error {record['expected_calibration_error']:.4f}, loss {record['loss']:.4f}",
        f"    {'':<24} {'recall':>8}{'prec.':>8}{'images':>8}",
    ]
    classes = sorted(record["per_class"].items(), key=lambda row: row[1]["recall"] if row[1]["images"] else 2.0)
    if len(classes) > PRINTED:
        rows.append(f"    the {PRINTED} of {len(classes)} classes with the lowest recall; all are in eval.json:")
    for name, scores in classes[:PRINTED] if len(classes) > PRINTED else record["per_class"].items():
        figures = (scores[key] for key in ("recall", "precision"))
        rows.append(f"    {name:<24} " + "".join("     -  " if f is None else f"{f:8.4f}" for f in figures)
                    + f"{scores['images']:8d}")  # fmt: skip
    return "\n".join([*rows, *closing_lines(record, folder, "confusion.png, calibration.png, mistakes.png")])
