"""What `hf-dbp detect IMAGES LABELS --budget 30m` chooses, and why: a recipe written before training starts.

`budget.yaml` in the output folder holds every choice with its reason, as in pre-training
(`hf_dbp.training.budget_plan`), whose fields it shares.

1. The labelled objects say how large the view should be and how many queries there must be, by the rules of
   `hf-dbp inspect`.
2. A step at the encoder's own size is timed on this machine; the cost of others is proportional to their pixels. If the
   view does not allow `STEPS` steps, the largest smaller one that does is taken, at least the encoder's own.
3. Validation images beyond `EVALUATED` of the budget, for each pass over them, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from hf_dbp.downstream.beit import sides
from hf_dbp.downstream.detection.data import ObjectList, load_objects
from hf_dbp.downstream.detection.model import build_detector
from hf_dbp.downstream.encoder import build_vit
from hf_dbp.inspection.choices import Findings
from hf_dbp.inspection.object_survey import SMALL_DETECTOR, choose_detector
from hf_dbp.training.budget_plan import Choice, Timed, unattended

__all__ = ["choose", "chosen", "timed"]

STEPS = 300  # wanted; a rule of thumb: small objects need pixels more than steps
PATCHES = 8  # along a side of the view of an encoder without weights, at least
OBJECTS = 5  # in each image of a timed step
TRAINED = 0.75  # share of the budget, for the forecast; the rest is start-up, evaluation and ending
EVALUATED = 0.06  # share of the budget that one evaluation may take; there are four
FAST = 1e-3  # learning rate of the small detector: docs/results/detection


def timed(vit: Any, names: Sequence[str], side: int, head: dict[str, Any]) -> Timed:
    """Time a training step and a forward pass on two images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_detector(vit, names, image_size=(side, side), **head).to(device)
    pixels = torch.rand(2, vit.config.num_channels, side, side, device=device)
    label = {
        "class_labels": torch.zeros(OBJECTS, dtype=torch.int64, device=device),
        "boxes": torch.full((OBJECTS, 4), 0.5, device=device),
        "masks": torch.ones(OBJECTS, side, side, dtype=torch.uint8, device=device),
    }
    labels = [{key: value for key, value in label.items() if key != "masks" or head["instances"]} for _ in pixels]

    def step() -> None:
        model.train()(pixel_values=pixels, labels=labels).loss.backward()

    return Timed.of(side, len(pixels), step, lambda: model.eval()(pixel_values=pixels))


def choose(
    objects: ObjectList,
    trained: int,
    validation: int,
    seconds: float,
    at: Timed,
    patch: int,
    given: int | None = None,
) -> list[Choice]:
    """Every flag that the budget decides, with its reason.

    Args:
        objects: the objects of the training images.
        trained, validation: the number of training and of validation images.
        seconds: the budget in seconds.
        at: the speed of this machine, at the encoder's own size, with the decoder that will be used.
        patch: side of the encoder's patches in pixels.
        given: longer side of the view, if the user gave it.
    """
    most = max(int((~one.crowd_N).sum()) for one in objects.objects if one is not None)
    found = Findings(pretraining={"patch_size": patch, "image_size": at.side, "num_channels": None})
    choose_detector(objects, most, trained, found)
    wanted, batch = found.detection["image_size"], found.detection["per_device_train_batch_size"]
    fitting = at.side * math.sqrt(TRAINED * seconds / (STEPS * batch * at.step))
    size = given or max(at.side, min(wanted, int(fitting) // patch * patch))
    steps = TRAINED * seconds / (batch * at.scaled(at.step, size))
    reason = f"about {steps:.0f} steps fit, {STEPS} are wanted; the objects ask for {wanted} pixels"
    queries = min(found.detection["num_queries"], (size // patch) ** 2)
    each = at.scaled(at.forward, size)
    evaluated = max(2, math.floor(EVALUATED * seconds / each))
    left_out = f"of {validation}: an image takes {each:.2g} s, and there are four evaluations"
    return [
        Choice("image_size", size, reason),
        Choice("num_queries", queries, f"an image holds up to {most} objects"),
        Choice("per_device_train_batch_size", batch, f"{trained} labelled images"),
        Choice("per_device_eval_batch_size", batch, "memory"),
        *([Choice("max_eval_samples", evaluated, left_out)] if evaluated < validation else []),
        *unattended(),
    ]


def chosen(parsed: Sequence[Any], seconds: float, flags: Collection[str]) -> list[Choice]:
    """What --budget chooses for these arguments; the view and the decoder that the user gave are those it reckons
    with."""
    model_args, data_args, _ = parsed
    train, validation = load_objects(data_args.source(model_args.cache_dir, model_args.token, model_args.instances))
    given = max(model_args.size) if model_args.size is not None else None
    vit = build_vit(model_args, given or PATCHES * model_args.patch_size, train.images.readable(0).shape[2])
    small = {} if torch.cuda.is_available() else {k: v for k, v in SMALL_DETECTOR.items() if k not in flags}
    head = {name: small.get(name, getattr(model_args, name)) for name in (*SMALL_DETECTOR, "instances", "num_windows")}
    patch, own = sides(vit.config.patch_size)[0], max(sides(vit.config.image_size))
    at = timed(vit, train.names, own, head)
    choices = choose(train, len(train), len(validation), seconds, at, patch, given)
    reason = "a step of a large decoder takes too long without a GPU"
    choices += [Choice(name, value, reason) for name, value in small.items()]
    if small:
        choices.append(Choice("learning_rate", FAST, "for that decoder: docs/results/detection"))
    return choices
