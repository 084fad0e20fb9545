"""Whether and how a run resumes: from which checkpoint, with which changed arguments, with which weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, DBPViTMAEModel
from hf_dbp.natures import Nature, natures
from hf_dbp.records import RunRecord
from hf_dbp.training.arguments import GROUPS
from hf_dbp.training.saving import checkpoint_step, fault, last_checkpoint

__all__ = [
    "MEASURED_SETTINGS",
    "advance_schedule",
    "best_saved",
    "changed_arguments",
    "compared_arguments",
    "find_checkpoint",
    "lacking",
    "noted_changes",
    "restore_weights",
    "tensors_alone",
    "warn_of_rise",
]

logger = logging.getLogger(__name__)

MEASURED_SETTINGS = frozenset(
    {
        "factor",
        "patience",
        "cooldown",
        "warmup",
        "mode",
        "threshold",
        "threshold_mode",
        "eps",
        "smooth",
        "window_size",
        "min_lrs",
        "max_lrs",
        "_init_lrs",
    }
)  # fmt: skip  of schedules that follow a measurement, ReduceLROnPlateau and GreedyLR


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the named one, else the last complete one in the output folder.

    Raises:
        UserError: the named one is incomplete.
    """
    if args.resume_from_checkpoint in (None, "true", "True", True):
        return last_checkpoint(args.output_dir)
    named = str(args.resume_from_checkpoint)
    problem = fault(Path(named))
    if problem is not None:
        raise UserError(
            f"checkpoint {named} is incomplete: {problem}; without --resume_from_checkpoint the last complete one in "
            f"--output_dir is used"
        )
    return named


def changed_arguments(before: RunRecord, now: RunRecord, checkpoint: str) -> dict[str, list[Any]]:
    """The arguments that shape pre-training and differ from the checkpoint's: {name: [old, new]}.

    Raises:
        UserError: method, optimizer or decorrelated layers differ, so that the checkpoint's tensors and states are of
            no use; or the seed, with which order, views and held-out images change; or the weights to start from.
    """
    old, new = ({**record.arguments, **vars(record)} for record in (before, now))  # method, optimizer, seed: its own
    flags = {name: flag for name, flag in natures(*GROUPS).items() if before.method == "dbp" or not flag.dbp}
    return compared_arguments(old, new, flags, checkpoint)


def compared_arguments(
    before: Mapping[str, Any], now: Mapping[str, Any], flags: Mapping[str, Nature], checkpoint: str
) -> dict[str, list[Any]]:
    """The arguments in both records that differ and whose nature is to be told: {name: [old, new]}.

    Raises:
        UserError: one differs whose nature is to be refused.
    """
    changed = [name for name in flags if name in before and name in now and before[name] != now[name]]
    for name in changed:
        if flags[name].on_resume == "refused":
            old, new = before[name], now[name]
            remedy = f"leave --{name} out" if old is None else f"give --{name} {old}"
            raise UserError(
                f"{checkpoint} was trained with --{name} {old}, not {new}: to resume, {remedy}; to start over, "
                "use another --output_dir"
            )
    return {name: [before[name], now[name]] for name in changed if flags[name].on_resume == "told"}


def noted_changes(
    changed: Mapping[str, list[Any]], earlier: Mapping[str, Any], checkpoint: str, *, tell: bool
) -> dict[str, Any]:
    """`resumed_with` of a run that resumes from a checkpoint with other arguments: ``earlier`` changes and these."""
    if not changed:
        return {**earlier}
    if tell:
        told = ", ".join(f"--{name} {old} -> {new}" for name, (old, new) in changed.items())
        logger.warning("%s resumes with other settings: %s", checkpoint, told)
    return {**earlier, str(checkpoint_step(Path(checkpoint))): changed}


RISE = 0.1  # of the peak learning rate: more is told


def warn_of_rise(schedule: LambdaLR, optimizer: Optimizer) -> None:
    """Warn if a resumed schedule, such as a longer one, begins well above the learning rate that the checkpoint ended
    with: weights that had settled at a low rate are moved again."""
    group, base, factor = optimizer.param_groups[0], schedule.base_lrs[0], schedule.lr_lambdas[0]
    before, after = float(group["lr"]), base * factor(schedule.last_epoch)
    if after - before > RISE * base:
        logger.warning(
            "the learning rate rises from %.2g to %.2g at step %d, as the schedule is now: the loss may rise at first",
            before, after, schedule.last_epoch,
        )  # fmt: skip


def restore_weights(model: nn.Module, folder: str) -> None:
    """Load a checkpoint's weights into ``model``, in place.

    ``from_pretrained`` checks names and shapes for our classes, and for any class whose checkpoint has older names.
    Other decorrelated models are not what their class builds from the configuration, so they are loaded directly.

    Raises:
        UserError: the checkpoint's tensors are not those of the model; nothing is changed.
    """
    if not isinstance(model, DBPViTMAEForPreTraining | DBPViTMAEModel):
        tensors = {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}
        state = model.state_dict()
        memory = {tensor.data_ptr() for name, tensor in state.items() if name in tensors}
        tied = {name for name, tensor in state.items() if name not in tensors and tensor.data_ptr() in memory}
        if shapes(tensors) == shapes({name: tensor for name, tensor in state.items() if name not in tied}):
            model.load_state_dict(tensors, strict=not tied)
            return
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"checkpoint {folder} does not have the tensors of the model, {type(model).__name__}")
    saved, info = type(model).from_pretrained(
        folder,
        config=model.config,
        output_loading_info=True,
        dtype=model.dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
    )
    found = {
        "lacks {} tensors of the model": info["missing_keys"],
        "has {} tensors that the model lacks": info["unexpected_keys"],
        "has {} tensors whose shapes differ from the model's": {key for key, *_ in info["mismatched_keys"]},
    }
    for problem, keys in found.items():
        if keys:
            raise UserError(
                f"checkpoint {folder} {problem.format(len(keys))}, among them {min(keys)}; to resume, give "
                "the flags it was trained with; to start over, use another --output_dir"
            )
    model.load_state_dict(saved.state_dict())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextmanager
def tensors_alone(checkpoint: str | None) -> Iterator[None]:
    """Turn the error of PyTorch's ``weights_only`` reader about unsafe content, none of which it executes, into a
    UserError."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {checkpoint} holds optimizer or random states with more than tensors in them, which could "
            f"execute code: they are not loaded; remove it to resume from an earlier one"
        ) from error


def best_saved(
    args: TrainingArguments, state: TrainerState, saved: Collection[int], checkpoint: Path, before: str | None
) -> Path | None:
    """The best evaluated checkpoint of a run; None if none was evaluated.

    Args:
        args: names the metric.
        state: holds the measurements by step.
        saved: steps of the run's checkpoints in the folder of ``checkpoint``.
        checkpoint: the one being written.
        before: the best so far; after a resume from another folder, it lies there.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return None
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = {row["step"]: row[name] for row in state.log_history if name in row}
    folders = {step: checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}") for step in saved if step in values}
    step = None if before is None else checkpoint_step(Path(before))
    if before is not None and step is not None and step in values:
        folders.setdefault(step, Path(before))
    whole = [step for step, folder in folders.items() if folder == checkpoint or fault(folder) is None]
    finite = [step for step in whole if math.isfinite(values[step])]
    sign = -1 if args.greater_is_better else 1
    return folders[min(finite, key=lambda step: (sign * values[step], step))] if finite else None


def lacking(checkpoint: str | Path) -> list[str]:
    """The files of training state that a checkpoint lacks."""
    return [name for name in ("optimizer.pt", "scheduler.pt") if not (Path(checkpoint) / name).exists()]


def advance_schedule(schedule: LRScheduler, optimizer: Optimizer, step: int, lack: str) -> None:
    """Resume from a checkpoint that holds only the model: the schedule continues at its step, the optimizer starts new.

    Args:
        schedule: schedule of ``optimizer``, whose learning rates it sets.
        optimizer: a new optimizer.
        step: step of the checkpoint.
        lack: says which checkpoint lacks what.

    Raises:
        UserError: the schedule depends on measurements, not on the step.
    """
    if not isinstance(schedule, LambdaLR):
        raise UserError(
            f"{lack} (--save_only_model), which --lr_scheduler_type, {type(schedule).__name__}, needs to resume: "
            f"start a new run from its weights"
        )
    logger.warning(
        "%s (--save_only_model): the optimizer starts without its moments, and the learning rate continues at step %d "
        "of its schedule. The result will differ from that of an uninterrupted run",
        lack, step,
    )  # fmt: skip
    schedule.last_epoch = step
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
