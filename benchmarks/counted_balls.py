"""Built-in images in one folder per class, by their number of ball bonds: work for a classifier of two channels.

    python benchmarks/counted_balls.py --output_dir balls

The balls are the connected parts of class `ball` in the mask; the classes `BOUNDS` are a third of the images each,
nearly. Training and validation show different scenes.
"""

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import tifffile
from tqdm import tqdm

from hf_dbp.data.wire_bonding import BALL, WireBonding

BOUNDS = {"up_to_8": 8, "9_to_11": 11, "12_or_more": 1000}  # the largest number of each class
FIRST = {"train": 0, "validation": 10_000_000}


def class_of(mask_HW: np.ndarray) -> str:
    """The class of a mask by its number of balls."""
    balls = cv2.connectedComponents((mask_HW == BALL).astype(np.uint8), connectivity=8)[0] - 1
    return next(name for name, most in BOUNDS.items() if balls <= most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96, help="side of an image in pixels")
    parser.add_argument("--train", type=int, default=600, help="training images")
    parser.add_argument("--validation", type=int, default=300, help="validation images")
    args = parser.parse_args()
    for split, first in FIRST.items():
        scenes = WireBonding(getattr(args, split), size=args.size, first=first)
        counts: Counter[str] = Counter()
        for index in tqdm(range(len(scenes)), desc=split):
            scene = scenes[index]
            name = class_of(scene["annotation"])
            folder = args.output_dir / split / name
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{index:05d}.tif"
            tifffile.imwrite(file, scene["image"], photometric="minisblack", planarconfig="contig")
            counts[name] += 1
        print(f"{split}: " + ", ".join(f"{name} {counts[name]}" for name in BOUNDS))


if __name__ == "__main__":
    main()
