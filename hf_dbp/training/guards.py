"""`GuardCallback`: a step whose loss or gradients are not finite is skipped; several in a row end the run.

A skipped step leaves weights, R, running statistics and the optimizer's state unchanged, bit for bit: the gradients are
removed before the optimizer sees them, the rows gathered for R are dropped (`DecorrelationCallback`), and buffers (of
BatchNorm) are restored. The step still counts, its images are consumed and the schedule advances. All processes make
the same decision. R is guarded in its own update (`step_share`); updates that left it unchanged are also counted here,
and the steps between two updates of R do not end their row.

A forward hook sees the loss that the model returns. If it is not finite, the last finite one replaces it, so the logs
stay readable; they also show how many steps were skipped. The host waits for the device once per step, for one small
tensor, while the stock Trainer waits twice per micro-batch: its `logging_nan_inf_filter`, which hides such losses from
the logs, is switched off. Under float16 the gradient scaler skips steps as part of its work, so only the loss is
checked here.

    Trainer(model, args, callbacks=[r := DecorrelationCallback(), GuardCallback(decorrelation=r)], ...)

A stock Trainer clips before it calls its callbacks, and clipping spreads one NaN over all gradients, so its layer can
no longer be identified. A `ResumingTrainer`, which has these guards built in, checks before clipping.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from transformers import TrainerState, TrainingArguments

from hf_dbp._moved import moved_names
from hf_dbp.callbacks import DecorrelationCallback, ReportingCallback
from hf_dbp.errors import UserError

__all__ = ["GuardCallback", "NonFiniteError", "first_non_finite_output"]

logger = logging.getLogger(__name__)

if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)

KEPT = 100  # skipped steps listed individually
ADVICE = {
    "loss": "look at that layer's inputs; lower --learning_rate, lengthen --warmup_steps or give --max_grad_norm 1",
    "gradient": "lower --learning_rate, lengthen --warmup_steps or give --max_grad_norm 1",
    "R": "lower --eta, and leave --bound_eta on",
}


class NonFiniteError(UserError, FloatingPointError):
    """Too many steps in a row had a loss, gradient or R that is not finite; the message says where and what to do.

    The weights are those before the first of these steps, unless R was the cause: then only R is.
    """


def first_non_finite_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Where values that are not finite first appear in a forward pass: an input, a module, or None.

    The model runs in eval mode and does not change.
    """
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f"the batch's {name}"
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    modules = dict(model.named_modules())
    modes = [module.training for module in modules.values()]
    handles = [module.register_forward_hook(functools.partial(look, name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    finally:
        for handle, module, mode in zip(handles, modules.values(), modes, strict=True):
            handle.remove()
            module.training = mode
    return found[0] if found else None


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output, where the Trainer looks for it."""
    loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None


class GuardCallback(ReportingCallback):
    """The guards of the module's docstring, for any `transformers.Trainer`.

    Args:
        max_skipped_steps: the run ends after this many skipped steps in a row.
        decorrelation: the callback that updates R; its skipped updates also count.

    Raises:
        UserError: ``max_skipped_steps`` is less than 1.
    """

    def __init__(self, max_skipped_steps: int = 5, decorrelation: DecorrelationCallback | None = None) -> None:
        if max_skipped_steps < 1:
            raise UserError(f"--max_skipped_steps is a number of steps, at least 1, got {max_skipped_steps}")
        self.max_skipped_steps, self.skipped_in_a_row = max_skipped_steps, 0
        self._left = False  # whether the last update of R left one unchanged
        self.decorrelation = decorrelation
        self._hook: Any = None
        self._judged, self.micro_batches = False, 0  # for the current step
        self._last_inputs = dict[str, Any]()
        self._buffers: list[tuple[Tensor, Tensor]] = []  # each buffer with its value before the step

    # ---- events of the Trainer ----

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, model, **kwargs)
        args.logging_nan_inf_filter = False
        self.release()
        self.skipped_in_a_row, self._left = 0, False
        self.model: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
        self.trained: dict[str, Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._lost = self._last_loss = torch.zeros((), device=args.device)
        self.finite = torch.ones((), device=args.device)  # 1 or 0: whether the last micro-batch's loss is finite
        self._hook = self.model.register_forward_hook(self._see, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def release(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._judged, self.micro_batches = False, 0
        self._lost = torch.zeros_like(self._lost)
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.judge(args, state, scaled=kwargs["optimizer"].scaler is not None, clipped=args.max_grad_norm > 0)

    def figures(self, state: TrainerState) -> dict[str, float]:
        """``skipped_steps`` so far, if there are any."""
        skipped = self.skipped_steps(state)["skipped_steps"]
        return {"skipped_steps": skipped} if skipped else {}

    # ---- checking ----

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: `note` the loss of a micro-batch in training."""
        loss = loss_of(output) if module.training else None
        if loss is None:
            return None
        loss = self.note(loss, kwargs)
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def note(self, loss: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Record whether a micro-batch's loss is finite; return it, or else the last finite one (0 if there was
        none)."""
        self.micro_batches, self._last_inputs = self.micro_batches + 1, inputs
        finite = loss.detach().isfinite()
        self.finite = finite.to(self._lost)
        self._lost = torch.maximum(self._lost, 1.0 - self.finite)
        self._last_loss = torch.where(finite, loss.detach(), self._last_loss)
        return torch.where(finite, loss, self._last_loss)

    def judge(self, args: TrainingArguments, state: TrainerState, *, scaled: bool, clipped: bool = False) -> None:
        """Skip this step if its loss or gradients, reduced over processes, are not finite; call it once per step.

        Args:
            scaled: whether a gradient scaler checks the gradients.
            clipped: whether they are already clipped.

        Raises:
            NonFiniteError: ``max_skipped_steps`` were skipped in a row.
        """
        if self._judged:
            return
        self._judged = True
        norms = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        norms = dict(zip(norms, torch._foreach_norm(list(norms.values())), strict=True))
        lost = torch.zeros_like(self._lost)
        if norms and not scaled:
            lost = 1.0 - torch.stack(list(norms.values())).isfinite().all().to(lost)
        updated = self.decorrelation is not None and not self.decorrelation.shares.judged
        left = lost.new_zeros(()) if self.decorrelation is None else self.decorrelation.shares.pop_left().to(lost)
        flags = torch.stack([self._lost, lost, left])
        if args.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        causes = [cause for cause, flag in zip(("loss", "gradient", "R"), flags.tolist(), strict=True) if flag]
        if updated:
            self._left = "R" in causes
        if not causes:
            waiting = self._left and self.decorrelation is not None and state.global_step < self.decorrelation.last_step
            if not waiting:  # the steps up to the next update of R say nothing about it
                self.skipped_in_a_row = 0
            return
        layer = self._first_layer(causes[0], norms, clipped) or "another process"
        if causes != ["R"] and not scaled:
            for parameter in self.trained.values():
                parameter.grad = None
        if causes != ["R"]:
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._count(causes[0], layer, state)

    @torch.no_grad()
    def _first_layer(self, cause: str, norms: dict[str, Tensor], clipped: bool) -> str | None:
        """The first layer concerned, as far as this process can tell."""
        if cause == "R":
            assert self.decorrelation is not None
            return next((name for name, left in self.decorrelation.shares.last_left.items() if left), None)
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name}, which is not finite itself"
        if cause == "gradient":  # the last in the forward pass is the first in the backward pass
            bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
            return "a layer that clipping hides" if bad and clipped else bad[-1] if bad else None
        if not self._lost:
            return None
        found = first_non_finite_output(self.model, self._last_inputs)
        return found or ("the loss itself" if self.micro_batches == 1 else "an earlier micro-batch of the step")

    def _count(self, cause: str, layer: str, state: TrainerState) -> None:
        """Record and log the skipped step; raise once the limit is reached."""
        self.skipped_in_a_row += 1
        step = state.global_step + 1
        state.log_history.append({"step": step, "skipped": cause, "layer": layer})
        what = "the update of R before it" if cause == "R" else "its update"
        logger.warning(
            "step %d: the %s is not finite, first in %s; %s is skipped (%d in a row, %d stop the run)",
            step, cause, layer, what, self.skipped_in_a_row, self.max_skipped_steps,
        )  # fmt: skip
        if self.skipped_in_a_row >= self.max_skipped_steps:
            failed = f"steps in a row up to step {step} had a {cause} that is not finite"
            if cause == "R":  # checkpoints between two updates are whole
                failed = f"updates of R in a row up to step {step} were not finite"
            saved = "The" if cause == "R" else "None of these steps was saved; the"
            raise NonFiniteError(
                f"{self.skipped_in_a_row} {failed}, first in {layer}: {ADVICE[cause]}. {saved} command with these "
                f"changes resumes from the last checkpoint (--max_skipped_steps sets the limit)"
            )

    @staticmethod
    def skipped_steps(state: TrainerState) -> dict[str, Any]:
        """``skipped_steps``: how many, including those before a resume; ``skipped``: the first hundred, with cause and
        layer."""
        rows = [row for row in state.log_history if "skipped" in row]
        return {"skipped_steps": len(rows), "skipped": rows[:KEPT]}
