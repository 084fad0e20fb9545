"""What training sees, in figures, of images that were always read correctly: `golden.json` holds those of commit
65cb07c.

`figures` writes pictures of the usual kinds, opens them as training does, and samples the arrays, the views of
pre-training, the crops of fine-tuning and the pixels of evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

__all__ = ["KINDS", "figures"]

KINDS = ("png", "grey", "jpeg", "png16", "tiff", "tiff16", "npy")
SIZES = ((80, 90), (97, 80), (130, 120))


def scene(number: int, channels: int) -> NDArray[np.float64]:
    """A picture with smooth and sharp parts, in [0, 1]."""
    rng, size = np.random.default_rng(number), SIZES[number]
    picture = np.stack([cv2.GaussianBlur(rng.random(size), (0, 0), 1 + channel) for channel in range(channels)], axis=2)
    picture = (picture - picture.min()) / np.ptp(picture)
    picture[20:40, 10:50] = 1 - picture[20:40, 10:50]
    return picture


def write(folder: Path, kind: str, number: int) -> Path:
    channels = {"grey": 1, "png16": 1, "tiff": 2, "tiff16": 2}.get(kind, 3)
    picture = scene(number, channels)
    eight, sixteen = (picture * 255).round().astype(np.uint8), (picture * 65535).round().astype(np.uint16)
    file = folder / f"{kind}{number}.{ {'tiff16': 'tif', 'tiff': 'tif', 'npy': 'npy', 'jpeg': 'jpg'}.get(kind, 'png') }"
    if kind == "npy":
        np.save(file, picture.astype(np.float32))
    elif kind in ("tiff", "tiff16"):
        planes = np.moveaxis(eight if kind == "tiff" else sixteen, 2, 0)
        tifffile.imwrite(file, np.ascontiguousarray(planes), photometric="minisblack", planarconfig="separate")
    elif kind == "png16":
        cv2.imwrite(str(file), sixteen)
    else:
        Image.fromarray(eight[..., 0] if channels == 1 else eight).save(file, quality=95)
    return file


def sampled(array: Any, count: int = 12) -> list[float]:
    """The mean, and values at even steps."""
    values = np.asarray(array, np.float64).ravel()
    steps = np.linspace(0, values.size - 1, count).astype(int)
    return [float(np.round(value, 6)) for value in (values.mean(), *values[steps])]


def figures(folder: Path, kind: str, api: Any) -> dict[str, list[float]]:
    """The samples of each stage.

    Args:
        folder: empty, to write into.
        kind: one of `KINDS`.
        api: a module or namespace with the classes of the package that are used.
    """
    ids = [(np.arange(h * w).reshape(h, w) // 50 % 3).astype(np.uint8) for h, w in SIZES]
    files = [str(write(folder, kind, number)) for number in range(len(SIZES))]
    rows = [{"image": {"bytes": None, "path": file}, "mask": mask} for file, mask in zip(files, ids, strict=True)]
    images = api.ImageList(rows, "image")
    channels = images[0].shape[2]
    images.num_channels = channels
    how: dict[str, Any] = {"mean": [0.45] * channels, "std": [0.22] * channels}
    found = {f"image {number}": sampled(images[number]) for number in range(len(rows))}
    mean, std = api.channel_statistics(images, "measured")
    found["statistics"] = [float(np.round(value, 6)) for value in (*mean, *std)]
    for native in (False, True):
        views = api.MaskedImages(images, size=(32, 48), patch_size=8, seed=3, native=native, **how)
        for index in range(len(rows)):
            view = views[1, index]
            found[f"view {index} native {native}"] = sampled(view["pixel_values"]) + sampled(view["noise"], 3)
            found[f"evaluation {index} native {native}"] = sampled(views[index]["pixel_values"])
    labelled = api.LabelledImages(rows, ("image", "mask"), num_labels=3, ignore_index=255, num_channels=channels)
    for long_edge in (None, 64):
        crops = api.TrainingCrops(labelled, api.Augmentation(48, long_edge, 255), seed=5, **how)
        whole = api.WholeImages(labelled, long_edge, **how)
        for index in range(len(rows)):
            crop = crops[2, index]
            found[f"crop {index} of {long_edge}"] = sampled(crop["pixel_values"]) + sampled(crop["labels"])
            found[f"whole {index} of {long_edge}"] = sampled(whole[index][0])
    return found
