"""`MAETrainer`: transformers' Trainer for masked autoencoders, plain or decorrelated.

It adds what the stock Trainer lacks here:
- saving, stopping and resuming, shared with fine-tuning (`ResumingTrainer`);
- `EpochSampler` draws the images, so views and masks follow from (seed, epoch, image);
- Muon or another optimizer combined with AdamW;
- a run record with one row per evaluation, kept in every checkpoint: losses, seconds and kWh of training alone, and how
  correlated the layers' inputs are, measured while the clock is stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_dbp.callbacks import DecorrelationCallback
from hf_dbp.correlations import mean_correlations, measure_correlations
from hf_dbp.data.feeding import adopt_order, feeding, make_sampler
from hf_dbp.data.images import unreadable_images
from hf_dbp.data.masked import EvaluationViews, collate
from hf_dbp.data.order import EpochSampler
from hf_dbp.errors import UserError
from hf_dbp.records import RECORD, RunRecord
from hf_dbp.training.arguments import PretrainingArguments
from hf_dbp.training.clocked import ClockCallback
from hf_dbp.training.guards import NonFiniteError
from hf_dbp.training.input_meter import InputMeter
from hf_dbp.training.measurement import Meter
from hf_dbp.training.optimizers import HiddenWithAdamW, decay_groups, stock_optimizer
from hf_dbp.training.restoring import changed_arguments, lacking, noted_changes
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import checkpoint_step
from hf_dbp.training.stopping import shield_workers

__all__ = ["MAETrainer"]

logger = logging.getLogger(__name__)

PROBE_IMAGES = 64  # validation images per process for measuring layer inputs


class MAETrainer(ResumingTrainer):
    """Trainer of masked autoencoders.

    Args:
        record: the run record to fill.
        optimizer_name: ``adamw``, ``muon``, or an optimizer of pytorch-optimizer.
        decorrelation: updates R; None for plain backprop.
        meter: measures this node's energy; None in all but one process of a node.
        kwargs: as for `transformers.Trainer`; ``train_dataset`` is a `MaskedImages`.
    """

    sampler: EpochSampler

    def __init__(
        self,
        *,
        record: RunRecord,
        optimizer_name: str = "adamw",
        decorrelation: DecorrelationCallback | None = None,
        meter: Meter | None = None,
        **kwargs: Any,
    ) -> None:
        self.cost = ClockCallback(meter, record.energy)
        super().__init__(data_collator=collate, **kwargs)
        self.add_callback(self.cost)
        if decorrelation is not None:  # after the clock, because its work at the start of a step is part of the step
            self.add_callback(decorrelation)
        self.record, self.optimizer_name, self.decorrelation = record, optimizer_name, decorrelation
        self.asked = dict(record.arguments)  # before any of it turns out not to fit
        self.use_sampler(make_sampler(self.train_dataset.images, self.args))
        self.input = InputMeter()
        record.data["feeding"] = feeding(self.sampler, self.args)
        self._spent: dict[str, Any] = {}
        self._measured: dict[int, float] = {}  # step -> loss of its weights, for the last evaluation
        self._probe_batch: dict[str, Tensor] | None = None
        self._losses = torch.zeros(2, device=self.args.device)  # sum and number of finite losses since the last row

    # ---- data and optimizer ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader[Any]:
        """This rank's share of the validation views, a contiguous run, so each view counts exactly once."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        first, last = (
            len(data) * rank // self.args.world_size for rank in (self.args.process_index, self.args.process_index + 1)
        )
        loader = torch.utils.data.DataLoader(
            EvaluationViews(data, range(first, last)),
            batch_size=self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=EvaluationViews.collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        shield_workers(loader)
        return loader

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: torch.utils.data.DataLoader[Any], description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss over all validation images of all ranks (the stock loop counts padded ones twice)."""
        self.weights_as_evaluated()
        model = self.accelerator.unwrap_model(self.model_wrapped).eval()
        total = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        for batch in dataloader:
            if not batch:  # none of its images could be read
                continue
            inputs = self._prepare_inputs(batch)
            self._probe_batch = self._probe_batch or {key: value[:PROBE_IMAGES] for key, value in batch.items()}
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                loss = model(**inputs).loss
            count = len(inputs["pixel_values"])
            total += torch.stack([loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)])
        loss_sum, count = self.accelerator.reduce(total, reduction="sum").tolist()
        if not count:
            raise UserError(f"none of the {len(self.eval_dataset)} validation images can be read")
        self.note_evaluation(loss_sum / count)
        return EvalLoopOutput(None, None, {"eval_loss": loss_sum / count}, int(count))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        before = self.cost.clock.seconds
        batches, count = super().get_batch_samples(*args, **kwargs)
        images = sum(len(batch["pixel_values"]) for batch in batches) * self.args.world_size
        self.input.add(images, self.cost.clock.seconds - before)
        return batches, count

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.input.since_last(self.cost.clock.seconds)
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None and self.optimizer_name != "adamw":
            optimizer = HiddenWithAdamW(
                model or self.model,
                self.optimizer_name,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        elif optimizer is None:
            optimizer_class, options = stock_optimizer(self.args, model or self.model)
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            optimizer = optimizer_class(decay_groups(named, self.args.weight_decay), **options)
        self.optimizer = optimizer
        return optimizer

    # ---- clock and record ----

    def before_training(self, checkpoint: str | None) -> None:
        spent: dict[str, Any] = {}
        if checkpoint is not None and (Path(checkpoint) / RECORD).is_file():
            spent = self._take_over(RunRecord.read(Path(checkpoint) / RECORD), checkpoint)
        elif checkpoint is None:
            self.record.rows, self.record.results, self._measured = [], {}, {}
        self._spent = {name: spent[name] for name in ("train_seconds", "kwh", "input") if name in spent}
        self._preset()

    def _preset(self) -> None:
        """Set clock and input meter to their values when the run started or resumed."""
        self.cost.stop()
        self.cost.preset(self._spent, kwh=self.is_world_process_zero())
        self.input.preset(self._spent.get("input", {}), self.cost.clock.seconds)

    def _take_over(self, before: RunRecord, checkpoint: str) -> dict[str, Any]:
        """Continue the record of a checkpoint's run, and return its results."""
        changed = changed_arguments(before, self.record, checkpoint)
        if "feeding" in before.data:
            adopt_order(self.sampler, before.data, self.record.data, self.args.dataloader_drop_last)
        self.record.rows, self.record.results = before.rows, before.results
        if changed:
            earlier, tell = before.results.get("resumed_with", {}), self.is_world_process_zero()
            self.record.results["resumed_with"] = noted_changes(changed, earlier, checkpoint, tell=tell)
        lost = lacking(checkpoint)
        if lost:
            step = str(checkpoint_step(Path(checkpoint)))
            self.record.results["resumed_without"] = before.results.get("resumed_without", {}) | {step: lost}
        if self.decorrelation is not None:
            self.decorrelation.shares.preset(before.results.get("guards", {}))
        return self.record.results

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().train(*args, **kwargs)
        except NonFiniteError as error:
            self.record.results |= self.cost.costs(self.args) | self.guard_results() | {"stopped": str(error)}
            if self.args.should_save:
                self.record.write(self.run_folder / RECORD)
            raise
        self.before_saving()
        return output

    def input_results(self) -> dict[str, Any]:
        """The input figures so far, over all processes, for the record; the clock must be stopped."""
        lists = [data.images for data in (self.train_dataset, self.eval_dataset)]
        return {
            "input": self.input.totals(self.cost.clock.seconds),
            "unreadable": unreadable_images(self.record.results.get("unreadable", {}), *lists),
        }

    def guard_results(self) -> dict[str, Any]:
        """The actions of the numerical guards so far, for the record."""
        of_R = self.decorrelation.shares.results() if self.decorrelation is not None else {}
        return {"guards": self.skipped_steps() | of_R}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        views = self.train_dataset.finished(self._prepare_inputs(inputs))
        loss: Tensor = super().training_step(model, views, *args, **kwargs)
        finite = self.guard.finite
        self._losses = self._losses + finite * torch.stack([loss * self.current_gradient_accumulation_steps, finite])
        return loss

    def note_evaluation(self, eval_loss: float) -> None:
        """Add an evaluation to the record now, and write it for anyone who watches the run.

        Only evaluations in training add rows: weights restored from a checkpoint already have theirs.
        """
        row = self.evaluation_row(eval_loss)
        self._measured = {self.weights_step: eval_loss}
        if self.restored is None:
            self.record.add_row(row)
        self.record.results |= self.input_results()
        if self.args.should_save and self.is_in_train:
            self.record.write(self.run_folder / RECORD)

    def evaluation_row(self, eval_loss: float) -> dict[str, Any]:
        """The record's row for an evaluation now; the training loss is the mean of the finite losses since the last
        row."""
        row: dict[str, Any] = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            **self.cost.costs(self.args),
            "eval_loss": eval_loss,
        }
        step_seconds = self.cost.timer.median()
        if step_seconds is not None:
            row["step_seconds"] = step_seconds
        if sys.platform != "win32":
            row["load_average"] = os.getloadavg()[0]
        total, count = self.accelerator.reduce(self._losses, reduction="sum").tolist()
        if count:
            row["train_loss"] = total / count
        self._losses = torch.zeros_like(self._losses)
        if self._probe_batch is None:  # this rank's share has no readable image
            self._probe_batch = EvaluationViews.collate([self.eval_dataset[0]])
        layers = measure_correlations(
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False), self._probe_batch
        )
        return row | mean_correlations(layers) | {"decorrelation": layers}

    def before_saving(self) -> None:
        self.record.results |= self.cost.costs(self.args) | self.input_results() | self.guard_results()

    def model_figure(self) -> dict[str, Any]:
        """Step of the current model and, if training evaluated it, its loss: `model` in the record."""
        losses = {row["step"]: row["eval_loss"] for row in self.record.rows} | self._measured
        step = self.weights_step
        return {"step": step} | ({"eval_loss": losses[step]} if step in losses else {})

    def batch_found(self, asked: int, found: int) -> None:
        if isinstance(self.args, PretrainingArguments):
            self.args.scale_learning_rate()
        self._preset()  # attempts with other batch sizes do not count as training
        self.record.data["feeding"] = feeding(self.sampler, self.args)
        self.record.arguments |= {
            "per_device_train_batch_size": found, "learning_rate": self.args.learning_rate
        }  # fmt: skip

    def _write_model(self, *args: Any, **kwargs: Any) -> None:
        super()._write_model(*args, **kwargs)
        self.record.results["model"] = self.model_figure()
        self.record.write(Path(args[0]) / RECORD)
