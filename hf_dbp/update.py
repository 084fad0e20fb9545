"""One update of every R, from the input rows gathered since the last update: R <- R - eta * C R (paper eq. 4).

A hand-written loop needs one more line after the optimizer step:

    loss.backward(); optimizer.step(); optimizer.zero_grad()
    update_decorrelation(model, eta=5e-4)

Guards. Each layer uses only the share of eta that is stable for its rows (`step_share`). In the paper's regime this is
all of eta. If a row, R or a sum is not finite it is zero, and R does not change. The share is computed on the device.

Few tokens. A layer that saw no row since the last update, such as an expert that received no token, keeps its R bit for
bit. With few rows C is only a rough estimate; the share of eta still keeps the step stable.

Frozen weights. The R of a layer whose weight was frozen after the swap does not change either, even if other layers
share it: a weight that does not learn cannot make up for the change.

Blocks. Each block of a block-diagonal R is a matrix of its own: it has its own share of eta, and correlations are
measured within it. A layer reports the smallest share of its blocks and the mean of their measurements.

Processes. Each process sums over its rows (`covariance_sums`, D x D + D + 2 numbers per matrix); the sums are
all-reduced, so every process computes R from the rows of all, and R is bit-identical on each.

Speed. Matrices of one width are reduced in one collective and updated by batched products, in groups of at most
`GROUP_NUMBERS` matrix entries: for many small matrices kernel launches are the bottleneck, for a few large ones memory.
A single process on the CPU, where launches cost nothing, updates one matrix at a time without copies. An update never
waits for the device.

Precision. R, the sums and the step are in float32, outside autocast. On a GPU the products take TF32 inputs (10 bits)
and accumulate in float32, whatever the global setting: strict float32 products alone could double a fast step, and the
rounding is far below the sampling noise of C.

Shapes: L matrices of a group, M rows, D features of one matrix.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.errors import UserError
from hf_dbp.functional import (
    covariance_sums,
    decorrelation_metrics,
    decorrelation_step_,
    second_moment_sums,
    step_share,
)
from hf_dbp.layers import Decorrelation, JointDraws, RowSampling

__all__ = [
    "ETA",
    "UPDATE_INTERVAL",
    "configure_sampling",
    "discard_rows",
    "measure_decorrelation",
    "seed_sampling",
    "set_gathering",
    "update_decorrelation",
]

ETA = 5e-4  # learning rate of R, in the paper and here
UPDATE_INTERVAL = 5  # optimizer steps per update of R where nothing else is asked for; the paper has 1

GROUP_NUMBERS = 2**24  # matrix entries per batched update: 64 MiB in float32

Group = list[tuple[Tensor, Tensor, Decorrelation]]  # rows (M, D), a square matrix (D, D) of R, and whose it is
Sums = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # rows (L, M, D), R (L, D, D) -> sums (L, D, D), (L, D), (L,)


def decorrelations(module: nn.Module) -> list[tuple[str, Decorrelation]]:
    """Every `Decorrelation` with the name of the first layer that uses it. UserError if there is none."""
    found: dict[Decorrelation, str] = {}
    for name, layer in decorrelated_layers(module):
        found.setdefault(layer.decorrelation, name)
    if not found:
        raise UserError(f"{type(module).__name__} has no decorrelated layer; see convert_to_decorrelated")
    return [(name, decorrelation) for decorrelation, name in found.items()]


def configure_sampling(module: nn.Module, sampling: RowSampling) -> None:
    """Set how many rows each forward pass of every decorrelated layer below ``module`` contributes."""
    for _, decorrelation in decorrelations(module):
        decorrelation.sampling = sampling


def set_gathering(module: nn.Module, gathering: bool) -> None:
    """Choose whether forward passes in train mode gather rows (not needed in steps without an update)."""
    for _, decorrelation in decorrelations(module):
        decorrelation.gathering = gathering


def discard_rows(module: nn.Module) -> None:
    """Drop the gathered rows without an update, for example after a skipped optimizer step."""
    for _, decorrelation in decorrelations(module):
        decorrelation.rows = None


def seed_sampling(module: nn.Module, *, seed: int, step: int, rank: int = 0) -> None:
    """Make the draws of rows depend on (seed, step, rank, layer) and the draws since, so a resumed run repeats them."""
    found = [decorrelation for _, decorrelation in decorrelations(module)]
    for decorrelation in found:
        decorrelation.key = decorrelation.key.to(decorrelation.R.device)
    keys = [decorrelation.key for decorrelation in found]
    # the hash of a tuple of ints is the same in every process
    values = [hash((seed, step, rank, layer)) % 2**62 for layer in range(len(found))]
    torch._foreach_zero_(keys)
    torch._foreach_add_(keys, values)
    draws = JointDraws([key.to(keys[0].device) for key in keys])
    for position, decorrelation in enumerate(found):
        decorrelation.draws, decorrelation.position = draws, position


@torch.no_grad()
def update_decorrelation(
    module: nn.Module, *, eta: float = ETA, kappa: float = 0.0, bound: bool = True
) -> dict[str, Tensor]:
    """Update every R below ``module`` from the rows gathered since the last update, and drop the rows.

    Call it once per optimizer step, on every process.

    Args:
        module: a module with decorrelated layers that ran forward in train mode.
        eta: learning rate of R (paper: 5e-4).
        kappa: weight of the term that pulls variances to 1 (paper: 0).
        bound: keep eta inside its stable range in each layer.

    Returns:
        layer name -> the share of eta that was taken, a scalar on the device: 1 unless ``bound`` acted, 0 if the
        statistics were not finite and R did not change; the smallest of its blocks. The same on every process. Layers
        that share R appear once, under the name of the first.

    Raises:
        UserError: no rows were gathered (no forward pass in train mode, or gathering is off).
    """
    shares: dict[int, list[Tensor]] = defaultdict(list)
    for group in gathered_groups(module, keep=frozen(module)):
        R_LDD = stacked([R_DD for _, R_DD, _ in group])
        zzR_LDD, zz_LD, largest_L, count_L = reduced_sums(group, covariance_sums)
        seen_L, count_L = count_L > 0, count_L.clamp_min(1)
        share_L = step_share(zzR_LDD, largest_L if bound else None, count_L, eta=eta)
        decorrelation_step_(R_LDD, zzR_LDD, zz_LD, count_L, eta=eta, kappa=kappa, share=share_L * seen_L)
        share_L = torch.where(seen_L, share_L, 1.0)
        for (_, _, decorrelation), share in zip(group, share_L, strict=True):
            shares[id(decorrelation)].append(share)
        if len(group) > 1:
            torch._foreach_copy_([R_DD for _, R_DD, _ in group], list(R_LDD.unbind()))
    discard_rows(module)
    smallest = functools.partial(functools.reduce, torch.minimum)
    return {name: smallest(shares[id(d)]) for name, d in decorrelations(module) if id(d) in shares}


@torch.no_grad()
def measure_decorrelation(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Decorrelation loss and mean squared correlation of every layer, from the rows gathered since the last update.

    Returns:
        layer name -> (loss, mean squared correlation), scalars on the device (see `decorrelation_metrics`), in the
        layers' order, over the rows of all processes. Of a block-diagonal R they are the means over the blocks of what
        is measured within each: correlations between blocks do not count.

    Raises:
        UserError: no rows were gathered.
    """
    measured: dict[int, list[Tensor]] = defaultdict(list)
    for group in gathered_groups(module):
        zz_LDD, _, count_L = reduced_sums(group, second_moment_sums)
        metrics = zip(*decorrelation_metrics(zz_LDD / count_L.clamp_min(1)[:, None, None]), strict=True)
        seen = (count_L > 0).tolist() if is_distributed() else [True] * len(group)
        for (_, _, decorrelation), pair, rows in zip(group, metrics, seen, strict=True):
            if rows:
                measured[id(decorrelation)].append(torch.stack(pair))
    means = {key: torch.stack(pairs).mean(dim=0) for key, pairs in measured.items()}
    return {name: (means[id(d)][0], means[id(d)][1]) for name, d in decorrelations(module) if id(d) in means}


def frozen(module: nn.Module) -> set[Decorrelation]:
    """Every `Decorrelation` that serves a weight without gradients, which cannot make up for a change of R."""
    return {
        layer.decorrelation
        for _, layer in decorrelated_layers(module)
        if isinstance(weight := getattr(layer, "weight", None), Tensor) and not weight.requires_grad
    }


def gathered_groups(module: nn.Module, keep: Container[Decorrelation] = ()) -> Iterator[Group]:
    """Matrices with gathered rows, in groups of one width: the same groups in the same order on every process. With
    several processes every layer is included, even without rows, because other processes may have some. Those in
    ``keep`` are left out.
    """
    by_width: dict[object, Group] = defaultdict(list)
    found = [decorrelation for _, decorrelation in decorrelations(module)]
    for decorrelation in found:
        if decorrelation in keep:
            continue
        rows = decorrelation.rows
        if rows is None and is_distributed():
            rows = decorrelation.R.new_empty(0, decorrelation.num_features)
        for x_MD, R_DD in decorrelation.squares(rows) if rows is not None else ():
            by_width[R_DD.shape, R_DD.device].append((x_MD, R_DD, decorrelation))
    if all(decorrelation.rows is None for decorrelation in found):
        raise UserError("no rows were gathered: run a forward pass in train mode before each update of R")
    for group in by_width.values():
        R_DD = group[0][1]
        size = 1 if R_DD.is_cpu and not is_distributed() else max(1, GROUP_NUMBERS // R_DD.numel())
        for first in range(0, len(group), size):
            yield group[first : first + size]


def reduced_sums(group: Group, sums: Sums) -> tuple[Tensor, ...]:
    """The sums and the row count (L,) of each matrix, over the rows of all processes.

    Matrices whose rows have one shape share batched products; a group is reduced in one collective.
    """
    by_shape: dict[object, list[int]] = defaultdict(list)
    for i, (rows, _, _) in enumerate(group):
        by_shape[rows.shape, rows.dtype].append(i)
    device = group[0][1].device
    found: list[tuple[Tensor, ...]] = [()] * len(group)
    with torch.autocast(device.type, enabled=False), tf32_products(device):
        for members in by_shape.values():
            x_LMD = stacked([group[i][0] for i in members])
            results = sums(x_LMD, stacked([group[i][1] for i in members]))
            results = (*results, results[0].new_full((len(members),), x_LMD.shape[1]))
            for i, *parts in zip(members, *results, strict=True):
                found[i] = tuple(parts)
    if len(by_shape) > 1:
        results = tuple(map(torch.stack, zip(*found, strict=True)))
    if not is_distributed():
        return results
    flat = torch.cat([part.flatten() for part in results])
    dist.all_reduce(flat)
    pieces = torch.split(flat, [part.numel() for part in results])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, results, strict=True))


def stacked(tensors: list[Tensor]) -> Tensor:
    """Several tensors of one shape as one batched tensor; a view if there is only one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """In the update of R, float32 products on a GPU take TF32 inputs; on other devices nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
