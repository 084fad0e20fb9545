"""Predict whole images with a model trained on crops: class ids at the images' resolution, in bounded memory.

1. Scale the image as training does at factor 1: the long edge to `long_edge` pixels (or keep the native resolution).
2. If it is smaller than the crop, pad right and below with the channel mean (0 after normalising), as training does; if
   it is larger, slide a crop-sized window with at least a third of overlap. Every forward pass sees full crops.
3. Average the windows' logits, remove the padding, resize to the image's height and width (bilinear), take the argmax.

Evaluation and prediction run this same code and give bit-identical results on the same machine: the windows of
successive images fill batches of a fixed size (the last one is filled up with zeros), a window's logits do not depend
on the rest of its batch, and on a CPU each forward pass runs in one thread, as many in parallel as PyTorch may use. So
neither the number of images, nor a resume, nor the number of cores changes a logit.

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
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_dbp.data.augmentation import normalized, resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import UNIT, ValueRange, in_unit_range
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.mean_iou import confusion_matrix
from hf_dbp.downstream.segmentation.transforms import long_edge_size

__all__ = [
    "Band",
    "Counts",
    "ImageCounts",
    "Likely",
    "Preparation",
    "View",
    "WholeImages",
    "WholeView",
    "count_pixels",
    "likely",
    "logit_bands",
    "predict_labels",
    "whole_image_logits",
    "window_origins",
]

BATCH = 8  # default number of windows per forward pass
BAND = 2**24  # logits per band
LARGE = 2**26  # logits of a row of windows: of more, finished columns are handed out one window at a time
HELD = 5 * 2**23  # logits held of the rows in which two rows of windows overlap: of more, an image is taken in strips
PART = 2**22  # logits turned into probabilities at a time
PIXELS = 2**18  # pixels per forward pass on a CPU


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Prepares an image for the model: scales it to `long_edge` (None: native) and normalises it.

    ``value_range`` is the range of float images, see `hf_dbp.data.values`.
    """

    long_edge: int | None
    mean: Sequence[float]
    std: Sequence[float]
    value_range: ValueRange = UNIT

    def pixels(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        """(H, W, C) stored values -> (C, h, w)."""
        height, width = image_HWC.shape[:2]
        view = long_edge_size(height, width, self.long_edge)
        scaled = image_HWC if view == (height, width) else resized(image_HWC, view, (0, 0, width, height))
        return self.normalized(scaled, image_HWC.dtype)

    def normalized(self, scaled_HWC: npt.NDArray[Any], dtype: np.dtype[Any]) -> Tensor:
        """Scaled values of an image of ``dtype`` -> (C, h, w)."""
        pixels = in_unit_range(scaled_HWC, dtype, self.value_range)
        return normalized(pixels, np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32))


@dataclasses.dataclass(frozen=True)
class WholeImages(torch.utils.data.Dataset[tuple[Tensor, npt.NDArray[np.int32]] | None]):
    """Evaluation items: scaled, normalised pixels (C, h, w) and the untouched label (H, W); None if unreadable."""

    images: LabelledImages
    long_edge: int | None
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def preparation(self) -> Preparation:
        """How images are prepared."""
        return Preparation(self.long_edge, self.mean, self.std, self.images.value_range)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, npt.NDArray[np.int32]] | None:
        try:
            image_HWC, label_HW = self.images[index]
        except UnreadableImageError:
            return None
        return self.pixels(image_HWC), label_HW

    def pixels(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        """(H, W, C) stored values -> (C, h, w)."""
        return self.preparation.pixels(image_HWC)


# ---- windows, batches, bands ----


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


# ---- used by evaluation and pictures ----


def whole_image_logits(
    model: nn.Module, pixels: Sequence[Tensor], crop_size: int, batch_size: int, *, classes: int
) -> list[Tensor]:
    """Return logits (K, h, w), float32, of each image (C, h, w)."""
    views = [WholeView(image, (image.shape[1], image.shape[2])) for image in pixels]
    found: list[Tensor] = []
    for band in logit_bands(model, views, crop_size, batch_size, classes=classes):
        _, rows, columns = band.logits_KnW.shape
        if band.top == band.left == 0:
            found.append(band.logits_KnW.new_empty(classes, *band.view.target))
        found[-1][:, band.top : band.top + rows, band.left : band.left + columns] = band.logits_KnW
    return found


def predict_labels(model: nn.Module, data: WholeImages, image_HWC: npt.NDArray[Any], crop_size: int) -> Tensor:
    """Return the class ids (H, W) of one image, as evaluation predicts them; the model must be in eval mode."""
    view = WholeView(data.pixels(image_HWC), (image_HWC.shape[0], image_HWC.shape[1]))
    ids_HW = torch.zeros(view.target, dtype=torch.int64)
    for band in logit_bands(model, [view], crop_size, classes=data.images.num_labels):
        _, rows, columns = band.logits_KnW.shape
        ids_HW[band.top : band.top + rows, band.left : band.left + columns] = torch.cat(
            [part.ids_nW for part in likely(band.logits_KnW)]
        )
    return ids_HW


@dataclasses.dataclass
class ImageCounts:
    """Counts on one labelled image.

    Attributes:
        hits_K, true_K, predicted_K: its labelled pixels that are correct, true and predicted for each class.
        foreground: the highest probability, over its pixels, of any class but 0.
    """

    hits_K: npt.NDArray[np.int64]
    true_K: npt.NDArray[np.int64]
    predicted_K: npt.NDArray[np.int64]
    foreground: float = 0.0


@dataclasses.dataclass
class Counts:
    """Counts on labelled images.

    Attributes:
        confusion_KK: confusion matrix of all of them (rows: true class).
        ignore_index: label of pixels that are not counted.
        loss_sum: cross-entropy summed over the labelled pixels.
        images: counts of each image, by number.
    """

    confusion_KK: npt.NDArray[np.int64]
    ignore_index: int
    loss_sum: float = 0.0
    images: dict[int, ImageCounts] = dataclasses.field(default_factory=dict)

    def add(self, number: int, logits_KnW: Tensor, label_nW: npt.NDArray[np.int32]) -> None:
        """Count the pixels of a band of image ``number``."""
        classes = logits_KnW.shape[0]
        target_nW = torch.from_numpy(np.ascontiguousarray(label_nW)).to(logits_KnW.device, torch.int64)
        self.loss_sum += nn.functional.cross_entropy(
            logits_KnW[None], target_nW[None], ignore_index=self.ignore_index, reduction="sum"
        ).item()
        parts = list(likely(logits_KnW))
        predicted_nW = torch.cat([part.ids_nW for part in parts]).to(torch.uint8 if classes <= 256 else torch.int32)
        confusion_KK = confusion_matrix([predicted_nW], [label_nW], classes, self.ignore_index)
        self.confusion_KK += confusion_KK
        image = self.images.setdefault(number, ImageCounts(*np.zeros((3, classes), np.int64)))
        image.hits_K += np.diag(confusion_KK)
        image.true_K += confusion_KK.sum(axis=1)
        image.predicted_K += confusion_KK.sum(axis=0)
        image.foreground = max(image.foreground, *(part.foreground for part in parts))


@dataclasses.dataclass(frozen=True)
class Likely:
    """What some rows of logits say: from row ``top`` of them on, the classes, and how sure.

    Attributes:
        top: their first row.
        ids_nW: the likeliest class of each pixel.
        chance_nW: its probability.
        foreground: the highest probability, over the pixels, of any class but 0.
    """

    top: int
    ids_nW: Tensor
    chance_nW: Tensor
    foreground: float


def likely(logits_KnW: Tensor) -> Iterator[Likely]:
    """The likeliest classes, from at most `PART` logits (or one row) at a time, so that no copy of a band is held."""
    classes, rows, width = logits_KnW.shape
    step = max(1, PART // (classes * width))
    for top in range(0, rows, step):
        part_KnW = logits_KnW[:, top : top + step]
        best_nW, ids_nW = _largest(part_KnW)
        odds_KnW = (part_KnW - best_nW).exp_()  # 1 for the likeliest class
        chance_nW = odds_KnW.sum(dim=0).reciprocal_()
        others_nW = odds_KnW[1:].sum(dim=0).mul_(chance_nW)
        yield Likely(top, ids_nW, chance_nW, float(others_nW.max()))


def _largest(part_KnW: Tensor) -> tuple[Tensor, Tensor]:
    """``max(dim=0)``; on a CPU class by class, which is several times as fast. The first of equal ones wins."""
    if part_KnW.device.type != "cpu":
        return torch.max(part_KnW, dim=0)
    dtype = torch.uint8 if len(part_KnW) <= 256 else torch.int32
    best_nW, ids_nW = part_KnW[0].clone(), torch.zeros(part_KnW.shape[1:], dtype=dtype)
    for k, logits_nW in enumerate(part_KnW[1:], start=1):
        torch.maximum(ids_nW, (logits_nW > best_nW).to(dtype) * k, out=ids_nW)
        torch.maximum(best_nW, logits_nW, out=best_nW)
    return best_nW, ids_nW


def count_pixels(
    model: nn.Module,
    batches: Iterable[Sequence[tuple[Tensor, npt.NDArray[np.int32]] | None]],
    *,
    num_labels: int,
    ignore_index: int,
    crop_size: int,
    batch_size: int = BATCH,
) -> Counts:
    """Predict batches of `WholeImages` items with a model in eval mode, windows in batches of ``batch_size``.

    Returns:
        The counts, with those of each image by its number in the batches; items that are None are left out.
    """
    numbers: deque[int] = deque()
    labels: dict[int, npt.NDArray[np.int32]] = {}  # labels of the views in progress

    def views() -> Iterator[WholeView]:
        number = 0
        for items in batches:
            for item in items:
                if item is not None:
                    numbers.append(number)
                    labels[number] = item[1]
                    yield WholeView(item[0], (item[1].shape[0], item[1].shape[1]))
                number += 1

    found = Counts(np.zeros((num_labels, num_labels), np.int64), ignore_index)
    for band in logit_bands(model, views(), crop_size, batch_size, classes=num_labels):
        _, rows, columns = band.logits_KnW.shape
        part = slice(band.top, band.top + rows), slice(band.left, band.left + columns)
        found.add(numbers[0], band.logits_KnW, labels[numbers[0]][part])
        if band.last:
            del labels[numbers.popleft()]
    return found
