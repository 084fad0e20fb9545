"""Losses for classes with few pixels: class weights in the cross-entropy, and soft Dice added to it.

With p_NK the softmax of N labelled pixels over K classes, y_N their classes and w_K the weights:

    cross-entropy = 1/N sum_n -w[y_n] log p[n, y_n]
    Dice          = 1 - mean over the classes k of the batch of  2 sum_n p[n, k] [y_n = k] / (sum_n p[n, k] + N_k)
    loss          = cross-entropy (+ Dice), plus auxiliary_loss_weight times the same for UperNet's auxiliary head

Cross-entropy weights classes by their pixels; Dice weights all classes of a batch equally, however few pixels they
hold. Weights come from the classes' shares of the training pixels (`hf_dbp.downstream.class_weights`). Without weights
and Dice, this is the stock loss.

Shapes: B images; K classes; H, W height and width of a crop; N labelled pixels of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import UperNetForSemanticSegmentation

__all__ = ["LOSSES", "PixelLoss", "TrainingLoss", "UperNetLoss", "soft_dice", "with_a_label"]

LOSSES = ("ce", "ce+dice")


class TrainingLoss(Protocol):
    """What the Trainer asks of the loss of a head."""

    def labelled(self, labels_BHW: Tensor) -> Tensor:
        """What the loss of these labels is a mean over; several numbers if parts of it are means of their own."""

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], share: Tensor, progress: float
    ) -> tuple[Tensor, Any]:
        """The loss of a micro-batch as its part of the step's, and the model's outputs.

        Args:
            model: the model, maybe wrapped.
            inputs: ``pixel_values`` (B, C, H, W) and ``labels`` (B, H, W).
            share: the micro-batch's share of what `labelled` counts in the step.
            progress: share of training that is done, in [0, 1].
        """


def with_a_label(labels_BHW: Tensor, ignore_index: int) -> Tensor:
    """The labels, in which one pixel is of class 0 if none is labelled: with weight 0 the loss is finite."""
    all_void = labels_BHW.eq(ignore_index).all()
    labels_BHW = labels_BHW.clone()
    labels_BHW[0, 0, 0] = torch.where(all_void, 0, labels_BHW[0, 0, 0])
    return labels_BHW


@dataclasses.dataclass
class PixelLoss:
    """A mean over the labelled pixels.

    Args:
        ignore_index: label of the others.
        formula: training loss of logits and labels; None for the model's own, which evaluation uses anyway.
    """

    ignore_index: int
    formula: Callable[[Tensor, Tensor], Tensor] | None = None

    def labelled(self, labels_BHW: Tensor) -> Tensor:
        """The number of labelled pixels."""
        return labels_BHW.ne(self.ignore_index).sum()

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], share: Tensor, progress: float
    ) -> tuple[Tensor, Any]:
        """See `TrainingLoss`."""
        labels_BHW = with_a_label(inputs["labels"], self.ignore_index)
        if self.formula is None or not model.training:
            outputs = model(**{**inputs, "labels": labels_BHW})
            loss = outputs.loss
        else:
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = self.formula(outputs.logits, labels_BHW)
        return loss * share, outputs


def soft_dice(logits_BKHW: Tensor, labels_BHW: Tensor, ignore_index: int) -> Tensor:
    """1 - the mean soft Dice coefficient of the classes in the labels, pooled over the batch; a scalar."""
    labelled_N = labels_BHW.ne(ignore_index).flatten()
    classes = logits_BKHW.shape[1]
    p_NK = logits_BKHW.float().softmax(dim=1).movedim(1, -1).reshape(-1, classes)[labelled_N]
    y_NK = nn.functional.one_hot(labels_BHW.flatten()[labelled_N], classes).to(p_NK.dtype)
    there_K = y_NK.sum(dim=0)
    dice_K = 2 * (p_NK * y_NK).sum(dim=0) / (p_NK.sum(dim=0) + there_K).clamp(min=1e-12)
    return 1 - dice_K[there_K > 0].mean()


@dataclasses.dataclass
class UperNetLoss:
    """The loss of both heads of a UperNet; the model is called without labels, and a hook sees its auxiliary logits.

    Args:
        model: the UperNet, unwrapped.
        dice: whether to add soft Dice.
        weights: class weights; None for none.
    """

    model: UperNetForSemanticSegmentation
    dice: bool = False
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        self.auxiliary_logits: Tensor | None = None
        if self.model.auxiliary_head is not None:
            self.model.auxiliary_head.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        self.auxiliary_logits = logits

    def __call__(self, logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
        """The loss of the last forward pass, a mean over the labelled pixels; at least one must be labelled."""
        loss = self.of(logits_BKHW, labels_BHW)
        if self.auxiliary_logits is not None:
            auxiliary = nn.functional.interpolate(self.auxiliary_logits, labels_BHW.shape[1:], mode="bilinear")
            loss = loss + self.model.config.auxiliary_loss_weight * self.of(auxiliary, labels_BHW)
            self.auxiliary_logits = None
        return loss

    def of(self, logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
        """The loss of one head."""
        ignore_index = self.model.config.loss_ignore_index
        weight_K = None if self.weights is None else logits_BKHW.new_tensor(self.weights, dtype=torch.float32)
        total = nn.functional.cross_entropy(
            logits_BKHW.float(), labels_BHW, weight_K, ignore_index=ignore_index, reduction="sum"
        )
        loss = total / labels_BHW.ne(ignore_index).sum()
        return loss + soft_dice(logits_BKHW, labels_BHW, ignore_index) if self.dice else loss
