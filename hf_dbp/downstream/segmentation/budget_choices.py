"""What `hf-dbp finetune IMAGES MASKS --budget 30m` chooses, and why: a recipe written before training starts.

`budget.yaml` in the output folder holds every choice with its reason, as in pre-training
(`hf_dbp.training.budget_plan`), whose fields it shares.

1. Up to 64 labelled images, at even steps, say what there is to learn: sizes, objects, rare classes. Scale, crops
   around rare classes and the loss follow by the rules of `hf-dbp inspect`.
2. A few steps at the smallest crop are timed on this machine; the cost of others is proportional to their pixels. The
   largest crop for which the budget allows `STEPS` steps is taken, at most `VIEW` pixels (`SMALL_VIEW` without a GPU).
3. Validation images beyond `EVALUATED` of the budget, for each pass over them, are left out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.downstream.encoder import build_vit
from hf_dbp.downstream.segmentation.arguments import ModelArguments
from hf_dbp.downstream.segmentation.data import LabelledImages, load_labelled_images
from hf_dbp.downstream.segmentation.heads import build_head, segmenter, training_loss
from hf_dbp.downstream.segmentation.sliding import window_origins
from hf_dbp.downstream.segmentation.transforms import long_edge_size
from hf_dbp.errors import UserError
from hf_dbp.inspection.choices import (
    FAST,
    SMALL_HEAD,
    SMALL_VIEW,
    VIEW,
    Findings,
    choose_balance,
    choose_batch,
    choose_scale,
    held_by_crops,
)
from hf_dbp.inspection.mask_survey import MaskSurvey, crop_chances, thickness
from hf_dbp.inspection.survey import ImageKind
from hf_dbp.recipes import read_yaml, recipe_path
from hf_dbp.training.budget_plan import Choice, Timed, unattended

__all__ = ["choose", "chosen", "timed"]

STEPS = 400  # wanted, as in docs/results/rare_classes
SURVEYED = 64  # labelled images
SIDES = (64, 96, 128, 192, 256, 384, 512)  # of crops, in pixels, rounded down to whole patches
TRAINED = 0.75  # share of the budget, for the forecast; the rest is start-up, evaluation and ending
EVALUATED = 0.06  # share of the budget that one evaluation may take; there are four


def timed(model_args: ModelArguments, names: dict[int, str], channels: int, side: int, head: dict[str, Any]) -> Timed:
    """Time a training step and a forward pass on two images."""
    device, model_args = "cuda" if torch.cuda.is_available() else "cpu", dataclasses.replace(model_args, **head)
    vit = build_vit(model_args, side, channels)
    model = build_head(vit, names, model_args, crop_size=side, ignore_index=max(255, len(names))).to(device)
    loss, applied = training_loss(model, None), segmenter(model)
    pixels = torch.rand(2, channels, side, side, device=device)
    labels = torch.zeros(2, side, side, dtype=torch.int64, device=device)
    whole = torch.ones_like(loss.labelled(labels), dtype=torch.float32)

    def step() -> None:
        loss(model.train(), {"pixel_values": pixels, "labels": labels}, whole, 0.0)[0].backward()  # type: ignore[no-untyped-call]

    return Timed.of(side, len(pixels), step, lambda: applied.eval()(pixel_values=pixels))


def survey(images: LabelledImages, crop: int) -> tuple[list[ImageKind], MaskSurvey]:
    """What the surveyed images and their masks hold, as `hf-dbp inspect` counts it; ignored pixels do not count."""
    kinds, found = [], MaskSurvey()
    for index in np.linspace(0, len(images) - 1, min(SURVEYED, len(images))).astype(int):
        name = str(index)
        try:
            image_HWC, label_HW = images[int(index)]
        except UnreadableImageError:
            continue
        kinds.append(ImageKind(name, size=image_HWC.shape[:2], channels=image_HWC.shape[2], dtype=image_HWC.dtype.name))
        ids, counts = np.unique(label_HW, return_counts=True)
        learned = {int(k): int(n) for k, n in zip(ids, counts, strict=True) if k != images.ignore_index}
        found.sizes[name], found.values[name] = label_HW.shape, Counter(learned)
        found.objects[name], found.chances[name] = thickness(label_HW), crop_chances(label_HW, crop)
    if not kinds:
        raise UserError(f"none of {min(SURVEYED, len(images))} sampled images can be read; run hf-dbp inspect")
    return kinds, found


def sides_of(patch: int) -> list[int]:
    """The sides of crops to choose from, whole numbers of patches."""
    return sorted({max(1, side // patch) * patch for side in SIDES})


def choose(
    train: LabelledImages,
    validation: LabelledImages,
    names: dict[int, str],
    seconds: float,
    at: Timed,
    patch: int,
    given: int | None = None,
) -> list[Choice]:
    """Every flag that the budget decides, with its reason.

    Args:
        train, validation: the labelled images.
        names: the classes by id.
        seconds: the budget in seconds.
        at: the speed of this machine with the head that will be used.
        patch: side of the encoder's patches in pixels.
        given: side of the crops, if the user gave it.
    """
    short = min(*train.readable(0)[0].shape[:2], VIEW if torch.cuda.is_available() else SMALL_VIEW)
    batch = choose_batch(len(train))
    sides = [given] if given is not None else [side for side in sides_of(patch) if side <= max(short, at.side)]
    steps = {side: TRAINED * seconds / (batch * at.scaled(at.step, side)) for side in sides}
    crop = max([side for side in sides if steps[side] >= STEPS] or sides[:1])
    found = Findings(pretraining={"image_size": crop, "patch_size": patch, "native_tiles": False})
    kinds, masks = survey(train, crop)
    sides_HW = [min(kind.size) for kind in kinds]
    found.pretraining["native_tiles"] = statistics.median(sides_HW) >= 2 * crop
    found.finetuning = {"crop_size": crop}
    edge = found.finetuning["long_edge"] = choose_scale(kinds, masks, found)
    scale = "; ".join(line.strip() for line in found.lines).removeprefix("scale").strip()
    pixels = Counter({names[k]: n for k, n in masks.pixels.items() if k in names})
    found.lines.clear()
    choose_balance(list(names.values()), pixels, held_by_crops(masks, names, found), found)
    balance = {
        "rare_crops": " ".join("".join(found.lines[:1]).split()).removeprefix("balance "),
        "loss": "Dice counts small classes as much as large ones",
        "class_weights": "with the two above better than each alone: docs/results/rare_classes",
    }
    forecast = (
        f"the largest of {', '.join(map(str, sides))} for which {STEPS} steps fit: about {steps[crop]:.0f} do"
        if steps[crop] >= STEPS
        else f"the smallest of {', '.join(map(str, sides))}: about {steps[crop]:.0f} steps fit, {STEPS} are wanted"
    )
    recipe = read_yaml(recipe_path("industrial_upernet.yaml"))
    return [
        Choice("crop_size", crop, forecast),
        Choice("long_edge", edge, scale),
        Choice("per_device_train_batch_size", batch, f"{len(train)} labelled images"),
        Choice("per_device_eval_batch_size", 8, "memory"),
        *(Choice(flag, found.finetuning[flag], why) for flag, why in balance.items() if flag in found.finetuning),
        *evaluated(validation, seconds, at, crop, edge),
        Choice("learning_rate", float(FAST), "hf-dbp inspect's for a head with few steps"),
        Choice("layer_decay", float(recipe["layer_decay"]), "industrial_upernet.yaml"),
        Choice("weight_decay", float(recipe["weight_decay"]), "industrial_upernet.yaml"),
        *unattended(),
    ]  # fmt: skip


def evaluated(validation: LabelledImages, seconds: float, at: Timed, crop: int, edge: int) -> list[Choice]:
    """The number of validation images, if there are more than the budget allows."""
    shape = validation.readable(0)[0].shape
    height, width = long_edge_size(shape[0], shape[1], edge or None)
    windows = len(window_origins(height, crop)) * len(window_origins(width, crop))
    each = windows * at.scaled(at.forward, crop)
    most = max(2, math.floor(EVALUATED * seconds / each))
    if most >= len(validation):
        return []
    reason = f"of {len(validation)}: {windows} windows of an image take {each:.2g} s, and there are four evaluations"
    return [Choice("max_eval_samples", most, reason)]


def chosen(parsed: Sequence[Any], seconds: float, flags: Collection[str]) -> list[Choice]:
    """What --budget chooses for these arguments; the head and the crop that the user gave are those it reckons with."""
    model_args, data_args, *_ = parsed
    source = data_args.source(model_args.cache_dir, model_args.token)
    train, validation = load_labelled_images(source)
    recipe = read_yaml(recipe_path("industrial_upernet.yaml"))
    gpu, eomt = torch.cuda.is_available(), model_args.head == "eomt"
    head = {} if eomt else {name: int(recipe[name]) if gpu else size for name, size in SMALL_HEAD.items()}
    head |= {name: getattr(model_args, name) for name in head if name in flags}
    channels = train.readable(0)[0].shape[2]
    patch = build_vit(model_args, data_args.crop_size, channels).config.patch_size
    given = data_args.crop_size if "crop_size" in flags else None
    reason = "that of industrial_upernet.yaml" if gpu else "a step of a wide head takes too long without a GPU"
    at = timed(model_args, source.class_names(), channels, sides_of(patch)[0], head)
    choices = choose(train, validation, source.class_names(), seconds, at, patch, given)
    if eomt:  # its loss is its own
        choices = [choice for choice in choices if choice.flag not in ("loss", "class_weights")]
    return [*choices, *(Choice(name, size, reason) for name, size in head.items())]
