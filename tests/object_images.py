"""Small images with bright rectangles as objects, their labels in every form, and flags of a tiny run on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

NAMES = ("block", "stripe")
FLAGS = [
    *("--model_size", "mini", "--patch_size", "8", "--image_size", "32", "--num_queries", "8", "--query_groups", "2"),
    *("--decoder_layers", "2", "--decoder_width", "32", "--crop_scale", "0.8", "--learning_rate", "1e-3"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
    *("--max_steps", "4", "--warmup_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2"),
    *("--do_train", "--use_cpu", "--report_to", "none", "--disable_tqdm", "1"),
]

Boxes = list[tuple[int, tuple[int, int, int, int]]]  # class id; left, top, right, bottom


def scene(
    number: int, channels: int = 3, depth: type = np.uint8, size: tuple[int, int] = (36, 48)
) -> tuple[Any, Boxes]:
    """An image (H, W, C) and its objects: one block, and in every second image a stripe."""
    rng = np.random.default_rng(number)
    image = rng.uniform(0, 0.3, (*size, channels))
    left, top = int(rng.integers(2, 14)), int(rng.integers(2, 12))
    boxes: Boxes = [(0, (left, top, left + 9, top + 10))]
    if number % 2:
        boxes.append((1, (26, int(rng.integers(4, 20)), 46, 0)))
        boxes[1] = (1, (*boxes[1][1][:3], boxes[1][1][1] + 6))
    for kind, (x0, y0, x1, y1) in boxes:
        image[y0:y1, x0:x1] = 0.95 if kind == 0 else 0.6
    top_value = np.iinfo(depth).max if np.issubdtype(depth, np.integer) else 900.0
    return (image * top_value).astype(depth), boxes


def mask_of(boxes: Boxes, size: tuple[int, int] = (36, 48)) -> Any:
    mask = np.zeros(size, np.uint8)
    for kind, (x0, y0, x1, y1) in boxes:
        mask[y0:y1, x0:x1] = kind + 1
    return mask


def object_folder(folder: Path, count: int = 8, channels: int = 3, depth: type = np.uint8) -> Path:
    """``images`` with train and validation, ``masks`` alike, ``labels.json`` (COCO), ``yolo`` and ``labelme``."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(NAMES)]
    for kind in ("yolo", "labelme"):
        (folder / kind).mkdir(parents=True)
    (folder / "yolo" / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for split, shift, images in (("train", 0, count), ("validation", 100, 3)):
        for kind in ("images", "masks", "yolo", "labelme"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            image, boxes = scene(number + shift, channels, depth)
            name = f"{split}/{number}"
            if channels == 3 and depth is np.uint8:
                file = f"{name}.png"
                Image.fromarray(image).save(folder / "images" / file)
            else:
                file = f"{name}.tif"
                tifffile.imwrite(folder / "images" / file, np.moveaxis(image, 2, 0), photometric="minisblack")
            Image.fromarray(mask_of(boxes)).save(folder / "masks" / f"{name}.png")
            entry = {"id": len(content["images"]) + 1, "file_name": file, "height": 36, "width": 48}
            content["images"].append(entry)
            lines, shapes = [], []
            for kind, (x0, y0, x1, y1) in boxes:
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": entry["id"], "category_id": 10 * (kind + 1),
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                })  # fmt: skip
                sides = ((x0 + x1) / 96, (y0 + y1) / 72, (x1 - x0) / 48, (y1 - y0) / 36)
                lines.append(" ".join(map(str, (kind, *sides))))
                shapes.append({"label": NAMES[kind], "points": [[x0, y0], [x1, y1]], "shape_type": "rectangle"})
            (folder / "yolo" / f"{name}.txt").write_text("\n".join(lines))
            labelme = {"shapes": shapes, "imagePath": f"{number}.png", "imageHeight": 36, "imageWidth": 48}
            (folder / "labelme" / f"{name}.json").write_text(json.dumps(labelme))
    (folder / "labels.json").write_text(json.dumps(content))
    (folder / "names.json").write_text(json.dumps(["background", *NAMES]))
    return folder
