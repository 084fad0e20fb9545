"""Views of an image: the paper's random resized crop and flip for training, a centre crop for evaluation.

An image is an array (height, width, channels) of uint8, uint16 or float, with any number of channels. It is resized
channel by channel to the view's size in one bicubic, antialiased step (a = -0.5, like Pillow's).

All randomness comes from the generator passed in, `image_rng(seed, epoch, image)`: a view is a pure function of these
three, so a resumed run, another number of processes and another method see the same views.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Box", "center_box", "cut", "image_rng", "native_tile", "normalized", "random_resized_crop", "resized"]

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def image_rng(seed: int, epoch: int, image: int) -> np.random.Generator:
    """The generator of all random choices about one image in one epoch."""
    return np.random.default_rng((seed, epoch, image))


def random_resized_crop(
    rng: np.random.Generator,
    size: tuple[int, int],
    view: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box of an image, as in He et al. (paper section 2.3: scale [0.2, 1.0]).

    Its area is uniform in ``scale`` times the image's, its aspect log-uniform in ``ratio`` times the view's. Such a box
    may not fit into a long thin image. After ten that do not fit, take the largest box of the last aspect, with its
    centre uniform over the image and then moved inside, so the ends are seen half as often as the middle instead of
    hardly ever.

    Args:
        rng: source of randomness.
        size: (height, width) of the image.
        view: (height, width) that the crop will be resized to.
        scale: range of the share of the image's area.
        ratio: range of the aspect (width / height) relative to the view's.
    """
    height, width = size
    target = view[1] / view[0]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = target * math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w, h = max(1, round(min(width, height * aspect))), max(1, round(min(height, width / aspect)))
    x, y = (min(max(round(rng.uniform(0, side) - length / 2), 0), side - length)
            for side, length in ((width, w), (height, h)))  # fmt: skip
    return float(x), float(y), float(x + w), float(y + h)


def center_box(size: tuple[int, int], view: tuple[int, int]) -> Box:
    """The largest central box with the view's aspect."""
    return _centered(size, view[1] / view[0])


def native_tile(rng: np.random.Generator | None, size: tuple[int, int], view: tuple[int, int]) -> Box:
    """A random box of the view's size, or the central one without ``rng``; `center_box` for a smaller image."""
    spare = size[0] - view[0], size[1] - view[1]
    if min(spare) < 0:
        return center_box(size, view)
    top, left = (side // 2 if rng is None else int(rng.integers(side + 1)) for side in spare)
    return float(left), float(top), float(left + view[1]), float(top + view[0])


def _centered(size: tuple[int, int], aspect: float) -> Box:
    height, width = size
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def cut(image_HWC: NDArray[Any], box: Box) -> NDArray[Any]:
    """The pixels of the box, with its edges rounded to whole pixels; a view, not a copy."""
    left, top, right, bottom = (round(edge) for edge in box)
    return image_HWC[top : max(bottom, top + 1), left : max(right, left + 1)]


def resized(image_HWC: NDArray[np.generic], view: tuple[int, int], box: Box | None = None) -> NDArray[np.generic]:
    """The image, or a box of it, resized to the view's size, bicubic and antialiased, in the image's dtype (or float).

    With a box, the kernel reaches beyond its edges; an image that was `cut` ends there.
    """
    if image_HWC.shape[:2] == view and box is None:
        return image_HWC
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] <= 4 and box is None:
        return _resized_by_torch(image_HWC, view)
    box = box or (0.0, 0.0, float(image_HWC.shape[1]), float(image_HWC.shape[0]))
    size = (view[1], view[0])
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] in (1, 3):
        picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=box)).reshape(*view, -1)
    if image_HWC.dtype != np.uint8:
        image_HWC, box = _surroundings(image_HWC, view, box)
        image_HWC = image_HWC.astype(np.float32)
    channels = (Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image_HWC, 2, 0))
    return np.stack([np.asarray(c.resize(size, Image.Resampling.BICUBIC, box=box)) for c in channels], axis=-1)


def _resized_by_torch(image_HWC: NDArray[Any], view: tuple[int, int]) -> NDArray[Any]:
    """What Pillow computes in 8-bit steps, with vector instructions, in a third of the time."""
    image_BCHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)[None]
    view_BCHW = torch.nn.functional.interpolate(image_BCHW, view, mode="bicubic", antialias=True)
    return np.asarray(view_BCHW[0].permute(1, 2, 0).numpy())


def normalized(image_HWC: NDArray[np.float32], mean_C: NDArray[Any], std_C: NDArray[Any]) -> torch.Tensor:
    """(H, W, C) in [0, 1] -> (C, H, W) with zero mean and unit variance per channel."""
    pixels = (image_HWC - mean_C) / std_C
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32, copy=False), 2, 0)))


def _surroundings(image_HWC: NDArray[Any], view: tuple[int, int], box: Box) -> tuple[NDArray[Any], Box]:
    """The part of the image that a bicubic kernel reaches from the box, and the box relative to it."""
    left, top, right, bottom = box
    reach_x, reach_y = (2 * max(1.0, side / pixels) + 1 for side, pixels in
                        ((right - left, view[1]), (bottom - top, view[0])))  # fmt: skip
    x, y = max(0, int(left - reach_x)), max(0, int(top - reach_y))
    part = image_HWC[y : math.ceil(bottom + reach_y), x : math.ceil(right + reach_x)]
    return part, (left - x, top - y, right - x, bottom - y)
