"""Convert plain modules to decorrelated ones and back, in any tree of `nn.Linear`.

    convert_to_decorrelated(model, lambda module, name: ".layer." in name)   # swap, in place; R = I changes nothing
    for name, layer in decorrelated_layers(model): ...                       # look
    plain = fuse(model)                                                      # W <- W R, a plain copy

A predicate ``(module, name) -> bool`` chooses the layers; it is called with every `nn.Linear` and patch projection
(`nn.Conv2d` with stride = kernel size) and its name inside the given module. Every layer gets its own R;
`hf_dbp.decorrelate` finds layers that share an input and gives them one R.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_dbp.errors import UserError
from hf_dbp.layers import DecorrelatedLayer, DecorrelatedLinear, DecorrelatedPatchProjection, Fusable
from hf_dbp.padding import remove_watches

__all__ = ["all_linears", "convert_to_decorrelated", "decorrelated_layers", "fuse", "fused_state_dict"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def all_linears(module: nn.Module, name: str) -> bool:
    """The predicate that chooses every `nn.Linear` and no convolution."""
    return isinstance(module, nn.Linear)


def convert_to_decorrelated(
    module: ModuleT, predicate: Callable[[nn.Module, str], bool] = all_linears, *, naive: bool = False
) -> ModuleT:
    """Swap the chosen linear layers below ``module`` for decorrelated ones, in place, with R = I.

    Args:
        module: any tree of modules; it keeps its parameters, their names and their values.
        predicate: called with each plain `nn.Linear` and `nn.Conv2d` and its dotted name; subclasses, which compute
            something else, are skipped.
        naive: use the form z = R x, y = W z instead of the fused one.

    Returns:
        ``module`` itself.

    Raises:
        UserError: no layer was chosen, ``module`` is itself a layer, or a chosen convolution is not a patch projection.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        raise UserError("a layer cannot be swapped in place of itself; use DecorrelatedLinear.from_linear(layer)")
    chosen = {
        child: name
        for name, child in module.named_modules()
        if type(child) in (nn.Linear, nn.Conv2d) and predicate(child, name)
    }
    if not chosen:
        raise UserError(
            f"the predicate chose none of the linear layers of {type(module).__name__}; "
            "print the names with `[name for name, _ in module.named_modules()]`"
        )
    replace_submodules(module, {child: decorrelated(name, child, naive) for child, name in chosen.items()})
    return module


def decorrelated(name: str, layer: nn.Module, naive: bool) -> nn.Module:
    """The decorrelated layer that adopts this layer's parameters; a UserError names a layer that has none."""
    if isinstance(layer, nn.Linear):
        return DecorrelatedLinear.from_linear(layer, naive=naive)
    assert isinstance(layer, nn.Conv2d)
    try:
        return DecorrelatedPatchProjection.from_conv(layer, naive=naive)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def replace_submodules(module: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Replace each child by ``replacements[child]``, under every name that leads to it."""
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child in replacements:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, replacements[child])


def decorrelated_layers(module: nn.Module) -> Iterator[tuple[str, DecorrelatedLayer]]:
    """The decorrelated layers below ``module`` (itself included) with their names, in a fixed order.

    Each is a module with a `decorrelation`, whose R all weights of the layer share.
    """
    for name, child in module.named_modules():
        if isinstance(child, DecorrelatedLayer):
            yield name, child


def fuse_layer(name: str, layer: DecorrelatedLayer) -> nn.Module:
    try:
        return layer.fuse()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def fuse(module: nn.Module) -> nn.Module:
    """A plain copy of ``module`` in which W R replaces (W, R); ``module`` itself does not change.

    A `DBPViTMAEForPreTraining` becomes a stock `ViTMAEForPreTraining`, decoder included. Products are computed in
    float64.

    Raises:
        UserError: a fused weight is not finite (the message names the layer), or nothing below ``module`` is
            decorrelated.
    """
    if isinstance(module, Fusable):
        return module.fuse()
    plain = copy.deepcopy(module)
    fused = {layer: fuse_layer(name, layer) for name, layer in decorrelated_layers(plain)}
    if not fused:
        raise UserError(f"{type(module).__name__} has no decorrelated layer to fuse; it is already plain")
    replace_submodules(plain, fused)
    remove_watches(plain)
    return plain


def fused_state_dict(module: nn.Module, keep: Container[str] = ()) -> dict[str, Tensor]:
    """The state dict of the plain module equivalent to ``module``: W R in place of (W, R), and none of our keys.

    Args:
        module: any tree of modules.
        keep: names of decorrelated layers to leave unfused.

    Raises:
        UserError: a fused weight is not finite; the message names the layer.
    """
    state = module.state_dict()
    layers = [(name, layer) for name, layer in decorrelated_layers(module) if name not in keep]
    for name, layer in layers:
        prefix = f"{name}." if name else ""
        state |= {prefix + key: value for key, value in fuse_layer(name, layer).state_dict().items()}
    ours = tuple(f"{name}.decorrelation." if name else "decorrelation." for name, _ in layers)
    return {key: value for key, value in state.items() if not (ours and key.startswith(ours))}
