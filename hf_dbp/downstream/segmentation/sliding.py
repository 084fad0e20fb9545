"""Sliding windows over whole images, averaged into bands of logits, in bounded memory.

A window of the crop's size slides over a view (a scaled image) with at least a third of overlap; views smaller than
the crop are padded right and below with 0. Every forward pass sees full crops. Where windows overlap, their logits are
averaged, then resized to the image's height and width (bilinear).

Results do not depend on what else is predicted: the windows of successive images fill batches of a fixed size (the last
one is filled up with zeros), a window's logits do not depend on the rest of its batch, and on a CPU each forward pass
runs in one thread, as many in parallel as PyTorch may use.

Logits come in bands, from top to bottom, so memory does not grow with an image's height: for an image of width w after
scaling, K S w + K n W numbers are held for a crop of S pixels and bands of n rows, n W K <= 2^24 (or one row). Of a
large image at native resolution, where K S w > 2^26, only one window and the overlap with the next row of windows are
held, K S^2 + K S w / 3 numbers. Where that overlap would take more than 4e7 (`HELD`), the image is predicted in upright
strips from left to right, each narrow enough; each strip computes the last windows of its left neighbour once more.
On a CPU a forward pass has at most 2^18 pixels (or one window): more would take more memory and no less time.

Shapes: C channels; K classes; h, w scaled height and width; H, W the image's; S crop size; B windows of a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["BATCH", "PART", "Band", "View", "WholeView", "logit_bands", "window_origins"]

BATCH = 8  # default number of windows per forward pass
BAND = 2**24  # logits per band
LARGE = 2**26  # logits of a row of windows: of more, finished columns are handed out one window at a time
HELD = 5 * 2**23  # logits held of the rows in which two rows of windows overlap: of more, an image is taken in strips
PART = 2**22  # logits worked on at a time
PIXELS = 2**18  # pixels per forward pass on a CPU


class View(Protocol):
    """A scaled image: its size (h, w), the target size (H, W) of its logits, and crops of it."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def target(self) -> tuple[int, int]: ...

    def crop(self, top: int, left: int, side: int) -> Tensor:
        """(C, side, side), padded with 0 beyond the image."""


@dataclasses.dataclass(frozen=True)
class WholeView:
    """A view held in memory: pixels (C, h, w)."""

    pixels: Tensor
    target: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    def crop(self, top: int, left: int, side: int) -> Tensor:
        part = self.pixels[:, top : top + side, left : left + side]
        return nn.functional.pad(part, (0, side - part.shape[2], 0, side - part.shape[1]))


@dataclasses.dataclass(frozen=True)
class Band:
    """Logits (K, n, W) of rows ``top`` to ``top + n`` of view ``number``; ``last`` if they are its last.

    Of a view at its own resolution whose rows of windows are more than `LARGE` logits, they are those of some columns
    only, ``left`` to ``left + W``.
    """

    number: int
    view: View
    top: int
    logits_KnW: Tensor
    last: bool
    left: int = 0


def window_origins(length: int, crop_size: int) -> list[int]:
    """Where windows begin along a side of ``length`` pixels: in even steps, with at least a third of overlap."""
    length = max(length, crop_size)
    steps = math.ceil((length - crop_size) / (crop_size * 2 / 3))
    return [round(step * (length - crop_size) / max(steps, 1)) for step in range(steps + 1)]


@dataclasses.dataclass(frozen=True)
class Strip:
    """Windows that begin at columns ``lefts``, and the columns, ``start`` to ``end``, that they cover completely."""

    lefts: list[int]
    start: int
    end: int


def _strips(view: View, crop_size: int, classes: int) -> list[Strip]:
    """The strips of a view, from left to right: one, unless it is large and `HELD` logits are too few for its width."""
    (height, width), lefts = view.size, window_origins(view.size[1], crop_size)
    overlap = _overlap(window_origins(height, crop_size), crop_size)
    widest = HELD // (classes * max(1, overlap))
    strips, first = [], 0
    while first < len(lefts):
        begin = next(number for number, left in enumerate(lefts) if left + crop_size > lefts[first])
        last = first
        while last + 1 < len(lefts) and (
            not _large(view, crop_size, classes) or lefts[last + 1] + crop_size - lefts[begin] <= widest
        ):
            last += 1
        end = lefts[last + 1] if last + 1 < len(lefts) else width
        strips.append(Strip(lefts[begin : last + 1], lefts[first], end))
        first = last + 1
    return strips


def _large(view: View, crop_size: int, classes: int) -> bool:
    """Whether finished columns of the view are handed out one window at a time."""
    return classes * crop_size * view.size[1] > LARGE and view.size == view.target


def _overlap(origins: Sequence[int], crop_size: int) -> int:
    """The most positions that two successive windows share."""
    return crop_size - min((after - before for before, after in itertools.pairwise(origins)), default=crop_size)


Window = tuple[int, View, Strip, int, int]  # number of the view, the view, its strip, top, left


def _windows(views: Iterable[View], crop_size: int, classes: int) -> Iterator[Window]:
    for number, view in enumerate(views):
        for strip in _strips(view, crop_size, classes):
            for top in window_origins(view.size[0], crop_size):
                for left in strip.lefts:
                    yield number, view, strip, top, left


def _forwards(
    model: nn.Module, windows: Iterator[Window], crop_size: int, batch_size: int
) -> Iterator[tuple[Window, Tensor]]:
    """Each window with its logits (K, S, S), float32, in order; on a CPU one forward pass per thread runs ahead.

    Large logits of a model that leaves resizing to the user come as they are, (K, h, w): see `_added`.
    """
    device = next(model.parameters()).device
    mixed = (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
    )  # settings of this thread only

    def forward(batch: Sequence[Window]) -> Tensor:
        if device.type == "cpu":
            torch.set_num_threads(1)
        crops = [view.crop(top, left, crop_size) for _, view, _, top, left in batch]
        filling = [torch.zeros_like(crops[0])] * (batch_size - len(batch))
        pixels_BCSS = torch.stack([*crops, *filling]).to(device, non_blocking=True)
        with torch.no_grad(), torch.autocast(device.type, mixed[1], enabled=mixed[0]):
            logits: Tensor = model(pixel_values=pixels_BCSS).logits[: len(batch)].float()
        small = logits.shape[0] * logits.shape[1] * crop_size**2 <= BAND
        return _at_size(logits, crop_size, crop_size) if small else logits

    if device.type == "cpu":
        batch_size = max(1, min(batch_size, PIXELS // crop_size**2))
    batches = iter(lambda: list(islice(windows, batch_size)), [])
    if device.type != "cpu":
        for batch in batches:
            yield from zip(batch, forward(batch), strict=True)
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool, _restored_threads(threads):
        waiting: deque[tuple[list[Window], Future[Tensor]]] = deque()
        torch.set_num_threads(1)  # here too: more would take the cores of the forward passes
        for batch in batches:
            waiting.append((batch, pool.submit(forward, batch)))
            if len(waiting) > threads:
                done, logits = waiting.popleft()
                yield from zip(done, logits.result(), strict=True)
        for done, logits in waiting:
            yield from zip(done, logits.result(), strict=True)


@contextlib.contextmanager
def _restored_threads(threads: int) -> Iterator[None]:
    """Restore PyTorch's thread count, because a value set in a thread also becomes the default of later threads."""
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _averages(model: nn.Module, views: Iterable[View], crop_size: int, batch_size: int, classes: int) -> Iterator[Band]:
    """Averaged logits at the views' own resolution: bands of a row of windows, of a large view one window at a time."""
    sums, columns_of = torch.zeros(0), None  # the second for a large view
    windows = _windows(views, crop_size, classes)
    for (number, view, strip, top, left), logits_KSS in _forwards(model, windows, crop_size, batch_size):
        if top == 0 and left == strip.lefts[0]:
            columns_of = None  # freed before the next is made
            if _large(view, crop_size, classes):
                columns_of = Columns(number, view, crop_size, strip, logits_KSS)
        if columns_of is not None:
            yield from columns_of.add(top, left, logits_KSS)
            continue
        height, width = view.size
        tops, lefts = window_origins(height, crop_size), strip.lefts
        if top == left == 0:
            sums = logits_KSS.new_zeros(logits_KSS.shape[0], crop_size, max(width, crop_size))
        _add(sums[:, :, left : left + crop_size], logits_KSS)
        if left != lefts[-1]:
            continue
        last = top == tops[-1]
        end = max(height, crop_size) if last else tops[tops.index(top) + 1]
        rows = _covered(tops, crop_size, top, end).to(sums.device)
        columns = _covered(lefts, crop_size, 0, sums.shape[2]).to(sums.device)
        for part, done in _pieces(min(end, height) - top, BAND // (sums.shape[0] * sums.shape[2])):
            average = sums[:, part] / (rows[part, None] * columns)
            yield Band(number, view, top + part.start, average[:, :, :width], last and done)
        if last:
            sums = torch.zeros(0)  # freed before those of the next view
            continue
        kept = crop_size - (end - top)
        for sums_SW in sums:
            sums_SW[:kept] = sums_SW[end - top :].clone()
        sums[:, kept:] = 0


def _pieces(rows: int, step: int) -> Iterator[tuple[slice, bool]]:
    """Slices of so many rows, at most ``step`` at a time, and whether each is the last."""
    step = max(1, step)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), start + step >= rows


def _add(sums_KSS: Tensor, logits_Khw: Tensor) -> None:
    """Add logits at the size of the sums; larger ones are resized a few classes at a time, so that no copy is held."""
    step = max(1, PART // (sums_KSS.shape[1] * sums_KSS.shape[2]))
    for sums, logits in zip(torch.split(sums_KSS, step), torch.split(logits_Khw, step), strict=True):
        sums.add_(_at_size(logits[None], *sums.shape[1:])[0])


class Columns:
    """Averages the windows of a strip of a large view, and hands out the columns that each window finishes.

    Above the next row of windows it keeps only the rows that overlap it: K n w numbers for n rows of overlap and a
    strip of w columns.
    """

    def __init__(self, number: int, view: View, crop_size: int, strip: Strip, like: Tensor) -> None:
        self.number, self.view, self.crop_size, self.strip = number, view, crop_size, strip
        self.tops = window_origins(view.size[0], crop_size)
        span = strip.lefts[-1] + crop_size - strip.lefts[0]
        self.kept_Knw = like.new_zeros(like.shape[0], _overlap(self.tops, crop_size), span)
        self.sums_KSS = like.new_zeros(like.shape[0], crop_size, crop_size)

    def add(self, top: int, left: int, logits_KSS: Tensor) -> Iterator[Band]:
        """Add a window; windows come in rows, each from left to right."""
        crop, (height, width), lefts = self.crop_size, self.view.size, self.strip.lefts
        last, rightmost = top == self.tops[-1], left == lefts[-1]
        above = 0 if top == 0 else self.tops[self.tops.index(top) - 1] + crop - top  # rows kept of the windows above
        fresh = crop if left == lefts[0] else left - lefts[lefts.index(left) - 1]  # columns that this window begins
        place = left - lefts[0]
        self.sums_KSS[:, :, crop - fresh :] = 0
        self.sums_KSS[:, :above, crop - fresh :] = self.kept_Knw[:, :above, place + crop - fresh : place + crop]
        _add(self.sums_KSS, logits_KSS)
        end = max(height, crop) if last else self.tops[self.tops.index(top) + 1]
        done = crop if rightmost else lefts[lefts.index(left) + 1] - left
        self.kept_Knw[:, : crop - (end - top), place : place + done] = self.sums_KSS[:, end - top :, :done]
        shown = slice(max(self.strip.start - left, 0), max(0, min(self.strip.end - left, done)))
        if shown.start < shown.stop:
            rows = _covered(self.tops, crop, top, end).to(logits_KSS.device)
            columns = _covered(lefts, crop, left + shown.start, left + shown.stop).to(logits_KSS.device)
            finished = last and rightmost and self.strip.end == width
            for part, done_rows in _pieces(min(end, height) - top, PART // (len(self.sums_KSS) * len(columns))):
                average = self.sums_KSS[:, part, shown] / (rows[part, None] * columns)
                yield Band(
                    self.number, self.view, top + part.start, average, finished and done_rows, left + shown.start
                )
        for sums_SS in self.sums_KSS:
            sums_SS[:, : crop - done] = sums_SS[:, done:].clone()


def _covered(origins: Sequence[int], crop_size: int, first: int, end: int) -> Tensor:
    """The number of windows that cover each position between ``first`` and ``end`` of a side."""
    places = torch.arange(first, end)
    return sum((((places >= start) & (places < start + crop_size)).float() for start in origins), torch.zeros(1))


def _at_size(logits_BKhw: Tensor, height: int, width: int) -> Tensor:
    if logits_BKhw.shape[2:] == (height, width):
        return logits_BKhw
    return nn.functional.interpolate(logits_BKhw, size=(height, width), mode="bilinear", align_corners=False)


def logit_bands(
    model: nn.Module, views: Iterable[View], crop_size: int, batch_size: int = BATCH, *, classes: int
) -> Iterator[Band]:
    """Logits at each view's target resolution, one view after the other, each from top to bottom (of a large view, in
    upright strips from left to right).

    Args:
        model: in eval mode; takes only crops of ``crop_size``.
        views: views, opened as needed.
        crop_size: side of the windows.
        batch_size: windows per forward pass; on a CPU at most `PIXELS` pixels.
        classes: logits per pixel.
    """
    held: list[Tensor] = []
    above = 0
    for band in _averages(model, views, crop_size, batch_size, classes):
        height, width = band.view.target
        if band.view.size == band.view.target:
            yield band
            continue
        piece = max(1, BAND // (band.logits_KnW.shape[0] * width))
        held = [band.logits_KnW] if band.top == 0 else [*held, band.logits_KnW]
        if band.last and height <= piece:
            logits = _at_size(torch.cat(held, dim=1)[None], height, width)[0]
            yield Band(band.number, band.view, 0, logits, True)
        if height > piece:
            above = 0 if band.top == 0 else above
            held, above = yield from _stretched(band, torch.cat(held, dim=1), above, piece)


def _stretched(band: Band, held_Knw: Tensor, above: int, piece: int) -> Generator[Band, None, tuple[list[Tensor], int]]:
    """The target rows that the held logits reach; returns the logits to keep holding, and how many rows lie above them.

    This is ``interpolate`` row by row: output row y lies at (y + 1/2) h / H - 1/2 of the source, clamped to its rows.
    """
    (h, _), (height, width) = band.view.size, band.view.target
    places = ((np.arange(height) + 0.5) * h / height - 0.5).clip(0, h - 1)
    lower = np.floor(places).astype(int)
    upper = np.minimum(lower + 1, h - 1)
    rows, seen = np.arange(height), band.top + band.logits_KnW.shape[1]
    begun = 0 if band.top == 0 else int(np.searchsorted(upper, band.top))
    ready = rows[begun : int(np.searchsorted(upper, seen))]
    for start in range(0, len(ready), piece):
        y = ready[start : start + piece]
        share = torch.from_numpy(places[y] - lower[y]).to(held_Knw)[:, None]
        mixed = held_Knw[:, lower[y] - above] * (1 - share) + held_Knw[:, upper[y] - above] * share
        end = bool(y[-1] == height - 1)
        yield Band(band.number, band.view, int(y[0]), _at_size(mixed[None], len(y), width)[0], end)
    keep = min(seen, int(lower[min(int(np.searchsorted(upper, seen)), height - 1)]))
    return [held_Knw[:, keep - above :]], keep
