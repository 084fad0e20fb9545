"""He et al.'s augmentation for fine-tuning: RandAugment and random erasing of an image, mixup and cutmix of a batch.

RandAugment (Cubuk et al. 2020; the increasing set of timm, ``rand-m9-mstd0.5-inc1``): ``operations`` of the list below,
each applied half of the time at magnitude m ~ N(9, 0.5) of 10. kornia transforms the pixels; the operation, its
strength and its direction are drawn here, from the image's own generator, because kornia draws from PyTorch's global
generator and the same for a whole batch, and its magnitudes differ.

    autocontrast, invert; equalize, posterize (4 - 0.4 m bits), solarize (above 1 - m / 10), solarize_add (0.43 m / 10)
    brightness, contrast, color, sharpness (factor 1 +- 0.09 m); rotate (3 m degrees), shear_x, shear_y (0.03 m),
    translate_x, translate_y (0.045 m of the side), with the mean of each channel beyond the image

Images other than 8-bit RGB have fewer operations: ``color`` mixes RGB with grey, and ``equalize`` and ``posterize``
count in 256 steps. `operations_for` says what is left out. Float values outside the range of the data set are clipped.

Random erasing (Zhong et al. 2020): with probability 0.25 a rectangle of 2 to 33 % of the view becomes normal noise.

Mixing combines a batch with its reverse: half of the batches by mixup (Zhang et al. 2018), half by cutmix (Yun et al.
2019), with one lambda ~ Beta(alpha, alpha) per batch,

    mixup   x <- lambda x + (1 - lambda) x'        cutmix   a box of 1 - lambda of the view comes from x'
    target  t <- lambda s(y) + (1 - lambda) s(y')  s(y) one-hot with smoothing e: 1 - e + e / K, elsewhere e / K

Shapes: B images; C channels; H, W the view; K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from kornia import enhance
from kornia.geometry.transform import affine
from torch import Tensor, nn

__all__ = ["OPERATIONS", "Mixing", "erased", "operations_for", "rand_augment"]

LEVELS = 10.0
SPREAD, CHANCE = 0.5, 0.5  # of a magnitude; of an operation
ERASED_AREA, ERASED_ASPECT, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10

#: maps an image (1, C, H, W) in [0, 1] and a signed level, -1 to 1, to an image
Operation = Callable[[Tensor, float], Tensor]


def autocontrast(image: Tensor, level: float) -> Tensor:
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp(min=1e-12), image)


def warped(image: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """The image warped about its centre by a 2 x 3 matrix in pixels, with the mean of each channel beyond its edges."""
    height, width = image.shape[2:]
    (a, b, tx), (c, d, ty) = matrix
    x, y = (width - 1) / 2, (height - 1) / 2
    about = torch.tensor([[[a, b, tx + x - a * x - b * y], [c, d, ty + y - c * x - d * y]]], dtype=image.dtype)
    mean = image.mean(dim=(2, 3), keepdim=True)
    return affine(image - mean, about, mode="bilinear", padding_mode="zeros") + mean


def rotate(image: Tensor, level: float) -> Tensor:
    angle = math.radians(30 * level)
    return warped(image, [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0]])


#: name -> operation; each has a sign if that makes a difference
OPERATIONS: dict[str, Operation] = {
    "autocontrast": autocontrast,
    "equalize": lambda image, level: enhance.equalize(image),
    "invert": lambda image, level: enhance.invert(image),
    "rotate": rotate,
    "posterize": lambda image, level: enhance.posterize(image, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda image, level: enhance.solarize(image, 1 - abs(level)),
    "solarize_add": lambda image, level: torch.where(image < 0.5, (image + 0.43 * abs(level)).clamp(max=1), image),
    "color": lambda image, level: enhance.adjust_saturation_with_gray_subtraction(image, max(0.1, 1 + 0.9 * level)),
    "contrast": lambda image, level: enhance.adjust_contrast_with_mean_subtraction(image, max(0.1, 1 + 0.9 * level)),
    "brightness": lambda image, level: enhance.adjust_brightness_accumulative(image, max(0.1, 1 + 0.9 * level)),
    "sharpness": lambda image, level: enhance.sharpness(image, max(0.1, 1 + 0.9 * level)),
    "shear_x": lambda image, level: warped(image, [[1, 0.3 * level, 0], [0, 1, 0]]),
    "shear_y": lambda image, level: warped(image, [[1, 0, 0], [0.3 * level, 1, 0]]),
    "translate_x": lambda image, level: warped(image, [[1, 0, 0.45 * level * image.shape[3]], [0, 1, 0]]),
    "translate_y": lambda image, level: warped(image, [[1, 0, 0], [0, 1, 0.45 * level * image.shape[2]]]),
}


def operations_for(channels: int, eight_bits: bool) -> tuple[list[str], dict[str, str]]:
    """The operations for such images, and those left out, with the reason."""
    left_out = {}
    if channels != 3:
        left_out["color"] = f"for RGB alone, these images have {channels} channels"
    if not eight_bits:
        left_out |= dict.fromkeys(("equalize", "posterize"), "they count in 256 steps, these images have more depth")
    return [name for name in OPERATIONS if name not in left_out], left_out


def rand_augment(
    image_CHW: Tensor, names: Sequence[str], rng: np.random.Generator, *, operations: int, magnitude: float
) -> Tensor:
    """The image in [0, 1] after random operations from ``names``.

    Args:
        image_CHW: values outside [0, 1] are clipped.
        names: names in `OPERATIONS`.
        rng: source of randomness.
        operations: how many to draw, with replacement.
        magnitude: the mean of m, 0 to 10.
    """
    image = image_CHW[None].clamp(0, 1)
    for name in rng.choice(np.asarray(names), operations):
        level = float(np.clip(rng.normal(magnitude, SPREAD), 0, LEVELS)) / LEVELS
        sign, taken = rng.choice((-1, 1)), rng.random() < CHANCE
        if taken:
            image = OPERATIONS[str(name)](image, sign * level).clamp(0, 1)
    return image[0]


def erased(pixels_CHW: Tensor, rng: np.random.Generator, chance: float) -> Tensor:
    """Normalised pixels; with probability ``chance``, a random rectangle of them becomes normal noise."""
    channels, height, width = pixels_CHW.shape
    if rng.random() >= chance:
        return pixels_CHW
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = torch.from_numpy(rng.standard_normal((channels, h, w), dtype=np.float32))
            pixels_CHW = pixels_CHW.clone()
            pixels_CHW[:, top : top + h, left : left + w] = noise
            break
    return pixels_CHW


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixup, cutmix and smoothed targets of a batch.

    Args:
        classes: K.
        mixup, cutmix: alpha of each; 0 for none. With both, half of the batches use one, half the other.
        smoothing: e.
        weights: class weights, multiplied into their part of the targets; None for none.
    """

    classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    weights: Sequence[float] | None = None

    def __call__(self, pixels_BCHW: Tensor, labels_B: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mixed pixels (B, C, H, W) and their targets (B, K)."""
        targets_BK = self.targets(labels_B)
        if not self.mixup and not self.cutmix:
            return pixels_BCHW, targets_BK
        cuts = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(rng.beta(alpha, alpha))
        if cuts:
            pixels_BCHW, share = self.cut(pixels_BCHW, share, rng)
        else:
            pixels_BCHW = pixels_BCHW * share + pixels_BCHW.flip(0) * (1 - share)
        return pixels_BCHW, targets_BK * share + targets_BK.flip(0) * (1 - share)

    def targets(self, labels_B: Tensor) -> Tensor:
        """Smoothed, weighted targets (B, K)."""
        targets_BK = nn.functional.one_hot(labels_B, self.classes) * (1 - self.smoothing)
        targets_BK = targets_BK + self.smoothing / self.classes
        if self.weights is None:
            return targets_BK
        return targets_BK * torch.tensor(self.weights, device=labels_B.device)[labels_B][:, None]

    def cut(self, pixels_BCHW: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
        """The batch with a box from its reverse pasted in, and the remaining share of each image."""
        height, width = pixels_BCHW.shape[2:]
        h, w = (int(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = int(rng.integers(height)), int(rng.integers(width))  # the centre: the edge may cut the box
        rows = slice(max(y - h // 2, 0), min(y + h // 2, height))
        columns = slice(max(x - w // 2, 0), min(x + w // 2, width))
        mixed = pixels_BCHW.clone()
        mixed[:, :, rows, columns] = pixels_BCHW.flip(0)[:, :, rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
