"""A time budget instead of epochs: training, and everything after it, ends when the time is up.

The learning rate follows the clock. With p the share of the training time that has passed, in [0, 1],

    lr(p) = peak * p / w                                 for p < w, the warm-up, 5 %
    lr(p) = peak * (1 + cos(pi * (p - w) / (1 - w))) / 2    afterwards

so a slow or shared machine changes the number of steps, never the shape of the schedule or its end. The training time
is the budget less start-up, which is already over, and less the ending, which is measured at the first checkpoint: an
evaluation, two saves and the pictures. Checkpoints are saved ten times, at even intervals, and two of them are
evaluated, so evaluations cost little.

A resumed run has what was left of the budget at its checkpoint. With several processes, all follow the clock of the
first.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_dbp.errors import UserError

__all__ = ["BudgetCallback", "schedule"]

logger = logging.getLogger(__name__)

WARM_UP = 0.05
SAVES, EVALUATED = 10, (3, 6)  # tenths of the training time
GUESSED_ENDING = 0.05  # share of the budget, until the ending is measured
# for pictures and exit: a share of the start, which also imports much, at most a share of the budget, and seconds
DRAWN, MOST_DRAWN, LONGEST = 0.3, 0.06, 15.0
FIRST = 60.0  # seconds, or a tenth of the budget: then measure the ending and predict the number of steps


def schedule(progress: float) -> float:
    """The budget's schedule: lr(p) / peak."""
    if progress < WARM_UP:
        return max(progress, 0.0) / WARM_UP
    return (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))) / 2


class BudgetCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Fits the schedule to the budget, saves and evaluates rarely, and ends training in time.

    Args:
        seconds: the budget in seconds.
        began: when the command began, from `time.monotonic`.

    Attributes:
        spent: seconds of the budget used by earlier runs up to the checkpoint.
        first_step: seconds of the budget used at the first step.
        ending: seconds reserved for what comes after training.
        evaluation, saving: seconds of the last evaluation and the last checkpoint; 0 before the first.
    """

    def __init__(self, seconds: float, began: float) -> None:
        self.seconds, self.began = seconds, began
        self.spent, self.ending, self.done = 0.0, GUESSED_ENDING * seconds, 0
        self.first_step: float | None = None
        self.evaluation, self.saving, self._marked, self._now = 0.0, 0.0, 0.0, 0.0

    def elapsed(self) -> float:
        """Seconds of the budget used so far."""
        return self.spent + time.monotonic() - self.began

    def progress(self) -> float:
        """The share p of the training time that had passed at the last step."""
        begin = self.first_step or 0.0
        return min(1.0, (self._now - begin) / max(self.seconds - self.ending - begin, 1e-9))

    def state(self) -> dict[str, Any]:
        """The state of the budget that a checkpoint keeps."""
        kept = {name: getattr(self, name) for name in ("first_step", "ending", "done", "evaluation", "saving")}
        attributes = kept | {"spent": self.elapsed()}
        return {"args": {"seconds": self.seconds, "began": 0.0}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, LambdaLR):
            raise UserError(f"--budget has its own schedule: leave out --lr_scheduler_type {args.lr_scheduler_type}")
        scheduler.lr_lambdas = [lambda _: schedule(self.progress())] * len(scheduler.base_lrs)
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if kept:
            before = kept["attributes"]
            self.spent, self.ending, self.done = before["spent"], before["ending"], before["done"]
            self.first_step = before["first_step"]
            self.evaluation, self.saving = before.get("evaluation", 0.0), before.get("saving", 0.0)
            logger.warning("%.0f s of the budget of %.0f s are left", self.seconds - self.elapsed(), self.seconds)
        self._now = self.elapsed()
        if self.first_step is None:
            self.first_step = self._now
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = group["initial_lr"] * schedule(self.progress())
        scheduler._last_lr = [group["lr"] for group in kwargs["optimizer"].param_groups]  # for the logs
        if self._now + self.ending >= self.seconds:
            raise UserError(
                f"the budget of {self.seconds:.0f} s is used up before the first step ({self._now:.0f} s to start, "
                f"{self.ending:.0f} s reserved for the end): give a larger --budget"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress() < WARM_UP:
            args.warmup_steps = state.global_step + 1  # eta, which skips the warm-up, knows it by this number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = torch.tensor(self.elapsed(), dtype=torch.float64, device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(now, src=0)
        step, self._now = float(now) - self._now, float(now)
        if self._now + self.ending + step >= self.seconds:
            control.should_training_stop = True
            return
        tenth = int(self.progress() * SAVES)
        early = (
            self.done == 0 and not self.saving and self._now - (self.first_step or 0.0) > min(FIRST, 0.1 * self.seconds)
        )
        if tenth > self.done or early:
            self.done, control.should_save = max(tenth, self.done), True
            control.should_evaluate = args.do_eval and (early or tenth in EVALUATED)
            self._marked = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluation, self._marked = time.monotonic() - self._marked, time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.saving:
            left = (self.seconds - self.ending - self._now) / max(self._now - (self.first_step or 0.0), 1e-9)
            logger.warning(
                "%d steps so far; about %.0f will fit the budget", state.global_step, state.global_step * (1 + left)
            )
        self.saving = time.monotonic() - self._marked
        # an evaluation, interpolation or pictures, which cost about the same, the final model, exit, and a margin
        pictures = min(DRAWN * (self.first_step or 0.0), MOST_DRAWN * self.seconds, LONGEST)
        self.ending = 2 * self.evaluation + 2 * self.saving + pictures + 0.01 * self.seconds
        self._marked = time.monotonic()
        self._now = self.elapsed()  # evaluating and saving are not part of a step

    def record(self) -> dict[str, float]:
        """How the budget was used, for the run record."""
        return {"seconds": self.seconds, "used_at_the_end_of_training": round(self.elapsed(), 2),
                "kept_for_the_end": round(self.ending, 2)}  # fmt: skip
