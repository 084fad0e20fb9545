"""The tasks that every encoder of a comparison can be fine-tuned for: a key of a plan, and a folder below each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_dbp.data.classes import load_classified
from hf_dbp.downstream.classification import arguments as classification
from hf_dbp.downstream.detection import arguments as detection
from hf_dbp.downstream.detection.data import load_objects
from hf_dbp.downstream.segmentation import arguments as segmentation
from hf_dbp.downstream.segmentation.data import load_labelled_images

__all__ = ["EVALUATION", "HEADS", "Head"]

EVALUATION = "eval.json"  # written by fine-tuning


@dataclass(frozen=True)
class Head:
    """A task that every encoder of a comparison can be fine-tuned for.

    Args:
        module: module of its ``main``.
        groups: its classes of flags.
        model: what is trained, in words.
        metrics: figures of its `eval.json`, in words; see `first`. One that the file lacks is left out.
        guess: figure with the first metric's value for always predicting the most common class; None if that means
            nothing.
        load: loads the labelled images that the flags of model and data name, as fine-tuning does.
    """

    module: str
    groups: tuple[type, ...]
    model: str
    metrics: dict[str, str]
    guess: str | None
    load: Callable[[Any, Any], Any]

    @property
    def first(self) -> tuple[str, str]:
        """The metric that is plotted and that the yardstick judges by, and its name in words."""
        return next(iter(self.metrics.items()))


#: key of a plan, and folder below a run -> task
HEADS = {
    "segmentation": Head(
        "hf_dbp.downstream.segmentation.finetuning",
        segmentation.GROUPS,
        "a segmentation model",
        {"mean_iou": "mean IoU"},
        "majority_class_mean_iou",
        lambda model, data: load_labelled_images(data.source(model.cache_dir, model.token)),
    ),
    "classification": Head(
        "hf_dbp.downstream.classification.finetuning",
        classification.GROUPS,
        "a classifier",
        {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"},
        "majority_class_accuracy",
        lambda model, data: load_classified(data.source(model.cache_dir, model.token)),
    ),
    "detection": Head(
        "hf_dbp.downstream.detection.finetuning",
        detection.GROUPS,
        "a detector",
        {
            "map": "mean average precision",
            "map_50": "AP50",
            "mask_map": "mean average precision of masks",
            "mask_map_50": "AP50 of masks",
        },
        None,
        lambda model, data: load_objects(data.source(model.cache_dir, model.token, model.instances)),
    ),
}
