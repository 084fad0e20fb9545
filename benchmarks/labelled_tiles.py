"""Tiles of segmented photographs with one class each, one folder per class: real data to probe an encoder with.

    python benchmarks/labelled_tiles.py DATASET --names names.json --output_dir tiles

DATASET is a folder that `datasets.load_dataset` reads, with columns `image` and `annotation` (class ids per pixel) and
splits train and validation; NAMES is a JSON list of class names. A tile has the class that covers more than half of it;
tiles without one are left out, and so are classes with fewer than ten tiles in a split.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image


def tiles(image: Image.Image, mask: Image.Image, side: int) -> list[tuple[int, Image.Image]]:
    """(class id, tile) of the tiles of ``side`` pixels, side by side, that one class covers by more than half."""
    ids, found = np.asarray(mask), []
    for top in range(0, image.height - side + 1, side):
        for left in range(0, image.width - side + 1, side):
            counts = np.bincount(ids[top : top + side, left : left + side].ravel())
            if counts.max() > side * side / 2:
                found.append((int(counts.argmax()), image.crop((left, top, left + side, top + side))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--names", type=Path, required=True, help="JSON list of class names; other ids are no class")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--side", type=int, default=96, help="side of a tile in pixels")
    args = parser.parse_args()
    names = json.loads(args.names.read_text(encoding="utf-8"))
    data = load_dataset(args.dataset)
    found: dict[str, dict[str, list[Image.Image]]] = {}
    for split in ("train", "validation"):
        by_class: dict[str, list[Image.Image]] = defaultdict(list)
        for row in data[split]:
            for number, tile in tiles(row["image"].convert("RGB"), row["annotation"], args.side):
                if number < len(names):
                    by_class[names[number]].append(tile)
        found[split] = by_class
    kept = [name for name in names if all(len(found[split].get(name, [])) >= 10 for split in found)]
    for split, by_class in found.items():
        for name in kept:
            folder = args.output_dir / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index, tile in enumerate(by_class[name]):
                tile.save(folder / f"{index:05d}.png")
        print(f"{split}: " + ", ".join(f"{name} {len(by_class[name])}" for name in kept))


if __name__ == "__main__":
    main()
