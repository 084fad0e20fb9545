"""The order in which images are seen: a function of (seed, epoch), which the loader cuts into batches.

`EpochSampler` yields (epoch, index). Batch b of the order goes to process b mod P, and there to worker (b div P) mod W,
so every image is seen once, by one process; the images after the last full optimizer step are dropped. Nothing is
buffered: the position in the data is the number of steps taken, and a resumed run skips indices, not images.

Images that can be read one by one are simply permuted. Images that come in blocks (row groups of parquet files, runs of
tar members) are permuted so that each block is read about once, however many processes and workers read:

    1. the blocks are permuted and cut into equal parts, *lanes*, one per worker of all processes;
    2. in each lane, blocks are grouped into windows of about `WINDOW_IMAGES`, whose images are permuted;
    3. the lanes are dealt in turn, one batch each, so every lane goes to one worker.

N images, L lanes, C images in a batch of one process (*chunk*). (L, C) are kept in the run record, so a run resumed on
another number of processes has the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["EpochSampler", "Lanes", "block_order"]

WINDOW_IMAGES, WINDOW_BYTES = 1024, 128 * 2**20

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Lanes:
    """How an order in blocks is dealt to workers.

    Args:
        count: number of lanes, processes x workers.
        chunk: images dealt from a lane at a time: the batch of a process.
    """

    count: int
    chunk: int


def block_order(rng: np.random.Generator, counts: Integers, sizes: Integers, lanes: Lanes) -> Integers:
    """A permutation of images in blocks; see the module's docstring.

    Args:
        rng: source of randomness.
        counts: images in each block; block 0 holds images 0 ... counts[0] - 1, and so on.
        sizes: bytes of each block.
        lanes: how the order is dealt.
    """
    first = np.concatenate([[0], np.cumsum(counts)])
    blocks = rng.permutation(len(counts))
    stream_N = np.concatenate([np.arange(first[block], first[block + 1]) for block in blocks])
    position_N = np.arange(len(stream_N))
    chunk_N = position_N // lanes.chunk
    lane_N = chunk_N % lanes.count
    starts = np.concatenate([[0], np.cumsum(np.bincount(lane_N, minlength=lanes.count))])
    ends = np.cumsum(counts[blocks])
    for low, high in itertools.pairwise(starts):
        for window in _windows(int(low), int(high), ends, sizes[blocks]):
            rng.shuffle(stream_N[window])
    dealt_N: Integers = stream_N[starts[lane_N] + chunk_N // lanes.count * lanes.chunk + position_N % lanes.chunk]
    return dealt_N


def _windows(low: int, high: int, ends: Integers, sizes: Integers) -> Iterator[slice]:
    """Cut [low, high) at ends of blocks into windows of about `WINDOW_IMAGES`, fewer if the images are large."""
    start, total = low, 0
    for block in range(int(np.searchsorted(ends, low, side="right")), len(ends)):
        end, total = min(int(ends[block]), high), total + int(sizes[block])
        if end - start >= WINDOW_IMAGES or total >= WINDOW_BYTES or end == high:
            yield slice(start, end)
            start, total = end, 0
        if end == high:
            return


class EpochSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Yields (epoch, index) over all images except the dropped tail.

    Args:
        num_images: N.
        seed: seed of the order.
        step_images: images of one optimizer step, over all processes; the order is cut to a multiple of it.
        blocks: images and bytes of each block, if images come in blocks.
        lanes: how the blocks are dealt.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        *,
        step_images: int = 1,
        blocks: tuple[Integers, Integers] | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self.num_images, self.seed, self.step_images, self.epoch = num_images, seed, step_images, 0
        self.blocks, self.lanes = blocks, lanes or Lanes(1, 1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.step_images * self.step_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        rng = np.random.default_rng((self.seed, epoch))
        order = block_order(rng, *self.blocks, self.lanes) if self.blocks else rng.permutation(self.num_images)
        return ((epoch, int(index)) for index in order[: len(self)])
