"""Strips as line cameras see them (rail, steel, web): long, thin, textured, with defects of a few pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["strip", "write_strips"]


def strip(seed: int, size: tuple[int, int], thick: int = 5) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A grey strip (H, W) and its mask, 1 where a defect is: up to four dark spots and scratches; a third has none.

    Args:
        seed: of everything drawn.
        size: height and width in pixels.
        thick: of the defects, in pixels.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    grain = cv2.GaussianBlur(rng.normal(0, 1, size), (0, 0), sigmaX=4, sigmaY=1)
    light = 130 + 25 * np.sin(np.linspace(0, 2 * np.pi * rng.uniform(0.5, 2), width) + rng.uniform(0, 6))
    image, mask = light + 8 * grain / grain.std(), np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 5) if seed % 3 else 0):
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        if rng.random() < 0.5:
            cv2.circle(mask, centre, thick, 1, -1)
        else:
            reach = rng.integers(-4 * thick, 4 * thick + 1, 2)
            cv2.line(mask, centre, (int(centre[0] + reach[0]), int(centre[1] + reach[1])), 1, thick)
    image = image - 55 * cv2.GaussianBlur(mask.astype(np.float64), (0, 0), 0.7) + rng.normal(0, 4, size)
    return image.clip(0, 255).astype(np.uint8), mask


def write_strips(folder: Path, count: int, size: tuple[int, int], thick: int = 5, *, upright: bool = False) -> None:
    """Write ``images/NNN.png`` and ``masks/NNN.png``; with ``upright`` turned by a quarter."""
    for number in range(count):
        for name, array in zip(("images", "masks"), strip(number, size, thick), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"{number:03}.png"), array.T if upright else array)
