"""`GuardedTrainer`: a step whose loss or gradients are not finite is skipped; several in a row end the run.

What is skipped leaves weights, R, running statistics and the optimizer's state as they were to the bit: the gradients
are taken away before the clipping, so that no optimizer sees them, the rows gathered for R are dropped
(`DecorrelationCallback`), and buffers (of BatchNorm) are put back. The step counts, its images are used up, the
learning rate goes on. All processes decide alike. R is guarded in its own update (`step_share`); steps at which it was
left count here too.

The host waits for the device once a step, for one small tensor, where the stock Trainer waits twice a micro-batch: its
`logging_nan_inf_filter`, which hides such losses from the logs, is switched off. Logs show the last finite loss in
their place, and how many steps were skipped. Under float16 the gradient scaler skips steps as part of its work; then
the loss alone is judged here.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from transformers import Trainer

from hf_dbp.callbacks import DecorrelationCallback
from hf_dbp.errors import UserError

__all__ = ["GuardedTrainer", "NonFiniteError", "first_non_finite_output"]

logger = logging.getLogger(__name__)

KEPT = 100  # skipped steps that are listed one by one
ADVICE = {
    "loss": "look at that layer's inputs; lower --learning_rate, lengthen --warmup_steps or give --max_grad_norm 1",
    "gradient": "lower --learning_rate, lengthen --warmup_steps or give --max_grad_norm 1",
    "R": "lower --eta, and leave --bound_eta on",
}


class NonFiniteError(UserError, FloatingPointError):
    """Too many steps in a row met a loss, a gradient or an R that is not finite; the message says where and what to do.

    The weights are those before the first of these steps.
    """


def first_non_finite_output(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Where values that are not finite first appear in a forward: an input, a module, or None.

    The model runs in eval mode and is left as it was.
    """
    for name, value in inputs.items():
        if not value.isfinite().all():
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


class GuardedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the guards of the module's docstring.

    Args:
        max_skipped_steps: the run ends when so many steps in a row were skipped.
        args, kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: ``max_skipped_steps`` is less than 1.
    """

    decorrelation: DecorrelationCallback | None = None

    def __init__(self, *args: Any, max_skipped_steps: int = 5, **kwargs: Any) -> None:
        if max_skipped_steps < 1:
            raise UserError(f"--max_skipped_steps is a number of steps, at least 1, got {max_skipped_steps}")
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False
        self.max_skipped_steps, self.skipped_in_a_row = max_skipped_steps, 0
        self._micro_batches, self._last_batch = 0, dict[str, Tensor]()  # of the step under way
        self._buffers: list[tuple[Tensor, Tensor]] = []  # each with its value before the step
        self._lost = self._last_loss = torch.zeros((), device=self.args.device)
        self.finite = torch.ones((), device=self.args.device)  # 1 or 0: whether the last micro-batch's loss is

    @functools.cached_property
    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    @functools.cached_property
    def _trained(self) -> dict[str, Parameter]:
        return {name: p for name, p in self._bare_model.named_parameters() if p.requires_grad}

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Loss of a micro-batch, or the last finite one (0 if there was none); after its last one a step is judged."""
        if not self._micro_batches:
            self._lost = torch.zeros_like(self._lost)
            self._buffers = [(buffer, buffer.clone()) for buffer in self._bare_model.buffers()]
        self._micro_batches, self._last_batch = self._micro_batches + 1, inputs
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.finite = loss.isfinite().to(self._lost)
        self._lost = torch.maximum(self._lost, 1.0 - self.finite)
        self._last_loss = torch.where(loss.isfinite(), loss, self._last_loss)
        if self.accelerator.sync_gradients:
            self._judge()
            self._micro_batches, self._last_batch = 0, {}
        return self._last_loss.clone()

    def _judge(self) -> None:
        """Skip this step if its loss or gradients, reduced over processes, are not finite."""
        norms = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        norms = dict(zip(norms, torch._foreach_norm(list(norms.values())), strict=True))
        lost = torch.zeros_like(self._lost)
        if norms and self.accelerator.scaler is None:
            lost = 1.0 - torch.stack(list(norms.values())).isfinite().all().to(lost)
        left = lost.new_zeros(()) if self.decorrelation is None else self.decorrelation.shares.pop_left().to(lost)
        flags = torch.stack([self._lost, lost, left])
        if self.args.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        causes = [cause for cause, flag in zip(("loss", "gradient", "R"), flags.tolist(), strict=True) if flag]
        if not causes:
            self.skipped_in_a_row = 0
            return
        layer = self._first_layer(causes[0], norms) or "another process"
        if causes != ["R"] and self.accelerator.scaler is None:
            for parameter in self._trained.values():
                parameter.grad = None
        if causes != ["R"]:
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._count(causes[0], layer)

    @torch.no_grad()
    def _first_layer(self, cause: str, norms: dict[str, Tensor]) -> str | None:
        """The first layer concerned, as far as this process can tell."""
        if cause == "R":
            assert self.decorrelation is not None
            return next((name for name, left in self.decorrelation.shares.last_left.items() if left), None)
        for name, parameter in self._bare_model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name}, which is not finite itself"
        if cause == "gradient":  # the last in the order of the forward is the first in that of the backward
            bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
            return bad[-1] if bad else None
        if not self._lost:
            return None
        with self.compute_loss_context_manager():
            found = first_non_finite_output(self._bare_model, self._prepare_inputs(self._last_batch))
        return found or ("the loss itself" if self._micro_batches == 1 else "an earlier micro-batch of the step")

    def _count(self, cause: str, layer: str) -> None:
        """Write the step down and say so; stop if it is one too many."""
        self.skipped_in_a_row += 1
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, "skipped": cause, "layer": layer})
        what = "the update of R before it" if cause == "R" else "its update"
        logger.warning(
            "step %d: the %s is not finite, first in %s; %s is skipped (%d in a row, %d stop the run)",
            step, cause, layer, what, self.skipped_in_a_row, self.max_skipped_steps,
        )  # fmt: skip
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row up to step {step} met a {cause} that is not finite, first in "
                f"{layer}: {ADVICE[cause]}. Nothing of these steps was kept or saved; the same command, changed, goes "
                "on from the last checkpoint (--max_skipped_steps sets the number)"
            )

    def skipped_steps(self) -> dict[str, Any]:
        """``skipped_steps``: how many, also before a resume; ``skipped``: the first hundred, with cause and layer."""
        rows = [row for row in self.state.log_history if "skipped" in row]
        return {"skipped_steps": len(rows), "skipped": rows[:KEPT]}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        skipped = self.skipped_steps()["skipped_steps"] if "loss" in logs else 0
        super().log(logs | ({"skipped_steps": skipped} if skipped else {}), *args, **kwargs)
