"""Classes of new images: `hf_dbp.downstream.predicting` for classifiers from `hf-dbp classify` and any stock one.

The model sees an image as in evaluation: its largest central part with the view's aspect, at the size, mean and
standard deviation of the model's image processor. So predictions on the validation images reproduce the accuracy of
`eval.json`. If the processor of a stock model squeezes non-square images into a square, they are cropped instead.

The table has one row per image: the most probable class and the second, each with its probability, and, for up to
`COLUMNS` classes, the probability of every class.

Shapes: B images of a batch; K classes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.values import UNIT, ValueRange
from hf_dbp.downstream.classification.model import load_classifier
from hf_dbp.downstream.classification.views import central_view
from hf_dbp.downstream.networks import channels_of, chosen_device, processor_size, weights_digest
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_statistics, read_value_range

__all__ = ["Classified", "Classifier", "View", "load"]

COLUMNS = 50  # maximum number of classes with a column each
BATCH = 32


def load(
    model: str, *, batch_size: int | None = None, device: str | None = None, images: str | None = None, **others: Any
) -> Classifier:
    """The predictor for a classifier.

    Args:
        model: folder or Hub id.
        batch_size: images of a forward pass.
        device: default: a GPU where there is one.
        images: folder of the images; not used.
        others: settings of segmentation, none of which may be set.

    Raises:
        UserError: what is wrong with model or settings.
    """
    given = sorted(name for name, value in others.items() if value not in (None, "", False, [], ()))
    if given:
        raise UserError(f"--{given[0]} is for segmentation; {model} is a classifier")
    network, content = load_classifier(model)
    network = network.eval().to(chosen_device(device))
    channels, kept = channels_of(content), read_value_range(model)
    mean, std = read_statistics(model) or ([0.5] * channels, [0.5] * channels)
    size = processor_size(model)
    settings = {"task": "classification", "model": model, "weights": weights_digest(network), "size": list(size)}
    view = View(size, channels, mean, std, kept or UNIT, floats=kept is not None)
    return Classifier(network, view, settings, batch_size or BATCH)


@dataclasses.dataclass(frozen=True)
class View:
    """How an image is prepared for the model.

    Args:
        size: height and width.
        channels: number of channels of the images. mean, std: per channel, of values in [0, 1].
        value_range: range of float images.
        floats: whether the model was trained on float images, not on those of 8 or 16 bits.
    """

    size: tuple[int, int]
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    value_range: ValueRange = UNIT
    floats: bool = False

    def read(self, files: Sequence[str]) -> NDArray[Any]:
        """The image (H, W, C) in the files of its channels. UnreadableImageError if it cannot be read, or is of another
        kind than those of training."""
        value = {"bytes": None, "path": files[0], "more": list(files[1:])}
        image_HWC = decode(value, self.channels, files[0])
        if (image_HWC.dtype.kind == "f") != self.floats:
            of = "float images, this is" if self.floats else "images of 8 or 16 bits, this is"
            raise UnreadableImageError(f"{files[0]}: the model was trained on {of} {image_HWC.dtype}; convert it")
        return image_HWC


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened image: its name, file and pixels (C, H, W)."""

    name: str
    file: str
    pixels: Tensor


@dataclasses.dataclass(frozen=True)
class Classified:
    """The probabilities of an image (K)."""

    image: Opened
    chance_K: Tensor


class Classifier:
    """A `Predictor` of classes.

    Args:
        model: in eval mode, where it is to run.
        view: prepares images for it.
        settings: for the journal.
        batch_size: images of a forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, view: View, settings: Mapping[str, Any], batch_size: int = BATCH
    ) -> None:
        self.model, self.how, self.settings, self.batch_size = model, view, settings, batch_size
        self.names: dict[int, str] = {int(k): str(name) for k, name in model.config.id2label.items()}

    def open(self, name: str, files: Sequence[str]) -> Opened:
        """Open an image for the model. UnreadableImageError if it cannot be read."""
        image = self.how.read(files)
        pixels = central_view(image, self.how.size, self.how.value_range, self.how.mean, self.how.std)
        return Opened(name, f"{name}{Path(files[0]).suffix}", pixels)

    @torch.no_grad()
    def predict(self, images: Iterable[Opened]) -> Iterator[Classified]:
        """The probabilities of opened images, in order."""
        waiting = iter(images)
        while batch := list(islice(waiting, self.batch_size)):
            pixels = torch.stack([image.pixels for image in batch]).to(self.model.device)
            chance_BK = self.model(pixel_values=pixels).logits.double().softmax(dim=1).cpu()
            yield from map(Classified, batch, chance_BK)

    def write(self, result: Classified, folder: Path) -> list[dict[str, Any]]:
        """Return the row of an image; there is no file to write."""
        best, second = result.chance_K.topk(2).indices.tolist()
        row = {
            "image": result.image.name, "file": result.image.file, "class_id": best, "class": self.names[best],
            "probability": float(result.chance_K[best]), "second": self.names[second],
            "second_probability": float(result.chance_K[second]),
        }  # fmt: skip
        if len(self.names) <= COLUMNS:
            row |= {f"p({name})": float(result.chance_K[k]) for k, name in self.names.items()}
        return [row]

    def finish(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
        """Count the images of each class."""
        counts = Counter(row["class"] for row in rows)
        return {
            "files": [],
            "classes": self.names,
            "counts": {name: counts[name] for name in self.names.values()},
            "next": "sort the table by probability: look at and label the least certain images first",
        }
