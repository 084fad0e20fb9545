"""Decorrelate any torch model with two lines in an existing script:

    decorrelate(model, batch=next(iter(loader)))                      # swap: R = I, so nothing changes yet
    trainer.add_callback(DecorrelationCallback())                     # in a loop: update_decorrelation(model, eta=...)

One forward pass on the batch shows which layers share an input, and thus an R, and which must stay plain (`probing`).
If the model is given attention masks, padding never enters C (`padding`). Checkpoints of the decorrelated model load
correctly in its stock class (`sharing`), and `fuse(model)` returns a model of that class.

A layer behind dropout sees, and decorrelates, the output of the dropout. A layer that is called several times per step
gathers the rows of all calls. Experts that are separate layers have one R each (see "Few tokens" in `update`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hf_dbp.conversion import decorrelated_layers, replace_submodules
from hf_dbp.errors import UserError
from hf_dbp.layers import RowSampling
from hf_dbp.padding import remove_watches, watch_padding
from hf_dbp.probing import LayerInput, call, evaluating, kept_random_state, linear_table, probe
from hf_dbp.sharing import SharingLayer, is_conv1d, sharing_layer
from hf_dbp.update import configure_sampling, decorrelations, measure_decorrelation

__all__ = ["decorrelate", "survey_layers"]

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Predicate = Callable[[nn.Module, str], bool]

PROBED = RowSampling(fraction=1.0, cap=2.0)  # the tokens used to measure correlations


def decorrelate(model: ModuleT, layers: str | Predicate = "auto", *, batch: Any) -> ModuleT:
    """Swap linear layers of any model for decorrelated ones, in place, with R = I: its outputs do not change.

    Call it on every process, before you create the optimizer, the Trainer or DistributedDataParallel. Parameters keep
    their names and stay the same objects.

    Args:
        model: any torch model.
        layers: which of the layers that can be decorrelated:
            "auto": those whose input is correlated enough for the gain to outweigh the cost (`hf_dbp.probing`, with the
            callback's default interval between updates), printed as a table; "all": every one; "block_inputs": those
            fed by a normalisation, such as q, k, v and the first layer of an MLP; a predicate
            ``(module, name) -> bool``.
        batch: the model's input in training: a mapping of keyword arguments, a tuple of arguments, or one argument. Its
            number of tokens and its correlations decide "auto"; for the other choices any batch will do.

    Returns:
        ``model`` itself.

    Raises:
        UserError: no layer was chosen, the predicate chose a layer that must stay plain (the message says why),
            ``model`` is already decorrelated, or it is itself a layer.
    """
    if layers not in ("auto", "all", "block_inputs") and not callable(layers):
        raise UserError(f"layers is auto, all, block_inputs or a predicate (module, name) -> bool, got {layers!r}")
    if any(True for _ in decorrelated_layers(model)):
        raise UserError(f"{type(model).__name__} is already decorrelated; hf_dbp.fuse(model) gives a plain one")
    if isinstance(model, nn.Linear | nn.Conv2d) or is_conv1d(model):
        raise UserError("the model is itself a layer, which cannot be swapped in place; wrap it in nn.Sequential")
    inputs = survey_layers(model, batch) if layers == "auto" else probe(model, batch)
    chosen = {name for one in inputs for name in one.names if is_chosen(model, one, name, layers)}
    refuse_plain(inputs, chosen)
    table = linear_table(inputs, chosen)
    if not chosen:
        raise UserError(f"none of the linear layers of {type(model).__name__} is to be decorrelated:\n{table}")
    swap(model, [[name for name in one.names if name in chosen] for one in inputs])
    if layers == "auto" and not (dist.is_initialized() and dist.get_rank()):
        print(table)
    else:
        logger.info("Decorrelated layers of %s:\n%s", type(model).__name__, table)
    return model


def is_chosen(model: nn.Module, one: LayerInput, name: str, layers: str | Predicate) -> bool:
    """Whether the layer with this name and input is chosen."""
    if callable(layers):
        return layers(model.get_submodule(name), name)
    return not one.plain and (layers == "all" or (one.pays() if layers == "auto" else one.block_input))


def refuse_plain(inputs: list[LayerInput], chosen: set[str]) -> None:
    """Raise a UserError if a layer that must stay plain was chosen."""
    for one in inputs:
        if one.plain and one.names[0] in chosen:
            raise UserError(f"{one.names[0]} cannot be decorrelated: {one.plain}; let the predicate leave it out")


def survey_layers(model: nn.Module, batch: Any) -> list[LayerInput]:
    """The inputs of all linear layers of ``model`` with their correlations, gain and cost; ``model`` does not change.

    Args:
        model: any torch model that is not decorrelated.
        batch: as for `decorrelate`; with several processes each passes its own batch and all get the same list.
    """
    if any(True for _ in decorrelated_layers(model)):
        raise UserError(f"{type(model).__name__} is already decorrelated; survey hf_dbp.fuse(model)")
    inputs = probe(model, batch)
    fit = {one.names[0]: one for one in inputs if not one.plain}
    if not fit:
        return inputs
    plain = swap(model, [one.names for one in fit.values()])
    try:
        with evaluating(model), kept_random_state(model), torch.no_grad():
            configure_sampling(model, PROBED)
            for _, decorrelation in decorrelations(model):
                decorrelation.train()  # so that it gathers rows; dropout stays off
            call(model, batch)
            rows = torch.tensor(
                [0 if d.rows is None else len(d.rows) for _, d in decorrelations(model)],
                device=next(model.parameters()).device,
            )
            if dist.is_initialized():
                dist.all_reduce(rows)
            counts = dict(zip([name for name, _ in decorrelations(model)], rows.tolist(), strict=True))
            for name, (_, correlation) in measure_decorrelation(model).items():
                fit[name].correlation, fit[name].rows = float(correlation), counts[name]
    finally:
        replace_submodules(model, plain)
        remove_watches(model)
    return inputs


def swap(model: nn.Module, groups: list[list[str]]) -> dict[nn.Module, nn.Module]:
    """Decorrelate these layers, with one R per group, and return a mapping from new layer to plain layer."""
    padding = watch_padding(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for names in filter(None, groups):
        owner: SharingLayer | None = None
        for name in names:
            layer = sharing_layer(model.get_submodule(name))
            if owner is None:
                owner = layer
                owner.decorrelation.padding, owner.decorrelation.name = padding, name
            else:
                layer.share(owner)
            replacements[model.get_submodule(name)] = layer
    replace_submodules(model, replacements)
    return {layer: plain for plain, layer in replacements.items()}
