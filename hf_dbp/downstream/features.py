"""Compute the features of a frozen ViT: prepare images as its input, and run them through it in batches.

The probe, `hf-dbp embed` and the readers of its tables all see an image through `CentralSquares`: its largest central
square at the ViT's size.

Shapes: B images of a batch, T patch tokens of an image, D features; C, H, W channels, height and width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ViTModel

from hf_dbp.data.augmentation import center_box, normalized, resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.images import ImageList, channel_statistics, share_value_range
from hf_dbp.data.values import UNIT, ValueRange, in_unit_range
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_statistics, read_value_range

__all__ = [
    "CentralSquares",
    "FrozenEncoder",
    "load_encoder",
    "pooled",
    "token_batches",
]

logger = logging.getLogger(__name__)


class CentralSquares(torch.utils.data.Dataset[Tensor | None]):
    """The largest central square of each image at the ViT's size, normalised: (C, H, W); None if it is unreadable."""

    def __init__(self, images: ImageList, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.size = images, size
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            return self.view(self.images[index])
        except UnreadableImageError:
            return None

    def view(self, image_HWC: NDArray[Any]) -> Tensor:
        """The input of the ViT for one image."""
        view = resized(image_HWC, self.size, center_box((image_HWC.shape[0], image_HWC.shape[1]), self.size))
        return normalized(in_unit_range(view, image_HWC.dtype, self.images.value_range), self.mean, self.std)


def pooled(tokens_BTD: Tensor, pooling: str) -> Tensor:
    """One feature (B, D) per image from the final tokens, class token first: ``mean`` of the patch tokens, or
    ``cls``."""
    return tokens_BTD[:, 1:].mean(dim=1) if pooling == "mean" else tokens_BTD[:, 0]


def token_batches(
    vit: ViTModel, images: torch.utils.data.Dataset[Tensor | None], batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor | None, list[bool]]]:
    """For each batch, the final tokens (B, 1 + T, D) of its readable images, or None, and which images are readable."""
    vit = vit.eval()
    for views in torch.utils.data.DataLoader(images, batch_size=batch_size, collate_fn=list, num_workers=workers):
        there = [view for view in views if view is not None]
        tokens = None
        if there:
            with torch.no_grad():
                tokens = vit(torch.stack(there).to(vit.device)).last_hidden_state
        yield tokens, [view is not None for view in views]


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A ViT and how images are prepared for it."""

    vit: ViTModel
    name: str
    mean: Sequence[float]
    std: Sequence[float]
    value_range: ValueRange = UNIT

    @property
    def size(self) -> tuple[int, int]:
        size = self.vit.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def squares(self, images: ImageList) -> CentralSquares:
        return CentralSquares(images, self.size, self.mean, self.std)


def load_encoder(source: str, images: ImageList, **hub: Any) -> FrozenEncoder:
    """Load a stock ViT, on the GPU if there is one, with the statistics of its image processor or else of the images.

    Raises: UserError: it is not a ViT, or it takes another number of channels than the images have.
    """
    vit = load_vit(source, **hub)
    channels = images.readable(0).shape[2]
    if channels != vit.config.num_channels:
        raise UserError(
            f"the ViT takes {vit.config.num_channels} channels, the images have {channels}: convert with --num_channels"
        )
    images.num_channels = channels
    share_value_range(images, kept=read_value_range(source, **hub))
    statistics = read_statistics(source, **hub)
    if statistics is None:
        logger.warning("%s has no image processor; taking the images' statistics", source)
        statistics = channel_statistics(images)
    vit = vit.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return FrozenEncoder(vit, source, *statistics, images.value_range)
