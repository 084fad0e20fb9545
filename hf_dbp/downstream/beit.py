"""Load a ViT's weights into stock BEiT classes, which compute the same hidden states; parameter groups for training.

transformers' BEiT with absolute positions, no relative bias, no LayerScale and no drop path is a ViT. Differences:

- BEiT's keys have no bias. Leaving it out has no effect: q_i . b_k is the same for every key, and softmax ignores it.
- BEiT's encoder ends without a norm: `last_hidden_state` is the residual stream, which the heads normalise.
- BEiT's position table must be square; another shape is resampled once, bicubic, to a square of the longer side.
  Other image sizes, non-square ones included, are handled in every forward: BEiT interpolates the table, bicubic.

Shapes: D width, T patches, L layers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTModel

from hf_dbp.errors import UserError
from hf_dbp.stock_vit_mae import resampled_positions

__all__ = ["beit_fields", "beit_state", "parameter_groups", "sides"]

SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
)
#: the tensors of the encoder in a model over one: a BEiT, RF-DETR's backbone, or an EoMT; the second group is the layer
ENCODER = r"(?:\b(?:beit|backbone\.backbone)\.|^)(embeddings|(?:encoder\.layer|layers)\.(\d+))\."


def beit_fields(vit: ViTConfig) -> dict[str, Any]:
    """The fields of a `BeitConfig` that give the hidden states of a ViT with this configuration."""
    return {
        **{name: getattr(vit, name) for name in SHARED},
        "image_size": max(sides(vit.image_size)),
        "patch_size": sides(vit.patch_size)[0],
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
    }


def sides(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a config's image or patch size, which may be a single number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def beit_state(vit: ViTModel) -> dict[str, Tensor]:
    """The ViT's tensors under the names of a `BeitModel`."""
    state = {name: value for name, value in vit.state_dict().items() if not name.startswith(("pooler.", "layernorm."))}
    state = {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}
    for layer in range(vit.config.num_hidden_layers):
        for projection in ("q_proj", "v_proj"):  # a ViT may lack these biases; BEiT has them
            state.setdefault(f"layers.{layer}.attention.{projection}.bias", torch.zeros(vit.config.hidden_size))
    table = "embeddings.position_embeddings"
    height, width = (side // sides(vit.config.patch_size)[0] for side in sides(vit.config.image_size))
    state[table] = resampled_positions(state[table], (max(height, width),) * 2, (height, width))
    return state


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group the parameters of a model over an encoder (`ENCODER`), with layer-wise learning-rate decay (BEiT, MAE).

    With L layers, layer i (1..L) learns at `learning_rate * layer_decay ** (L + 1 - i)`, the embeddings as layer 0,
    neck and heads at `learning_rate`. Biases, norms, the class token and the positions get no weight decay.

    Raises:
        UserError: `layer_decay` is outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}: give a factor above 0 and at most 1 (1 is no decay)")
    found = [re.search(ENCODER, name) for name, _ in model.named_parameters()]
    layers = max(int(match[2]) + 1 for match in found if match is not None and match[2] is not None)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for match, (name, parameter) in zip(found, model.named_parameters(), strict=True):
        depth = layers + 1
        if match is not None and layer_decay < 1:
            depth = 0 if match[2] is None else int(match[2]) + 1
        fixed = ("cls_token", "position_embeddings", "position_embeddings.weight")
        decays = parameter.ndim > 1 and not name.endswith(fixed)
        group = {"params": [], "lr": learning_rate * layer_decay ** (layers + 1 - depth)}
        group["weight_decay"] = weight_decay if decays else 0.0
        groups.setdefault((depth, decays), group)["params"].append(parameter)
    return list(groups.values())
