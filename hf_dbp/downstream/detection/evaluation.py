"""The results of evaluating a detector: the content of `eval.json`, and lines to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dbp.data.feeding import feeding
from hf_dbp.data.images import unreadable_images
from hf_dbp.data.sources import ImageSource
from hf_dbp.downstream.detection.trainer import DetectionTrainer
from hf_dbp.downstream.finetuning import closing_lines
from hf_dbp.records import hardware, source_commit, versions

__all__ = ["class_rows", "evaluation_record", "summary"]

PRINTED = 30  # classes that are printed
USELESS = 0.05  # AP50


def class_rows(trainer: DetectionTrainer) -> dict[str, dict[str, float | int | None]]:
    """The figures of each class by name; those of masks begin with ``mask_``."""
    assert trainer.scores is not None
    names, masks = trainer.model.config.id2label, trainer.mask_scores
    rows = {}
    for k, row in enumerate(trainer.scores.classes):
        more = {} if masks is None else {f"mask_{name}": masks.classes[k][name] for name in ("ap", "ap_50", "recall")}
        rows[str(names[k])] = {**row, **more}
    return rows


def evaluation_record(
    trainer: DetectionTrainer,
    metrics: Mapping[str, float],
    source: ImageSource,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `eval.json`.

    Figures are shares in [0, 1], see `hf_dbp.downstream.detection.coco`; null where there is no such object;
    ``boxes`` says what is odd about them; `asked_used` names what else was used than was asked for. ``history`` has a
    row per evaluation during training, `evaluations`.
    """
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert trainer.sampler is not None
    data = {
        "source": source.name,
        "train_images": len(train),
        "validation_images": len(validation),
        "size": list(train.size),
        "channels": len(train.mean),
        "objects": {
            split: {name: int(count) for name, count in zip(part.data.names, part.data.counts_K, strict=True)}
            for split, part in (("train", train), ("validation", validation))
        },
        "boxes": {
            split: part.data.odd.record() | {"tiny": part.data.tiny(part.size)}
            for split, part in (("train", train), ("validation", validation))
        },
        "unreadable": unreadable_images({}, train.data, validation.data),
        "left_out": train.images.left_out.record(),
        "feeding": feeding(trainer.sampler, trainer.args),
    }
    record = {
        "schema": 1,
        "task": "detection",
        **trainer.figures(),
        "loss": metrics["eval_loss"],
        "per_class": class_rows(trainer),
        "data": data,
        "best_checkpoint": None if trainer.restored is None else trainer.state.best_model_checkpoint,
        "step": trainer.weights_step,
        "guards": trainer.skipped_steps(),
        "seed": trainer.args.seed,
        "arguments": {**trainer.arguments},
        "commit": source_commit(),
        "versions": versions(),
        "hardware": hardware() | {"processes": trainer.args.world_size},
        **trainer.cost.costs(trainer.args),
        "energy": {**trainer.cost.energy},
    }
    if trainer.resumed_with:
        record["resumed_with"] = trainer.resumed_with
    asked_used = trainer.asked_used(record, history, trainer.asked)
    return record | {"asked_used": asked_used, "evaluations": [*history]}


def summary(record: Mapping[str, Any], folder: Path) -> str:
    """The results of a detector's run and where they are, to print at its end."""
    rows = [f"\ndetector on {record['data']['source']}: {folder}"]
    for prefix, what in (("", "boxes"), ("mask_", "masks")):
        if f"{prefix}map" in record:
            rows.append(
                f"  {what}  mAP {shown(record[f'{prefix}map'])}, AP50 {shown(record[f'{prefix}map_50'])}, AP75 "
                f"{shown(record[f'{prefix}map_75'])}; small {shown(record[f'{prefix}map_small'])}, medium "
                f"{shown(record[f'{prefix}map_medium'])}, large {shown(record[f'{prefix}map_large'])}"
            )
    rows.append(f"    {'':<24} {'AP':>8}{'AP50':>8}{'recall':>8}{'objects':>9}")
    classes = list(record["per_class"].items())
    if len(classes) > PRINTED:
        classes.sort(key=lambda row: row[1]["ap"] if row[1]["ap"] is not None else 2.0)
        rows.append(f"    the {PRINTED} of {len(classes)} classes with the lowest AP; all are in eval.json:")
    for name, scores in classes[:PRINTED]:
        figures = "".join(f"{shown(scores[key]):>8}" for key in ("ap", "ap_50", "recall"))
        rows.append(f"    {name:<24} {figures}{scores['objects']:>9}")
    if (record["map_50"] or 0.0) < USELESS:
        rows.append(
            f"  after {record['step']} steps it finds next to nothing: train for longer (--budget, "
            "--num_train_epochs) or, if the objects are small, raise --image_size"
        )
    return "\n".join([*rows, *closing_lines(record, folder, "predictions.png")])


def shown(value: float | None) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.4f}"
