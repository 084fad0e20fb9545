"""The results of an evaluation: the scores of each class, the content of `eval.json`, and lines to print."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_dbp.data.images import unreadable_images
from hf_dbp.downstream.finetuning import closing_lines
from hf_dbp.downstream.segmentation.arguments import HEADS
from hf_dbp.downstream.segmentation.data import SegmentationSource
from hf_dbp.downstream.segmentation.detection import detection
from hf_dbp.downstream.segmentation.mean_iou import class_scores
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.records import hardware, source_commit, versions

__all__ = ["evaluation_record", "per_class", "summary"]


def per_class(trainer: SegmentationTrainer) -> dict[str, dict[str, float | int | None]]:
    """The scores of each class in the last evaluation, by name; see `class_scores`."""
    confusion_KK = trainer.confusion_KK
    counts = np.diag(confusion_KK), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    return class_scores(*counts, trainer.model.config.id2label)


def evaluation_record(
    trainer: SegmentationTrainer,
    metrics: Mapping[str, float],
    source: SegmentationSource,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `eval.json`.

    Scores are shares in [0, 1]; `per_class` has null if a class occurs neither in the labels nor in the predictions;
    `majority_class_mean_iou` is the score of predicting the most common class everywhere; `asked_used` names what else
    was used than was asked for. ``history`` has a row per evaluation during training, `evaluations`.
    """
    assert trainer.scores is not None
    scores, pixels_K = trainer.scores, trainer.confusion_KK.sum(axis=1)
    record = {
        "schema": 1,
        "task": "segmentation",
        "mean_iou": scores["mean_iou"],
        "mean_accuracy": scores["mean_accuracy"],
        "overall_accuracy": scores["overall_accuracy"],
        "loss": metrics["eval_loss"],
        "majority_class_mean_iou": float(pixels_K.max() / pixels_K.sum() / np.count_nonzero(pixels_K)),
        "per_class": per_class(trainer),
        "confusion": {"rows": "true", "columns": "predicted", "pixels": trainer.confusion_KK.tolist()},
        "detection": detection(trainer.images, trainer.args.detection_recall),
        "images": [dataclasses.asdict(image) for image in trainer.images],
        "data": {
            "source": source.name,
            "train_images": len(trainer.train_dataset),
            "validation_images": len(trainer.eval_dataset),
            "validation_pixels": int(pixels_K.sum()),
            "background_images": {
                split: data.images.background
                for split, data in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset))
            },
            "unreadable": unreadable_images({}, trainer.train_dataset.images, trainer.eval_dataset.images),
            "left_out": trainer.train_dataset.images.left_out.record(),
        },
        "best_checkpoint": None if trainer.restored is None else trainer.state.best_model_checkpoint,
        "step": trainer.weights_step,
        "guards": trainer.skipped_steps(),
        "seed": trainer.args.seed,
        "commit": source_commit(),
        "versions": versions(),
        "hardware": hardware() | {"processes": trainer.args.world_size},
        "evaluations": [*history],
        "arguments": {**trainer.arguments},
        **trainer.cost.costs(trainer.args),
        "energy": {**trainer.cost.energy},
    }
    if trainer.resumed_with:
        record["resumed_with"] = trainer.resumed_with
    return record | {"asked_used": trainer.asked_used(record, history, trainer.asked)}


def summary(record: dict[str, Any], folder: Path) -> str:
    """The results of a run and where they are, to print at its end."""
    rows = [f"\n{HEADS[record['arguments']['head']]} on {record['data']['source']}: {folder}"]
    rows.append(f"  mean IoU {record['mean_iou']:.4f} (most common class everywhere: "
                f"{record['majority_class_mean_iou']:.4f}), loss {record['loss']:.4f}")  # fmt: skip
    rows.append(f"    {'':<20} {'IoU':>8}{'Dice':>8}{'prec.':>8}{'recall':>8}")
    for name, scores in record["per_class"].items():
        figures = (scores[key] for key in ("iou", "dice", "precision", "recall"))
        rows.append(f"    {name:<20} " + "".join("     -  " if f is None else f"{f:8.4f}" for f in figures))
    if (found := record["detection"]) is not None:
        rows.append(
            f"  is there any? ROC AUC {found['roc_auc']:.4f}; a score of at least {found['threshold']:.4f} finds "
            f"{found['recall']:.1%} of the images with any, with {found['false_alarms']:.1%} false alarms"
        )
    return "\n".join([*rows, *closing_lines(record, folder, "predictions.png, worst.png")])
