"""`FinetuningTrainer`: what tasks that train a head on an encoder share, on top of `ResumingTrainer`.

- `EpochSampler` draws the training images, so a view follows from (seed, epoch, image);
- layer-wise learning-rate decay;
- every validation image is evaluated once, whatever the number of processes;
- every checkpoint holds the run's arguments: a run with another encoder, data, seed or optimizer cannot resume from it,
  and other changes are reported;
- the clock counts training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_dbp.data.feeding import feeding, make_sampler
from hf_dbp.downstream.beit import parameter_groups
from hf_dbp.natures import Nature, natures
from hf_dbp.records import read_arguments, write_json
from hf_dbp.training.accounting import asked_used
from hf_dbp.training.clocked import ClockCallback
from hf_dbp.training.measurement import Meter
from hf_dbp.training.optimizers import stock_optimizer
from hf_dbp.training.restoring import compared_arguments, lacking, noted_changes
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import checkpoint_step
from hf_dbp.training.stopping import shield_workers

__all__ = ["FinetuningTrainer"]

ARGUMENTS = "arguments.json"


class FinetuningTrainer(ResumingTrainer):
    """Trainer of a stock model over a BEiT.

    Args:
        layer_decay: as in `hf_dbp.downstream.beit.parameter_groups`.
        arguments: the run's arguments by name, kept in its checkpoints and compared on resume.
        meter: measures this node's energy; None in all but one process of a node.
        energy: the meter's description, with the carbon intensity; empty without a meter.
        kwargs: as for `transformers.Trainer`; `train_dataset` has its list of images as ``images`` and is indexed by
            (epoch, index); None to evaluate only.

    Attributes:
        groups: the classes of arguments of the task, whose natures say what a resumed run tells and refuses; other
            images and another model it refuses.
    """

    optimizer: torch.optim.Optimizer | None
    control: Any
    groups: tuple[type, ...]

    def __init__(
        self,
        *,
        layer_decay: float = 1.0,
        arguments: Mapping[str, Any] | None = None,
        meter: Meter | None = None,
        energy: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.layer_decay, self.arguments = layer_decay, arguments or {}
        self.asked = self.arguments  # before anything of it is found not to fit
        self.resumed_with: dict[str, Any] = {}
        self.resumed_without: dict[str, list[str]] = {}  # step -> states that its checkpoint lacks
        self.paid: dict[str, float] = {}  # `costs` when training began, then at the last checkpoint
        kwargs["model"].accepts_loss_kwargs = False
        super().__init__(**kwargs)
        self.cost = ClockCallback(meter, energy)
        self.add_callback(self.cost)
        if self.train_dataset is not None:
            self.check_batches()
            self.use_sampler(make_sampler(self.train_dataset.images, self.args))

    def check_batches(self) -> None:
        """Raise a UserError for batches that cannot be trained on; called before training and when another batch size
        is found."""

    # ---- arguments in checkpoints ----

    @classmethod
    def natures(cls) -> dict[str, Nature]:
        """The natures of the task's flags: those of images and model are to be refused on resume."""
        flags = natures(*cls.groups)
        fixed = {name: flag for name, flag in flags.items() if flag.shapes in ("data", "model")}
        return flags | {name: replace(flag, on_resume="refused") for name, flag in fixed.items()}

    def before_training(self, checkpoint: str | None) -> None:
        """Adopt the checkpoint's earlier changes and costs, and add the current changes.

        Raises:
            UserError: an argument differs with which the checkpoint is of another model, not of this one begun.
        """
        self.resumed_with, self.resumed_without, self.paid = {}, {}, {}
        if checkpoint is not None and (Path(checkpoint) / ARGUMENTS).is_file():
            before, self.resumed_with, self.resumed_without, self.paid = read_arguments(Path(checkpoint) / ARGUMENTS)
            changed = compared_arguments(before, self.arguments, self.natures(), checkpoint)
            tell = self.is_world_process_zero()
            self.resumed_with = noted_changes(changed, self.resumed_with, checkpoint, tell=tell)
        if checkpoint is not None and (lost := lacking(checkpoint)):
            self.resumed_without = {**self.resumed_without, str(checkpoint_step(Path(checkpoint))): lost}
        self.cost.preset(self.paid, kwh=self.is_world_process_zero())

    def before_saving(self) -> None:
        self.paid = self.cost.costs(self.args)  # over all processes, one of which writes

    def _write_model(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        super()._write_model(folder, state_dict)
        if folder != self._unfinished:  # only in checkpoints; at the end eval.json has them
            resumed = {"resumed_with": self.resumed_with, "resumed_without": self.resumed_without}
            write_json(folder / ARGUMENTS, {"arguments": self.arguments, **resumed, "costs": self.paid})

    def batch_found(self, asked: int, found: int) -> None:
        self.check_batches()
        self.cost.stop()  # attempts with another batch have trained nothing
        self.cost.preset(self.paid, kwh=self.is_world_process_zero())
        self.arguments = {**self.arguments, "per_device_train_batch_size": found}

    def asked_used(
        self, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """`asked_used` of `eval.json`, see `hf_dbp.training.accounting`.

        Args:
            record: the rest of it.
            history: the evaluations in training.
            asked: the arguments by name, as they were given.
        """
        assert self.sampler is not None
        results = {
            "unreadable": record["data"]["unreadable"],
            "guards": record["guards"],
            "steps": {"asked": self.state.max_steps, "taken": self.state.global_step},
            "model": {"step": record["step"]},
            "resumed_without": self.resumed_without,
        }
        sign, metric = 1 if self.args.greater_is_better else -1, str(self.args.metric_for_best_model)
        best = max(history, key=lambda row: sign * row[metric], default=None)
        data = record["data"] | {"feeding": feeding(self.sampler, self.args)}
        return asked_used(asked, record["arguments"], data, results, best)

    # ---- data and optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = stock_optimizer(self.args, self.model)
            groups = parameter_groups(self.model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def labelled(self, labels: Tensor) -> Tensor:
        """The number of items over which a micro-batch's loss is a mean: its images, unless a task counts something
        else."""
        return torch.tensor(len(labels))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, and the number of labelled items in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.labelled(batch["labels"]).to(device) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(), reduction="sum") if counts else torch.ones(
            ()
        )

    def step_share(self, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
        """The factor that turns a micro-batch's mean loss into its share of the step's, scaled for the means of Trainer
        and DDP."""
        labelled = self.labelled(labels)
        if num_items_in_batch is None:
            num_items_in_batch = labelled
        parts = self.current_gradient_accumulation_steps * self.args.world_size if self.is_in_train else 1
        return labelled * parts / num_items_in_batch.clamp(min=1)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader[Any]:
        """This process's share of the validation images: every world_size-th, so each counts exactly once."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        share = torch.utils.data.Subset(data, range(self.args.process_index, len(data), self.args.world_size))
        loader = torch.utils.data.DataLoader(
            share,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=list,
        )
        shield_workers(loader)
        return loader
