"""Pictures of a run: original, masked and reconstructed images, and its curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from hf_dbp.data.masked import MaskedImages

__all__ = ["literal_names", "plot_curves", "plot_reconstructions"]

#: decorates what draws names of classes and files: as they are, where matplotlib would read a formula between two `$`
literal_names = matplotlib.rc_context({"text.parse_math": False})


def displayed(pixels_CHW: Tensor, data: MaskedImages) -> list[NDArray[Any]]:
    """Normalised pixels as pictures in [0, 1] to plot: one RGB picture, or a grey one per channel."""
    stored = pixels_CHW.float().cpu().numpy().transpose(1, 2, 0) * data.std + data.mean
    stored = stored.clip(0.0, 1.0)
    return [stored] if stored.shape[2] == 3 else list(np.moveaxis(stored, 2, 0))


@torch.no_grad()
def plot_reconstructions(model: Any, data: MaskedImages, path: str | os.PathLike[str], *, num_images: int = 6) -> None:
    """Write a PNG with one row per image and channel: the original, the encoder's input, the reconstruction.

    Args:
        model: a ViT-MAE for pre-training (any method).
        data: evaluation views; the first ``num_images`` are shown, with the masks that evaluation uses.
        path: PNG file to write.
        num_images: how many images to show.
    """
    model = model.eval()
    rows = []
    for index in range(min(num_images, len(data))):
        sample = {key: value.unsqueeze(0).to(model.device) for key, value in data[index].items()}
        output = model(**sample)
        patches = model.patchify(sample["pixel_values"])
        logits = output.logits
        if model.config.norm_pix_loss:  # the model predicts normalised patches
            logits = logits * (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5 + patches.mean(dim=-1, keepdim=True)
        mask = output.mask.unsqueeze(-1)
        versions = (patches, patches * (1 - mask), patches * (1 - mask) + logits * mask)
        size = sample["pixel_values"].shape[2:]
        pictures = [displayed(model.unpatchify(version, tuple(size))[0], data) for version in versions]
        rows += list(zip(*pictures, strict=True))
    figure = Figure(figsize=(6, 2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for axis_row, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("original", "visible", "reconstruction"), strict=True):
        axis.set_title(title)
    with matplotlib.rc_context({"savefig.dpi": 100}):
        figure.savefig(path)


def plot_curves(
    rows: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    reference: float | None = None,
    loss: str = "mean squared error",
) -> None:
    """Write a PNG of training and validation loss by step, with a dashed line at ``reference`` if it is given."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for key, label in (("train_loss", "training"), ("eval_loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
    if reference is not None:
        axis.axhline(reference, color="grey", linestyle="--", label="interpolated means")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(loss)
    axis.legend()
    figure.savefig(path, dpi=100)
