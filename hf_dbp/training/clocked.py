"""`ClockCallback`: seconds, energy and carbon of training alone, for any Trainer.

The clock starts with the first step. It stops after a step (or epoch) if an evaluation, a checkpoint or the end of
training is due, and starts again when all of these are done. Start-up, restoring and replaying data come before it,
loading the best model after it (`measurement`). Callbacks that request an evaluation or a save must come before this
one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_dbp.training.measurement import EnergyMeter, Meter, StepTimer, TrainingClock, gpus_in_use

__all__ = ["ClockCallback", "training_meter"]


def training_meter(args: TrainingArguments, country: str | None) -> EnergyMeter | None:
    """The energy meter of this node, in one of its processes; None if nothing is trained."""
    if not args.do_train or args.local_process_index > 0:
        return None
    gpus = max(args.n_gpu, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if args.device.type == "cuda" else 0
    return EnergyMeter(country, gpus_in_use(gpus))


class ClockCallback(TrainerCallback):  # type: ignore[misc]
    """Times the steps of any Trainer, and training alone.

    Args:
        meter: measures this node's energy; None in all but one process of a node, or for seconds alone.
        energy: the meter's description, with the carbon intensity; empty without a meter.

    Attributes:
        clock: seconds and kWh so far.
        timer: durations of the steps.
    """

    def __init__(self, meter: Meter | None = None, energy: Mapping[str, Any] | None = None) -> None:
        self.clock, self.timer, self.energy = TrainingClock(meter), StepTimer(), energy or {}
        self._paused = False

    # ---- events of the Trainer ----

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._paused = False
        self.clock.start()
        self.timer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer.end()
        self.clock.tick()
        self._stop_where_due(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_where_due(control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock.running:  # the next of several evaluation data sets
            self._paused = True
            self.clock.stop()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            args.save_strategy != SaveStrategy.BEST
        ):  # not known yet whether a save follows: the next step starts the clock
            self._go_on(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._go_on(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def _stop_where_due(self, control: Any) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._paused = True
            self.clock.stop()

    def _go_on(self, control: Any) -> None:
        """Start the clock again, unless something else is due, training ends, or it was not stopped here."""
        if self._paused and not (control.should_evaluate or control.should_save or control.should_training_stop):
            self._paused = False
            self.clock.start()

    def stop(self) -> None:
        """Stop for good, because training is over or has failed."""
        self._paused = False
        self.clock.stop()

    # ---- figures ----

    def costs(self, args: TrainingArguments) -> dict[str, float]:
        """train_seconds, kwh and co2e_kg so far, over all nodes, for the record; the clock must be stopped."""
        kwh = torch.tensor(self.clock.kwh, device=args.device)
        if args.world_size > 1:
            dist.all_reduce(kwh)
        costs = {"train_seconds": self.clock.seconds}
        if self.energy:
            intensity = self.energy["carbon_intensity_g_per_kwh"]
            costs |= {"kwh": float(kwh), "co2e_kg": float(kwh) * intensity / 1000}
        return costs

    def preset(self, spent: Mapping[str, Any], *, kwh: bool) -> None:
        """Continue from the `costs` of the checkpoint's run: seconds, and ``kwh`` in one of the processes."""
        self.clock.preset(spent.get("train_seconds", 0.0), spent.get("kwh", 0.0) if kwh else 0.0)
