"""Decorrelated layers for any model: layers with the same input share one R, and a stock class can load their state.

- **Sharing.** Layers with the same input, such as q, k and v or the gate and up projections of a gated MLP, have one
  `Decorrelation`. The first to be called owns it, gathers rows and saves R; the others refer to it.
- **State.** The plain layer's own key holds W R, so a checkpoint of a decorrelated model, whatever writes it, is
  correct in the stock class. Beside it, ``decorrelation.weight`` holds W and ``decorrelation.R`` holds R, from which
  the decorrelated model resumes bit for bit. A plain checkpoint starts at R = I, and so does a layer whose R is not in
  the checkpoint because other layers were decorrelated; a choice of layers that cannot be resumed is an error.
- **Kinds.** `nn.Linear`, patch projections (`nn.Conv2d` with stride = kernel size), and transformers' `Conv1D`, a
  linear layer whose weight is stored transposed: y = x W^T + b with ``weight`` = W^T (D, O).

Shapes: N tokens, D = in_features, O = out_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_dbp.errors import UserError
from hf_dbp.functional import decorrelated_linear, fused_weight, layer_weight
from hf_dbp.layers import (
    DecorrelatedLayer,
    DecorrelatedLinear,
    DecorrelatedPatchProjection,
    Decorrelation,
    fuse_parameter,
)

__all__ = ["SharingConv1D", "SharingLayer", "SharingLinear", "SharingPatchProjection", "is_conv1d", "sharing_layer"]

RAW = "decorrelation.weight"  # W itself, beside W R


class SharingLayer(nn.Module, DecorrelatedLayer):
    """What all kinds share; each is also a plain module with ``weight`` and ``bias``."""

    weight: Tensor

    def share(self, owner: DecorrelatedLayer) -> None:
        """From now on use the R of ``owner``, which has the same input."""
        self._modules.pop("decorrelation", None)
        object.__setattr__(self, "decorrelation", owner.decorrelation)  # not registered: one tensor, one name

    @property
    def owns(self) -> bool:
        """Whether this layer gathers rows for R and saves it."""
        return "decorrelation" in self._modules

    def plain_weight(self) -> Tensor:
        """W R as the plain layer stores it, computed in float64."""
        weight = self.weight.detach()
        product = fused_weight(weight.flatten(1).double(), self.decorrelation.R.detach().double())
        return product.to(weight.dtype).view_as(weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + RAW] = destination[prefix + "weight"]
        destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        raw = state_dict.pop(prefix + RAW, None)
        has_R = prefix + "decorrelation.R" in state_dict
        if self.owns:
            if raw is not None and has_R:
                state_dict[prefix + "weight"] = raw
            elif prefix + "weight" in state_dict:
                self.decorrelation.reset_parameters()
        elif prefix + "weight" in state_dict and not self.decorrelation.is_identity():  # its owner was loaded before
            if raw is None or has_R:
                errors: list[str] = args[-1]
                errors.append(
                    f"{prefix[:-1]} shares its R with other layers here, but not in the checkpoint: "
                    "decorrelate the layers that it was trained with"
                )
            else:
                state_dict[prefix + "weight"] = raw
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharingLinear(SharingLayer, DecorrelatedLinear):
    """`DecorrelatedLinear` that can share R."""

    def forward(self, x: Tensor) -> Tensor:
        if self.owns:
            return super().forward(x)
        return decorrelated_linear(x, self.weight, self.bias, self.decorrelation.R)


class SharingPatchProjection(SharingLayer, DecorrelatedPatchProjection):
    """`DecorrelatedPatchProjection` whose state a stock class can load."""


class SharingConv1D(SharingLayer):
    """transformers' `Conv1D` on a decorrelated input: y = x A^T + b, A = W R, ``weight`` = W^T (D, O)."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain_class: type[nn.Module] = type(plain)
        self.nf: int = plain.nf  # O, as transformers calls it
        self.nx: int = plain.nx  # D
        self.weight = plain.weight
        self.bias: nn.Parameter = plain.bias
        self.decorrelation = Decorrelation(self.nx, device=self.weight.device)
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.owns:
            self.decorrelation.gather(x)
        A_DO = layer_weight(self.weight.T, self.decorrelation.R).T.contiguous()
        return torch.addmm(self.bias, x.reshape(-1, self.nx), A_DO).view(*x.shape[:-1], self.nf)

    def plain_weight(self) -> Tensor:
        A_OD = fused_weight(self.weight.detach().T.double(), self.decorrelation.R.detach().double())
        return A_OD.T.to(self.weight.dtype).contiguous()

    def fuse(self) -> nn.Module:
        with torch.device("meta"):
            plain = self.plain_class(self.nf, self.nx)
        fused = fuse_parameter(self.weight.T, self.decorrelation.R)
        plain.weight = nn.Parameter(fused.detach().T.contiguous(), requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


def is_conv1d(layer: nn.Module) -> bool:
    """Whether ``layer`` is transformers' `Conv1D`, checked without importing transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def sharing_layer(layer: nn.Module) -> SharingLayer:
    """The decorrelated layer, with R = I, that adopts this layer's parameters. UserError if there is none."""
    if is_conv1d(layer):
        return SharingConv1D(layer)
    if type(layer) is nn.Linear:
        made: DecorrelatedLinear | DecorrelatedPatchProjection = SharingLinear.from_linear(layer)
    elif type(layer) is nn.Conv2d:
        made = SharingPatchProjection.from_conv(layer)
    else:
        raise UserError(f"{type(layer).__name__} is not a layer that can be decorrelated")
    assert isinstance(made, SharingLayer)
    return made
