"""The findings of an inspection, and the flags it chooses for the recipes: views, scale, length, balance, split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_dbp.data.decoding import UnreadableImageError, check_kind, wrong_channels
from hf_dbp.data.subset import split_rows
from hf_dbp.inspection.mask_survey import MaskSurvey
from hf_dbp.inspection.survey import ImageKind
from hf_dbp.recipes import read_yaml, recipe_path

__all__ = [
    "STEPS",
    "VALIDATION",
    "Findings",
    "choose_balance",
    "choose_batch",
    "choose_length",
    "choose_pretraining",
    "choose_scale",
    "choose_size",
    "choose_split",
    "common",
    "held_by_crops",
]

SMALLEST = 32  # smallest view in pixels, to which smaller images are enlarged: 4 x 4 patches
THIN = 2  # above this ratio of the sides, an image scaled down to the view loses most of its short side
FEW = 0.1  # share of the images above which a finding counts
STEPS = 1000  # minimum steps of fine-tuning
FAST = "1e-3"  # learning rate for so few steps
SELDOM = 0.2  # share of the crops: for a rare class in fewer, crops are drawn around it
SMALL_MODEL = {"model_size": "mini"}  # without a GPU, and so are the next three
SMALL_HEAD = {"head_size": 64, "auxiliary_head_size": 32}
SMALL_VIEW, SMALL_BATCH = 256, 8  # at most
VIEW, BATCH = 512, 16  # at most
VALIDATION = 0.15  # the share held out in training; the default of --train_val_split


@dataclass
class Findings:
    """Lines of the report, problems to fix, and flags for the recipes."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pretraining: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] = field(default_factory=dict)
    detection: dict[str, Any] = field(default_factory=dict)


def common(counts: Counter[Any], shown: int = 4) -> str:
    """The most common kinds of image with their counts, for the report, and the number of others."""
    first = ", ".join(f"{entry} ({count})" for entry, count in counts.most_common(shown))
    return first + (f" and {len(counts) - shown} other kinds" if len(counts) > shown else "")


def choose_pretraining(trained: int, readable: Sequence[ImageKind], found: Findings) -> None:
    """Choose channels, view size, native tiles or not, and the batch size, and say why."""
    pictures = all(kind.picture for kind in readable)
    counts = Counter(kind.counted for kind in readable)
    channels = 3 if counts.keys() == {1, 3} else counts.most_common(1)[0][0]  # grey becomes RGB
    others = [kind for kind in readable if kind.counted != channels and {kind.counted, channels} != {1, 3}]
    if others:
        shape = (*others[0].size, others[0].counted)
        found.problems.append(
            f"{len(others)} of {len(readable)} images will be left out, e.g. {others[0].name}: "
            f"{wrong_channels(shape, channels)}"
        )
    mixed = Counter(np.dtype(kind.dtype).kind for kind in readable)
    first = np.dtype(readable[0].dtype).kind
    odd = next((kind for kind in readable if np.dtype(kind.dtype).kind != first), None)
    if odd is not None:
        try:
            check_kind(np.dtype(odd.dtype), first, odd.name)
        except UnreadableImageError as error:
            found.problems.append(
                f"{mixed.total() - mixed[first]} of {len(readable)} images will be left out, e.g. {error}"
            )
    elif len({kind.dtype for kind in readable}) > 1:
        found.problems.append(
            f"pixel types {common(Counter(kind.dtype for kind in readable))} are mixed; each is scaled by its full "
            "range: convert them to one type if different values mean the same brightness"
        )
    short = int(np.median([min(kind.size) for kind in readable]))
    patch = 16 if short >= 128 else 8
    full = max(SMALLEST, min(VIEW, short // patch * patch))
    size = full if torch.cuda.is_available() else min(full, SMALL_VIEW)
    native = short >= 2 * full
    found.pretraining = {
        "image_size": size,
        "patch_size": patch,
        "num_channels": channels,
        "native_tiles": native,
        "per_device_train_batch_size": max(1, min(BATCH, trained)),
    }
    statistics = "ImageNet's" if channels == 3 and pictures else "measured once on the training images"
    found.lines += [
        f"views      {'random tiles of ' if native else 'random crops, scaled to '}{size} x {size} pixels"
        f"{' at native resolution (native_tiles: false for whole images, scaled down)' if native else ''}"
        f"{'' if size == full else f', for this machine has no GPU (with one: {full})'}",
        f"input      {channels} channels, mean and standard deviation {statistics}",
    ]


def choose_size(found: Findings, *, masks: bool) -> dict[str, Any]:
    """Without a GPU choose a small model and head, and say so; return the flags of the head.

    A step of fine-tuning (crops of 64 pixels, batch 16) then takes about a quarter of the time: 1.5 s against 6 s in
    two runs on a shared core. `choose_pretraining` makes views and crops at most `SMALL_VIEW` pixels there, and
    `choose_batch` the batch of fine-tuning at most `SMALL_BATCH`.

    Args:
        found: collects the flag of pre-training and the line.
        masks: whether there are masks to fine-tune on.
    """
    if torch.cuda.is_available():
        return {}
    found.pretraining |= SMALL_MODEL
    chosen = SMALL_MODEL | (SMALL_HEAD if masks else {})
    own = read_yaml(recipe_path("industrial.yaml")) | read_yaml(recipe_path("industrial_upernet.yaml"))
    found.lines.append(
        f"model      small, for this machine has no GPU: {', '.join(f'{flag}: {chosen[flag]}' for flag in chosen)} "
        f"(the recipe's own: {', '.join(own[flag] for flag in chosen)})"
        + (f", batches of at most {SMALL_BATCH} in fine-tuning" if masks else "")
    )
    return {**SMALL_HEAD}


def choose_batch(labelled: int) -> int:
    """The batch of fine-tuning: at least two steps an epoch; smaller without a GPU."""
    return max(2, min(BATCH if torch.cuda.is_available() else SMALL_BATCH, labelled // 2))


def choose_scale(readable: Sequence[ImageKind], survey: MaskSurvey, found: Findings) -> int:
    """Choose `long_edge` for fine-tuning (0: native) by both sides and the smallest objects, and say why."""
    size, stride = found.pretraining["image_size"], found.pretraining["patch_size"] / 4  # stride of the finest features
    native, scaled = survey.smallest(), survey.smallest(size)
    objects = "" if native is None else f"the smallest objects ({native:.1f} pixels thick)"
    thin = [kind.size for kind in readable if max(kind.size) >= THIN * min(kind.size) and max(kind.size) > size]
    if found.pretraining["native_tiles"]:
        reason = f"images are at least {2 * size} pixels a side"
    elif len(thin) > FEW * len(readable):
        short, long = (int(np.median([side(sides) for sides in thin])) for side in (min, max))
        which = "images are" if len(thin) == len(readable) else f"{len(thin)} of {len(readable)} images are"
        high = max(1, short * size // long)
        reason = f"{which} long and thin; scaled down to {size} pixels they would be {high} high"
    elif native is not None and scaled is not None and scaled < min(native, stride):
        reason = f"scaled down to {size} pixels {objects} would be {scaled:.1f}"
    else:
        found.lines.append(
            f"scale      the long edge at {size} pixels (long_edge: {size}), crops of {found.finetuning['crop_size']}"
            + (f"; {objects} are then {scaled:.1f}" if scaled is not None else "")
        )
        return int(size)
    found.lines.append(
        f"scale      native resolution (long_edge: 0), crops of {found.finetuning['crop_size']}: {reason}"
    )
    if native is not None and native < stride:
        found.lines.append(f"           {objects} are less than a cell of the feature maps, {stride:g} pixels")
    return 0


def choose_length(epoch_steps: int, found: Findings) -> dict[str, Any]:
    """Choose flags for few labelled images, for which the recipe's epochs are too few steps, and say so."""
    recipe = read_yaml(recipe_path("industrial_upernet.yaml"))
    epochs = int(recipe["num_train_epochs"])
    if epochs * epoch_steps >= STEPS:
        return {}
    found.lines.append(
        f"length     {-(-STEPS // epoch_steps)} epochs (num_train_epochs), {STEPS} steps: the recipe's {epochs} of "
        f"so few images are {epochs * epoch_steps} steps; in so few a head needs more than {recipe['learning_rate']} "
        f"(learning_rate: {FAST})"
    )
    steps = {"eval_strategy": "steps", "eval_steps": STEPS // 20, "save_strategy": "steps", "save_steps": STEPS // 20}
    return {"num_train_epochs": -(-STEPS // epoch_steps), "learning_rate": FAST, **steps}


def choose_balance(
    classes: Sequence[str], pixels: Mapping[str, int], chances: Mapping[str, float], found: Findings
) -> None:
    """Choose weights and crops for rare classes, see `hf_dbp.downstream.segmentation.rare`, and say why.

    Args:
        classes: the learned classes.
        pixels: pixels of each class in the masks.
        chances: share of the crops that hold a class by chance.
        found: collects flags and lines.
    """
    counts = {name: pixels.get(name, 0) for name in classes}
    share = 1 / (4 * max(1, len(classes)))
    rare = [name for name, count in counts.items() if 0 < count < share * sum(counts.values())]
    if not rare:
        return
    said = f"balance    {', '.join(rare)}: less than {share:.2%} of the pixels each, a quarter of an even share"
    seldom = [name for name in rare if chances[name] < SELDOM]
    if not seldom:
        found.finetuning |= {"rare_crops": 0.33, "loss": "ce+dice", "class_weights": "sqrt"}
        found.lines += [
            said,
            "           a third of the crops is drawn around them (rare_crops: 0.33), Dice joins the loss",
            "           (loss: ce+dice), which weights classes by one over the square root of their share",
            "           (class_weights: sqrt): together these did better than each alone in docs/results/rare_classes",
        ]
        return
    found.finetuning |= {"rare_crops": 0.33, "loss": "ce+dice"}
    found.lines += [
        said,
        f"           {', '.join(seldom)}: in less than {SELDOM:.0%} of the crops, so a third of them is drawn around "
        "rare classes (rare_crops: 0.33),",
        "           and Dice joins the loss (loss: ce+dice); class weights would make small objects too thick",
    ]


def choose_split(balance: Mapping[str, Mapping[str, int]]) -> int | None:
    """A `subset_seed` that leaves every class in both parts, or else in the training part; None if there is none.

    Args:
        balance: for each image, class -> pixels or objects, in the order of training; empty for one without labels that
            can be read.
    """
    names = list(balance)
    if len(names) < 2:
        return None
    every, second = set().union(*balance.values()), None
    for seed in range(100):
        parts = [
            set().union(*(balance[names[row]] for row in rows)) for rows in split_rows(len(names), VALIDATION, seed)
        ]
        if parts == [every, every]:
            return seed
        second = seed if second is None and parts[0] == every else second
    return second


def held_by_crops(survey: MaskSurvey, names: Mapping[int, str], found: Findings) -> dict[str, float]:
    """The share of the training crops that hold a class by chance, at most that of its masks: see `crop_chances`.

    A crop of a scaled-down image sees most of it.
    """
    native = not found.finetuning["long_edge"]
    shares: dict[str, float] = {}
    for value, name in names.items():
        chances = [(chances[value] if native else 1.0) for chances in survey.chances.values() if value in chances]
        shares[name] = min(1.0, shares.get(name, 0.0) + sum(chances) / max(1, len(survey.chances)))
    return shares
