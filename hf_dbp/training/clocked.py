"""`ClockedTrainer`: what pre-training and fine-tuning share of timing and metering training alone.

The clock starts with the first step and stands still in evaluations, checkpoints and the loading of the best model;
start-up, restoring and replaying data come before it (`measurement`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from hf_dbp.training.measurement import EnergyMeter, Meter, StepTimer, TrainingClock, gpus_in_use
from hf_dbp.training.resuming import ResumingTrainer

__all__ = ["ClockedTrainer", "training_meter"]


def training_meter(args: TrainingArguments, country: str | None) -> EnergyMeter | None:
    """The energy meter of this node, in one of its processes; None where nothing is trained."""
    if not args.do_train or args.local_process_index > 0:
        return None
    gpus = max(args.n_gpu, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if args.device.type == "cuda" else 0
    return EnergyMeter(country, gpus_in_use(gpus))


class ClockCallback(TrainerCallback):  # type: ignore[misc]
    """Times the steps; the clock starts with the first one."""

    def __init__(self, clock: TrainingClock, timer: StepTimer) -> None:
        self.clock, self.timer = clock, timer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()
        self.timer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer.end()
        self.clock.tick()


class ClockedTrainer(ResumingTrainer):
    """A `ResumingTrainer` with a clock of training alone.

    Args:
        meter: measures this node's energy; None in all but one process of a node.
        energy: the meter's description, with the carbon intensity; empty where there is no meter.
        kwargs: as for `transformers.Trainer`.
    """

    def __init__(self, *, meter: Meter | None = None, energy: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clock, self.timer, self.energy = TrainingClock(meter), StepTimer(), energy or {}
        self.callback_handler.callbacks.insert(0, ClockCallback(self.clock, self.timer))

    def costs(self) -> dict[str, float]:
        """train_seconds, kwh and co2e_kg so far, over all nodes, for the record; the clock must stand still."""
        kwh = torch.tensor(self.clock.kwh, device=self.args.device)
        kwh = self.accelerator.reduce(kwh, reduction="sum")
        costs = {"train_seconds": self.clock.seconds}
        if self.energy:
            intensity = self.energy["carbon_intensity_g_per_kwh"]
            costs |= {"kwh": float(kwh), "co2e_kg": float(kwh) * intensity / 1000}
        return costs

    def preset_costs(self, spent: Mapping[str, Any]) -> None:
        """Go on from what the checkpoint's run had paid: its `costs`."""
        kwh = spent.get("kwh", 0.0) if self.is_world_process_zero() else 0.0
        self.clock.preset(spent.get("train_seconds", 0.0), kwh)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.clock.stop()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self.clock.paused():
            super()._load_best_model()
