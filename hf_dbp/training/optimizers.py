"""The optimizers of the scripts: AdamW, and Muon on hidden matrices with AdamW on the rest.

Muon (`torch.optim.Muon`) orthogonalises the momentum of 2-D weights; embeddings, the output layer, norms and biases
stay with AdamW. A Trainer has one optimizer, so the two are presented, scheduled and checkpointed as one. Muon's step
is scaled to AdamW's size (``match_rms_adamw``), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.nn.parameter import Parameter
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, TrainingArguments

from hf_dbp.errors import UserError

__all__ = ["MuonWithAdamW", "checked_schedule", "decay_groups", "hidden_matrices"]


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the trainable 2-D weights inside the blocks of encoder and decoder."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and "layers." in name
    }


def decay_groups(named: list[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weight decay on everything but biases and norms (vectors), as He et al. have it."""
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices of ``model``, AdamW on every other trainable parameter, as one optimizer.

    Args:
        model: the model.
        lr: learning rate of both.
        betas, eps: AdamW's.
        momentum: Muon's.
        weight_decay: decoupled, on matrices and other non-vector weights.
        fused: AdamW's fused kernel.

    Raises:
        ValueError: the model has no hidden matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        hidden = hidden_matrices(model)
        if not hidden:
            raise UserError(f"{type(model).__name__} has no hidden matrix for Muon; use --optimizer adamw")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if name in hidden]
        rest = decay_groups([(name, p) for name, p in named if name not in hidden], weight_decay)
        self.muon = torch.optim.Muon(
            matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([{"params": matrices}, *rest], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """A learning rate that a scheduler sets here is the one that the two optimizers use."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


def checked_schedule(create: Callable[[int], LRScheduler], args: TrainingArguments, steps: int) -> LRScheduler:
    """The schedule that ``create`` makes for so many steps, tried at the last of them: some fail only there.

    Raises:
        ValueError: it cannot be computed, as polynomial decay that the warm-up leaves no step.
    """
    try:
        schedule = create(steps)
        for factor in schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ():
            factor(steps)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value} cannot go over {steps} steps, "
            f"{args.get_warmup_steps(steps)} of them warm-up, with --lr_scheduler_kwargs {args.lr_scheduler_kwargs} "
            f"({error}): leave it steps after --warmup_steps, a --learning_rate above 0 and arguments that it takes"
        ) from error
    return schedule
