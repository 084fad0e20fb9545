"""The optimizers of the scripts: AdamW, or Muon or one of pytorch-optimizer on hidden matrices with AdamW on the rest.

Muon orthogonalises the momentum of 2-D weights, in a step of AdamW's size (`hf_dbp.training.muon`), so one learning
rate serves both. SOAP and others come by name from the optional package
pytorch-optimizer. Embeddings, the output layer, norms and biases stay with AdamW. A Trainer has one optimizer, so the
two act, are scheduled and are checkpointed as one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.nn.parameter import Parameter
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_dbp.errors import UserError
from hf_dbp.training.muon import Muon

__all__ = [
    "HiddenWithAdamW",
    "check_optimizer",
    "checked_schedule",
    "decay_groups",
    "hidden_matrices",
    "stock_optimizer",
]

BUILT_IN = ("adamw", "muon")
MOMENTUM = 0.95  # Muon's
BLOCKS = re.compile(r"(layers?|blocks?|\bh)\.\d+\.")  # names of the list of blocks in transformers' models


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the trainable 2-D weights inside the blocks of encoder and decoder."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and BLOCKS.search(name)
    }


def decay_groups(named: list[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weight decay on everything but biases and norms (vectors), as in He et al."""
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_optimizer(name: str) -> None:
    """Raise a UserError unless the name is adamw, muon, or an optimizer of pytorch-optimizer."""
    if name not in BUILT_IN:
        library_optimizer(name)


def library_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of pytorch-optimizer with that name, such as ``soap``.

    Raises:
        UserError: the package is not installed, or has no such optimizer.
    """
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UserError(
            f"--optimizer is {' or '.join(BUILT_IN)}; for {name} install pytorch-optimizer: "
            "pip install 'hf-dbp[optimizers]'"
        ) from error
    known = pytorch_optimizer.get_supported_optimizers()
    if name not in known:
        near = difflib.get_close_matches(name, [*BUILT_IN, *known], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"give {', '.join(BUILT_IN)}, soap, kron, ..."
        raise UserError(f"--optimizer {name}: pytorch-optimizer has none with that name; {hint}")
    found: type[torch.optim.Optimizer] = pytorch_optimizer.load_optimizer(name)
    return found


class HiddenWithAdamW(torch.optim.Optimizer):
    """Another optimizer on the hidden matrices of ``model`` and AdamW on all other trainable parameters, as one.

    Args:
        model: the model.
        name: ``muon``, or an optimizer of pytorch-optimizer (with its own defaults for what is not given here).
        lr: learning rate of both optimizers.
        betas, eps: AdamW's.
        weight_decay: decoupled weight decay, on matrices and other weights that are not vectors.
        fused: AdamW's fused kernel.

    Raises:
        UserError: the model has no hidden matrix, or there is no such optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "muon",
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        hidden = hidden_matrices(model)
        if not hidden:
            raise UserError(f"{type(model).__name__} has no hidden matrix for {name}; use --optimizer adamw")
        named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        matrices = [p for key, p in named if key in hidden]
        rest = decay_groups([(key, p) for key, p in named if key not in hidden], weight_decay)
        self.name = name
        self.hidden: torch.optim.Optimizer
        if name == "muon":
            self.hidden = Muon(matrices, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
        else:
            self.hidden = made_by_library(name, matrices, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([{"params": matrices}, *rest], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """Make both optimizers use the learning rate that a scheduler sets here."""
        self.param_groups = [*self.hidden.param_groups, *self.adamw.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None for group in self.hidden.param_groups for p in group["params"]):
            self.hidden.step()  # else a step whose gradients a guard removed would count in its state
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {self.name: self.hidden.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hidden.load_state_dict(state_dict[self.name])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


def made_by_library(name: str, matrices: list[Parameter], **options: Any) -> torch.optim.Optimizer:
    """An instance of an optimizer of pytorch-optimizer. UserError if it needs more than parameters and these
    options."""
    try:
        return library_optimizer(name)(matrices, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {name} cannot be used here: {error}") from error


def stock_optimizer(args: TrainingArguments, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of ``--optim`` and its options, without the parameters.

    Raises:
        UserError: its package is not installed, or it wants to group the parameters by itself.
    """
    name = OptimizerNames(args.optim).value
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--optim {name} cannot be used: {' '.join(str(error).split())}") from error
    if own := {"params", "model", "optimizer_dict"} & options.keys():
        raise UserError(f"--optim {name} takes {min(own)} in place of groups with and without decay: choose another")
    return kind, options


def checked_schedule(create: Callable[[int], LRScheduler], args: TrainingArguments, steps: int) -> LRScheduler:
    """The schedule that ``create`` makes for ``steps`` steps, tried at the last one, where some fail.

    Raises:
        UserError: it cannot be computed, such as polynomial decay for which the warm-up leaves no step.
    """
    try:
        schedule = create(steps)
        for factor in schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ():
            factor(steps)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value} cannot cover {steps} steps, "
            f"{args.get_warmup_steps(steps)} of them warm-up, with --lr_scheduler_kwargs {args.lr_scheduler_kwargs} "
            f"({error}): it needs steps after --warmup_steps, a --learning_rate above 0 and valid arguments"
        ) from error
    return schedule
