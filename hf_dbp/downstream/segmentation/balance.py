"""Make rare classes count in fine-tuning: choose the loss (`losses`) and the crops (`rare`) for the training masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.threads import in_threads
from hf_dbp.downstream.class_weights import class_weights as weights_of
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.losses import UperNetLoss
from hf_dbp.downstream.segmentation.rare import RareCrops
from hf_dbp.downstream.segmentation.rare import rare_classes as rare_ids

__all__ = ["balanced", "count_classes"]

logger = logging.getLogger(__name__)


def count_classes(images: LabelledImages) -> NDArray[np.int64]:
    """The pixels of each class in each mask (M, K); zeros for a mask that cannot be read."""

    def look(index: int) -> NDArray[np.int64]:
        try:
            mask_HW = images.mask(index)
        except UnreadableImageError:
            return np.zeros(images.num_labels, np.int64)
        labelled = mask_HW[(mask_HW >= 0) & (mask_HW < images.num_labels) & (mask_HW != images.ignore_index)]
        return np.bincount(labelled, minlength=images.num_labels)

    progress = tqdm(in_threads(look, range(len(images))), "Classes in the masks", len(images), leave=False)
    return np.stack(list(progress))


def balanced(
    model: PreTrainedModel,
    images: LabelledImages,
    *,
    loss: str = "ce",
    class_weights: str = "none",
    rare_crops: float = 0.0,
    rare_classes: Sequence[str] | None = None,
) -> tuple[UperNetLoss | None, RareCrops | None]:
    """The loss that replaces UperNet's own, and the crops around rare classes; None if not asked for.

    Args:
        model: the UperNet, or the EoMT, which has a loss of its own, to train; unwrapped.
        images: the training images; their masks are read once if weights or crops need them.
        loss, class_weights, rare_crops, rare_classes: the flags.

    Raises:
        UserError: there is no such class, or none is rare.
    """
    weights, rare, names = None, None, model.config.id2label
    if rare_crops or class_weights != "none":
        counts_MK = count_classes(images)
        weights = weights_of(counts_MK.sum(axis=0), class_weights)
        if rare_crops:
            rare = RareCrops(counts_MK, rare_ids(counts_MK.sum(axis=0), names, rare_classes), rare_crops)
            drawn = ", ".join(names[k] for k in rare.classes)
            logger.warning("%.0f %% of the training crops are drawn around a pixel of: %s", 100 * rare.share, drawn)
    plain = loss == "ce" and weights is None
    return None if plain else UperNetLoss(model, loss == "ce+dice", weights), rare
