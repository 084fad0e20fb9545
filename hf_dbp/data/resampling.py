"""Make views on the device, by flip and bicubic resize, from parts of images that the loader gathers as bytes.

Resizing is linear in the pixels and separable, so a batch of parts X of any sizes becomes views by two batched matrix
products, V = A X B^T per channel. Row o of A is the antialiased bicubic kernel (a = -0.5) around the output pixel's
centre, as in Pillow and `hf_dbp.data.augmentation.resized`:

    scale = input pixels per output pixel,  width = max(scale, 1)
    A_oi = k((i + 1/2 - (o + 1/2) * scale) / width) / sum over i,  i < height of the part

A flipped view takes the rows of B in reverse order. On a GPU the products take float16 inputs, which hold 8-bit values
exactly, and sum in float32: on average, views differ from those of the CPU by less than one 8-bit step.

Shapes: B images, H, W the canvas that holds the parts, h, w the view, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_dbp.data.images import ImageList
from hf_dbp.errors import UserError

__all__ = ["augments_on_device", "collate", "resample"]

CHUNK = 64  # images resized at a time, which bounds the memory of the weights


def augments_on_device(asked: bool | None, args: TrainingArguments, images: ImageList) -> bool:
    """Whether the device makes the views: as asked, else on a GPU if the images have 8 bits.

    UserError if it is asked for other images.
    """
    dtype = images.readable(0).dtype
    if asked and dtype != np.uint8:
        raise UserError(f"--augment_on_device is for 8-bit images, these are {dtype}; leave it out")
    return bool(dtype == np.uint8 and (args.device.type == "cuda" if asked is None else asked))


def collate(views: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A training batch from the output of `hf_dbp.data.masked.MaskedImages`: finished views, or parts, each on a
    canvas.

    Outside its part a canvas holds arbitrary values; the weights there are zero.
    """
    if "flip" not in views[0]:
        batch: dict[str, Tensor] = torch.utils.data.default_collate(list(views))
        return batch
    parts = [view["pixel_values"] for view in views]
    sizes = np.array([part.shape[:2] for part in parts])
    canvas = torch.empty((len(parts), *sizes.max(axis=0).tolist(), parts[0].shape[2]), dtype=torch.uint8)
    for place, part in zip(canvas.numpy(), parts, strict=True):
        place[: part.shape[0], : part.shape[1]] = part
    return {
        "pixel_values": canvas,
        "sizes": torch.from_numpy(sizes),
        "flip": torch.tensor([view["flip"] for view in views]),
        "noise": torch.stack([view["noise"] for view in views]),
    }


def resample(parts_BHWC: Tensor, sizes_B2: Tensor, flip_B: Tensor, view: tuple[int, int]) -> Tensor:
    """Views (B, C, h, w) float32 in [0, 255].

    Args:
        parts_BHWC: uint8; each part lies in the upper left corner of its canvas.
        sizes_B2: height and width of each part.
        flip_B: whether to flip each view left to right.
        view: (h, w).
    """
    chunks = (slice(start, start + CHUNK) for start in range(0, len(parts_BHWC), CHUNK))
    return torch.cat([_resample(parts_BHWC[chunk], sizes_B2[chunk], flip_B[chunk], view) for chunk in chunks])


def _resample(parts_BHWC: Tensor, sizes_B2: Tensor, flip_B: Tensor, view: tuple[int, int]) -> Tensor:
    B, H, W, C = parts_BHWC.shape
    h, w = view
    dtype = torch.float16 if parts_BHWC.is_cuda else torch.float32
    rows_BhH = _weights(sizes_B2[:, 0], torch.zeros_like(flip_B), H, h).to(dtype)
    columns_BwW = _weights(sizes_B2[:, 1], flip_B, W, w).to(dtype)
    tall_BhWC = torch.bmm(rows_BhH, parts_BHWC.reshape(B, H, W * C).to(dtype)).view(B, h, W, C)
    views = torch.bmm(tall_BhWC.permute(0, 3, 1, 2).reshape(B, C * h, W), columns_BwW.mT).view(B, C, h, w)
    return views.float().clamp_(0.0, 255.0)


def _weights(size_B: Tensor, flip_B: Tensor, pixels: int, outputs: int) -> Tensor:
    """The kernel around each output pixel, (B, outputs, pixels) float32; zero from ``size_B`` on."""
    scale_B11 = (size_B / outputs)[:, None, None].float()
    output_1o1 = torch.arange(outputs, device=size_B.device)[None, :, None]
    output_Bo1 = torch.where(flip_B[:, None, None], outputs - 1 - output_1o1, output_1o1)
    pixel_11i = torch.arange(pixels, device=size_B.device)[None, None]
    distance = ((pixel_11i + 0.5 - (output_Bo1 + 0.5) * scale_B11) / scale_B11.clamp(min=1.0)).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    kernel = torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))
    kernel = kernel.masked_fill(pixel_11i >= size_B[:, None, None], 0.0)
    return kernel / kernel.sum(dim=2, keepdim=True)
