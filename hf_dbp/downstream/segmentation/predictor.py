"""Semantic segmentation of new images: `hf_dbp.downstream.predicting` for UperNet, EoMT, any stock model for semantic
segmentation, and the memories of `hf-dbp retrieve`.

A model from `hf-dbp finetune` sees images as in its evaluation: its config.json holds crop, scale and batch size, its
image processor mean and standard deviation. Predictions on the validation images reproduce the mean IoU of `eval.json`,
digit for digit on the same machine. So do those of `hf-dbp retrieve`, whose settings are in its `retrieval.json`. For a
stock model without that entry, the crop is the size that its image processor resizes to, and images keep their native
resolution.

For each image, with NAME its path below the folder of images, it writes

    masks/NAME.png       the class id of each pixel, 8 bits (16 for more than 256 classes); of more than 2^26 pixels a
                         tiled TIFF
    labelme/NAME.json    with export labelme: the parts of the classes as polygons to correct by hand
    coco.json            with export coco: those of all images
    overlays/NAME.jpg    the image with every class but 0 in colour, at most 1600 pixels wide and high

and one row of the table per class: pixels, share, components (8-connected parts), mean confidence (the class's mean
probability over its pixels), and ``score``, the highest probability of any class but 0 at any pixel. With true masks, a
row also counts the labelled pixels that are of the class (true), predicted as it (predicted), and both (hits).

Shapes: C channels; K classes; H, W the image's height and width; n rows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from hf_dbp.data.decoding import UnreadableImageError, decode, stored
from hf_dbp.data.labels.formats import coco_content, labelme_content
from hf_dbp.data.labels.masks import is_labels, mask_folder
from hf_dbp.data.masks import Palette, index_mask
from hf_dbp.data.values import UNIT, displayed
from hf_dbp.data.whole_files import whole_file
from hf_dbp.data.windows import open_rows
from hf_dbp.downstream.networks import channels_of, chosen_device, load_stock, weights_digest
from hf_dbp.downstream.segmentation.components import Components, class_pixels
from hf_dbp.downstream.segmentation.eomt import SemanticEomt
from hf_dbp.downstream.segmentation.evaluation_settings import MEMORY_SETTINGS, Evaluated, read_evaluated, stock_crop
from hf_dbp.downstream.segmentation.figures import class_colours
from hf_dbp.downstream.segmentation.heads import check_crop, load_head, segmenter
from hf_dbp.downstream.segmentation.inference import Preparation, likely
from hf_dbp.downstream.segmentation.mean_iou import class_scores
from hf_dbp.downstream.segmentation.opened import Opened, RowsView, Truth
from hf_dbp.downstream.segmentation.sliding import View, WholeView, logit_bands
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_config, read_statistics, read_value_range
from hf_dbp.precision import fast_in_16_bits
from hf_dbp.records import write_json

if TYPE_CHECKING:
    from hf_dbp.downstream.segmentation.retrieval import RetrievalSegmenter

__all__ = ["Segmented", "Segmenter", "load"]

logger = logging.getLogger(__name__)

LARGE_MASK = 2**26  # pixels
EXPORTS = ("coco", "labelme")
OVERLAY = 1600  # pixels of the longer side


# ---- loading ----


def load(
    model: str,
    *,
    crop_size: int | None = None,
    long_edge: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    masks: str | None = None,
    mask_suffix: str = "",
    palette: str | None = None,
    ignore_index: int | None = None,
    export: Sequence[str] = (),
    no_overlays: bool = False,
    images: str | None = None,
) -> Segmenter:
    """The predictor for a segmentation model.

    Args:
        model: folder or Hub id.
        crop_size, long_edge, batch_size: override those of the model's evaluation; ``long_edge`` 0 is native.
        device: default: a GPU if there is one.
        masks: folder of true masks, named like the images, for scoring the predictions.
        mask_suffix, palette, ignore_index: for the true masks, as in fine-tuning.
        export: label formats to also write the predictions in: ``coco``, ``labelme``.
        no_overlays: write no overlays.
        images: folder of the images, needed if ``masks`` are labels.

    Raises:
        UserError: something is wrong with the model or the settings.
    """
    content = read_config(model)
    own: dict[str, Any] = {}
    network: PreTrainedModel | SemanticEomt | RetrievalSegmenter
    evaluated: Evaluated | None
    if (Path(model) / MEMORY_SETTINGS).is_file():
        from hf_dbp.downstream.segmentation.retrieval import load_retrieval  # imports training, which takes memory

        network, kept = load_retrieval(model)
        evaluated = Evaluated(kept["crop_size"], kept["long_edge"], kept["batch_size"])
        own = {name: kept[name] for name in ("neighbours", "temperature")}
        content = content | {"loss_ignore_index": kept["ignore_index"]}
    else:
        network, evaluated = load_network(model, content), read_evaluated(content, model)
    how = evaluated or Evaluated(crop_size or stock_crop(model), long_edge or None)
    changes: dict[str, Any] = {"crop_size": crop_size, "batch_size": batch_size}
    how = dataclasses.replace(how, **{name: value for name, value in changes.items() if value is not None})
    how = how if long_edge is None else dataclasses.replace(how, long_edge=long_edge or None)
    network.eval().to(chosen_device(device))
    how = without_slow_autocast(how, next(network.parameters()).device, model)
    channels = channels_of(content)
    statistics = read_statistics(model) or ([0.5] * channels, [0.5] * channels)
    truth = None
    alone = {"mask_suffix": mask_suffix or None, "palette": palette, "ignore_index": ignore_index}
    if masks is None and (without := [name for name, value in alone.items() if value is not None]):
        raise UserError(f"--{without[0]} says how to read true masks: give --masks too, or leave it out")
    unknown = sorted(set(export) - set(EXPORTS))
    if unknown:
        raise UserError(f"export {unknown[0]!r}: choose from {', '.join(EXPORTS)}")
    if masks is not None:
        if images is not None and is_labels(masks):
            masks, _ = mask_folder(masks, images, [str(name) for name in network.config.id2label.values()])
        ignored = ignore_index if ignore_index is not None else int(content.get("loss_ignore_index", 255))
        colours = None if palette is None else Palette(palette, ignored)
        truth = Truth(masks, mask_suffix, colours, ignored, len(network.config.id2label))
    settings = {
        "task": "segmentation", "model": model, "weights": weights_digest(network), **how.record(), **own,
        "masks": masks, "overlays": not no_overlays, "export": sorted(export),
    }  # fmt: skip
    value_range = read_value_range(model)
    preparation = Preparation(how.long_edge, *statistics, value_range or UNIT)
    return Segmenter(network, how, preparation, channels, settings, truth, floats=value_range is not None)


def without_slow_autocast(how: Evaluated, device: torch.device, model: str) -> Evaluated:
    """``how``, but in float32 if the device is slow in 16 bits; with a warning, because masks can then differ."""
    if how.autocast is None or fast_in_16_bits(device, getattr(torch, how.autocast)):
        return how
    logger.warning(
        "%s was evaluated in %s, which is slow on this CPU: predicting in float32 instead; masks can differ slightly",
        *(model, how.autocast),
    )
    return dataclasses.replace(how, autocast=None)


def load_network(model: str, content: Mapping[str, Any]) -> PreTrainedModel | SemanticEomt:
    """Load a model from a folder or Hub id: one of our UperNets, an EoMT, or any stock class for semantic segmentation.

    Raises:
        UserError: another kind of model, or invalid weights; see `hf_dbp.hub.untrusted`.
    """
    backbone = content.get("backbone_config")
    names = {int(number): str(name) for number, name in (content.get("id2label") or {}).items()}
    kind = content["model_type"]
    ours = kind == "upernet" and isinstance(backbone, dict) and backbone.get("model_type") == "beit"
    if ours or kind == "eomt":
        return segmenter(load_head(kind, model, names, ignore_index=int(content.get("loss_ignore_index", 255))))
    return load_stock(AutoModelForSemanticSegmentation, model, content, "semantic segmentation")


def return_large_blocks() -> None:
    """Have glibc return blocks of 4 MiB and more to the system as soon as they are freed.

    Otherwise it raises that bound to 32 MiB, and activations leave gaps in its heaps: over a large image these took up
    to 0.3 GB more.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**22)  # M_MMAP_THRESHOLD


@dataclasses.dataclass
class Segmented:
    """The prediction for an image.

    Attributes:
        ids_HW: class ids.
        confidence_K: for each class, the sum of its probability over its pixels.
        score: the highest probability of any class but 0.
        image: the opened image.
    """

    ids_HW: npt.NDArray[Any]
    confidence_K: npt.NDArray[np.float64]
    score: float
    image: Opened

    def add(self, top: int, left: int, logits_KnW: Tensor) -> None:
        """Add the logits of some rows, from column ``left`` on."""
        for part in likely(logits_KnW):
            ids_nW, first = part.ids_nW.cpu(), top + part.top
            self.ids_HW[first : first + len(ids_nW), left : left + ids_nW.shape[1]] = ids_nW.numpy()
            chances = part.chance_nW.flatten().double().cpu()
            self.confidence_K += torch.bincount(ids_nW.flatten(), chances, minlength=len(logits_KnW)).numpy()
            self.score = max(self.score, part.foreground)


# ---- prediction ----


class Segmenter:
    """A `Predictor` of class ids.

    Args:
        model: in eval mode, on the device where it is to run; its config names the classes.
        how: crop, scale, batch and autocast.
        preparation: prepares images for the model.
        channels: number of channels of the images.
        settings: settings for the journal.
        truth: true masks for scoring.
        floats: whether the model was trained on float images rather than on 8-bit or 16-bit ones.
    """

    def __init__(
        self, model: PreTrainedModel | SemanticEomt | RetrievalSegmenter, how: Evaluated, preparation: Preparation,
        channels: int, settings: Mapping[str, Any], truth: Truth | None = None, *, floats: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(model, SemanticEomt):
            check_crop(model.model, how.crop_size)
        self.floats = floats
        self.model, self.how, self.preparation, self.channels = model, how, preparation, channels
        self.settings, self.truth = settings, truth
        self.names: dict[int, str] = {int(k): str(name) for k, name in model.config.id2label.items()}
        self.dtype = np.uint8 if len(self.names) <= 256 else np.uint16

    def open(self, name: str, files: Sequence[str]) -> Opened:
        rows = open_rows(files[0]) if len(files) == 1 else None
        if (
            rows is not None
            and not self.floats
            and (rows.shape[2] == self.channels or (rows.shape[2], self.channels) == (1, 3))
        ):
            large = RowsView(rows, self.preparation, self.channels)
            return_large_blocks()
            small = large.small(OVERLAY) if self.settings["overlays"] else None
            return Opened(name, files[0], large, small, self.true(name, large.target))
        image = decode({"bytes": None, "path": files[0], "more": list(files[1:])}, self.channels, files[0])
        if (image.dtype.kind == "f") != self.floats:
            of = "float images, but this is" if self.floats else "images of 8 or 16 bits, but this is"
            raise UnreadableImageError(f"{files[0]}: the model was trained on {of} {image.dtype}; convert it")
        size = image.shape[0], image.shape[1]
        view = WholeView(self.preparation.pixels(image), size)
        step = -(-max(size) // OVERLAY)
        small = image[::step, ::step] if self.settings["overlays"] else None
        return Opened(name, files[0], view, small, self.true(name, size))

    def true(self, name: str, size: tuple[int, int]) -> npt.NDArray[np.int32] | None:
        return None if self.truth is None else self.truth.mask(name, size)

    @torch.no_grad()
    def predict(self, images: Iterable[Opened]) -> Iterator[Segmented]:
        """Predict class ids for opened images."""
        waiting: list[Opened] = []

        def views() -> Iterator[View]:
            for image in images:
                waiting.append(image)
                yield image.view

        device, autocast = next(self.model.parameters()).device.type, self.how.autocast
        kind = getattr(torch, autocast or "bfloat16")
        found: Segmented | None = None
        pixels = tqdm(desc="Pixels", unit="px", leave=False, disable=True)
        with torch.autocast(device, kind, enabled=autocast is not None):
            crop, batch = self.how.crop_size, self.how.batch_size
            for band in logit_bands(self.model, views(), crop, batch, classes=len(self.names)):
                if found is None:
                    ids_HW = np.zeros(band.view.target, self.dtype)
                    found = Segmented(ids_HW, np.zeros(len(self.names)), 0.0, waiting.pop(0))
                    if isinstance(band.view, RowsView):  # of an image that takes long
                        called = {"desc": f"Pixels of {found.image.name}", "unit": "px", "unit_scale": True}
                        pixels = tqdm(total=ids_HW.size, leave=False, **called)
                found.add(band.top, band.left, band.logits_KnW)
                pixels.update(band.logits_KnW[0].numel())
                if band.last:
                    pixels.close()
                    yield found
                    found = None

    def write(self, result: Segmented, folder: Path) -> list[dict[str, Any]]:
        """Write mask and overlay of one image, and return its rows."""
        name, ids_HW = result.image.name, result.ids_HW
        write_mask(folder / "masks" / name, ids_HW)
        if result.image.small_HWC is not None:
            picture = displayed(result.image.small_HWC, self.preparation.value_range)
            write_overlay(folder / "overlays" / name, picture, ids_HW, len(self.names))
        if "labelme" in self.settings["export"]:
            content = labelme_content(ids_HW, self.names, f"{Path(name).name}{Path(result.image.file).suffix}")
            write_json(folder / "labelme" / f"{name}.json", content, indent=None)
        parts_K = Components(len(self.names)).counted(ids_HW)
        pixels_K = class_pixels(ids_HW, len(self.names))
        rows = []
        for k, label in self.names.items():
            row = {
                "image": name, "file": f"{name}{Path(result.image.file).suffix}", "class_id": k, "class": label,
                "pixels": int(pixels_K[k]),
                "share": float(pixels_K[k] / ids_HW.size), "components": int(parts_K[k]),
                "mean_confidence": float(result.confidence_K[k] / pixels_K[k]) if pixels_K[k] else None,
                "score": result.score,
            }  # fmt: skip
            rows.append(row | self.scored(k, result))
        if isinstance(result.image.view, RowsView):
            result.image.view.rows.close()
        return rows

    def scored(self, k: int, result: Segmented) -> dict[str, int]:
        """The labelled pixels of class k, those predicted as it, and both."""
        if self.truth is None or result.image.truth_HW is None:
            return {}
        labelled = result.image.truth_HW != self.truth.ignore_index
        true, predicted = (result.image.truth_HW == k) & labelled, (result.ids_HW == k) & labelled
        return {"true": int(true.sum()), "predicted": int(predicted.sum()), "hits": int((true & predicted).sum())}

    def finish(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
        """Compute the scores if there are true masks."""
        files = ["masks", *(["overlays"] if self.settings["overlays"] else [])]
        record: dict[str, Any] = {"files": files, "classes": self.names}
        exported = list(self.settings["export"])
        if "coco" in exported:
            images = {row["image"]: row["file"] for row in rows}
            masks = ((file, read_mask(folder / "masks" / name)) for name, file in images.items())
            write_json(folder / "coco.json", coco_content(masks, self.names), indent=None)
        files += ["coco.json" if kind == "coco" else kind for kind in exported]
        look = f"look at {folder / 'overlays'}, " if self.settings["overlays"] else ""
        record["next"] = f"{look}correct masks, add them to the training set and run `hf-dbp finetune` again"
        if self.truth is None:
            return record
        true_K, predicted_K, hits_K = (
            np.array([sum(row[key] for row in rows if row["class_id"] == k) for k in self.names], np.int64)
            for key in ("true", "predicted", "hits")
        )
        per_class = class_scores(hits_K, true_K, predicted_K, self.names)
        ious = [row["iou"] for row in per_class.values() if row["iou"] is not None]
        return record | {"mean_iou": float(np.mean(ious)) if ious else None, "per_class": per_class}


def write_mask(stem: Path, ids_HW: npt.NDArray[Any]) -> None:
    """Write ids (H, W) as PNG, or as a tiled TIFF, which can be read in parts, if there are very many pixels."""
    large = ids_HW.size > LARGE_MASK
    file = stem.with_name(stem.name + (".tif" if large else ".png"))
    with whole_file(file) as part:
        if large:
            how = {"tile": (512, 512), "compression": "zlib", "photometric": "minisblack", "maxworkers": 1}
            tifffile.imwrite(part, ids_HW, **how)
        else:
            Image.fromarray(ids_HW).save(part, "PNG", compress_level=4)


def read_mask(stem: Path) -> npt.NDArray[Any]:
    """The ids (H, W) that `write_mask` wrote."""
    file = next(place for ending in (".png", ".tif") if (place := stem.with_name(stem.name + ending)).is_file())
    return index_mask(stored({"bytes": None, "path": str(file)}))


def write_overlay(stem: Path, picture: npt.NDArray[Any], ids_HW: npt.NDArray[Any], classes: int) -> None:
    """Write the small image, with values in [0, 1], and every class but 0 in colour over it."""
    step = -(-max(ids_HW.shape) // OVERLAY)
    ids = ids_HW[::step, ::step]
    share_K = np.where(np.arange(classes) > 0, np.float32(0.55), np.float32(0))[:, None]  # of the colour
    mixed = picture * (1 - share_K).take(ids, axis=0)
    mixed += (share_K * class_colours(classes).astype(np.float32)).take(ids, axis=0)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor((mixed * 255).astype(np.uint8), cv2.COLOR_RGB2BGR))
    assert done
    with whole_file(stem.with_name(f"{stem.name}.jpg")) as part:
        part.write_bytes(encoded.tobytes())
