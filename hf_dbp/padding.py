"""Tell which rows of a layer's input are tokens and which are padding, in any model that takes a mask.

What a transformer computes for the padding of a short sequence is meaningless and must not enter C. `watch_padding`
puts a hook on every module whose forward takes a mask. While such a module runs, `Padding` knows its mask, and
`Padding.tokens` finds the rows of a layer's input x that count, from the innermost module outwards:

1. x is the ``encoder_hidden_states`` that came with an ``encoder_attention_mask``: the mask decides;
2. a mask (B, T) fits x (B, T, D) or (B * T, D): the mask decides;
3. x has one row per sequence (B, D), like a pooler's input: every row counts;
4. the innermost module that takes a mask was given none, like the vision part beside a text part, or a decoder
   without a mask of its own: every row counts, whatever its length;
5. otherwise tokens cannot be told from padding: no row counts, and one warning names the layer.

A mask of two dimensions may hold 1 for tokens, or be one that a model adds to attention scores. Masks of more
dimensions, which a model derives from its mask, add nothing and are ignored; under one that the user passes, no row can
be told from padding.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Padding", "remove_watches", "watch_padding"]

logger = logging.getLogger(__name__)

TOKENS = ("attention_mask", "encoder_attention_mask")  # transformers' convention: 1, or True, is a token
PADDED = (
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
)  # torch's convention: True, or -inf, is padding


class Mask:
    """One mask: which tokens count (B, T), or None if none was given, and the tensor they belong to, if known."""

    def __init__(self, keep_BT: Tensor | None, owner: Tensor | None = None) -> None:
        self.keep_BT = keep_BT
        self.owner = owner
        self.found: Tensor | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether x (B, T, D) or (B * T, D) has a row for every entry."""
        if self.keep_BT is None or (self.owner is not None and self.owner is not x):
            return False
        return x.shape[:2] == self.keep_BT.shape if x.ndim > 2 else len(x) == self.keep_BT.numel()

    @property
    def indices(self) -> Tensor:
        """Indices of the tokens among the B * T rows; waits for the device, once."""
        assert self.keep_BT is not None
        if self.found is None:
            self.found = self.keep_BT.flatten().nonzero().squeeze(-1)
        return self.found


class Padding:
    """The masks of the modules that are currently running, innermost last."""

    def __init__(self) -> None:
        self.masks: list[Mask] = []
        self.named: set[str] = set()

    def tokens(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the rows of x (..., D) can be told from padding, and which of them count; None for all."""
        if not self.masks:
            return True, None
        for mask in [mask for mask in self.masks if mask.owner is x] + self.masks[::-1]:
            if mask.fits(x):
                return True, mask.indices
            if mask.keep_BT is None and mask.owner is None:
                break
        one_each = x.ndim == 2 and any(mask.keep_BT is not None and len(mask.keep_BT) == len(x) for mask in self.masks)
        return one_each or self.masks[-1].keep_BT is None, None

    def warn(self, layer: str) -> None:
        """Warn, once per layer, that its tokens cannot be told from padding."""
        if layer not in self.named:
            self.named.add(layer)
            logger.warning(
                "The shape of %s's input does not match the attention mask, so its tokens cannot be told from "
                "padding: while a mask is given, no rows are gathered there and its R does not change", layer,
            )  # fmt: skip


def is_token(mask_BT: Tensor) -> Tensor:
    """Which entries of an ``attention_mask`` are tokens: those that are not 0, or, if it is a mask that some models add
    to attention scores (0 for a token, below 0 for padding), those that are not below 0."""
    if not mask_BT.is_floating_point():
        return mask_BT != 0
    added = (mask_BT.min() < 0) | (mask_BT.max() <= 0)
    return torch.where(added, mask_BT >= 0, mask_BT != 0)


class Watch:
    """A pair of hooks that register a module's masks with `Padding` while its forward runs."""

    def __init__(self, module: nn.Module, padding: Padding, places: dict[str, int], *, root: bool) -> None:
        self.padding = padding
        self.root = root  # whether it is the whole model, whose masks come from the user
        self.places = places
        self.lengths: list[int] = []
        heads = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
        self.batch_first = all(part.batch_first for part in heads)

    def given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.root:
            self.padding.masks.clear()  # an interrupted forward leaves its own
            self.lengths.clear()
        self.lengths.append(len(self.padding.masks))
        given = False  # whether this module was given a mask for its own tokens
        for name in TOKENS + PADDED:
            if name not in self.places:
                continue
            mask, owner = self.given(name, args, kwargs), None
            if name == "encoder_attention_mask":
                owner = self.given("encoder_hidden_states", args, kwargs)
                if owner is None:
                    continue
            given |= mask is not None and owner is None
            if mask is None:
                if owner is not None:
                    self.padding.masks.append(Mask(None, owner))
            elif isinstance(mask, Tensor) and mask.ndim == 2:
                keep = is_token(mask) if name in TOKENS else mask == 0
                self.padding.masks.append(Mask(keep if name in TOKENS or self.batch_first else keep.T, owner))
            elif self.root and isinstance(mask, Tensor):
                self.padding.masks.append(Mask(mask.new_zeros(0, 0), owner))  # fits nothing
        if not given and self.places.keys() & {*TOKENS[:1], *PADDED}:
            self.padding.masks.append(Mask(None))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.lengths:  # empty if an earlier hook of the module failed
            del self.padding.masks[self.lengths.pop() :]


def watch_padding(model: nn.Module) -> Padding | None:
    """Watch the masks given to ``model`` and its parts; None if no part takes one."""
    padding, watched = Padding(), False
    for module in model.modules():
        names = list(inspect.signature(module.forward).parameters)
        places = {name: place for place, name in enumerate(names)}
        if not places.keys() & {*TOKENS, *PADDED}:
            continue
        watch, watched = Watch(module, padding, places, root=module is model), True
        module.register_forward_pre_hook(watch.enter, with_kwargs=True)
        module.register_forward_hook(watch.leave, always_call=True)
    return padding if watched else None


def remove_watches(model: nn.Module, padding: Padding | None = None) -> None:
    """Remove the hooks that serve ``padding``; by default, all."""

    def ours(hook: Any) -> bool:
        watch = getattr(hook, "__self__", None)
        return isinstance(watch, Watch) and padding in (None, watch.padding)

    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if ours(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
