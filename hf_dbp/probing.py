"""What one forward pass shows about a model's linear layers: which can be decorrelated, which share an input, the cost.

`probe` runs one batch through a model, in eval mode and without gradients, and finds, for every `nn.Linear`, patch
projection and `Conv1D`,

- its **input**: layers called on the same tensor, identified by its memory and not by a name, can share one R. Dropout
  counts as a change although it is off, because in training it makes another tensor;
- whether that input is a **block input**: the output of a normalisation, at most rearranged since (views, windows,
  dropout);
- whether it must stay **plain**, and why: its weight is tied, frozen, quantised or read by other code; it is never
  called; its tokens cannot be told from padding.

Which layers are worth decorrelating depends on three measured numbers (correlation, width, tokens in a batch). With D
the width, r2 the mean squared correlation of the input's features over M sampled tokens, O the outputs of all layers
that share the input, N the tokens of a batch and f the sampled fraction,

    excess = (D - 1) * max(r2 - 1 / M, 0)               M uncorrelated rows would show 1 / M
    gain   = excess / (1 + excess)                      share of the D directions lost to correlation
    cost   = 2 D / (3 N) + update / (6 N O D)           extra work: W R and dA R^T of 2 O D^2 each against 6 N O D
    update = 2 D^2 * (m + min(2 m, m + D)) / k, m = f N
                                                        z = R x; then z^T (z R) or (z^T z) R; at every k-th step, with
                                                        the callback's default k = `UPDATE_INTERVAL`

A group of layers is worth it if SAVING * gain >= cost, where SAVING is the smallest share of steps that decorrelation
saved in our trials (over Muon, docs/results/methods).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_dbp.conversion import replace_submodules
from hf_dbp.layers import DecorrelatedLayer, RowSampling, is_patch_projection
from hf_dbp.padding import Padding, remove_watches, watch_padding
from hf_dbp.sharing import is_conv1d, sharing_layer
from hf_dbp.update import UPDATE_INTERVAL

__all__ = ["SAVING", "LayerInput", "call", "linear_table", "linears", "probe"]

SAVING = 0.187
MOVES = {  # torch functions that rearrange numbers without changing them
    "__getitem__", "chunk", "clone", "contiguous", "dropout", "expand", "flatten", "index_select", "pad", "permute",
    "reshape", "roll", "split", "squeeze", "swapaxes", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
NORMS = {"batch_norm", "group_norm", "layer_norm", "rms_norm"}


@dataclass
class LayerInput:
    """One input, shared by one or more layers of a model.

    Attributes:
        names: names of the layers called on it, in the model's order.
        features: width D.
        outputs: outputs O of all these layers together.
        tokens: rows N of a batch, over all calls.
        calls: number of calls in one forward pass.
        block_input: whether it comes from a normalisation.
        plain: why these layers cannot be decorrelated; empty if they can.
        correlation: mean squared correlation of its features; None if not measured.
        rows: number M of tokens used to measure the correlation.
    """

    names: list[str]
    features: int
    outputs: int
    tokens: int = 0
    calls: int = 0
    block_input: bool = False
    plain: str = ""
    correlation: float | None = None
    rows: int = 0

    @property
    def gain(self) -> float:
        """The share of the input's directions lost to correlation, in [0, 1)."""
        if self.correlation is None or not self.rows:
            return 0.0
        excess = (self.features - 1) * max(self.correlation - 1 / self.rows, 0.0)
        return excess / (1 + excess)

    def cost(self, fraction: float = RowSampling.fraction) -> float:
        """Extra work of a training step as a share of these layers' own (forward and backward, 6 N O D)."""
        sampled = fraction * self.tokens
        update = 2 * self.features**2 * (sampled + min(2 * sampled, sampled + self.features)) / UPDATE_INTERVAL
        plain = 6 * self.tokens * self.outputs * self.features
        return 2 * self.features / (3 * self.tokens) + update / plain if self.tokens else float("inf")

    def pays(self, fraction: float = RowSampling.fraction) -> bool:
        """Whether the expected gain outweighs the cost."""
        return SAVING * self.gain >= self.cost(fraction)


def linears(model: nn.Module) -> dict[nn.Module, str]:
    """Every layer that is, or looks, linear, with its first name."""
    kinds = nn.Linear | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention
    return {
        layer: name
        for name, layer in model.named_modules()
        if not isinstance(layer, DecorrelatedLayer)
        and (isinstance(layer, kinds) or is_conv1d(layer) or "Linear" in type(layer).__name__)
    }


def reason_to_stay_plain(layer: nn.Module, owners: Mapping[int, list[str]], name: str) -> str:
    """Why a layer cannot be decorrelated, as far as can be seen without a forward pass; empty if it can."""
    kind = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention):
        return "nn.MultiheadAttention keeps q, k and v in one parameter and calls no linear layer"
    if isinstance(layer, nn.Conv3d):
        return "a convolution in three dimensions"
    if not (type(layer) in (nn.Linear, nn.Conv2d) or is_conv1d(layer)):
        return f"{kind} is not a plain nn.Linear: it may compute something else, as quantised layers do"
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is {type(weight).__name__} of {weight.dtype}, quantised or computed from other parameters"
    if isinstance(layer, nn.Conv2d) and (not is_patch_projection(layer)):
        return "a convolution whose windows overlap, have gaps, are padded or split by channel"
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"its weight is that of {others[0]} too, which W R would change"
    if not weight.requires_grad:
        return "its weight is frozen: nothing would learn to make up for a change of R"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or "forward" in vars(layer):
        return "it has hooks or a forward of its own, which would be lost"
    return ""


def call(model: nn.Module, batch: Any) -> Any:
    """Call any model on a batch of any form: a mapping of keyword arguments, a tuple or list of arguments, or one
    argument."""
    device = next(iter(model.parameters()), torch.empty(0)).device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return model(*map(moved, batch))
    return model(moved(batch))


class Trace(TorchFunctionMode):
    """Follows one forward pass: each layer's input tensor, what comes from a normalisation, which code reads
    weights."""

    def __init__(self, layers: Mapping[nn.Module, str], padding: Padding | None) -> None:
        super().__init__()
        self.padding = padding
        self.identities: dict[nn.Module, list[Any]] = {layer: [] for layer in layers}
        self.inputs: dict[nn.Module, list[Tensor]] = {
            layer: [] for layer in layers
        }  # kept alive so that memory is not reused
        self.tokens: dict[nn.Module, int] = dict.fromkeys(layers, 0)
        self.weights = {id(layer.weight): layer for layer in layers if isinstance(layer.weight, Tensor)}
        self.refused: dict[nn.Module, str] = {}
        self.running: list[nn.Module] = []
        self.normalised: dict[int, Tensor] = {}

    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(layer)
        if not args:
            self.refused[layer] = "it is called with a keyword for its input"
            return
        x = args[0]
        patches = isinstance(layer, nn.Conv2d)  # not shared with other layers
        if not patches and self.padding is not None:
            known, tokens = self.padding.tokens(x)
            if not known:
                self.refused[layer] = (
                    "its input has another shape than the attention mask: tokens and padding look alike"
                )
            elif tokens is not None and not len(tokens) and x.numel():
                self.refused[layer] = "its mask calls every row of its input padding"
        self.inputs[layer].append(x)
        memory = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        self.identities[layer].append(memory if x.numel() and not patches else id(layer))  # no tokens, no memory

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.running.pop()
        self.tokens[layer] += output.numel() // outputs_of(layer)

    def normalise(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.normalised[id(output)] = output

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        given = [*args, *(kwargs or {}).values()]
        tensors = [one for value in given for one in (value if isinstance(value, list | tuple) else (value,))]
        result = function(*args, **(kwargs or {}))
        for one in tensors:
            layer = self.weights.get(id(one)) if isinstance(one, nn.Parameter) else None
            attribute = name == "__get__" and not isinstance(result, Tensor)  # a shape or dtype, unlike .T or .data
            if layer is not None and layer not in self.running and not attribute:
                self.refused[layer] = "other code reads its weight without calling it, and would take W for W R"
        if name == "dropout" and (kwargs or {}).get("p", tensors[1:2]) not in (0.0, [0.0]):
            result = result.clone()  # in training it would be another tensor
        if name in NORMS or (name in MOVES and tensors and id(tensors[0]) in self.normalised):
            for one in result if isinstance(result, list | tuple) else (result,):
                self.normalised[id(one)] = one
        return result


def outputs_of(layer: nn.Module) -> int:
    """The number of outputs O of a linear-like layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1] if is_conv1d(layer) else weight.shape[0]


def features_of(layer: nn.Module) -> int:
    """The number of input features D of a linear-like layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[0] if is_conv1d(layer) else weight[0].numel()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of the probed model in eval mode inside the block, and restore its mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def probe(model: nn.Module, batch: Any) -> list[LayerInput]:
    """The inputs of the linear layers of ``model``, found by one forward pass on ``batch``; the same on all processes.
    The model does not change, and no random number is drawn.
    """
    layers = linears(model)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = {layer: reason_to_stay_plain(layer, owners, name) for layer, name in layers.items()}
    fit = {layer: name for layer, name in layers.items() if not reasons[layer]}
    trace = Trace(fit, watch_padding(model))
    with ExitStack() as stack:
        stack.callback(remove_watches, model, trace.padding)
        stack.enter_context(evaluating(model))
        for layer in fit:
            stack.enter_context(removed(layer.register_forward_pre_hook(trace.enter)))
            stack.enter_context(removed(layer.register_forward_hook(trace.leave)))
        for module in model.modules():
            if "Norm" in type(module).__name__:
                stack.enter_context(removed(module.register_forward_hook(trace.normalise)))
        stack.enter_context(kept_random_state(model))
        with trace:
            call(model, batch)
    called = {layer: len(inputs) for layer, inputs in trace.inputs.items() if inputs and layer not in trace.refused}
    trace.refused |= dict.fromkeys(
        held_elsewhere(model, batch, called),
        "code also holds it outside its module's attributes, for example in a list, and would go on calling it",
    )
    groups: dict[Any, LayerInput] = {}
    for layer, name in layers.items():
        reason = reasons[layer] or trace.refused.get(layer, "")
        if not reason and not trace.inputs[layer]:
            reason = "the batch's forward never calls it"
        features, outputs = (0, 0) if reasons[layer] else (features_of(layer), outputs_of(layer))
        if reason:
            groups[name] = LayerInput([name], features, outputs, plain=reason)
            continue
        inputs = trace.inputs[layer]
        found = groups.setdefault(
            (*trace.identities[layer], features),
            LayerInput(
                [], features, 0, trace.tokens[layer], len(inputs), all(id(x) in trace.normalised for x in inputs)
            ),
        )
        found.names.append(name)
        found.outputs += outputs
    return agreed(list(groups.values()))


def held_elsewhere(model: nn.Module, batch: Any, called: Mapping[nn.Module, int]) -> list[nn.Module]:
    """The layers that ``model`` no longer calls as often once others stand in their places."""
    stand_ins = {layer: sharing_layer(layer) for layer in called}
    counts = dict.fromkeys(called, 0)

    def count(layer: nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[layer] += 1

        return hook

    for layer, stand_in in stand_ins.items():
        stand_in.register_forward_pre_hook(count(layer))
    replace_submodules(model, stand_ins)
    try:
        with evaluating(model), kept_random_state(model):
            call(model, batch)
    finally:
        replace_submodules(model, {stand_in: layer for layer, stand_in in stand_ins.items()})
    return [layer for layer, times in called.items() if counts[layer] != times]


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Let the block draw the random numbers that it would draw anyway, and then restore torch's state."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def agreed(found: list[LayerInput]) -> list[LayerInput]:
    """One list of layer inputs for all processes: the first one's, plus layers that only others called, such as
    experts."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return found
    everyone: list[list[LayerInput]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    places: dict[tuple[int, int], list[str]] = {}
    for name in [name for one in everyone[0] for name in one.names]:
        at = [(rank, i) for rank, inputs in enumerate(everyone) for i, one in enumerate(inputs) if name in one.names]
        place = next(((rank, i) for rank, i in at if not everyone[rank][i].plain), at[0])
        places.setdefault(place, []).append(name)
    return [replace(everyone[rank][i], names=names) for (rank, i), names in places.items()]


def linear_table(inputs: list[LayerInput], chosen: set[str]) -> str:
    """A Markdown table of what is decorrelated and what is not: one row per input, so layers that share R share a
    row."""
    header = ["layers", "D", "O", "tokens", "correlation", "gain", "cost", "decorrelated"]
    rows = [header, ["---"] * len(header)]
    for one in inputs:
        measured = one.correlation is not None
        some = [name for name in one.names if name in chosen]
        verdict = "no" + (f": {one.plain}" if one.plain else "")
        if some:
            verdict = "yes" if some == one.names else f"only {', '.join(some)}"
        rows.append([
            ", ".join(one.names), str(one.features or ""), str(one.outputs or ""), str(one.tokens or ""),
            f"{one.correlation:.4f}" if measured else "", f"{one.gain:.2f}" if measured else "",
            f"{one.cost():.3f}" if one.tokens else "", verdict,
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
