"""`RecordingCallback` makes any Trainer write the `run.json` that the comparison tool reads, for your own scripts.

    trainer.add_callback(RecordingCallback(RunRecord("pretraining", "dbp", "adamw", seed=args.seed, ...)))

Seconds count training alone (`ClockCallback`); energy is not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_dbp.records import RECORD, RunRecord
from hf_dbp.training.clocked import ClockCallback

__all__ = ["RecordingCallback"]


class RecordingCallback(ClockCallback):
    """Adds a row at every evaluation and writes the record into the output folder, in one process.

    Args:
        record: the record of the run.
    """

    def __init__(self, record: RunRecord) -> None:
        super().__init__()
        self.record = record

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        since = self.record.rows[-1]["step"] if self.record.rows else -1
        logs = [row for row in state.log_history if "loss" in row and row["step"] > since]
        row = {"step": state.global_step, "epoch": state.epoch or 0.0, "eval_loss": kwargs["metrics"]["eval_loss"]}
        row["train_seconds"] = self.clock.seconds
        if (median := self.timer.median()) is not None:
            row["step_seconds"] = median
        if logs:
            row["train_loss"] = sum(log["loss"] for log in logs) / len(logs)
            keys = ("decorrelation_loss", "mean_squared_correlation")
            row |= {key: logs[-1][key] for key in keys if key in logs[-1]}
        self.record.add_row(row)
        self.write(args, state)
        super().on_evaluate(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.record.results |= {"finished": state.global_step >= state.max_steps, "steps": state.global_step}
        self.record.results["train_seconds"] = self.clock.seconds
        self.write(args, state)

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the record, in the first process."""
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.record.write(Path(args.output_dir) / RECORD)
