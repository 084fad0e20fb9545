"""One step of every R from the rows gathered since the last one: R <- R - eta * C R (paper eq. 4).

A hand-written loop needs one line after the optimizer's:

    loss.backward(); optimizer.step(); optimizer.zero_grad()
    update_decorrelation(model, eta=5e-4)

Processes. Each adds its rows' sums (`covariance_sums`, D x D + D + 1 numbers per layer); the sums are all-reduced, so
that R follows from all processes' rows and is the same everywhere to the bit.

Speed. Layers whose rows have one shape are updated by batched products, and reduced in one collective, in groups of at
most `GROUP_NUMBERS` matrix entries: many small matrices are bound by launches, few large ones by memory. Nothing here
waits for the device.

Shapes: L layers of a group, M rows, D features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.functional import covariance_sums, decorrelation_direction, decorrelation_metrics
from hf_dbp.layers import Decorrelation, RowSampling

__all__ = [
    "configure_sampling",
    "discard_rows",
    "measure_decorrelation",
    "seed_sampling",
    "set_gathering",
    "update_decorrelation",
]

GROUP_NUMBERS = 2**24  # matrix entries that one batched update may hold: 64 MiB in float32


def decorrelations(module: nn.Module) -> list[tuple[str, Decorrelation]]:
    """The `Decorrelation` of every decorrelated layer with the layer's name. ValueError if there is none."""
    found = [(name, layer.decorrelation) for name, layer in decorrelated_layers(module)]
    if not found:
        raise ValueError(f"{type(module).__name__} has no decorrelated layer; see convert_to_decorrelated")
    return found


def configure_sampling(module: nn.Module, sampling: RowSampling) -> None:
    """Set how many rows each forward of every decorrelated layer below ``module`` contributes."""
    for _, decorrelation in decorrelations(module):
        decorrelation.sampling = sampling


def set_gathering(module: nn.Module, gathering: bool) -> None:
    """Let forwards in train mode gather rows, or not (steps without an update)."""
    for _, decorrelation in decorrelations(module):
        decorrelation.gathering = gathering


def discard_rows(module: nn.Module) -> None:
    """Drop the gathered rows without an update, as after an optimizer step that was skipped."""
    for _, decorrelation in decorrelations(module):
        decorrelation.rows = None


def seed_sampling(module: nn.Module, *, seed: int, step: int, rank: int = 0) -> None:
    """Make the next draw of rows a function of (seed, step, rank, layer) alone: a resumed run draws the same."""
    found = decorrelations(module)
    for _, decorrelation in found:
        if decorrelation.key is None or decorrelation.key.device != decorrelation.R.device:
            decorrelation.key = torch.zeros((), dtype=torch.int64, device=decorrelation.R.device)
    keys = [d.key for _, d in found if d.key is not None]
    # the hash of a tuple of ints is the same in every process
    values = [hash((seed, step, rank, layer)) % 2**62 for layer in range(len(found))]
    torch._foreach_zero_(keys)
    torch._foreach_add_(keys, values)


@torch.no_grad()
def update_decorrelation(module: nn.Module, *, eta: float = 5e-4, kappa: float = 0.0) -> None:
    """Update every R below ``module`` from the rows gathered since the last update, and drop the rows.

    Call it once per optimizer step, on every process.

    Args:
        module: a module with decorrelated layers that ran forward in train mode.
        eta: learning rate of R (paper: 5e-4).
        kappa: weight of the pull of the variances to 1 (paper: 0).

    Raises:
        ValueError: no rows were gathered (no forward in train mode, or gathering is off).
    """
    for group in gathered_groups(module):
        R_LDD = torch.stack([decorrelation.R for _, decorrelation in group])
        x_LMD = torch.stack([rows for rows, _ in group])
        zzR_LDD, zz_LD, count = reduce_sums(*covariance_sums(x_LMD, R_LDD), x_LMD.shape[1])
        direction_LDD = decorrelation_direction(zzR_LDD / count, zz_LD / count, R_LDD, kappa)
        torch._foreach_add_([d.R for _, d in group], list(direction_LDD.unbind()), alpha=-eta)
    discard_rows(module)
    advance_keys(module)


@torch.no_grad()
def measure_decorrelation(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Decorrelation loss and mean squared correlation of every layer, from the rows gathered since the last update.

    Returns:
        layer name -> (loss, mean squared correlation), scalars on the device (see `decorrelation_metrics`), in the
        layers' order; over the rows of all processes.

    Raises:
        ValueError: no rows were gathered.
    """
    measured: dict[int, tuple[Tensor, Tensor]] = {}
    for group in gathered_groups(module):
        R_LDD = torch.stack([decorrelation.R for _, decorrelation in group])
        x_LMD = torch.stack([rows for rows, _ in group])
        z_LMD = x_LMD.to(R_LDD.dtype) @ R_LDD.mT
        zz_LDD, _, count = reduce_sums(z_LMD.mT @ z_LMD, z_LMD.new_zeros(len(group), 0), x_LMD.shape[1])
        metrics = zip(*decorrelation_metrics(zz_LDD / count), strict=True)
        measured |= {id(d): pair for (_, d), pair in zip(group, metrics, strict=True)}
    return {name: measured[id(d)] for name, d in decorrelations(module) if id(d) in measured}


def gathered_groups(module: nn.Module) -> Iterable[list[tuple[Tensor, Decorrelation]]]:
    """Layers with gathered rows in groups of one shape, each group small enough for one batched product."""
    by_shape: dict[object, list[tuple[Tensor, Decorrelation]]] = defaultdict(list)
    for _, decorrelation in decorrelations(module):
        rows = decorrelation.rows
        if rows is not None:
            by_shape[rows.shape, rows.dtype, rows.device].append((rows, decorrelation))
    if not by_shape:
        raise ValueError("no rows were gathered: run a forward in train mode before each update of R")
    for layers in by_shape.values():
        size = max(1, GROUP_NUMBERS // layers[0][1].R.numel())
        for first in range(0, len(layers), size):
            yield layers[first : first + size]


def reduce_sums(matrix_LDD: Tensor, vector_LD: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | int]:
    """Add the sums and the row count of all processes in one collective; a single process returns its own."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return matrix_LDD, vector_LD, count
    flat = torch.cat([matrix_LDD.flatten(), vector_LD.flatten(), matrix_LDD.new_full((1,), count)])
    dist.all_reduce(flat)
    matrix, vector, total = torch.split(flat, [matrix_LDD.numel(), vector_LD.numel(), 1])
    return matrix.view_as(matrix_LDD), vector.view_as(vector_LD), total


def advance_keys(module: nn.Module) -> None:
    """Draw other rows at the next step, for loops that never call `seed_sampling`."""
    found = decorrelations(module)
    keys = [decorrelation.key for _, decorrelation in found if decorrelation.key is not None]
    if len(keys) < len(found):
        seed_sampling(module, seed=0, step=0)
    else:
        torch._foreach_add_(keys, 1)
