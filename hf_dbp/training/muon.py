"""Muon, with the matrices of one shape orthogonalised together: the step of `torch.optim.Muon` in fewer launches.

    B <- mu B + (1 - mu) G                     momentum of the gradient
    M  = (1 - mu) G + mu B                     Nesterov's look ahead
    O  = NS(M / |M|_F)                         five Newton-Schulz iterations towards the polar factor of M
    W <- (1 - lr lambda) W - lr 0.2 sqrt(max(O, D)) O

torch iterates over one matrix at a time, some forty kernels each: for the 84 hidden matrices of a ViT-Small their
launches alone take milliseconds of a GPU's step. On a CPU, batching makes the iterations of a small model about 1.5
times as fast. They are in bfloat16, as torch's, or in float32 where bfloat16 is slow (`hf_dbp.precision`). The factor
0.2 sqrt(max(O, D)) gives the step the size of AdamW's (``match_rms_adamw``), so one learning rate serves both.

Shapes: L matrices of one shape O x D.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from hf_dbp.precision import fast_in_16_bits

__all__ = ["Muon", "newton_schulz"]


def newton_schulz(M_LOD: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (L, O, D) with the singular vectors of M and singular values near 1 (0.7 to 1.2), in bfloat16, or in
    float32 on a CPU that is slow in bfloat16.

    Args:
        M_LOD: matrices of one shape.
        coefficients: a, b, c of the iteration ``X <- a X + (b X X^T + c (X X^T)^2) X``.
        steps: number of iterations.
        eps: lower limit of the norm that each matrix is divided by.
    """
    a, b, c = coefficients
    tall = M_LOD.shape[-2] > M_LOD.shape[-1]
    X = M_LOD.bfloat16() if fast_in_16_bits(M_LOD.device) else M_LOD.float()
    X = X.mT if tall else X  # the smaller side gives the smaller products
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(eps)
    if X.dtype == torch.float32 and X.shape[-1] >= 2 * X.shape[-2]:
        X = _factor(X @ X.mT, coefficients, steps) @ X
    else:
        for _ in range(steps):
            gram = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def _factor(gram_LOO: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """What the iterations multiply X by, from G = X X^T alone: ``Q = a I + b G + c G^2``, ``G <- Q G Q``, and the
    product of all Q. For X at least twice as wide as high, these are the smaller products. float32 only: G holds the
    squares of the singular values, and for matrices of low rank errors reach 2e-4, ten times those of the plain form.
    """
    a, b, c = coefficients

    def polynomial(G_LOO: Tensor) -> Tensor:
        Q_LOO = torch.baddbmm(G_LOO, G_LOO, G_LOO, beta=b, alpha=c)
        Q_LOO.diagonal(dim1=-2, dim2=-1).add_(a)
        return Q_LOO

    factor_LOO = Q_LOO = polynomial(gram_LOO)
    for _ in range(steps - 1):
        gram_LOO = Q_LOO @ gram_LOO @ Q_LOO
        Q_LOO = polynomial(gram_LOO)
        factor_LOO = Q_LOO @ factor_LOO
    return factor_LOO


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with ``match_rms_adamw`` and batched products; its state is interchangeable with torch's.

    Args:
        params: 2-D weights.
        lr: learning rate.
        momentum: of the gradient.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params: list[Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same: dict[object, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[p.shape, p.dtype, p.device].append(p)
            for matrices in same.values():
                self._step_together(matrices, group)
        return loss

    def _step_together(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """The step of all matrices of one shape."""
        lr, momentum = float(group["lr"]), group["momentum"]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in matrices if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        M_LOD = torch.stack(list(torch._foreach_lerp(grads, buffers, momentum)))
        O_LOD = newton_schulz(M_LOD, group["ns_coefficients"], group["ns_steps"], group["eps"])
        size = lr * 0.2 * math.sqrt(max(M_LOD.shape[-2:]))
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, list(O_LOD.to(M_LOD.dtype).unbind()), alpha=-size)
