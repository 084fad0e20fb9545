"""What tasks that train a head on an encoder share: `FinetuningTrainer`, on top of `ResumingTrainer`, and how a run
ends.

The Trainer adds:

- `EpochSampler` draws the training images, so a view follows from (seed, epoch, image);
- layer-wise learning-rate decay;
- every validation image is evaluated once, whatever the number of processes;
- every checkpoint holds the run's arguments: a run with another encoder, data, seed or optimizer cannot resume from it,
  and other changes are reported;
- the clock counts training alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from hf_dbp.data.feeding import feeding, make_sampler, step_images
from hf_dbp.downstream.beit import parameter_groups
from hf_dbp.downstream.encoder import EncoderArguments
from hf_dbp.errors import UserError
from hf_dbp.figures import plot_curves
from hf_dbp.hub.model_card import write_card
from hf_dbp.hub.publishing import Destination
from hf_dbp.hub.untrusted import read_config
from hf_dbp.natures import Nature, natures
from hf_dbp.records import read_arguments, write_json
from hf_dbp.training.accounting import asked_lines, asked_used
from hf_dbp.training.budget import BudgetCallback
from hf_dbp.training.checkpoints import model_folder
from hf_dbp.training.clocked import ClockCallback, training_meter
from hf_dbp.training.duration import command_began, parse_duration
from hf_dbp.training.measurement import Meter
from hf_dbp.training.optimizers import stock_optimizer
from hf_dbp.training.restoring import compared_arguments, find_checkpoint, lacking, noted_changes
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import checkpoint_step
from hf_dbp.training.stopping import shield_workers

__all__ = ["FinetuningTrainer", "class_ids", "closing_lines", "finish", "options_of", "trained", "trained_model"]

ARGUMENTS, RECORD = "arguments.json", "eval.json"
Encoder = TypeVar("Encoder", bound=EncoderArguments)


class FinetuningTrainer(ResumingTrainer):
    """Trainer of a stock model over an encoder, see `hf_dbp.downstream.beit.parameter_groups`.

    Args:
        layer_decay: as in `hf_dbp.downstream.beit.parameter_groups`.
        arguments: the run's arguments by name, kept in its checkpoints and compared on resume.
        meter: measures this node's energy; None in all but one process of a node.
        energy: the meter's description, with the carbon intensity; empty without a meter.
        budget: ends training in time; None without a budget.
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
        budget: BudgetCallback | None = None,
        **kwargs: Any,
    ) -> None:
        self.layer_decay, self.arguments = layer_decay, arguments or {}
        self.asked = self.arguments  # before anything of it is found not to fit
        self.resumed_with: dict[str, Any] = {}
        self.resumed_without: dict[str, list[str]] = {}  # step -> states that its checkpoint lacks
        self.paid: dict[str, float] = {}  # `costs` when training began, then at the last checkpoint
        kwargs["model"].accepts_loss_kwargs = False
        self.budget = budget
        if budget is not None:  # before the clock, which stops for the evaluations and saves that it requests
            kwargs["callbacks"] = [budget, *(kwargs.get("callbacks") or ())]
        super().__init__(**kwargs)
        self.cost = ClockCallback(meter, energy)
        self.add_callback(self.cost)
        if self.train_dataset is not None:
            self.check_batches()
            self.use_sampler(make_sampler(self.train_dataset.images, self.args))

    def check_batches(self) -> None:
        """Raise a UserError for batches that cannot be trained on; called before training and when another batch size
        is found."""
        images, step = len(self.train_dataset), step_images(self.args)
        if self.args.dataloader_drop_last and images < step:
            raise UserError(
                f"{images} training images do not fill one step of {step}; "
                "lower --per_device_train_batch_size or --gradient_accumulation_steps"
            )

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

    def _get_learning_rate(self) -> float:
        """The learning rate that the logs show: that of neck and heads, undiminished by the decay over layers."""
        assert self.optimizer is not None
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def labelled(self, labels: Tensor) -> Tensor:
        """The number of items over which a micro-batch's loss is a mean: its images, unless a task counts something
        else; several numbers if parts of the loss are means of their own."""
        return torch.tensor(len(labels))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, and the number of labelled items in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.labelled(batch["labels"]).to(device) for batch in batches]
        if not counts:
            return batches, torch.ones(())
        return batches, self.accelerator.reduce(torch.stack(counts).sum(dim=0), reduction="sum")

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


def options_of(args: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `FinetuningTrainer` that follow from the flags of training, whatever the task.

    Args:
        args: the arguments of training.
        arguments: all arguments of the run by name.
    """
    meter = training_meter(args, args.country)
    return {
        "args": args,
        "layer_decay": args.layer_decay,
        "arguments": arguments,
        "meter": meter,
        "energy": None if meter is None else meter.description,
        "budget": None if args.budget is None else BudgetCallback(parse_duration(args.budget), command_began()),
        "max_skipped_steps": args.max_skipped_steps,
    }


def trained(trainer: FinetuningTrainer) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train, from the last checkpoint if there is one, and save the model; return its metrics and the evaluations
    during training."""
    trainer.train(resume_from_checkpoint=find_checkpoint(trainer.args))
    history = [row for row in trainer.state.log_history if "eval_loss" in row]
    metrics = trainer.evaluate()  # the model is now the best checkpoint
    trainer.save_model()
    return metrics, history


def closing_lines(record: Mapping[str, Any], folder: Path, pictures: str) -> list[str]:
    """The lines that end every task's summary: on what it was scored, cost, what was used, files, and what to do next.

    Args:
        record: the content of `eval.json`.
        folder: the run's folder.
        pictures: the names of the task's pictures.
    """
    rows = [
        f"  training time {record['train_seconds']:.1f} s, {record['kwh']:.6f} kWh, {record['co2e_kg']:.6f} kg CO2e"
    ]
    if (most := record["arguments"].get("max_eval_samples")) is not None:
        rows.insert(0, f"  scored on {record['data']['validation_images']} images alone (--max_eval_samples {most})")
    curves = "curves.png, " if record["evaluations"] else ""
    model = "model" if record["best_checkpoint"] is None else "model (best)"
    return [
        *rows,
        *asked_lines(record["asked_used"]),
        f"  {model}, image processor, card, eval.json, {curves}{pictures} are in that folder",
        f"next       hf-dbp predict {shlex.quote(str(folder))} IMAGES --output_dir OUT",
    ]


def class_ids(model: PreTrainedModel, source: str, present: Iterable[str]) -> dict[str, int]:
    """The model's class names with their ids. UserError for a name of ``present`` that it lacks."""
    ids = {str(name): int(k) for k, name in model.config.id2label.items()}
    unknown = [name for name in present if name not in ids]
    if unknown:
        raise UserError(f"{source} does not know the class {unknown[0]!r}; its classes are {', '.join(ids)}"[:400])
    return ids


def trained_model(
    model_args: Encoder, args: TrainingArguments, what: str, is_one: Callable[[dict[str, Any]], bool]
) -> Encoder:
    """The model to evaluate without training: that of --model_name_or_path or, if it is an encoder, of the run in
    output_dir.

    Args:
        model_args: which encoder or trained model.
        args: the arguments of training.
        what: what the task calls its model.
        is_one: whether a config.json is of such a model.

    Raises:
        UserError: there is no such model, or a push was asked for.
    """
    if args.push_to_hub:
        raise UserError("--push_to_hub pushes what --do_train trains: repeat the command of the run with both")
    named = model_args.model_name_or_path
    if named is not None and is_one(read_config(named, **model_args.hub_options)):
        return model_args
    try:
        folder = str(model_folder(args.output_dir))
    except UserError as error:
        raise UserError(
            f"no {what} to evaluate: {error}; train one with --do_train, or name one with --model_name_or_path"
        ) from error
    return replace(model_args, model_name_or_path=folder, model_size=None, model_revision="main")


def finish(
    trainer: FinetuningTrainer,
    record: dict[str, Any],
    plot: Callable[[Path], None],
    summary: Callable[[dict[str, Any], Path], str],
    destination: Destination | None,
    *,
    loss: str = "cross-entropy",
) -> None:
    """Write what a trained run leaves: `eval.json`, pictures and the card. Print the summary, and push.

    Args:
        record: the content of `eval.json`; the use of the budget is added.
        plot: writes the pictures of the task into a folder.
        summary: what to print, from the record and the folder.
        destination: where to push; None not to.
        loss: what the curves call the loss.
    """
    if trainer.budget is not None:
        record["budget"] = trainer.budget.record()
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    trainer.save_state()
    write_json(folder / RECORD, record)
    plot(folder)
    if record["evaluations"]:
        plot_curves(record["evaluations"], folder / "curves.png", loss=loss)
    write_card(folder, None if destination is None else destination.repo_id)
    print(summary(record, folder))
    if destination is not None:
        print(f"pushed: {destination.push(folder)}")
