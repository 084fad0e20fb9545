"""The order in which a training loop sees its images, and how a resumed run goes on in that order."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_dbp.data.order import EpochSampler, Lanes
from hf_dbp.errors import UserError

__all__ = [
    "EpochCallback",
    "adopt_order",
    "feeding",
    "make_sampler",
    "step_images",
]


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch begins, however deeply the loader wraps it (a resume wraps it once more)."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


def step_images(args: TrainingArguments) -> int:
    """The number of images per optimizer step, over all processes: the effective batch."""
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
    """What the order of images depends on, for the run record."""
    return {
        "step_images": step_images(args),
        "dropped_tail": sampler.num_images - len(sampler),
        "processes": args.world_size,
        "lanes": sampler.lanes.count,
        "chunk": sampler.lanes.chunk,
    }


def adopt_order(sampler: EpochSampler, before: dict[str, Any], now: dict[str, Any], drop_last: bool) -> None:
    """Make a resumed run see the images that the original run would have seen, on any number of processes.

    Args:
        sampler: sampler of the resumed run; it takes over the lanes.
        before, now: `data` of the two run records.
        drop_last: whether both drop an incomplete last step.

    Raises:
        UserError: the images or the number of images per step differ, so the position means nothing.
    """
    old, new = before["feeding"], now["feeding"]
    advice = "to start again from its weights, pass --model_name_or_path CHECKPOINT and another --output_dir"
    if before["train_images"] != now["train_images"] or before.get("subset") != now.get("subset"):
        raise UserError(
            f"the checkpoint was trained on {before['train_images']} images (subset {before.get('subset')}), this run "
            f"has {now['train_images']} (subset {now.get('subset')}): give the same data, or, {advice}"
        )
    if old["step_images"] != new["step_images"]:
        raise UserError(
            f"the checkpoint was trained with {old['step_images']} images a step, this run has {new['step_images']}: "
            "keep --per_device_train_batch_size x --gradient_accumulation_steps x processes the same, or, " + advice
        )
    if not drop_last and old["processes"] != new["processes"]:
        raise UserError(
            f"with --dataloader_drop_last false a run must be resumed on the {old['processes']} processes it began on, "
            f"not on {new['processes']}"
        )
    sampler.lanes = Lanes(old["lanes"], old["chunk"])
    now["feeding"] = new | {"lanes": old["lanes"], "chunk": old["chunk"]}
