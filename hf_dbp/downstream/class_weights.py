"""Weights of classes in a cross-entropy, from their frequencies.

From the shares s_K of the classes, w_k ~ s_k^(-1/2) or s_k^(-1), with sum_k s_k w_k = 1, so the size of the gradient,
and thus the learning rate, keeps its meaning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["WEIGHTS", "class_weights"]

WEIGHTS = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}  # name -> power of a class's share


def class_weights(counts_K: NDArray[np.int64], kind: str) -> list[float] | None:
    """Weights (K) of the classes from their pixels in the training masks, or their images (1 for a class without any).

    Returns:
        None for ``none``.

    Raises:
        UserError: nothing is labelled.
    """
    if kind == "none":
        return None
    if not counts_K.any():
        raise UserError(f"--class_weights {kind}: no pixel of the training masks is labelled")
    share_K = counts_K / counts_K.sum()
    weight_K = np.where(share_K > 0, share_K, 1.0) ** -WEIGHTS[kind]
    return [float(weight) for weight in np.where(share_K > 0, weight_K / (share_K * weight_K).sum(), 1.0)]
