"""Objects in new images: `hf_dbp.downstream.predicting` for RF-DETRs from `hf-dbp detect` and public ones.

The model sees an image as in evaluation: stretched to the size of its image processor, with its mean and standard
deviation. The table has one row per object with a score of at least ``threshold``: class, score and box in pixels of
the image; an image without any has one row without a class. ``coco.json`` holds the same objects, with masks if the
model finds them, as labels that tools for labelling read. Overlays show them over the images.

Shapes: B images of a batch; M objects found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_dbp.data.decoding import stored
from hf_dbp.data.folders import open_pictures
from hf_dbp.data.labels.formats import read_labels
from hf_dbp.data.labels.masks import is_labels, named
from hf_dbp.data.labels.shapes import Labelled
from hf_dbp.data.values import UNIT, displayed
from hf_dbp.data.whole_files import whole_file
from hf_dbp.downstream.classification.predictor import View
from hf_dbp.downstream.detection.coco import Found, coco_scores
from hf_dbp.downstream.detection.figures import draw_objects
from hf_dbp.downstream.detection.model import load_detector
from hf_dbp.downstream.detection.objects import Objects, Oddities, labelled_objects
from hf_dbp.downstream.detection.postprocessing import found_in
from hf_dbp.downstream.detection.runs import Runs
from hf_dbp.downstream.detection.views import seen
from hf_dbp.downstream.networks import channels_of, processor_size, weights_digest
from hf_dbp.downstream.segmentation.figures import class_colours
from hf_dbp.errors import UserError
from hf_dbp.figures import literal_names
from hf_dbp.hub.untrusted import read_statistics, read_value_range
from hf_dbp.records import write_json

__all__ = ["Detected", "Detector", "load"]

logger = logging.getLogger(__name__)

BATCH = 8
THRESHOLD = 0.3
OVERLAY = 1600  # pixels of the longer side
EXPORTS = ("coco",)


def load(
    model: str,
    *,
    batch_size: int | None = None,
    device: str | None = None,
    threshold: float | None = None,
    no_overlays: bool = False,
    export: Sequence[str] = (),
    images: str | None = None,
    masks: str | None = None,
    **others: Any,
) -> Detector:
    """The predictor for a detector.

    Args:
        model: folder or Hub id.
        batch_size: images of a forward pass.
        device: default: a GPU where there is one.
        threshold: lowest score of an object, in [0, 1]; default: 0.3, or 0 if the predictions are scored.
        no_overlays: write no overlays.
        export: only ``coco``, which is always written.
        images: folder of the images, needed if ``masks`` are given.
        masks: true labels of the images, for scoring the predictions.
        others: settings of segmentation, none of which may be set.

    Raises:
        UserError: what is wrong with model or settings.
    """
    given = sorted(name for name, value in others.items() if value not in (None, "", False, [], ()))
    if given:
        raise UserError(f"--{given[0]} is for segmentation; {model} is a detector")
    if unknown := sorted(set(export) - set(EXPORTS)):
        raise UserError(f"export {unknown[0]!r}: the objects of a detector are exported as coco")
    lowest = (THRESHOLD if masks is None else 0.0) if threshold is None else threshold
    if not 0.0 <= lowest <= 1.0:
        raise UserError(f"--threshold is a score between 0 and 1, got {lowest}")
    network, content = load_detector(model)
    network = network.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    channels, kept = channels_of(content), read_value_range(model)
    mean, std = read_statistics(model) or ([0.5] * channels, [0.5] * channels)
    size = processor_size(model)
    settings = {
        "task": "detection", "model": model, "weights": weights_digest(network), "size": list(size),
        "threshold": lowest, "overlays": not no_overlays,
    }  # fmt: skip
    truth = None
    if masks is not None:
        names = [str(name) for name in network.config.id2label.values()]
        truth = true_objects(masks, str(images), names, instances=hasattr(network, "segmentation_head"))
        settings["masks"] = masks
    view = View(size, channels, mean, std, kept or UNIT, floats=kept is not None)
    return Detector(network, view, settings, batch_size or BATCH, truth)


def true_objects(masks: str, images: str, names: Sequence[str], *, instances: bool) -> dict[str, Objects]:
    """The labelled objects of images, by their names; labels of images that are not there are not used.

    Raises:
        UserError: these are no labels of the images, or they hold a class that the model lacks.
    """
    if not is_labels(masks):
        raise UserError(f"--masks {masks}: a detector's predictions are scored by labels (COCO, YOLO, LabelMe, CVAT)")
    folder = open_pictures(images)
    files = {name: paths[0] for name, paths in folder.named(Path(images), folder.files, None).items()}
    found: dict[str, Objects] = {}

    def size_of(name: str) -> tuple[int, int]:
        shape = np.asarray(stored({"bytes": None, "path": files[named(name, files, masks)]})).shape
        return shape[0], shape[1]

    labelled, known = read_labels(masks, size_of)
    if unknown := [name for name in known if name not in names]:
        raise UserError(f"{masks} holds the class {unknown[0]!r}, which the model lacks; it has {', '.join(names)}")
    candidates: dict[str, list[Labelled]] = {}
    for one in labelled:
        with contextlib.suppress(UserError):  # of an image elsewhere
            candidates.setdefault(named(one.file, files, masks), []).append(one)
    ids, odd = {name: k for k, name in enumerate(names)}, Oddities()
    for name, several in candidates.items():
        if len(several) > 1:  # train/0.png and validation/0.png: that of this folder
            own = PurePath(Path(images).resolve().name, name)
            mine = [one for one in several if PurePath(one.file).with_suffix("") == own]
        else:
            mine = several
        if len(mine) != 1:
            raise UserError(f"{masks} labels several images called {name!r}; give labels of those in {images} alone")
        found[name] = labelled_objects(mine[0], ids, odd, instances=instances)
    elsewhere = len(labelled) - len(found)
    if not found:
        raise UserError(f"{masks} labels none of the images in {images}")
    for line in odd.lines():
        logger.warning("%s: %s", masks, line)
    if elsewhere:
        logger.warning("%s labels %d images that are not in %s; they are not scored", masks, elsewhere, images)
    return found


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened image: its name, file, pixels (C, H, W), its own height and width, and itself to be drawn on."""

    name: str
    file: str
    pixels: Tensor
    size: tuple[int, int]
    picture: NDArray[Any] | None


@dataclasses.dataclass(frozen=True)
class Detected:
    """What was found in an image."""

    image: Opened
    found: Found


class Detector:
    """A `Predictor` of objects.

    Args:
        model: in eval mode, where it is to run.
        view: prepares images for it.
        settings: for the journal; ``threshold`` and ``overlays`` say what is written.
        batch_size: images of a forward pass.
        truth: the true objects by the names of their images, to score the predictions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        view: View,
        settings: Mapping[str, Any],
        batch_size: int = BATCH,
        truth: Mapping[str, Objects] | None = None,
    ) -> None:
        self.truth, self.highest = truth, 0.0  # the highest score that this process has seen
        self.model, self.how, self.settings, self.batch_size = model, view, settings, batch_size
        self.masks = hasattr(model, "segmentation_head")
        self.names: dict[int, str] = {int(k): str(name) for k, name in model.config.id2label.items()}

    def open(self, name: str, files: Sequence[str]) -> Opened:
        """Open an image for the model. UnreadableImageError if it cannot be read."""
        image = self.how.read(files)
        pixels = seen(image, self.how.size, self.how.value_range, self.how.mean, self.how.std)
        step = -(-max(image.shape[:2]) // OVERLAY)
        picture = displayed(image[::step, ::step], self.how.value_range) if self.settings["overlays"] else None
        return Opened(name, f"{name}{Path(files[0]).suffix}", pixels, (image.shape[0], image.shape[1]), picture)

    @torch.no_grad()
    def predict(self, images: Iterable[Opened]) -> Iterator[Detected]:
        """What is found in opened images, in order."""
        waiting = iter(images)
        while batch := list(islice(waiting, self.batch_size)):
            pixels = torch.stack([image.pixels for image in batch]).to(self.model.device)
            output = self.model(pixel_values=pixels)
            self.highest = max(self.highest, float(output.logits.float().sigmoid().max()))
            found = found_in(
                output,
                [image.size for image in batch],
                threshold=float(self.settings["threshold"]),
            )
            yield from map(Detected, batch, found)

    def write(self, result: Detected, folder: Path) -> list[dict[str, Any]]:
        """Write the overlay of an image; return its rows."""
        image, found = result.image, result.found
        if image.picture is not None:
            write_overlay(folder / "overlays" / f"{image.name}.jpg", result, self.names)
        height, width = image.size
        common = {"image": image.name, "file": image.file, "height": height, "width": width}
        nothing = dict.fromkeys(("class_id", "class", "score", "left", "top", "right", "bottom"))
        if self.masks:
            nothing |= dict.fromkeys(("pixels", "runs"))
        rows = []
        for number in range(len(found)):
            left, top, right, bottom = found.boxes_M4[number].tolist()
            k = int(found.classes_M[number])
            row: dict[str, Any] = {
                "class_id": k, "class": self.names[k], "score": float(found.scores_M[number]), "left": left,
                "top": top, "right": right, "bottom": bottom,
            }  # fmt: skip
            if self.masks:
                runs = found.runs[number]
                row |= {"pixels": runs.area, "runs": runs.counts.decode()}
            rows.append({**common, **nothing, **row})
        return rows or [{**common, **nothing}]

    def finish(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
        """Write ``coco.json``; count the objects of each class."""
        write_json(folder / "coco.json", self.coco(rows), indent=None)
        counts = Counter(row["class"] for row in rows)
        look = f"look at {folder / 'overlays'}, " if self.settings["overlays"] else ""
        advice = f"{look}correct coco.json, add it to the labels and run `hf-dbp detect` again"
        if not counts.keys() - {None}:
            best = f" (the highest is {self.highest:.2g})" if self.highest else ""
            advice = (
                f"no object has a score of {self.settings['threshold']:g} or more{best}: train the detector for "
                "longer, or give a lower --threshold and another --output_dir"
            )
        return self.scored(rows) | {
            "files": ["coco.json", *(["overlays"] if self.settings["overlays"] else [])],
            "classes": self.names,
            "counts": {name: counts[name] for name in self.names.values()},
            "empty": counts[None],
            "next": advice,
        }

    def scored(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """COCO's figures of the labelled images, as `hf_dbp.downstream.detection.trainer` computes them; {} without
        truth. UserError if an image is not of the size of its labels."""
        if self.truth is None:
            return {}
        mine: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            mine.setdefault(row["image"], []).append(row)
        images = [name for name in mine if name in self.truth]
        truth = {number: self.truth[name] for number, name in enumerate(images)}
        found = {}
        for number, name in enumerate(images):
            size = (mine[name][0]["height"], mine[name][0]["width"])
            if truth[number].size != size:
                raise UserError(
                    f"{name}: its labels are for {truth[number].size} pixels (height, width), it has {size}"
                )
            kept = [row for row in mine[name] if row["class"] is not None]
            corners = np.array([[row[side] for side in ("left", "top", "right", "bottom")] for row in kept])
            classes, scores = (np.array([row[key] for row in kept]) for key in ("class_id", "score"))
            runs = [Runs(size, row["runs"].encode()) for row in kept] if self.masks else []
            found[number] = Found(corners.reshape(-1, 4), classes.astype(np.int64), scores.astype(np.float64), runs)
        figures = dict(coco_scores(truth, found, len(self.names)).figures)
        if self.masks:
            masks = coco_scores(truth, found, len(self.names), masks=True).figures
            figures |= {f"mask_{name}": value for name, value in masks.items()}
        return {"scored_images": len(images), **figures}

    def coco(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The objects of all images as a COCO file, with their scores."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(row["image"] for row in rows), 1)}
        images = {
            row["image"]: {
                "id": numbers[row["image"]],
                "file_name": row["file"],
                "height": row["height"],
                "width": row["width"],
            }
            for row in rows
        }
        annotations: list[dict[str, Any]] = []
        for row in rows:
            if row["class"] is None:
                continue
            width, height = row["right"] - row["left"], row["bottom"] - row["top"]
            annotation = {
                "id": len(annotations) + 1, "image_id": numbers[row["image"]], "category_id": row["class_id"] + 1,
                "bbox": [row["left"], row["top"], width, height], "iscrowd": 0, "score": row["score"],
                "area": row["pixels"] if self.masks else width * height,
            }  # fmt: skip
            if self.masks:
                annotation["segmentation"] = {"size": [row["height"], row["width"]], "counts": row["runs"]}
            annotations.append(annotation)
        categories = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in self.names.items()]
        return {"images": list(images.values()), "annotations": annotations, "categories": categories}


@literal_names
def write_overlay(file: Path, result: Detected, names: Mapping[int, str]) -> None:
    """Write the image with what was found in it, each with its class and score."""
    picture, found = result.image.picture, result.found
    assert picture is not None
    height, width = result.image.size
    figure = Figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(picture, interpolation="nearest", extent=edges)
    captions = [f"{names[int(k)]} {score:.2f}" for k, score in zip(found.classes_M, found.scores_M, strict=True)]
    draw_objects(axis, found.boxes_M4, found.classes_M, class_colours(len(names)), found.runs, captions)
    axis.set_xlim(edges[0], edges[1])
    axis.set_ylim(edges[2], edges[3])
    with whole_file(file) as part:
        figure.savefig(part, format="jpg", dpi=100)
