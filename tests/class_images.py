"""Small images of classes that a classifier can tell apart, and flags of a tiny run on them."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

NAMES = ("bright", "dark", "striped")
FLAGS = [
    *("--model_size", "mini", "--patch_size", "8", "--image_size", "16"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-3"),
    *("--max_steps", "4", "--warmup_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2"),
    *("--do_train", "--use_cpu", "--report_to", "none", "--disable_tqdm", "1"),
]


def pixels(kind: int, number: int, channels: int, depth: type, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    rng = np.random.default_rng((kind, number))
    low, high = ((0.6, 1.0), (0.0, 0.4), (0.2, 0.8))[kind]
    image = rng.uniform(low, high, (*size, channels))
    if kind == 2:
        image[::4] = 1.0
    top = np.iinfo(depth).max if np.issubdtype(depth, np.integer) else 900.0
    return (image * top).astype(depth)


def class_folders(
    folder: Path, count: int = 6, channels: int = 3, depth: type = np.uint8, kinds: tuple[int, ...] = (0, 1, 2)
) -> Path:
    """``train`` and ``validation`` with a folder of images for each class."""
    for split, shift in (("train", 0), ("validation", 100)):
        for kind in kinds:
            place = folder / split / NAMES[kind]
            place.mkdir(parents=True)
            for number in range(count if split == "train" else 3):
                image = pixels(kind, number + shift, channels, depth)
                if channels == 3 and depth is np.uint8:
                    Image.fromarray(image).save(place / f"{number}.png")
                else:
                    planes = np.moveaxis(image, 2, 0)
                    tifffile.imwrite(place / f"{number}.tif", planes, photometric="minisblack")
    return folder
