"""Images per second that one core prepares for training: all ways take turns, image set by image set, in one run.

    python benchmarks/input_rate.py DATASET                       # folder or Hub id that `datasets` loads
    python benchmarks/input_rate.py DATASET --size 64 --images 200 --rounds 9 --output input_rate.json

Ways
    plain               Pillow: decode, crop, bicubic resize, flip; then normalised in float32. Ratios are to this one
    jpeg                ours: JPEGs decoded at the smallest sufficient scale, resized in one step, normalised
    jpeg_whole          the same without scaling in the decoder
    jpeg_to_device      ours with --augment_on_device, host part: decoded, cut, collated as bytes
    cache               from the decoded, memory-mapped cache, all on the CPU
    cache_to_device     the same with --augment_on_device, host part: bytes of the part copied from the map to a batch
    device              what the device then does with such a batch: flip, resize, normalise (on --device)

All draw the same crops, flips and masks. Nothing is trained; one process, one thread, no loader. A batch is collated
only if the device makes the views, because that is the copy from the map. Times are CPU times of the process (for a
GPU: until it is done). Figures are medians over the rounds, with each ratio taken within its round.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from hf_dbp.data import parts
from hf_dbp.data.augmentation import image_rng, random_resized_crop
from hf_dbp.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageList, ImageSource, find_column, load_images
from hf_dbp.data.masked import MaskedImages, collate

WAYS = ("plain", "jpeg", "jpeg_whole", "jpeg_to_device", "cache", "cache_to_device", "device")
BATCH = 64


def plain_view(data: MaskedImages, epoch: int, index: int) -> dict[str, torch.Tensor]:
    """The plain way, as in torchvision's transforms; equals the view of `MaskedImages` to two 8-bit steps."""
    rng = image_rng(data.seed, epoch, index)
    noise = torch.from_numpy(rng.random(data.num_patches, dtype=np.float32))
    picture = Image.open(io.BytesIO(data.images.samples[index]["image"]["bytes"])).convert("RGB")
    left, top, right, bottom = random_resized_crop(rng, (picture.height, picture.width), data.size)
    view = picture.crop((int(left), int(top), int(right), int(bottom)))
    view = view.resize(data.size[::-1], Image.Resampling.BICUBIC)
    if rng.random() < data.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (data.mean, data.std))
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().to(torch.float32)
    return {"pixel_values": pixels.div_(255).sub_(mean).div_(std), "noise": noise}


def encoded_images(dataset: str, count: int) -> list[dict[str, Any]]:
    """The first ``count`` images, encoded, in memory, because reading files is not measured."""
    rows = next(iter(load_dataset(dataset).values()))
    column = find_column(rows, None)
    rows = rows.cast_column(column, ImageFeature(decode=False))
    values = [row[column] for row in rows.select(range(min(count, len(rows))))]
    return [{"image": {"bytes": v["bytes"] or Path(v["path"]).read_bytes(), "path": None}} for v in values]


def cached_images(samples: list[dict[str, Any]], folder: Path, short_side: int) -> ImageList:
    """The same images through the decoded cache of a streamed run."""
    for split, some in (("train", samples), ("validation", samples[:1])):
        (folder / "images" / split).mkdir(parents=True)
        for index, sample in enumerate(some):
            (folder / "images" / split / f"{index:06d}.jpg").write_bytes(sample["image"]["bytes"])
    source = ImageSource(
        train_dir=str(folder / "images"), streaming=True, cache_dir=str(folder), cache_short_side=short_side
    )
    return load_images(source)[0]


def batches(data: MaskedImages, epoch: int) -> list[dict[str, torch.Tensor]]:
    indices = range(len(data))
    return [
        collate([data[epoch, index] for index in indices[start : start + BATCH]])
        for start in range(0, len(data), BATCH)
    ]


def ways(args: argparse.Namespace, samples: list[dict[str, Any]], folder: Path) -> dict[str, Callable[[int], Any]]:
    """For each way, a function that processes all images of an epoch."""
    views: dict[str, Any] = {"size": (args.size, args.size), "patch_size": args.size // 4, "seed": 0}
    views |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    lists = {"jpeg": ImageList(samples, "image", 3), "cache": cached_images(samples, folder, args.cache_short_side)}
    host = {name: MaskedImages(images, **views) for name, images in lists.items()}
    bytes_only = {name: MaskedImages(images, on_device=True, **views) for name, images in lists.items()}

    def each(data: MaskedImages, view: Callable[..., Any] = MaskedImages.training_view) -> Callable[[int], Any]:
        return lambda epoch: [view(data, epoch, index) for index in range(len(data))]

    def whole(epoch: int) -> None:
        with patch.dict(parts.FLAGS, {1: parts.FLAGS[1]}, clear=True):
            each(host["jpeg"])(epoch)

    held = [
        {key: value.to(args.device) for key, value in batch.items()} for batch in batches(bytes_only["cache"], epoch=0)
    ]

    def finish(epoch: int) -> None:
        for batch in held:
            bytes_only["cache"].finished(batch)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return {
        "plain": each(host["jpeg"], plain_view),
        "jpeg": each(host["jpeg"]),
        "jpeg_whole": whole,
        "jpeg_to_device": lambda epoch: batches(bytes_only["jpeg"], epoch),
        "cache": each(host["cache"]),
        "cache_to_device": lambda epoch: batches(bytes_only["cache"], epoch),
        "device": finish,
    }


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per way: images per second and the ratio to the plain way, medians and all rounds."""
    samples = encoded_images(args.dataset, args.images)
    run = {name: way for name, way in ways(args, samples, folder).items() if name in args.ways}
    rates: dict[str, list[float]] = {name: [] for name in run}
    for epoch in range(args.rounds + 1):
        for name, way in run.items():
            clock = time.perf_counter if name == "device" and args.device == "cuda" else time.process_time
            start = clock()
            way(epoch)
            rates[name].append(len(samples) / (clock() - start))
    rows = []
    for name, taken in rates.items():
        found, plain = taken[1:], rates["plain"][1:]  # the first round warms up
        ratios = [ours / theirs for ours, theirs in zip(found, plain, strict=True)]
        row = {"way": name, "images_per_second": statistics.median(found), "ratio_to_plain": statistics.median(ratios)}
        rows.append(row | {"rounds": found, "ratios": ratios})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'way':16} {'images/s':>9} {'us/image':>9} {'x plain':>8}  least and most of the rounds"]
    for row in rows:
        rate, ratios = row["images_per_second"], row["ratios"]
        line = f"{row['way']:16} {rate:9.0f} {1e6 / rate:9.0f} {row['ratio_to_plain']:8.2f}"
        lines.append(f"{line}  {min(ratios):.2f} {max(ratios):.2f}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--cache_short_side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("input_rate.json"))
    args = parser.parse_args()
    if "plain" not in args.ways:
        parser.error("--ways must include plain, which the others are compared with")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print(table(rows))
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"processor": platform.processor() or platform.machine(), "load": os.getloadavg()}
    args.output.write_text(json.dumps(record | {"arguments": setting, "rows": rows}, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
