"""The objects of labels or masks, and the flags of `hf-dbp detect` that they suggest.

What is counted is what training counts (`hf_dbp.downstream.detection.data`): inspection shows it beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.downstream.detection.coco import LARGE, SMALL
from hf_dbp.downstream.detection.data import BARE, ObjectImages, ObjectList, ObjectSource, load_objects
from hf_dbp.downstream.detection.objects import CROWDS, Objects
from hf_dbp.downstream.detection.postprocessing import FOUND
from hf_dbp.inspection.choices import STEPS, Findings, choose_split
from hf_dbp.inspection.contact_sheet import IMAGES, thumbnail, write_pictures
from hf_dbp.inspection.survey import ImageKind
from hf_dbp.recipes import read_yaml, recipe_path

__all__ = ["BASE", "choose_object_split", "describe_objects", "open_objects", "write_box_sheet"]

BASE = "industrial_detector.yaml"
SMALL_DETECTOR = {"query_groups": 3, "decoder_layers": 2, "decoder_width": 128}  # without a GPU
PATCHES, SMALL_PATCHES = 64, 32  # along a side of the view, at most; the second without a GPU
BATCH, SMALL_BATCH = 16, 4
SMALL_STEPS = 2000  # at most, without a GPU
QUERIES, EACH = 50, 3  # at least so many queries, and so many per object
EVALUATIONS = 10  # in training
SMALLEST = 10  # percentile of the thickness of objects that the view is chosen by

Lists = tuple[ObjectImages, ObjectImages]


def open_objects(flags: Mapping[str, Any]) -> Lists:
    """The training and validation images with their objects. UserError as in training.

    Args:
        flags: those of the source.
    """
    return load_objects(ObjectSource(**flags, seed=flags.get("subset_seed", 0)))


def choose_object_split(lists: Lists) -> int | None:
    """A `subset_seed` that leaves every class of labels in both parts; None without a choice: there is a folder
    ``validation``, or masks, whose split is chosen with them.
    """
    if lists[0].masks is not None:
        return None
    rows = [list(part.images.samples["entry"]) for part in lists]
    if set(rows[0]) & set(rows[1]):  # numbers in their own folders
        return None
    held = {
        row: Counter(lists[0].names[k] for k in (() if objects is None else objects.classes_N))
        for numbers, part in zip(rows, lists, strict=True)
        for row, objects in zip(numbers, part.objects, strict=True)
    }
    return choose_split({str(row): held[row] for row in sorted(held)})


def describe_objects(lists: Lists, kinds: Mapping[str, ImageKind], found: Findings) -> None:
    """Report classes, sizes and what is odd about the objects, and choose the flags of the detector.

    Args:
        lists: as `open_objects` returns them.
        kinds: the kinds of all images, by name.
        found: collects lines, problems and flags; holds those of pre-training.
    """
    fitting = [one for part in lists for one in fitting_objects(part, kinds, found)]
    both = ObjectList(fitting, lists[0].names, lists[0].odd + lists[1].odd)
    there = [one for one in both.objects if one is not None]
    counts = np.array([int((~one.crowd_N).sum()) for one in there])
    if not counts.sum():
        return
    found.lines += [
        "",
        f"boxes      {counts.sum()} objects of {len(both.names)} classes in {len(there)} images; up to {counts.max()} "
        f"in an image, {np.median(counts):g} in the median one, none in {int((counts == 0).sum())}; "
        f"{len(kinds) - sum(map(len, lists))} images have no labels and are used only for pre-training",
    ]
    native_N = both.thickness(None)
    classes_N = np.concatenate([one.classes_N[~one.crowd_N] for one in there])
    for k, name in enumerate(both.names):
        holders = sum(k in one.classes_N[~one.crowd_N] for one in there)
        sides = [f"{side:.3g}" for side in np.percentile(native_N[classes_N == k], (10, 50, 90))] if holders else []
        found.lines.append(
            f"           {name:<20} {int((classes_N == k).sum())} in {holders} images"
            + (f", thinner sides of {', '.join(sides)} pixels (tenth, half, nine tenths)" if sides else "")
        )
    areas_N = np.concatenate([one.areas_N[~one.crowd_N] for one in there])
    small, large = int((areas_N < SMALL).sum()), int((areas_N > LARGE).sum())
    found.lines.append(
        f"           {small} small, {len(areas_N) - small - large} medium and {large} large by COCO's measure"
    )
    choose_detector(both, int(counts.max()), len(lists[0]), found)
    view = found.detection["image_size"]
    for line in both.report((view, view)):
        if CROWDS in line:
            found.lines.append(f"           {line}")
        elif BARE not in line:  # reported
            found.problems.append(line)


def fitting_objects(part: ObjectImages, kinds: Mapping[str, ImageKind], found: Findings) -> list[Objects | None]:
    """The objects of each image; None where its size is not that of its labels, which is reported."""
    sizes = {kind.name: kind.size for kind in kinds.values() if not kind.error}
    fitting, wrong = list(part.objects), []
    for index, one in enumerate(part.objects if part.masks is None else ()):  # masks are reported as masks
        name = part.name_of(index)
        if one is not None and sizes.get(name, one.size) != one.size:
            fitting[index] = None
            wrong.append(
                f"{name}: it has {sizes[name][0]} x {sizes[name][1]} pixels (height x width), its labels are for "
                f"{one.size[0]} x {one.size[1]}"
            )
    if wrong:
        found.problems.append(
            f"{len(wrong)} images differ in size from their labels and will be left out of training, e.g. {wrong[0]}"
        )
    return fitting


def choose_detector(objects: ObjectList, most: int, trained: int, found: Findings) -> None:
    """Choose the view by the sizes of the objects, the queries by their number, and the length, and say why.

    A detector over a mini ViT with the small decoder took 0.3 s of a core per step of four views of 256 pixels, 1.2 s
    of 512, in patches of 16; with the recipe's own decoder 9.5 s of 256.

    Args:
        objects: of all images.
        most: the largest number in an image.
        trained: the number of training images.
        found: collects flags and lines.
    """
    gpu, own = torch.cuda.is_available(), read_yaml(recipe_path(BASE))
    patch, encoder = found.pretraining["patch_size"], found.pretraining["image_size"]
    share = float(np.percentile(objects.thickness((1, 1)), SMALLEST))
    wanted = -(-patch // max(share, 1e-6))  # pixels for a patch on it
    high = max(encoder, patch * (PATCHES if gpu else SMALL_PATCHES))
    size = int(min(high, max(encoder, -(-wanted // patch) * patch)))
    reason = f"a tenth of the objects are then thinner than {share * size:.1f} pixels"
    if wanted > high:
        reason += f"; {wanted:.0f} would make that a patch ({patch}), but take long{'' if gpu else ' without a GPU'}"
    else:
        reason += f", a patch has {patch}" + (", and it is the encoder's own size" if size == encoder else "")
    patches = (size // patch) ** 2
    queries = min(patches, max(QUERIES, min(int(own["num_queries"]), EACH * most), most + most // 5))
    batch = max(1, min(BATCH if gpu else SMALL_BATCH, trained // 2))
    found.detection |= {"num_channels": found.pretraining["num_channels"], "image_size": size, "num_queries": queries}
    found.detection |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    found.lines += [
        f"detector   image_size: {size}: {reason}",
        f"           num_queries: {queries}: "
        + ("as many as there are patches" if queries == patches else f"an image holds up to {most} objects"),
    ]
    if most > min(queries, FOUND):
        found.problems.append(
            f"an image holds {most} objects, but a detector finds {min(queries, FOUND)}: cut such images into parts"
        )
    if not gpu:
        found.detection |= SMALL_DETECTOR
        chosen = ", ".join(f"{flag}: {value}" for flag, value in SMALL_DETECTOR.items())
        found.lines.append(
            f"           {chosen}, batches of {batch}, for this machine has no GPU (the recipe's own: "
            f"{', '.join(str(own[flag]) for flag in SMALL_DETECTOR)}, {BATCH})"
        )
    found.detection |= choose_epochs(max(1, trained // batch), found, gpu=gpu)


def choose_epochs(epoch_steps: int, found: Findings, *, gpu: bool) -> dict[str, Any]:
    """Flags for few images, for which the recipe's epochs are too few steps, or for too many without a GPU."""
    own = int(read_yaml(recipe_path(BASE))["num_train_epochs"])
    most = own if gpu else SMALL_STEPS // epoch_steps
    epochs = max(1, -(-STEPS // epoch_steps), min(own, most))
    if epochs == own:
        return {}
    why = (
        f"the recipe's {own} of so few images are {own * epoch_steps}"
        if epochs > own
        else f"the recipe's {own} are {own * epoch_steps}, too many without a GPU"
    )
    found.lines.append(f"           num_train_epochs: {epochs}, {epochs * epoch_steps} steps: {why}")
    every = max(1, epochs * epoch_steps // EVALUATIONS)
    return {
        "num_train_epochs": epochs,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
    }


def write_box_sheet(path: Path, lists: Lists) -> None:
    """Write a PNG of up to 24 images at even steps, with the boxes of their objects; those without any come last."""
    every = [(part, index) for part in lists for index, one in enumerate(part.objects) if one is not None]
    full = [(part, index) for part, index in every if len(part.objects[index] or ())] or every
    pictures: list[tuple[str, Any]] = []
    objects: dict[int, Objects] = {}
    for number in np.linspace(0, len(full) - 1, min(IMAGES, len(full))).astype(int):
        part, index = full[number]
        try:
            image_HWC = part.images[index]
            one = part.of(index, (image_HWC.shape[0], image_HWC.shape[1]))
        except UnreadableImageError:
            continue  # reported
        objects[len(pictures)] = one
        pictures.append((Path(part.name_of(index)).stem, thumbnail(image_HWC)))
    if pictures:
        write_pictures(path, pictures, objects, lists[0].names)
