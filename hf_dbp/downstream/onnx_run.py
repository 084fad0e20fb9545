"""Run an exported model without PyTorch: NumPy, Pillow and onnxruntime, and the `preprocessing.json` beside it.

    python run.py image.png [-o mask.png]        a segmenter's class ids as a PNG; an encoder's feature, printed

`hf-dbp export` puts a copy of this file beside the model. It imports nothing from hf_dbp, so the folder works anywhere.
`preprocessing.json` holds all settings:

1. An image has `channels` arrays (height, width); 8-bit and 16-bit values are divided by 255 and 65535; for other
   values `value_range` [low, high] becomes 0 to 1.
2. ``centre_square`` (encoder): the largest central part of the model's aspect, scaled to `size` (height, width).
   ``long_edge`` (segmenter): scaled so that the longer side has `long_edge` pixels, rounded down; null: unchanged.
   Scaling is Pillow's bicubic, channel by channel, in the image's own type (16 bits as float).
3. (value - mean) / std per channel.
4. ``windows`` (segmenter): pad right and below with 0 to the window's side; cut windows at even steps with at least a
   third of overlap; average their logits; remove the padding; scale to the image's size, bilinear with half-pixel
   centres; take the class with the highest logit.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Model", "main"]

Array = NDArray[Any]


def resized(image_HWC: Array, size: tuple[int, int], box: tuple[float, float, float, float]) -> Array:
    """A box (left, top, right, bottom) of an image, resized to (height, width) as PyTorch does it, but by Pillow:
    bicubic, antialiased."""
    if image_HWC.shape[:2] == tuple(size) and box == (0, 0, image_HWC.shape[1], image_HWC.shape[0]):
        return image_HWC
    kind = image_HWC.dtype if image_HWC.dtype == np.uint8 else np.float32
    bands = [Image.fromarray(np.ascontiguousarray(image_HWC[..., c]).astype(kind)) for c in range(image_HWC.shape[2])]
    return np.stack([np.asarray(b.resize(size[::-1], Image.Resampling.BICUBIC, box=box)) for b in bands], axis=-1)


def bilinear(values_CHW: Array, size: tuple[int, int]) -> Array:
    """Scale the last two axes of logits to (height, width) in NumPy, bilinear with half-pixel centres."""
    for axis, (old, new) in ((1, (values_CHW.shape[1], size[0])), (2, (values_CHW.shape[2], size[1]))):
        at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
        low = np.minimum(at.astype(int), old - 1)
        high, weight = np.minimum(low + 1, old - 1), (at - low).astype(np.float32)
        weight = weight[:, None] if axis == 1 else weight
        values_CHW = values_CHW.take(low, axis) * (1 - weight) + values_CHW.take(high, axis) * weight
    return values_CHW


def origins(length: int, side: int) -> list[int]:
    steps = math.ceil((length - side) / (side * 2 / 3))
    return [round(step * (length - side) / max(steps, 1)) for step in range(steps + 1)]


class Model:
    """An exported model, loaded from its folder, on that many threads (0: all cores)."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        import onnxruntime

        self.how = json.loads((Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def pixels(self, image_HWC: Array) -> Array:
        """The input (channels, height, width), float32, of an image (height, width, channels)."""
        height, width = image_HWC.shape[:2]
        box: tuple[float, float, float, float]
        if self.how["kind"] == "encoder":
            size = (self.how["size"][0], self.how["size"][1])
            w, h = min(width, height * (size[1] / size[0])), min(height, width / (size[1] / size[0]))
            box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
        else:
            scale = self.how["long_edge"] / max(height, width) if self.how["long_edge"] else 1.0
            size, box = (max(1, int(height * scale)), max(1, int(width * scale))), (0, 0, width, height)
        ranges = {"uint8": (0, 255), "uint16": (0, 65535)}
        low, high = ranges.get(str(image_HWC.dtype), self.how.get("value_range", (0, 1)))
        values = (resized(image_HWC, size, box).astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
        values = (values - np.float32(self.how["mean"])) / np.float32(self.how["std"])
        return np.ascontiguousarray(np.moveaxis(values, 2, 0))

    def run(self, pixels_BCHW: Array) -> Array:
        """The model's output for a batch."""
        return np.asarray(self.session.run(None, {"pixel_values": pixels_BCHW})[0])

    def feature(self, image_HWC: Array) -> Array:
        """For an encoder: the mean of the patch tokens (D)."""
        return np.asarray(self.run(self.pixels(image_HWC)[None])[0, 1:].mean(axis=0))

    def logits(self, image_HWC: Array) -> Array:
        """For a segmenter: logits (classes, height, width) of the whole image at its own size."""
        pixels, side = self.pixels(image_HWC), self.how["window"]
        height, width = pixels.shape[1:]
        padded = np.pad(pixels, ((0, 0), (0, max(0, side - height)), (0, max(0, side - width))))
        total = np.zeros((len(self.how["labels"]), *padded.shape[1:]), np.float32)
        count = np.zeros(padded.shape[1:], np.float32)
        for top in origins(padded.shape[1], side):
            for left in origins(padded.shape[2], side):
                window = np.ascontiguousarray(padded[None, :, top : top + side, left : left + side])
                total[:, top : top + side, left : left + side] += self.run(window)[0]
                count[top : top + side, left : left + side] += 1
        return bilinear((total / count)[:, :height, :width], image_HWC.shape[:2])

    def segment(self, image_HWC: Array) -> Array:
        """For a segmenter: class ids (height, width)."""
        ids = self.logits(image_HWC).argmax(axis=0)
        return np.asarray(ids.astype(np.uint8 if len(self.how["labels"]) < 256 else np.uint16))


def read(path: str, channels: int) -> Array:
    """A picture for the exported model as (height, width, channels); a .npy array unchanged."""
    if str(path).endswith(".npy"):
        return np.asarray(np.load(path))
    with Image.open(path) as opened:
        image = opened.convert("L" if channels == 1 else "RGB") if channels in (1, 3) else opened
        return np.asarray(image).reshape(image.height, image.width, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the model beside this file on one image.")
    parser.add_argument("image")
    parser.add_argument("-o", "--output", default="mask.png", help="where a segmenter writes its class ids")
    args = parser.parse_args()
    model = Model(Path(__file__).parent)
    image = read(args.image, len(model.how["mean"]))
    if model.how["kind"] == "encoder":
        print(json.dumps(model.feature(image).tolist()))
    else:
        Image.fromarray(model.segment(image)).save(args.output)
        print(f"{args.output}: {model.how['labels']}")


if __name__ == "__main__":
    main()
