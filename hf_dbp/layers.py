"""Layers that decorrelate their input: y = W (R x) + b.

- `Decorrelation` holds R and keeps a sample of the rows it sees; an update works on it.
- `DecorrelatedLinear` is an `nn.Linear` and `DecorrelatedPatchProjection` an `nn.Conv2d` (stride = kernel size) with a
  `decorrelation`; both adopt the plain layer's parameters under the same names, and `fuse()` turns them back into it.

A forward pass in train mode gathers rows; `hf_dbp.update_decorrelation` uses and drops them. R is a Parameter with
``requires_grad=False``: it is saved, moved and sharded like any other, but no optimizer updates it, no weight decay
shrinks it, and DDP neither broadcasts nor reduces it (buffers are broadcast before every forward).

R of a `DecorrelatedLinear` may be block-diagonal, with J blocks (see `hf_dbp.functional`).

Shapes: N tokens, M sampled tokens, D = in_features, O = out_features; images are B x C x H x W, patches are p x p.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dbp.errors import UserError
from hf_dbp.functional import decorrelated_linear, fused_weight, layer_weight, sample_rows
from hf_dbp.padding import Padding

__all__ = [
    "DecorrelatedLayer",
    "DecorrelatedLinear",
    "DecorrelatedPatchProjection",
    "Decorrelation",
    "Fusable",
    "RowSampling",
    "is_patch_projection",
]


@dataclass(frozen=True)
class RowSampling:
    """How many of a layer's rows one optimizer step uses to estimate C.

    Args:
        fraction: share of all token rows, in (0, 1]; the paper's subsample is 0.1.
        floor: use at least ``floor * D`` rows if the batch has them; None for no floor.
        cap: use at most ``cap * D`` rows; None for no cap.
        shares: number of forward passes that contribute to one step (micro-batches x processes); floor and cap are
            split among them.

    Raises:
        UserError: a value outside its range, or a floor above the cap.
    """

    fraction: float = 0.1
    floor: float | None = None
    cap: float | None = None
    shares: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise UserError(f"the sample fraction must lie in (0, 1], got {self.fraction}; the paper uses 0.1")
        for name, value in (("floor", self.floor), ("cap", self.cap)):
            if value is not None and value <= 0:
                raise UserError(f"the row {name} is a positive multiple of the layer's in_features, got {value}")
        if self.shares < 1:
            raise UserError(f"shares counts the forward passes of one optimizer step, at least 1; got {self.shares}")
        if self.floor is not None and self.cap is not None and self.floor > self.cap:
            raise UserError(f"the row floor ({self.floor}) must not exceed the row cap ({self.cap})")

    def num_samples(self, num_rows: int, num_features: int) -> int:
        """The number of rows to draw from one forward pass with ``num_rows`` rows of ``num_features`` features."""
        count = round(self.fraction * num_rows)
        if self.floor is not None:
            count = max(count, -int(-self.floor * num_features // self.shares))
        if self.cap is not None:
            count = min(count, int(self.cap * num_features) // self.shares)
        return min(max(count, 1), num_rows)


class JointDraws:
    """The rows that all layers of a model draw in one step, computed for all of them at once.

    The hash of one draw is about fifty small operations. Launched for every layer, they take longer on a GPU than the
    forward pass of a small model. When a second layer asks for a sample of the same size, the samples of all are drawn.

    Args:
        keys: the layers' keys (`sample_rows`); draw k of layer l has the key ``keys[l] + k``.
    """

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys_L = torch.stack(keys)
        self.counts = [0] * len(keys)  # draws of each layer so far
        self.latest = 0
        self.asked: set[tuple[int, int, int]] = set()
        self.known: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, position: int, num_rows: int, num_samples: int) -> Tensor:
        """Indices (M,) of the next draw of the layer at ``position``."""
        draw = self.counts[position]
        self.counts[position] += 1
        if draw > self.latest:  # a loop that seeds only once draws on and on
            self.latest, self.asked, self.known = draw, set(), {}
        what = (num_rows, num_samples, draw)
        if what in self.asked and what not in self.known:
            self.known[what] = torch.vmap(lambda key: sample_rows(num_rows, num_samples, key))(self.keys_L + draw)
        self.asked.add(what)
        if what in self.known:
            return self.known[what][position]
        return sample_rows(num_rows, num_samples, self.keys_L[position] + draw)


class Decorrelation(nn.Module):
    """The decorrelation matrix R of one layer input, and the rows sampled from it for the next update of R.

    Attributes:
        R: Parameter (D, D), float32, initially the identity, never changed by autograd or an optimizer; (J, D/J, D/J)
            if it is block-diagonal.
        sampling: how many rows each forward pass contributes.
        gathering: whether forward passes in train mode gather rows (switched by an update schedule).
        rows: (M, D) rows gathered since the last update, or None.
        padding: tells which rows are tokens if the model is given masks; None counts every row.
        name: name of the layer, for warnings.
        key: int64 scalar tensor that decides which rows are drawn next; `hf_dbp.seed_sampling` sets it, each draw adds
            1.
        draws: the draws of all layers seeded together, in place of ``key`` where nothing is compiled.
        position: this layer's place among them.
    """

    R: nn.Parameter

    def __init__(self, num_features: int, device: torch.device | None = None, *, blocks: int = 1) -> None:
        super().__init__()
        if blocks < 1 or num_features % blocks:
            raise UserError(f"blocks is {blocks}; expected a divisor of the number of input features, {num_features}")
        width = num_features // blocks
        shape = (width, width) if blocks == 1 else (blocks, width, width)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # never lower: its updates are small
        self.R = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        self.sampling = RowSampling()
        self.gathering = True
        self.rows: Tensor | None = None
        self.padding: Padding | None = None
        self.name = ""
        self.key = torch.zeros((), dtype=torch.int64, device="cpu")  # not on the meta device, even if R still is
        self.draws: JointDraws | None = None
        self.position = 0
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        return self.R.numel() // self.R.shape[-1]

    def reset_parameters(self) -> None:
        """Set R to the identity, which makes the layer equal to the plain layer."""
        with torch.no_grad():
            self.R.copy_(torch.eye(self.R.shape[-1], device=self.R.device).expand_as(self.R))

    def is_identity(self) -> bool:
        """Whether R is the identity, as it is before the first update."""
        return torch.equal(self.R, torch.eye(self.R.shape[-1], device=self.R.device).to(self.R).expand_as(self.R))

    def squares(self, x_MD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of columns of the rows and the square matrix that decorrelates them: one, J for a block-diagonal R."""
        R_JEE = self.R.view(-1, *self.R.shape[-2:])
        return zip(x_MD.chunk(len(R_JEE), dim=-1), R_JEE.unbind(), strict=True)

    def wants_rows(self) -> bool:
        """Whether this forward pass contributes rows. Its recomputation under gradient checkpointing, in the backward
        pass, does not."""
        if not (self.training and self.gathering):
            return False
        # The check of torch.utils.module_tracker; torch.compile does not trace the recomputation through this code.
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def choose_rows(self, num_rows: int) -> Tensor | None:
        """Indices (M,) of the rows that this forward pass contributes, or None for all of them."""
        num_samples = self.sampling.num_samples(num_rows, self.num_features)
        if num_samples == num_rows:
            return None
        if self.draws is not None and not torch.compiler.is_compiling():
            return self.draws.rows(self.position, num_rows, num_samples).to(self.R.device)
        key = self.key.to(self.R.device)
        self.key = key + 1  # other rows for the next micro-batch
        return sample_rows(num_rows, num_samples, key)

    def keep(self, x_MD: Tensor) -> None:
        """Add rows (M, D) to those that the next update uses."""
        self.rows = x_MD if self.rows is None else torch.cat([self.rows, x_MD])

    def gather(self, x: Tensor) -> None:
        """Keep a sample of the rows of ``x`` (..., D) if this forward pass contributes any."""
        if not self.wants_rows():
            return
        known, tokens = (True, None) if self.padding is None else self.padding.tokens(x)
        if not known and self.padding is not None:
            self.padding.warn(self.name)
            return
        x_ND = x.detach().reshape(-1, x.shape[-1])
        count = len(x_ND) if tokens is None else len(tokens)
        if not count:
            return
        rows_M = self.choose_rows(count)
        if tokens is not None:
            rows_M = tokens if rows_M is None else tokens[rows_M]
        self.keep(x_ND if rows_M is None else x_ND.index_select(0, rows_M))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decorrelation:
        """Move R with the model, but never cast it below float32, where its small updates would be lost."""

        def move(tensor: Tensor) -> Tensor:
            target = fn(tensor[:0])
            return tensor.to(target.device) if target.dtype.itemsize < 4 else fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self.key = self.key.to(self.R.device)
        self.rows = None if self.rows is None else self.rows.to(self.R.device)
        return self

    def extra_repr(self) -> str:
        return f"R={'x'.join(map(str, self.R.shape))}"


class Fusable(ABC):
    """A module that can be turned into a plain one."""

    @abstractmethod
    def fuse(self) -> nn.Module:
        """The plain module with W R in place of (W, R), computed in float64. UserError if it is not finite."""


class DecorrelatedLayer(Fusable):
    """A module with a `decorrelation`, whose R serves all its weights."""

    decorrelation: Decorrelation


def fuse_parameter(weight: Tensor, R_DD: Tensor) -> nn.Parameter:
    """W R for a weight (O, ...) whose flattened rows have D entries, computed in float64, in the weight's dtype."""
    fused = fused_weight(weight.detach().flatten(1).double(), R_DD.detach().double())
    fused = fused.to(weight.dtype).view_as(weight)
    if not torch.isfinite(fused).all():
        raise UserError("the fused weight W R has non-finite values; go back to a checkpoint before they appeared")
    return nn.Parameter(fused, requires_grad=weight.requires_grad)


def fuse_linear(linear: nn.Linear, R_DD: Tensor) -> nn.Linear:
    """A plain linear layer with weight W R and ``linear``'s bias."""
    with torch.device("meta"):
        fused = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    fused.weight, fused.bias = fuse_parameter(linear.weight, R_DD), linear.bias
    return fused.train(linear.training)


class DecorrelatedLinear(nn.Linear, DecorrelatedLayer):
    """`nn.Linear` on a decorrelated input: y = W (R x) + b, weight (O, D), bias (O), x (..., D).

    Create one with `from_linear`.
    """

    def __init__(self, *args: object, naive: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.naive = naive
        self.decorrelation = Decorrelation(self.in_features, device=self.weight.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, naive: bool = False, blocks: int = 1) -> DecorrelatedLinear:
        """The same layer with R = I, block-diagonal with so many blocks; it adopts ``linear``'s Parameters without
        copying them. UserError unless ``blocks`` divides its in_features."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, naive=naive)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.decorrelation = Decorrelation(linear.in_features, device=linear.weight.device, blocks=blocks)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        self.decorrelation.gather(x)
        return decorrelated_linear(x, self.weight, self.bias, self.decorrelation.R, naive=self.naive)

    def fuse(self) -> nn.Linear:
        return fuse_linear(self, self.decorrelation.R)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", form=naive" if self.naive else "")


def is_patch_projection(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer on patches that neither overlap nor leave gaps."""
    dilated = any(gap > 1 and size > 1 for gap, size in zip(conv.dilation, conv.kernel_size, strict=True))
    unpadded = conv.padding in ((0, 0), "valid")
    return conv.stride == conv.kernel_size and conv.groups == 1 and unpadded and not dilated


class DecorrelatedPatchProjection(nn.Conv2d, DecorrelatedLayer):
    """A patch projection, `nn.Conv2d` with stride = kernel size, on decorrelated patches.

    It is a linear layer on flattened patches: D = C * p * p, in the (channel, row, column) order of the kernel. Pixels
    (B, C, H, W) -> (B, O, H / p, W / p). Create one with `from_conv`.
    """

    decorrelation: Decorrelation
    naive: bool

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, naive: bool = False) -> DecorrelatedPatchProjection:
        """The same layer with R = I; it adopts ``conv``'s Parameters. UserError unless it is a patch projection."""
        if not is_patch_projection(conv):
            raise UserError(
                f"only a convolution with stride = kernel size and no padding or dilation is a linear layer: {conv}"
            )
        with torch.device("meta"):
            layer = cls(
                conv.in_channels,
                conv.out_channels,
                kernel_size=conv.kernel_size,  # type: ignore[arg-type]
                stride=conv.stride,  # type: ignore[arg-type]
                bias=conv.bias is not None,
            )
        layer.weight, layer.bias, layer.naive = conv.weight, conv.bias, naive
        layer.decorrelation = Decorrelation(conv.weight[0].numel(), device=conv.weight.device)
        return layer.train(conv.training)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        R_DD = self.decorrelation.R
        if self.decorrelation.wants_rows():
            self.gather_patches(pixels_BCHW.detach())
        if self.naive:
            kernel = R_DD.detach().to(pixels_BCHW.dtype).view(-1, *self.weight.shape[1:])
            z_BDhw = F.conv2d(pixels_BCHW, kernel, stride=self.stride)
            return F.conv2d(z_BDhw, self.weight.flatten(1)[:, :, None, None], self.bias)
        A_OD = layer_weight(self.weight.flatten(1), R_DD)
        return F.conv2d(pixels_BCHW, A_OD.view_as(self.weight), self.bias, stride=self.stride)

    def gather_patches(self, pixels_BCHW: Tensor) -> None:
        """Keep a sample of the patches; only sampled patches are copied out of the image."""
        if pixels_BCHW.ndim == 3:  # one image without a batch
            pixels_BCHW = pixels_BCHW.unsqueeze(0)
        batch, channels, height, width = pixels_BCHW.shape
        p, q = self.weight.shape[2:]
        h, w = height // p, width // q
        pixels = pixels_BCHW[..., : h * p, : w * q].reshape(batch, channels, h, p, w, q)
        patches = pixels.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, q), a view
        rows_M = self.decorrelation.choose_rows(batch * h * w)
        if rows_M is not None:
            patches = patches[rows_M // (h * w), rows_M // w % h, rows_M % w]
        self.decorrelation.keep(patches.reshape(-1, self.decorrelation.num_features))

    def fuse(self) -> nn.Conv2d:
        with torch.device("meta"):
            conv = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                kernel_size=self.kernel_size,  # type: ignore[arg-type]
                stride=self.stride,  # type: ignore[arg-type]
                bias=self.bias is not None,
            )
        conv.weight, conv.bias = fuse_parameter(self.weight, self.decorrelation.R), self.bias
        return conv.train(self.training)
