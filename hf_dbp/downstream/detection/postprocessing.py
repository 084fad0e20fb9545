"""What an RF-DETR's output says about images: boxes, classes, scores and masks.

The score of query q for class k is sigmoid(logit_qk); the `FOUND` highest of an image are what it finds, so one query
may be found as two classes. There is no suppression of overlapping boxes: in training, each object is assigned to one
query of a group.

Shapes: B images; Q queries; K classes; M predictions; h, w the masks of the output; H, W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_dbp.downstream.detection.coco import Found
from hf_dbp.downstream.detection.runs import Runs, packed

__all__ = ["FOUND", "found_in"]

FOUND = 100  # predictions per image, as many as COCO counts


def found_in(
    output: Any, sizes: Sequence[tuple[int, int]], *, limit: int = FOUND, threshold: float = 0.0
) -> list[Found]:
    """The predictions for each image of a batch, most confident first.

    Args:
        output: of the model: logits (B, Q, K), pred_boxes (B, Q, 4), and maybe pred_masks (B, Q, h, w).
        sizes: height and width of each image, in whose pixels boxes and masks are wanted.
        limit: predictions per image.
        threshold: lowest score.
    """
    logits_BQK, boxes_BQ4 = output.logits.float(), output.pred_boxes.float()
    masks_BQhw = getattr(output, "pred_masks", None)
    found = []
    for number, (height, width) in enumerate(sizes):
        scores_QK = logits_BQK[number].sigmoid()
        scores_M, best_M = scores_QK.flatten().topk(min(limit, scores_QK.numel()))
        kept = scores_M >= threshold
        scores_M, best_M = scores_M[kept], best_M[kept]
        queries_M, classes_M = best_M // scores_QK.shape[1], best_M % scores_QK.shape[1]
        centre_M2, sides_M2 = boxes_BQ4[number][queries_M].double().cpu().split(2, dim=1)
        scale = torch.tensor([width, height, width, height], dtype=torch.float64)
        boxes_M4 = torch.cat([centre_M2 - sides_M2 / 2, centre_M2 + sides_M2 / 2], dim=1).clamp(0, 1) * scale
        runs = [] if masks_BQhw is None else masks_of(masks_BQhw[number], queries_M, (height, width))
        found.append(Found(boxes_M4.numpy(), classes_M.cpu().numpy(), scores_M.double().cpu().numpy(), runs))
    return found


def masks_of(masks_Qhw: Tensor, queries_M: Tensor, size: tuple[int, int]) -> list[Runs]:
    """The masks of the chosen queries, brought to the size of the image (bilinear) and cut at a probability of 0.5."""
    runs: dict[int, Runs] = {}
    for query in queries_M.tolist():
        if query not in runs:  # one at a time: all of them would be large
            mask = masks_Qhw[query].float()[None, None]
            mask_HW = nn.functional.interpolate(mask, size, mode="bilinear", align_corners=False)[0, 0] > 0
            runs[query] = packed(mask_HW.cpu().numpy().astype(np.uint8))
    return [runs[query] for query in queries_M.tolist()]
