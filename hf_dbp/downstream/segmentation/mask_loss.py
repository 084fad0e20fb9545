"""How an EoMT is trained on semantic labels: its own loss, averaged over a step, and the annealing of its masks.

The targets of an image are the classes in its labels and the mask of each. The stock loss matches them with queries
(Hungarian) after each of the last layers and sums, over these layers, with n masks and Q queries per image,

    2 * cross-entropy of the queries' classes      a mean over the queries, those that match no mask weigh 0.1 each
    5 * (binary cross-entropy + Dice) of masks     a sum over the masks, at points drawn where they are uncertain, / n

`MaskLoss` divides by the weights and masks of the whole step instead of the micro-batch, so accumulation and several
processes give the loss of one batch. Pixels that are not labelled lie outside every mask, as published; an image
without any labelled pixel is left out.

Annealing: block i of n masks the attention of each query with a probability that is 1 up to the share of training

    1/6 + i / (2 (n - 1)),   and then falls to 0 within a sixth of it, as (1 - passed) ** 0.9

These are the published schedules of 3 and 4 blocks. For the last sixth of training, attention is that of evaluation.

Shapes: B images; C channels; S side of a crop; Q queries; n masks of an image, or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EomtForUniversalSegmentation

from hf_dbp.downstream.segmentation.losses import with_a_label

__all__ = ["MaskLoss", "mask_chances"]

POWER = 0.9


def mask_chances(progress: float, blocks: int) -> list[float]:
    """The probability, for each block, that a query's attention is masked after that share of training."""
    starts = [1 / 6 + block / (2 * max(1, blocks - 1)) for block in range(blocks)]
    return [float(1 - min(1.0, max(0.0, 6 * (progress - start)))) ** POWER for start in starts]


class MaskLoss:
    """The training loss of an EoMT.

    Args:
        model: the EoMT, unwrapped; its stock loss divides as this one says from now on.
    """

    def __init__(self, model: EomtForUniversalSegmentation) -> None:
        self.model, self.factors = model, {"loss_mask": 1.0, "loss_dice": 1.0, "loss_cross_entropy": 1.0}
        model.criterion.get_num_masks = lambda class_labels, device: 1.0  # so that they are summed, without reduction
        model.criterion.register_forward_hook(self._scaled)

    def _scaled(self, module: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: loss * self.factors[name] for name, loss in losses.items()}

    def classes(self, label_SS: Tensor) -> Tensor:
        """The classes in an image's labels (n)."""
        found_n: Tensor = torch.unique(label_SS)
        return found_n[found_n != self.model.config.loss_ignore_index]

    def labelled(self, labels_BSS: Tensor) -> Tensor:
        """The number of masks, and the weight of the queries in the mean of their classes (2)."""
        config, counts = self.model.config, [len(self.classes(label)) for label in labels_BSS]
        masks, images = sum(counts), sum(count > 0 for count in counts)
        weight = masks + config.no_object_weight * (images * config.num_queries - masks)
        return torch.tensor([masks, weight], device=labels_BSS.device)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], share: Tensor, progress: float
    ) -> tuple[Tensor, Any]:
        """The loss of a micro-batch as its part of the step's, and the outputs.

        Args:
            model: the EoMT, maybe wrapped.
            inputs: ``pixel_values`` (B, C, S, S) and ``labels`` (B, S, S).
            share: the micro-batch's share of what `labelled` counts in the step (2).
            progress: share of training that is done.
        """
        labels_BSS = with_a_label(inputs["labels"], self.model.config.loss_ignore_index)
        images = [(index, self.classes(label)) for index, label in enumerate(labels_BSS)]
        kept = [(index, classes) for index, classes in images if len(classes)]
        masks = [(labels_BSS[index] == classes[:, None, None]).float() for index, classes in kept]
        of_masks = float(share[0]) / sum(len(classes) for _, classes in kept)
        self.factors = {"loss_mask": of_masks, "loss_dice": of_masks, "loss_cross_entropy": float(share[1])}
        chances = self.model.attn_mask_probs
        if model.training:
            chances.copy_(torch.tensor(mask_chances(progress, len(chances))))
        try:
            outputs = model(
                pixel_values=inputs["pixel_values"][[index for index, _ in kept]],
                mask_labels=masks,
                class_labels=[classes for _, classes in kept],
            )
        finally:
            chances.zero_()  # as evaluated and saved
        return outputs.loss, outputs
