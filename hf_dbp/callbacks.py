"""When R is updated: `DecorrelationCallback` for any `transformers.Trainer`, set by `DecorrelationArguments`.

Symbols (paper section 2.1): eta is R's learning rate, kappa the weight of the whitening term, M the number of sampled
rows.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import has_length
from transformers.utils import strtobool

from hf_dbp.correlations import correlation_values, mean_correlations
from hf_dbp.errors import UserError
from hf_dbp.layers import RowSampling
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, DBPViTMAEModel
from hf_dbp.natures import Nature
from hf_dbp.precision import warn_of_16_bit_weights
from hf_dbp.update import (
    ETA,
    UPDATE_INTERVAL,
    configure_sampling,
    discard_rows,
    measure_decorrelation,
    seed_sampling,
    set_gathering,
    update_decorrelation,
)

__all__ = ["DecorrelationArguments", "DecorrelationCallback", "ReportingCallback", "refuse_sharding"]

logger = logging.getLogger(__name__)

OF_R = partial(Nature, "training", "told", dbp=True)


@dataclass
class DecorrelationArguments:
    """How R is trained. Everything else about a run is in `TrainingArguments`."""

    eta: Annotated[float, OF_R(card="learning rate of R (eta)")] = field(
        default=ETA, metadata={"help": "Learning rate of R (paper: 5e-4)."}
    )
    eta_schedule: Annotated[str, OF_R(card="schedule of eta")] = field(
        default="decay",
        metadata={
            "help": "decay: eta follows the weights' learning rate down, but not its warm-up. constant: the paper's.",
            "choices": ["decay", "constant"],
        },
    )
    eta_stop: Annotated[float, OF_R(card="share of all steps after which R stays as it is")] = field(
        default=1.0, metadata={"help": "Stop updating R after this share of all steps, in (0, 1]."}
    )
    kappa: Annotated[float, OF_R(card="weight of the pull of variances to 1 (kappa)")] = field(
        default=0.0,
        metadata={"help": "Weight in [0, 1] of the term that pulls variances to 1 (paper: 0, only decorrelate)."},
    )
    update_interval: Annotated[int, OF_R(card="optimizer steps per update of R")] = field(
        default=UPDATE_INTERVAL,
        metadata={"help": "Update R every so many optimizer steps, with eta larger by that factor (paper: 1)."},
    )
    sample_fraction: Annotated[float, OF_R(card="share of the token rows that estimates C")] = field(
        default=0.1, metadata={"help": "Share of the token rows used to estimate C, in (0, 1] (paper: 0.1)."}
    )
    row_floor: Annotated[float | None, OF_R(card="rows for C at least, times the width")] = field(
        default=None, metadata={"help": "Use at least this many times D rows, if the batch has them."}
    )
    row_cap: Annotated[float | None, OF_R(card="rows for C at most, times the width")] = field(
        default=None, metadata={"help": "Use at most this many times D rows."}
    )
    bound_eta: Annotated[
        bool,
        OF_R(card="eta kept below 1 / the largest eigenvalue of cov(z)", card_if_off=True),
    ] = field(default=True, metadata={"help": "In each layer, keep eta below 1 / the largest eigenvalue of cov(z)."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta < 1.0:
            raise UserError(f"--eta lies in [0, 1), got {self.eta}; the paper uses 5e-4")
        if self.eta_schedule not in ("decay", "constant"):
            raise UserError(f"--eta_schedule is decay or constant, got {self.eta_schedule!r}")
        if not 0.0 < self.eta_stop <= 1.0:
            raise UserError(f"--eta_stop is a share of all steps in (0, 1], got {self.eta_stop}")
        if not 0.0 <= self.kappa <= 1.0:
            raise UserError(f"--kappa lies in [0, 1], got {self.kappa}; the paper uses 0")
        if self.update_interval < 1:
            raise UserError(f"--update_interval is a number of steps, at least 1, got {self.update_interval}")
        self.sampling(1)  # raises on a bad fraction, floor or cap

    def sampling(self, shares: int) -> RowSampling:
        """The row sampling, split among ``shares`` forward passes (micro-batches x processes) per step."""
        return RowSampling(self.sample_fraction, self.row_floor, self.row_cap, shares)


OFTEN, OFTEN_SHARE = 10, 0.1  # more reduced updates of a layer than both are worth a warning


class ShareCounts:
    """Counts, on the device, how often each layer took less than the full eta (`update_decorrelation`)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.last = torch.ones(1)  # shares taken in the last update (layers,)
        self.judged = True  # whether `pop_left` has reported them
        self.counts = torch.empty(
            3, 0, dtype=torch.float64
        )  # (3, layers): reduced steps, skipped steps, smallest positive share
        self.before: dict[str, Any] = {}
        self.updates, self.told = Counter[str](), 0

    def preset(self, results: dict[str, Any]) -> None:
        """Continue from the counts of an earlier part of the run."""
        self.before = {"reduced_eta": {}, "skipped_R": {}} | results

    def add(self, shares: dict[str, Tensor]) -> None:
        """Add the shares of one update."""
        new = [name for name in shares if name not in self.names]  # experts see tokens in some steps only
        if new:
            self.names = self.names + new
            counts = next(iter(shares.values())).new_zeros(3, len(new), dtype=torch.float64)
            counts[2] = 1.0
            self.counts = torch.cat([self.counts.to(counts.device), counts], dim=1)
        if not shares:
            return
        self.updates.update(shares.keys())
        one = torch.ones_like(next(iter(shares.values())))
        self.last, self.judged = torch.stack([shares.get(name, one) for name in self.names]), False
        skipped = self.last == 0
        self.counts[0] += (self.last < 1) & ~skipped
        self.counts[1] += skipped
        self.counts[2] = torch.minimum(self.counts[2], self.last.masked_fill(skipped, 1.0))

    def pop_left(self) -> Tensor:
        """Whether the last update left an R unchanged, as a scalar on the device; each update is reported once."""
        left = (self.last == 0).any() & (not self.judged)
        self.judged = True
        return left

    @property
    def last_left(self) -> dict[str, bool]:
        """For each layer, whether the last update left its R unchanged."""
        return dict(zip(self.names, (self.last == 0).tolist(), strict=False))

    def results(self) -> dict[str, Any]:
        """``reduced_eta`` {layer: {steps, largest_factor}} and ``skipped_R`` {layer: steps}; one synchronisation."""
        reduced, skipped = dict(self.before.get("reduced_eta", {})), dict(self.before.get("skipped_R", {}))
        for name, times, skips, smallest in zip(self.names, *self.counts.tolist(), strict=False):
            if times:
                old = reduced.get(name, {"steps": 0, "largest_factor": 1.0})
                factor = max(old["largest_factor"], round(1 / smallest, 4))
                reduced[name] = {"steps": old["steps"] + int(times), "largest_factor": factor}
            if skips:
                skipped[name] = skipped.get(name, 0) + int(skips)
        return {"reduced_eta": reduced, "skipped_R": skipped}

    def logs(self) -> dict[str, float]:
        """What to log once eta was reduced: layers, their steps in total, the largest factor, and the skipped updates
        of R summed over layers. Warns when further layers are affected often: a few reduced updates at the start of a
        run are expected."""
        results = self.results()
        reduced, skipped = results["reduced_eta"], sum(results["skipped_R"].values())
        found = {"skipped_R": float(skipped)} if skipped else {}
        if not reduced:
            return found
        factor = max(layer["largest_factor"] for layer in reduced.values())
        steps = sum(layer["steps"] for layer in reduced.values())
        here = dict(zip(self.names, self.counts[0].tolist(), strict=False))
        often = [name for name, times in here.items() if times > max(OFTEN, self.updates[name] * OFTEN_SHARE)]
        if len(often) > self.told:
            self.told = len(often)
            logger.warning(
                "eta is too large for %d layers, most often for %s: in more than a tenth of its updates it was "
                "reduced there, by a factor of up to %.3g. Lower --eta",
                len(often), max(often, key=here.__getitem__), max(reduced[name]["largest_factor"] for name in often),
            )  # fmt: skip
        return found | {
            "reduced_eta_layers": len(reduced),
            "reduced_eta_steps": steps,
            "reduced_eta_largest_factor": factor,
        }


class ReportingCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that adds figures to the logs of a training step before TensorBoard, W&B and others see them.

    A `ResumingTrainer` asks for the figures. A stock Trainer calls its reporters first, whatever order it is given, so
    the callback moves to the head of the list when training begins.
    """

    asked = False  # whether the Trainer asks for the figures; set by ResumingTrainer

    def figures(self, state: TrainerState) -> dict[str, float]:
        """The figures to add to the logs now, by name."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.asked:
            return
        for callbacks in gc.get_referrers(self):  # a callback does not know its Trainer
            if isinstance(callbacks, list) and any(isinstance(other, DefaultFlowCallback) for other in callbacks):
                callbacks.sort(key=lambda other: other is not self)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs and not self.asked:
            figures = self.figures(state)
            logs |= figures
            state.log_history[-1] |= figures


class DecorrelationCallback(ReportingCallback):
    """Updates every R of a model right after every ``update_interval``-th optimizer step: ``R <- R - eta_t * C R``.

    eta_t = eta * update_interval * (learning rate / peak learning rate if it decays, else 1), zero after ``eta_stop``.
    Rows are drawn from all micro-batches of that step. A step that was skipped, by the gradient scaler or by a guard
    that removed the gradients, updates nothing. Each layer takes the share of eta_t that is stable, unless
    ``bound_eta`` is off.

    Each log includes the decorrelation loss and the mean squared correlation, averaged over layers; `per_layer` holds
    them for every layer. Once the bound on eta has acted, the logs also include what it did; `shares` holds the counts.

    Args:
        arguments: eta, kappa, schedule and sampling.
        seed: seed of the row sampling.
    """

    def __init__(self, arguments: DecorrelationArguments | None = None, seed: int = 0) -> None:
        self.arguments = arguments or DecorrelationArguments()
        self.seed = seed
        self.restorable = False  # whether the Trainer can restore models that are not fused; set by ResumingTrainer
        self.last_step = 0  # after which R stays as it is
        self.begun = 0  # the step at which this part of the run began
        self.log_steps: int | None = None  # correlations are measured at the first step and every so many steps
        self.switches = ExitStack()  # torch settings, restored at the end
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}
        self.shares = ShareCounts()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, model, **kwargs)
        if args.n_gpu > 1:
            raise UserError(
                f"this process would train on {args.n_gpu} GPUs with nn.DataParallel, whose replicas lose the rows "
                f"that R is updated from: start one process per GPU, accelerate launch --multi_gpu --num_processes "
                f"{args.n_gpu} SCRIPT, or show it one with CUDA_VISIBLE_DEVICES=0"
            )
        refuse_sharding(args)
        if not self.restorable:
            refuse_restoring(args, model, resumed=state.global_step > 0)
        warn_of_16_bit_weights(model)
        self.switches.close()
        if args.torch_compile:  # gathering rows is a side effect: else every checkpointed block breaks the graph
            switch = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
            self.switches.enter_context(switch)
        configure_sampling(model, self.arguments.sampling(args.gradient_accumulation_steps * args.world_size))
        discard_rows(model)
        self.last_step = int(self.arguments.eta_stop * state.max_steps)
        fresh = ShareCounts()  # for a second run
        fresh.before = self.shares.before if state.global_step else {}
        self.shares, self.begun = fresh, state.global_step
        self.log_steps = steps_between_logs(args, state, kwargs.get("train_dataloader"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.switches.close()
        if self.arguments.eta and not self.begun and not self.shares.updates and state.is_world_process_zero:
            logger.warning(
                "R was never updated: its first update was due after step %d, but the run ended after %d steps, and R "
                "is trained up to step %d; lower --update_interval or raise --eta_stop",
                *(self.arguments.update_interval, state.global_step, self.last_step),
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        step = state.global_step
        updates = self.is_update_step(step)
        set_gathering(model, updates or self.is_log_step(step))
        if updates or self.is_log_step(step):
            seed_sampling(model, seed=self.seed, step=step, rank=args.process_index)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        step = state.global_step
        if kwargs["optimizer"].step_was_skipped or all(p.grad is None for p in model.parameters()):
            discard_rows(model)
            return
        if self.is_log_step(step):
            self.measured = measure_decorrelation(model)
        if self.is_update_step(step):
            eta = self.arguments.eta * self.arguments.update_interval * self.decay(args, state, kwargs["optimizer"])
            self.shares.add(
                update_decorrelation(model, eta=eta, kappa=self.arguments.kappa, bound=self.arguments.bound_eta)
            )
        else:
            discard_rows(model)

    def figures(self, state: TrainerState) -> dict[str, float]:
        """The last correlations, averaged over layers, and what the bound on eta did."""
        return mean_correlations(self.per_layer) | self.shares.logs() if self.measured else {}

    def is_update_step(self, step: int) -> bool:
        """Whether R is updated at this step (counted from 0)."""
        return step < self.last_step and (step + 1) % self.arguments.update_interval == 0

    def is_log_step(self, step: int) -> bool:
        """Whether correlations are measured at this step: the first, and every step at which the Trainer logs."""
        return self.log_steps is not None and (step == 0 or (step + 1) % self.log_steps == 0)

    def decay(self, args: TrainingArguments, state: TrainerState, optimizer: torch.optim.Optimizer) -> float:
        """How far the weights' learning rate has decayed from its peak, 1 during warm-up."""
        if self.arguments.eta_schedule == "constant" or state.global_step < args.get_warmup_steps(state.max_steps):
            return 1.0
        group = optimizer.param_groups[0]
        peak = group.get("initial_lr", args.learning_rate)  # not every schedule records it
        return float(group["lr"] / peak) if peak else 0.0  # weights that stay cannot make up for a change of R

    @property
    def per_layer(self) -> dict[str, dict[str, float]]:
        """The last measurement: layer -> decorrelation_loss, mean_squared_correlation."""
        return correlation_values(self.measured)


def refuse_sharding(args: TrainingArguments) -> None:
    """Raise a UserError if FSDP or DeepSpeed would split the weights over processes."""
    launched = [name for name in ("FSDP", "DEEPSPEED") if strtobool(os.environ.get(f"ACCELERATE_USE_{name}", "false"))]
    if args.fsdp or args.deepspeed or launched:
        flag = "--deepspeed" if args.deepspeed or "DEEPSPEED" in launched else "--fsdp"
        raise UserError(
            f"{flag} splits weights over processes, but the update of R, the fusion W R and the checkpoints here need "
            "whole matrices: leave it out, and train with accelerate launch --multi_gpu (each GPU holds the model; "
            "--gradient_checkpointing true saves memory)"
        )


def refuse_restoring(args: TrainingArguments, model: nn.Module, *, resumed: bool) -> None:
    """Raise a UserError if a stock Trainer would lose tensors when it restores a checkpoint.

    For our models it finds no ``model.safetensors``. For some of transformers' models, even plain ones, it saves
    tensors under older names but restores them by the current ones, and only warns.
    """
    if isinstance(model, DBPViTMAEModel | DBPViTMAEForPreTraining):
        reason = (
            "transformers.Trainer restores no checkpoint of this model (it is named model.unfused.safetensors so that "
            "no stock class mistakes W for W R)"
        )
    elif isinstance(model, PreTrainedModel) and (renamed := renamed_by_saving(model)):
        reason = (
            f"transformers.Trainer saves {renamed} tensors of {type(model).__name__} under names that it does not "
            f"look for when it restores, and would lose them"
        )
    else:
        return
    if args.load_best_model_at_end or args.resume_from_checkpoint or resumed:
        raise UserError(
            f"{reason}: train with hf_dbp.ResumingTrainer, a Trainer with the same arguments, for "
            "load_best_model_at_end and resume_from_checkpoint"
        )
    if args.save_strategy != "no":
        logger.warning("transformers.Trainer cannot resume the checkpoints it saves here; hf_dbp.ResumingTrainer can")


def renamed_by_saving(model: PreTrainedModel) -> int:
    """How many tensors ``save_pretrained`` writes under names other than the model's own."""
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return len(state.keys() - revert_weight_conversion(model, dict(state)).keys())


def steps_between_logs(args: TrainingArguments, state: TrainerState, loader: Any) -> int | None:
    """The number of optimizer steps between two logs of the loss; None if the Trainer never logs it."""
    if args.logging_strategy == "no":
        return None
    if args.logging_strategy == "steps":
        return int(state.logging_steps)
    # once per epoch; for a stream without a length, only at the last step
    return math.ceil(len(loader) / args.gradient_accumulation_steps) if has_length(loader) else int(state.max_steps)
