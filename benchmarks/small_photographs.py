"""Small square tiles of photographs, as a folder that the scripts read, so decoding does not limit small runs.

    python benchmarks/small_photographs.py DATASET [DATASET ...] --output_dir photographs

Each DATASET is a folder that `datasets.load_dataset` reads, with an `image` column and splits train and validation. A
photograph gives its largest square tiles, side by side and centred (4:3 gives two that overlap, a square one).
"""

import argparse
import math
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def tiles(image: Image.Image) -> list[Image.Image]:
    """Squares of the short side along the long one, evenly spread from end to end."""
    short, spare = min(image.size), max(image.size) - min(image.size)
    count = math.ceil(max(image.size) / short)
    offsets = [round(spare * k / (count - 1)) for k in range(count)] if count > 1 else [0]
    boxes = [(o, 0) if image.width >= image.height else (0, o) for o in offsets]
    return [image.crop((left, top, left + short, top + short)) for left, top in boxes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--side", type=int, default=72, help="side of a tile in pixels")
    args = parser.parse_args()
    for source in args.datasets:
        for split, rows in load_dataset(source).items():
            if split not in ("train", "validation"):
                continue
            folder = args.output_dir / split
            folder.mkdir(parents=True, exist_ok=True)
            count = 0
            for index, row in enumerate(rows):
                for k, tile in enumerate(tiles(row["image"].convert("RGB"))):
                    small = tile.resize((args.side, args.side), Image.Resampling.LANCZOS)
                    small.save(folder / f"{Path(source).name}-{index:05d}-{k}.png")
                    count += 1
            print(f"{source} {split}: {len(rows)} photographs, {count} tiles")


if __name__ == "__main__":
    main()
