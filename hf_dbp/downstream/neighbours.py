"""Find similar images: exact nearest neighbours, near-duplicates and outliers among features.

Similarities are cosines of centred features, s(x, y) = cos(x - m, y - m) with m their mean: a masked autoencoder's
features share a large common part, which would make everything look similar. `centred` prepares features so that inner
products are these cosines. Every pair is compared, a block at a time, so nothing is missed and memory stays constant.

Shapes: N images, Q queries, D features, B and M rows of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["centred", "near_duplicates", "nearest", "outlier_scores"]

BLOCK = 1024  # rows compared at a time


def centred(features_ND: Tensor, mean_D: Tensor | None = None) -> Tensor:
    """Features (N, D) minus their mean (or ``mean_D``), scaled to length 1, so inner products are cosines."""
    mean_D = features_ND.mean(dim=0) if mean_D is None else mean_D
    return nn.functional.normalize(features_ND - mean_D, dim=1)


def nearest(features_ND: Tensor, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k images most similar to each query, among all features: inner products (Q, k), descending, and their rows
    (Q, k), int64.

    Every pair is compared, a block at a time: exact, with O(block x block + Q x k) memory.
    """
    k = min(k, len(features_ND))
    similarities, rows = [], []
    for queries_BD in torch.split(queries_QD, BLOCK):
        best_Bk = queries_BD.new_zeros(len(queries_BD), 0)
        row_Bk = torch.zeros(len(queries_BD), 0, dtype=torch.int64, device=queries_BD.device)
        for start in range(0, len(features_ND), BLOCK):
            block_BM = queries_BD @ features_ND[start : start + BLOCK].T
            numbers = torch.arange(start, start + block_BM.shape[1], device=block_BM.device).expand(len(queries_BD), -1)
            if best_Bk.shape[1] == k:  # a full list: only what beats its last entry can enter it
                block_BM, numbers = larger(block_BM, numbers, best_Bk[:, -1:])
            pool, pool_rows = torch.cat([best_Bk, block_BM], dim=1), torch.cat([row_Bk, numbers], dim=1)
            if best_Bk.shape[1] == k:  # stable, so that no query's list depends on how many others found
                best_Bk, picked = (kept[:, :k] for kept in pool.sort(dim=1, descending=True, stable=True))
            else:
                best_Bk, picked = pool.topk(min(k, pool.shape[1]), dim=1)
            row_Bk = pool_rows.gather(1, picked)
        similarities.append(best_Bk)
        rows.append(row_Bk)
    return torch.cat(similarities), torch.cat(rows)


def larger(block_BM: Tensor, numbers_BM: Tensor, bound_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The values of each row above its bound, in order, and their numbers; rows with fewer end with -inf."""
    above_BM = block_BM > bound_B1
    row_n, column_n = above_BM.nonzero(as_tuple=True)
    count_B = above_BM.sum(dim=1)
    place_n = torch.arange(len(row_n), device=row_n.device) - (count_B.cumsum(dim=0) - count_B)[row_n]
    values = block_BM.new_full((len(block_BM), int(count_B.max())), -torch.inf)
    numbers = numbers_BM.new_zeros(values.shape)
    values[row_n, place_n] = block_BM[row_n, column_n]
    numbers[row_n, place_n] = numbers_BM[row_n, column_n]
    return values, numbers


def near_duplicates(features_ND: Tensor, threshold: float) -> NDArray[np.int64]:
    """For each image (N) the row of the earlier image that it nearly duplicates, or its own.

    Images are processed in order; an image duplicates an earlier kept one if their inner product is at least
    ``threshold``.

    Args:
        features_ND: centred features of length 1.
        threshold: inner product from which two images are duplicates.
    """
    first_N, kept = np.arange(len(features_ND)), np.zeros(0, np.int64)
    for start in range(0, len(features_ND), BLOCK):
        block_BD = features_ND[start : start + BLOCK]
        if len(kept):
            similarity_B1, row_B1 = nearest(features_ND[kept], block_BD, 1)
            known_B = (similarity_B1[:, 0] >= threshold).numpy()
            first_N[start : start + len(block_BD)][known_B] = kept[row_B1[:, 0].numpy()[known_B]]
        else:
            known_B = np.zeros(len(block_BD), np.bool_)
        inside_BB = (block_BD @ block_BD.T >= threshold).numpy()
        new: list[int] = []
        for row in np.flatnonzero(~known_B):
            like = [earlier for earlier in new if inside_BB[row, earlier]]
            first_N[start + row] = start + (like[0] if like else row)
            if not like:
                new.append(int(row))
        kept = np.concatenate([kept, start + np.asarray(new, np.int64)])
    return first_N


def outlier_scores(features_ND: Tensor, k: int) -> NDArray[np.float32]:
    """1 - inner product (N) to the k-th nearest other image, or the last if there are fewer; features as above."""
    similarity_Nk, _ = nearest(features_ND, features_ND, k + 1)  # the first is the image itself
    return (1 - similarity_Nk[:, -1]).numpy().astype(np.float32)
