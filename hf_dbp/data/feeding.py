"""How a training loop is fed: the order of its images, what a resume needs of it, and how long steps wait for input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from hf_dbp.data.images import ImageList
from hf_dbp.data.order import EpochSampler, Lanes
from hf_dbp.errors import UserError

__all__ = [
    "InputMeter",
    "adopt_order",
    "augments_on_device",
    "feed_fast",
    "feeding",
    "make_sampler",
    "step_images",
    "unreadable_images",
]


def feed_fast(args: TrainingArguments) -> None:
    """Settings of loaders and processes that cost nothing; to be called before `TrainingArguments.__post_init__`.

    Batches in pinned memory and copied while the device computes (with a GPU), workers that outlive an epoch, and no
    search for parameters without a gradient, of which our models have none.
    """
    args.dataloader_pin_memory &= torch.cuda.is_available()
    args.dataloader_persistent_workers &= args.dataloader_num_workers > 0
    if args.dataloader_pin_memory and args.accelerator_config is None:
        args.accelerator_config = {"non_blocking": True}
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def augments_on_device(asked: bool | None, args: TrainingArguments, images: ImageList) -> bool:
    """Whether the device makes the views: as asked, else on a GPU if the images have 8 bits.

    ValueError if it is asked of other images.
    """
    dtype = images.readable(0).dtype
    if asked and dtype != np.uint8:
        raise UserError(f"--augment_on_device is for 8-bit images, these are {dtype}; leave it out")
    return bool(dtype == np.uint8 and (args.device.type == "cuda" if asked is None else asked))


def step_images(args: TrainingArguments) -> int:
    """Images of one optimizer step, over all processes: the effective batch."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def make_sampler(images: Any, args: TrainingArguments) -> EpochSampler:
    """The order of the training images (`ImageList` or `LabelledImages`) for these processes and workers."""
    blocks = getattr(images.samples, "blocks", None)
    return EpochSampler(
        len(images),
        args.seed if args.data_seed is None else args.data_seed,
        step_images=step_images(args) if args.dataloader_drop_last else 1,
        blocks=blocks() if blocks is not None else None,
        lanes=Lanes(args.world_size * max(args.dataloader_num_workers, 1), args.train_batch_size),
    )


def feeding(sampler: EpochSampler, args: TrainingArguments) -> dict[str, Any]:
    """What the order depends on, for the run record."""
    return {
        "step_images": step_images(args),
        "dropped_tail": sampler.num_images - len(sampler),
        "processes": args.world_size,
        "lanes": sampler.lanes.count,
        "chunk": sampler.lanes.chunk,
    }


def adopt_order(sampler: EpochSampler, before: dict[str, Any], now: dict[str, Any], drop_last: bool) -> None:
    """Let a resumed run see the images that the run it continues would have seen, on whatever processes.

    Args:
        sampler: that of the resumed run; takes over the lanes.
        before, now: the `data` of the two run records.
        drop_last: whether both drop an incomplete last step.

    Raises:
        ValueError: the images or the images per step are others, so that the position means nothing.
    """
    old, new = before["feeding"], now["feeding"]
    advice = "to begin anew from its weights, pass --model_name_or_path CHECKPOINT and another --output_dir"
    if before["train_images"] != now["train_images"] or before.get("subset") != now.get("subset"):
        raise UserError(
            f"the checkpoint was trained on {before['train_images']} images (subset {before.get('subset')}), this run "
            f"has {now['train_images']} (subset {now.get('subset')}): give the same data, or, {advice}"
        )
    if old["step_images"] != new["step_images"]:
        raise UserError(
            f"the checkpoint was trained with {old['step_images']} images a step, this run has {new['step_images']}: "
            "choose --per_device_train_batch_size x --gradient_accumulation_steps x processes alike, or, " + advice
        )
    if not drop_last and old["processes"] != new["processes"]:
        raise UserError(
            f"with --dataloader_drop_last false a run is resumed on the {old['processes']} processes it began on, "
            f"not on {new['processes']}"
        )
    sampler.lanes = Lanes(old["lanes"], old["chunk"])
    now["feeding"] = new | {"lanes": old["lanes"], "chunk": old["chunk"]}


def unreadable_images(before: dict[str, Any], *lists: Any) -> dict[str, Any]:
    """How many images all processes have found unreadable, each counted once, and why, by path; with those of an
    earlier record."""
    found = gather_object([entry for images in lists for entry in images.unreadable_images().items()])
    reasons = {**before.get("images", {}), **dict(sorted(found))}
    return {"count": len(reasons), "images": reasons}


class InputMeter:
    """Images per second, and the share of the training time that steps wait for input.

    Seconds are those of the training clock, so that evaluation and checkpoints do not count. A device that works
    through a queue of steps hides some of the waiting: the share is an upper bound of what faster input would save.
    """

    def __init__(self) -> None:
        self.images = 0
        self.waited = 0.0
        self._last = (0, 0.0, 0.0)

    def preset(self, before: dict[str, float], seconds: float) -> None:
        """Go on from the totals of an earlier run, at ``seconds`` on the training clock."""
        self.images, self.waited = int(before.get("images", 0)), before.get("wait_seconds", 0.0)
        self._last = (self.images, self.waited, seconds)

    def add(self, images: int, waited: float) -> None:
        """A step was fed: its images over all processes, and the seconds it waited."""
        self.images += images
        self.waited += waited

    def totals(self, seconds: float) -> dict[str, float]:
        """Images and seconds waited, and both relative to the training time ``seconds``."""
        total = {"images": self.images, "wait_seconds": round(self.waited, 3)}
        if seconds > 0.0:
            total |= {
                "images_per_second": round(self.images / seconds, 2),
                "data_wait_share": round(self.waited / seconds, 4),
            }
        return total

    def since_last(self, seconds: float) -> dict[str, float]:
        """Figures since the last call, at ``seconds`` on the training clock; nothing if no time has passed."""
        images, waited, before = self._last
        self._last = (self.images, self.waited, seconds)
        elapsed = seconds - before
        if elapsed <= 0.0:
            return {}
        return {
            "images_per_second": round((self.images - images) / elapsed, 2),
            "data_wait_share": round((self.waited - waited) / elapsed, 4),
        }
