"""The mathematics of decorrelated backpropagation (DBP) on plain tensors; the rest of the package calls it.

One layer computes (paper eq. 1 to 3)

    z = R x                decorrelated input
    y = W z + b = A x + b  with A = W R                 the same function with a small product instead of a large one

After an optimizer step (every one in the paper), R takes one plain SGD step from M sampled rows of x, without autograd
(eq. 4):

    S = z^T z / M          second moments of z, with d = diag(S)
    C = (1 - kappa) * offdiag(S) + kappa * diag(d - 1)  kappa = 0 is the paper's eq. 5, read with z (see below)
    R <- R - eta * C R

C is computed from z, not from x as printed in eq. 5: offdiag(x^T x) has zero trace and hence negative eigenvalues, so R
would grow without bound. C is a mean over rows, so eta does not depend on the batch size. In the whitening term, the
factor diag(d - 1) multiplies the rows of R.

C R = (1 - kappa) * (S R - d * R) + kappa * (d - 1) * R needs S only through S R = z^T (z R) / M, which is cheaper than
(z^T z) R when there are fewer rows than features.

A step cannot overshoot while eta times the largest eigenvalue of S is at most about 1, and diverges above 2.
`largest_eigenvalue` estimates that eigenvalue from z; `step_share` says which share of eta may be taken: 1 as long as
the product is at most `STABLE`.

R may be block-diagonal, ``R = diag(R_1, .., R_J)``, stored as (J, E, E): each block decorrelates E = D / J features
among themselves, with a J-th of the memory and of the products. ``W R`` is then ``[W_1 R_1, .., W_J R_J]`` for the
columns W_j of W, and every block takes the step above, with its own C and share, from its own columns of x.

Shapes: N tokens, M sampled tokens, D = in_features, O = out_features, L layers of one shape, K start vectors, J blocks.
A leading ``...`` may be L: layers, and blocks, of one shape are updated as one batched product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "STABLE",
    "covariance_sums",
    "decorrelated_linear",
    "decorrelation_metrics",
    "decorrelation_step_",
    "fused_weight",
    "largest_eigenvalue",
    "layer_weight",
    "sample_rows",
    "second_moment_sums",
    "step_share",
]

STABLE = 1.0  # limit of eta times the largest eigenvalue of S: a step overshoots above 1 and diverges above 2
STARTS, PRODUCTS = 4, 2  # of the power iteration that estimates the eigenvalue


def decorrelated_linear(
    x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None, R_DD: Tensor, *, naive: bool = False
) -> Tensor:
    """``y = W (R x) + b`` in the fused form ``(W R) x + b`` or, with ``naive``, literally (paper eq. 1 to 3).

    Args:
        x_ND: inputs, any number of leading dimensions.
        weight_OD: weights W.
        bias_O: bias b or None.
        R_DD: decorrelation matrix, float32 (or float64 with float64 weights), or its diagonal blocks (J, E, E).
        naive: decorrelate every token instead of the weights; for checks, and cheaper only if N < O.

    Returns:
        y_NO in the dtype that ``F.linear`` gives for x (autocast included).
    """
    if naive:
        return F.linear(decorrelated_input(x_ND, R_DD.detach().to(x_ND.dtype)), weight_OD, bias_O)
    return F.linear(x_ND, layer_weight(weight_OD, R_DD), bias_O)


def decorrelated_input(x_ND: Tensor, R_DD: Tensor) -> Tensor:
    """``z = R x`` (paper eq. 1) for R in one dtype with x, or for its diagonal blocks."""
    if R_DD.ndim == 2:
        return F.linear(x_ND, R_DD)
    x_NJE = x_ND.reshape(*x_ND.shape[:-1], *R_DD.shape[:2])
    return torch.einsum("...je,jfe->...jf", x_NJE, R_DD).flatten(-2)


def in_blocks(product: Callable[[Tensor, Tensor], Tensor], weight_OD: Tensor, R_JEE: Tensor) -> Tensor:
    """Apply ``product`` to each block of R and the columns of W that belong to it, as one batch."""
    weight_JOE = weight_OD.reshape(-1, *R_JEE.shape[:2]).transpose(0, 1)
    return product(weight_JOE, R_JEE).transpose(0, 1).flatten(1)


def layer_weight(weight_OD: Tensor, R_DD: Tensor) -> Tensor:
    """``A = W R`` (paper eq. 3) in the dtype that a layer multiplies its inputs with; differentiable in W alone.

    Under autocast it is W + W (R - I) in autocast's dtype, one product and one rounding of W and of the sum. R = I
    gives W as autocast rounds it for a plain layer, bit for bit. `fused_weight` is more exact, but its launches on a
    GPU can last longer than a small layer. R may be its diagonal blocks.
    """
    if R_DD.ndim > weight_OD.ndim:
        return in_blocks(layer_weight, weight_OD, R_DD)
    device = weight_OD.device.type
    if not torch.is_autocast_enabled(device):
        return fused_weight(weight_OD, R_DD).to(weight_OD.dtype)
    low = torch.get_autocast_dtype(device)
    low_OD = weight_OD.to(low)
    add_product = torch.addmm if R_DD.ndim == 2 else torch.baddbmm
    return add_product(low_OD, low_OD, excess(R_DD.detach(), low))  # autocast leaves what is low already as it is


def excess(R_DD: Tensor, dtype: torch.dtype) -> Tensor:
    """``R - I``, subtracted in R's dtype and then rounded, so that a small correction keeps its leading digits."""
    size, device = R_DD.shape[-1], R_DD.device
    if torch.compiler.is_compiling() or type(R_DD) is not Tensor:  # nothing traced or simulated may be kept
        eye_DD = torch.eye(size, dtype=dtype, device=device)
    else:
        eye_DD = identity(size, dtype, device)
    return (R_DD - eye_DD).to(dtype)


@functools.lru_cache(maxsize=16)
def identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity matrix, made once for each size."""
    return torch.eye(size, dtype=dtype, device=device)


def fused_weight(weight_OD: Tensor, R_DD: Tensor) -> Tensor:
    """``A = W R`` (paper eq. 3), differentiable in W alone.

    Outside autocast the product is computed in the wider dtype of W and R (float32 on a GPU follows
    ``torch.backends.cuda.matmul.allow_tf32``). Inside autocast it is W + W (R - I), where only the correction is
    rounded to the autocast dtype: R = I leaves W unchanged bit for bit, and on a fast GPU a product in strict float32
    would cost more than the layer itself. R may be its diagonal blocks.

    Returns:
        A_OD in the wider dtype of W and R.
    """
    if R_DD.ndim > weight_OD.ndim:
        return in_blocks(fused_weight, weight_OD, R_DD)
    device, R_DD = weight_OD.device.type, R_DD.detach()  # even if R was made trainable: it has its own update rule
    dtype = torch.promote_types(weight_OD.dtype, R_DD.dtype)
    if not torch.is_autocast_enabled(device):
        return weight_OD.to(dtype) @ R_DD.to(dtype)
    low = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return weight_OD.to(dtype) + (weight_OD.to(low) @ excess(R_DD, low)).to(dtype)


def covariance_sums(x_MD: Tensor, R_DD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over rows that a step of R needs; they may be added up over ranks.

    Args:
        x_MD: sampled layer inputs (..., M, D), any floating dtype.
        R_DD: decorrelation matrices (..., D, D).

    Returns:
        ``sum_m z z^T R`` (..., D, D), ``sum_m z**2`` (..., D) and the `largest_eigenvalue` of ``sum_m z z^T`` (...), in
        R's dtype. The eigenvalue over all ranks' rows is at most the sum of the ranks' eigenvalues.
    """
    z_MD = x_MD.to(R_DD.dtype) @ R_DD.mT
    rows, features = z_MD.shape[-2:]
    zzR_DD = z_MD.mT @ (z_MD @ R_DD) if rows < features else (z_MD.mT @ z_MD) @ R_DD
    return zzR_DD, z_MD.square().sum(dim=-2), largest_eigenvalue(z_MD)


def second_moment_sums(x_MD: Tensor, R_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The sums that `decorrelation_metrics` needs: ``sum_m z z^T`` (..., D, D) and ``sum_m z**2`` (..., D)."""
    z_MD = x_MD.to(R_DD.dtype) @ R_DD.mT
    return z_MD.mT @ z_MD, z_MD.square().sum(dim=-2)


def largest_eigenvalue(z_MD: Tensor) -> Tensor:
    """A lower estimate of the largest eigenvalue of ``z^T z`` (...), by a short power iteration over z (..., M, D).

    It starts from a few mixtures of the rows, keeps no state, and costs about 7 / D of an update's FLOPs. It finds an
    eigenvalue that stands out, as one that limits eta does, to a few per cent; in a flat spectrum it may miss up to
    half, which keeps the step below twice `STABLE`.
    """
    m_M1 = torch.arange(z_MD.shape[-2], device=z_MD.device, dtype=z_MD.dtype).unsqueeze(-1)
    starts = torch.arange(STARTS, device=z_MD.device, dtype=z_MD.dtype)
    u_DK = v_DK = z_MD.mT @ torch.cos(m_M1 * starts)  # the first is the sum of the rows
    tiny = torch.finfo(z_MD.dtype).tiny
    for _ in range(PRODUCTS):
        u_DK = v_DK / torch.linalg.vector_norm(v_DK, float("inf"), dim=-2, keepdim=True).clamp_min(tiny)
        v_DK = z_MD.mT @ (z_MD @ u_DK)
    norms_K, before_K = (torch.linalg.vector_norm(w_DK, dim=-2) for w_DK in (v_DK, u_DK))
    return torch.amax(norms_K / before_K.clamp_min(tiny), dim=-1)


def step_share(zzR_DD: Tensor, largest: Tensor | None, count: Tensor, *, eta: float) -> Tensor:
    """The share of eta that a step may take.

    Args:
        zzR_DD: sums of z z^T R over rows (..., D, D).
        largest: eigenvalues of the sums of z z^T (...); None for no bound.
        count: rows in the sums (...).
        eta: learning rate of R.

    Returns:
        (...): exactly 1 while ``eta * largest / count <= STABLE``, else the share that makes them equal, and 0 if the
        sums are not finite or so large (beyond 1e19) that the step might overflow.
    """
    finite = torch.linalg.vector_norm(zzR_DD, dim=(-2, -1)).isfinite()
    share = torch.ones_like(count) if largest is None else (STABLE * count / (eta * largest)).clamp_max(1.0)
    return torch.where(finite, share, 0.0).nan_to_num(nan=0.0)


def decorrelation_step_(
    R_DD: Tensor,
    zzR_DD: Tensor,
    zz_D: Tensor,
    count: Tensor,
    *,
    eta: float,
    kappa: float = 0.0,
    share: Tensor | None = None,
) -> Tensor:
    """``R <- R - eta * C R``, in place (paper eq. 4 and 5; kappa from arXiv 2405.02385).

    C R is linear in S R and R, so the step scales R's rows and adds one term:
    ``R <- (1 + eta * ((1 - kappa) * d - kappa * (d - 1))) * R - eta * (1 - kappa) * S R``.

    Args:
        R_DD: decorrelation matrices (..., D, D).
        zzR_DD: sums of z z^T R over rows (..., D, D); overwritten.
        zz_D: sums of z**2 over rows (..., D).
        count: rows in the sums, broadcastable to (...).
        eta: learning rate of R.
        kappa: 0 only decorrelates, 1 only normalises the variances to 1.
        share: share of eta (...), from `step_share`; where it is 0, R does not change by a bit, whatever the sums hold.

    Returns:
        ``R_DD``.
    """
    d_D = zz_D / count.unsqueeze(-1)
    change_D = eta * ((1.0 - kappa) * d_D - kappa * (d_D - 1.0))
    factor = eta * (1.0 - kappa) / count
    if share is not None:
        factor = factor * share
        change_D = change_D.nan_to_num(0.0, 0.0, 0.0) * share.unsqueeze(-1)
        zzR_DD.nan_to_num_(0.0, 0.0, 0.0)  # 0 times a value that is not finite is not 0
    return R_DD.mul_((1.0 + change_D).unsqueeze(-1)).addcmul_(zzR_DD, factor[..., None, None], value=-1)


def decorrelation_metrics(S_DD: Tensor) -> tuple[Tensor, Tensor]:
    """How correlated the inputs of a layer are, computed from the second moments S = z^T z / M (..., D, D).

    Returns:
        The decorrelation loss ``sum(offdiag(S)**2) / D**2`` (paper Fig. 12), and the mean squared correlation, the mean
        of ``S_ij**2 / (S_ii S_jj)`` over i != j, which does not depend on the scale. Shapes (...).
    """
    features = S_DD.shape[-1]
    d_D = S_DD.diagonal(dim1=-2, dim2=-1)
    squares_DD = S_DD.square()
    loss = (squares_DD.sum(dim=(-2, -1)) - d_D.square().sum(dim=-1)) / features**2
    scale_D = d_D.clamp_min(torch.finfo(S_DD.dtype).tiny).reciprocal()
    normalised = (squares_DD * scale_D.unsqueeze(-1) * scale_D.unsqueeze(-2)).sum(dim=(-2, -1))
    alive = (d_D > 0).sum(dim=-1)  # a feature that is always zero has no correlation
    return loss, (normalised - alive) / max(features * (features - 1), 1)


def sample_rows(num_rows: int, num_samples: int, key: Tensor) -> Tensor:
    """Indices of a stratified random sample: shift the rows by a random offset, then draw one from each equal run.

    Every row is equally likely (the offset evens out runs of unequal length), none is drawn twice, and the sample
    spreads evenly over images and positions. The draw is a hash of (key, index): the same on every device, compiled or
    not, without generator state or host synchronisation.

    Args:
        num_rows: number of rows to choose from.
        num_samples: number of rows to draw, at most ``num_rows``.
        key: int64 scalar tensor; another key gives an independent sample.

    Returns:
        int64 indices (num_samples,) on ``key``'s device.
    """
    # adding 0 makes it a value: torch.compile computes what is only an index in 32 bits on a GPU
    i_M = torch.arange(num_samples, device=key.device) + key.bitwise_and(0)
    first_M = i_M * num_rows // num_samples
    width_M = (i_M + 1) * num_rows // num_samples - first_M
    seed = mixed_bits(key)
    return (first_M + mixed_bits(seed ^ i_M) % width_M + mixed_bits(seed ^ LOW_32) % num_rows) % num_rows


LOW_32 = 0xFFFFFFFF


def mixed_bits(h: Tensor) -> Tensor:
    """Hash 64-bit integers to 32 bits. No product exceeds 63 bits: signed overflow crashes compiled C++ loops."""
    h = (h ^ (h >> 32)).bitwise_and(LOW_32)
    h = ((h ^ (h >> 16)) * 0x7FEB352D).bitwise_and(LOW_32)
    h = ((h ^ (h >> 15)) * 0x31848BAB).bitwise_and(LOW_32)
    return h ^ (h >> 16)
